"""Adapter to Hugging Face transformers: configuration, model, cache and tokenizer.

The classes register with transformers' Auto classes: after ``import resnet_bk`` where wrapt is installed, else after
``import resnet_bk.hf``. The names below are loaded on first use, because the configuration must be registered while
transformers' models cannot be imported yet.
"""

import importlib
import importlib.util
import os
import warnings
from typing import TYPE_CHECKING, Any

from resnet_bk.extras import MissingExtraError, extra

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from resnet_bk.hf.configuration import ResNetBKConfig
    from resnet_bk.hf.modeling import ResNetBKForCausalLM, ResNetBKModel, on_device
    from resnet_bk.hf.outputs import RecurrentCache
    from resnet_bk.hf.tokenizer import byte_tokenizer, load_tokenizer, text_ids, token_file

_NAMES = {
    "configuration": ("ResNetBKConfig",),
    "modeling": ("ResNetBKForCausalLM", "ResNetBKModel", "on_device"),
    "outputs": ("RecurrentCache",),
    "tokenizer": ("Tokenizer", "byte_tokenizer", "load_tokenizer", "text_ids", "token_file"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [
    "RecurrentCache",
    "ResNetBKConfig",
    "ResNetBKForCausalLM",
    "ResNetBKModel",
    "Tokenizer",
    "byte_tokenizer",
    "load_tokenizer",
    "on_device",
    "quiet_transformers",
    "text_ids",
    "token_file",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with extra("hf"):
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def register_config(auto: Any) -> None:
    """Register the configuration with AutoConfig. auto: transformers' module `configuration_auto`."""
    if config := _optional("ResNetBKConfig"):
        auto.AutoConfig.register(config.model_type, config, exist_ok=True)


def register_model(auto: Any) -> None:
    """Register the model with AutoModelForCausalLM. auto: transformers' module `modeling_auto`."""
    if model := _optional("ResNetBKForCausalLM"):
        auto.AutoModelForCausalLM.register(model.config_class, model, exist_ok=True)
        # Trainer's label smoothing and the pipelines look here.
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model.config_class.model_type] = model.__name__


def _optional(name: str) -> Any:
    """Return a class of this package; warn and return None if transformers is too old for it."""
    try:
        return __getattr__(name)
    except MissingExtraError as error:
        warnings.warn(f"resnet_bk does not register with transformers: {error}", stacklevel=2)
        return None


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
