"""Hugging Face adapter: the only package here that imports transformers.

``import resnet_bk`` registers the classes with transformers' Auto classes as soon as those are imported. Names below
are loaded on first use: the configuration has to be registered while transformers' models cannot be imported yet.
"""

import importlib
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


def quiet_transformers() -> None:
    """Our own console says what happens; the engine's notices stay off it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
