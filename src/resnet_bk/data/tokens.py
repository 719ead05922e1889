"""Byte ids, and token files: a corpus as one memory-mapped array of ids, written once and reused while it stays valid.

The folder of a token file has ``tokens.bin`` (little-endian ids, uint16 or uint32, the end-of-document id after each
document), ``index.json`` (where documents begin, their sizes in bytes and their names) and a manifest of both.
"""

import codecs
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from resnet_bk.checkpoint import CheckpointError, seal, verify
from resnet_bk.config import BYTE_OFFSET, BYTE_VOCABULARY, END_OF_DOCUMENT, ConfigError
from resnet_bk.data.corpus import Document

_TEXT_PIECE = 1 << 18  # characters passed to a text tokenizer at a time


class TextTokenizer(Protocol):
    eos_token_id: int | None

    def __len__(self) -> int: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class TokenFile:
    """A tokenised corpus.

    Attributes:
        ids: (tokens,) uint16 or uint32, all documents, each followed by the end-of-document id.
        starts: (documents + 1,) int64, the index in `ids` of each document's first token; last, the number of tokens.
        sizes: (documents,) int64, bytes of each document.
        names: of the documents.
    """

    ids: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    names: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Bytes of text in all documents."""
        return int(self.sizes.sum())

    def document(self, i: int) -> np.ndarray:
        """Return the ids of document i with its end-of-document id."""
        return self.ids[self.starts[i] : self.starts[i + 1]]


def byte_ids(text: bytes) -> np.ndarray:
    """Return the ids of bytes, (len(text),) uint16: byte b has the id b + 3."""
    return np.frombuffer(text, np.uint8).astype(np.uint16) + BYTE_OFFSET


def encode(text: str | bytes) -> Tensor:
    """Return the byte ids of a text, (N,) int64 for N bytes of UTF-8, as the byte tokenizer makes them.

    Raises:
        TypeError: `text` is not str or bytes.
    """
    if not isinstance(text, str | bytes):
        raise TypeError(f"text: got {type(text).__name__}, allowed str or bytes")
    return torch.from_numpy(byte_ids(text.encode() if isinstance(text, str) else text).astype(np.int64))


def decode(ids: Tensor | Sequence[int]) -> str:
    """Return the text of byte ids, (N,) integers: the inverse of :func:`encode`.

    The special ids 0 to 2 are left out. Bytes that are not UTF-8 become the replacement character U+FFFD.

    Raises:
        ValueError: `ids` are not one-dimensional, not integers, or not from 0 to 258.
    """
    found = np.asarray(ids.tolist() if isinstance(ids, Tensor) else ids)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(f"ids: got {found.dtype.name} of shape {found.shape}, allowed integers of shape (N,)")
    wrong = found[(found < 0) | (found >= BYTE_VOCABULARY)]
    if wrong.size:
        raise ValueError(f"ids: got {wrong[0]}, allowed 0 to {BYTE_VOCABULARY - 1}")
    return (found[found >= BYTE_OFFSET] - BYTE_OFFSET).astype(np.uint8).tobytes().decode(errors="replace")


def _cut(text: str, limit: int) -> int:
    """Return where to cut `text`, at most `limit`.

    The best place is after the last line break that has no white space next to it: usual pre-tokenizers do not join
    characters across it. Otherwise cut after the last line break, and without one at the limit.
    """
    at = limit
    while (at := text.rfind("\n", 0, at)) > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
    return text.rfind("\n", 0, limit) + 1 or limit


def _text_ids(document: Document, tokenizer: TextTokenizer) -> Iterator[np.ndarray]:
    """Yield the ids that a text tokenizer gives a document, piece by piece; :func:`_cut` chooses where pieces end."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, consumed = "", 0
    for piece in itertools.chain(document.pieces(), [b""]):
        try:
            held += decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            offset = consumed + error.start - (len(error.object) - len(piece))
            raise ConfigError(
                f"data: {document.name} is not UTF-8 at byte {document.start + offset}; "
                "a text tokenizer cannot read it; use data.tokenizer: byte"
            ) from error
        consumed += len(piece)
        while len(held) > _TEXT_PIECE or (not piece and held):
            cut = _cut(held, _TEXT_PIECE) if len(held) > _TEXT_PIECE else len(held)
            yield np.asarray(tokenizer.encode(held[:cut], add_special_tokens=False), np.uint32)
            held = held[cut:]


