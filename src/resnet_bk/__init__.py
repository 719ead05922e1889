"""ResNet-BK: language models that spend compute where the text is hard.

Importing this package is cheap: torch is imported when a name below is first used, transformers never by us alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from resnet_bk.config import ConfigError, ModelConfig
    from resnet_bk.model import LanguageModel, ModelOutput

__version__ = "0.1.0"

_HOME = {
    "ConfigError": "resnet_bk.config",
    "LanguageModel": "resnet_bk.model",
    "ModelConfig": "resnet_bk.config",
    "ModelOutput": "resnet_bk.model",
}
__all__ = ["ConfigError", "LanguageModel", "ModelConfig", "ModelOutput", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def _register_with_transformers(_module: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM

    AutoConfig.register(ResNetBKConfig.model_type, ResNetBKConfig, exist_ok=True)
    AutoModelForCausalLM.register(ResNetBKConfig, ResNetBKForCausalLM, exist_ok=True)


register_post_import_hook(_register_with_transformers, "transformers.models.auto.modeling_auto")
