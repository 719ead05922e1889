"""Hugging Face adapter: the only package here that imports transformers.

``import resnet_bk`` registers the classes with transformers' Auto classes as soon as those are imported. Names below
are loaded on first use: the configuration has to be registered while transformers' models cannot be imported yet.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnet_bk.hf.configuration import ResNetBKConfig
    from resnet_bk.hf.modeling import RecurrentCache, ResNetBKForCausalLM
    from resnet_bk.hf.tokenizer import byte_tokenizer, load_tokenizer

_HOME = {
    "RecurrentCache": "modeling",
    "ResNetBKConfig": "configuration",
    "ResNetBKForCausalLM": "modeling",
    "byte_tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
}
__all__ = ["RecurrentCache", "ResNetBKConfig", "ResNetBKForCausalLM", "byte_tokenizer", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
