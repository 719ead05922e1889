"""Hugging Face adapter: the only package here that imports transformers.

``import resnet_bk`` registers the classes with transformers' Auto classes as soon as transformers is imported.
"""

from resnet_bk.hf.configuration import ResNetBKConfig
from resnet_bk.hf.modeling import RecurrentCache, ResNetBKForCausalLM
from resnet_bk.hf.tokenizer import byte_tokenizer, load_tokenizer

__all__ = ["RecurrentCache", "ResNetBKConfig", "ResNetBKForCausalLM", "byte_tokenizer", "load_tokenizer"]
