"""Adapter to Hugging Face transformers: configuration, model, cache and tokenizer.

The classes register with transformers' Auto classes: after ``import resnet_bk`` where wrapt is installed, else after
``import resnet_bk.hf``. The names below are loaded on first use, because the configuration must be registered while
transformers' models cannot be imported yet.
"""

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

from resnet_bk.extras import extra

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from resnet_bk.hf.configuration import ResNetBKConfig
    from resnet_bk.hf.modeling import RecurrentCache, ResNetBKForCausalLM, on_device
    from resnet_bk.hf.tokenizer import byte_tokenizer, load_tokenizer, token_file

_HOME = {
    "RecurrentCache": "modeling",
    "ResNetBKConfig": "configuration",
    "ResNetBKForCausalLM": "modeling",
    "Tokenizer": "tokenizer",
    "byte_tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
    "on_device": "modeling",
    "token_file": "tokenizer",
}
__all__ = [
    "RecurrentCache",
    "ResNetBKConfig",
    "ResNetBKForCausalLM",
    "Tokenizer",
    "byte_tokenizer",
    "load_tokenizer",
    "on_device",
    "quiet_transformers",
    "token_file",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extra("hf"):
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def register_config(auto: Any) -> None:
    """Register the configuration with AutoConfig. auto: transformers' module `configuration_auto`."""
    from resnet_bk.hf.configuration import ResNetBKConfig

    auto.AutoConfig.register(ResNetBKConfig.model_type, ResNetBKConfig, exist_ok=True)


def register_model(auto: Any) -> None:
    """Register the model with AutoModelForCausalLM. auto: transformers' module `modeling_auto`."""
    from resnet_bk.hf.configuration import ResNetBKConfig
    from resnet_bk.hf.modeling import ResNetBKForCausalLM

    auto.AutoModelForCausalLM.register(ResNetBKConfig, ResNetBKForCausalLM, exist_ok=True)


def quiet_transformers() -> None:
    """Silence transformers' log messages and progress bars: the commands report progress themselves."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


if importlib.util.find_spec("wrapt") is None:  # resnet_bk could not register hooks
    with extra("hf"):
        from transformers.models.auto import configuration_auto, modeling_auto
    register_config(configuration_auto)
    register_model(modeling_auto)
