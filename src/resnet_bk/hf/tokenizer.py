"""Tokenizers: bytes (ids as ByT5's: 0 pad, 1 end of document, 2 unknown, byte b at b + 3), or any of transformers'."""

import os
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as Tokenizer

from resnet_bk.config import BYTE_OFFSET, ConfigError, DataConfig
from resnet_bk.data import corpus, tokens


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: 259 ids, lossless on any text, left-padding as generation wants it."""
    # The printable stand-ins of GPT-2's byte alphabet: printable Latin-1 stands for itself, the rest from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    stand_ins = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        stand_ins.setdefault(byte, chr(0x100 + len(stand_ins) - len(printable)))
    specials = ["<pad>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate(specials)}
    vocabulary |= {stand_ins[byte]: byte + BYTE_OFFSET for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # "</s>" in a text is four characters
        model_input_names=["input_ids", "attention_mask"],
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """``"byte"``, a folder with a tokenizer, or a hub name."""
    if name == "byte":
        return byte_tokenizer()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its backends do
        is_folder = Path(name).is_dir()
        kind = "folder has no usable tokenizer" if is_folder else "no such folder, and not to be had from the hub"
        raise ConfigError(
            f"data.tokenizer: {name!r}: {kind} ({type(error).__name__}); "
            "use 'byte', a folder, or a hub name with a network"
        ) from error
    return tokenizer


def token_cache(data: DataConfig) -> Path:
    if data.cache is not None:
        return Path(data.cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet-bk"


def _is_bytes(tokenizer: Tokenizer) -> bool:
    return tokenizer.get_vocab() == byte_tokenizer().get_vocab()


def token_file(
    documents: list[corpus.Document], data: DataConfig, tokenizer: Tokenizer
) -> tuple[tokens.TokenFile, str]:
    """The documents as tokens, from the cache or made now, and the fingerprint of text and tokenizer."""
    name = "byte" if _is_bytes(tokenizer) else tokens.tokenizer_digest(tokenizer)
    return tokens.cached(documents, token_cache(data), name, None if name == "byte" else tokenizer)
