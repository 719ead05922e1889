"""Tokenizers: the byte tokenizer, or any tokenizer of transformers.

The byte tokenizer has the ids of ByT5: 0 is padding, 1 ends a document, 2 is unknown, and byte b has the id b + 3.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as Tokenizer

from resnet_bk.config import BYTE_OFFSET, ConfigError, DataConfig
from resnet_bk.data import corpus, tokens
from resnet_bk.data.byte_text import ByteText
from resnet_bk.folders import cache_folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return the byte tokenizer, a byte-level BPE without merges: 259 ids, lossless for any text, left-padded."""
    # GPT-2's byte alphabet: printable Latin-1 bytes stand for themselves, the others are mapped from U+0100 on.
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
        split_special_tokens=True,  # "</s>" in a text is four bytes
        model_input_names=["input_ids", "attention_mask"],
    )


class TokenizerText:
    """A tokenizer as generation needs it, see :class:`resnet_bk.data.byte_text.ByteText`."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self.end = tokenizer, int(tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def stream(self, prompt: list[int]) -> "TokenizerStream":
        return TokenizerStream(self, prompt, self._tokenizer.backend_tokenizer)


class TokenizerStream:
    """The text of one token after the other, in whole characters."""

    def __init__(self, ids: TokenizerText, prompt: list[int], backend: Any):
        self._ids, self._backend = ids, backend
        self._stream: Any = decoders.DecodeStream(skip_special_tokens=True)
        self._tokens, self._text = list(prompt), ids.decode(prompt)

    def add(self, token: int) -> str:
        """Return the text that a token completes."""
        self._tokens.append(token)
        piece = self._stream.step(self._backend, token) or ""
        self._text += piece
        return piece

    def finish(self) -> str:
        """Return what is left where the tokens end within a character."""
        whole = self._ids.decode(self._tokens)
        return whole[len(self._text) :] if whole.startswith(self._text) else ""


def text_ids(tokenizer: Tokenizer) -> ByteText | TokenizerText:
    """Return a tokenizer as generation needs it."""
    return ByteText() if _is_bytes(tokenizer) else TokenizerText(tokenizer)


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a name: ``"byte"``, a folder with a tokenizer, or a hub name.

    Raises:
        ConfigError: there is no such tokenizer.
    """
    if name == "byte":
        return byte_tokenizer()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers passes on the many classes of its backends
        is_folder = os.path.isdir(name)  # noqa: PTH112 - Path.is_dir raises if a parent cannot be read
        kind = "folder has no usable tokenizer" if is_folder else "no readable folder, and not available from the hub"
        raise ConfigError(
            f"data.tokenizer: {name!r}: {kind} ({type(error).__name__}); "
            "use 'byte', a folder, or a hub name with a network"
        ) from error
    return tokenizer


def token_cache(data: DataConfig) -> Path:
    """Return the folder of token files.

    Raises:
        ConfigError: no setting names one, and the user has no home directory.
    """
    if data.cache is not None:
        return Path(data.cache)
    folder = cache_folder()
    if folder is None:
        raise ConfigError(
            "data.cache: got no folder, and the user has no home directory; set data.cache or XDG_CACHE_HOME to one"
        )
    return folder


def _is_bytes(tokenizer: Tokenizer) -> bool:
    return tokenizer.get_vocab() == byte_tokenizer().get_vocab()


def token_file(
    documents: Sequence[corpus.AnyDocument], data: DataConfig, tokenizer: Tokenizer
) -> tuple[tokens.TokenFile, str]:
    """Return the token file of documents, cached or newly written, and the fingerprint of text and tokenizer."""
    name = "byte" if _is_bytes(tokenizer) else tokens.tokenizer_digest(tokenizer)
    return tokens.cached(documents, token_cache(data), name, None if name == "byte" else tokenizer)