def write(documents: Iterable[Document], folder: Path, tokenizer: TextTokenizer | None) -> None:
    """Write a token file to `folder`: into a scratch folder, sealed by a manifest, renamed at the end.

    Args:
        documents: in the order in which they are stored.
        folder: the result; it stays as it is if another process has written it in the meantime.
        tokenizer: None for bytes.

    Raises:
        ConfigError: the tokenizer has no end-of-text token or makes ids outside its vocabulary, or a text for it is not
            UTF-8.
    """
    vocabulary = BYTE_VOCABULARY if tokenizer is None else len(tokenizer)
    end = END_OF_DOCUMENT if tokenizer is None else tokenizer.eos_token_id
    if end is None:
        raise ConfigError("data.tokenizer: has no end-of-text token to separate documents with; use another tokenizer")
    dtype = np.uint16 if vocabulary <= 1 << 16 else np.uint32
    scratch = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        starts, sizes, names, position = [0], [], [], 0
        with (scratch / "tokens.bin").open("wb") as file:
            for document in documents:
                pieces = map(byte_ids, document.pieces()) if tokenizer is None else _text_ids(document, tokenizer)
                for ids in pieces:
                    if len(ids) and ids.max() >= vocabulary:
                        raise ConfigError(
                            f"data.tokenizer: got id {ids.max()}, allowed 0 to {vocabulary - 1}; use another tokenizer"
                        )
                    ids.astype(dtype, copy=False).tofile(file)
                    position += len(ids)
                file.write(np.asarray([end], dtype).tobytes())
                position += 1
                starts.append(position)
                sizes.append(len(document))
                names.append(document.name)
        index = {"dtype": np.dtype(dtype).name, "starts": starts, "sizes": sizes, "names": names}
        (scratch / "index.json").write_text(json.dumps(index))
        seal(scratch)
        try:
            scratch.rename(folder)
        except OSError:  # another process has written the same tokens first
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read(folder: Path) -> TokenFile:
    """Return the token file in `folder`.

    Raises:
        CheckpointError: the folder is not as it was written.
    """
    verify(folder)
    index = json.loads((folder / "index.json").read_bytes())
    dtype = {"uint16": np.uint16, "uint32": np.uint32}[index["dtype"]]
    ids = np.memmap(folder / "tokens.bin", dtype, mode="r")
    return TokenFile(ids, np.asarray(index["starts"]), np.asarray(index["sizes"]), tuple(index["names"]))


def fingerprint(documents: Iterable[Document], tokenizer: str) -> str:
    """Return the SHA-256 of all that determines a token file: names and bytes of the documents, and the tokenizer."""
    digest = hashlib.sha256(f"layout 1\0{tokenizer}\0".encode())
    for document in documents:
        digest.update(f"{document.name}\0{len(document)}\0".encode(errors="surrogateescape"))
        for piece in document.pieces():
            digest.update(piece)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: TextTokenizer) -> str:
    """Return the SHA-256 of all that determines a tokenizer's ids: vocabulary, merges, normaliser and the rest."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    settings |= {"truncation": None, "padding": None, "eos": tokenizer.eos_token_id, "class": type(tokenizer).__name__}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def cached(documents: list[Document], cache: Path, name: str, tokenizer: TextTokenizer | None) -> tuple[TokenFile, str]:
    """Return the token file of `documents` and its fingerprint; write the file first if it is not in the cache.

    Args:
        documents: as for :func:`write`.
        cache: folder of token files, each in a folder named by its fingerprint.
        name: identifies the tokenizer in the fingerprint.
        tokenizer: None for bytes.
    """
    key = fingerprint(documents, name)
    folder = cache / key[:32]
    if folder.exists():
        try:
            return read(folder), key
        except CheckpointError:  # damaged, or left by a power failure: write it again
            shutil.rmtree(folder)
    write(documents, folder, tokenizer)
    return read(folder), key
