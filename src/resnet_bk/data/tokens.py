"""Byte ids, and token files: a corpus as one memory-mapped array of ids, written once and reused while it stays valid.

The folder of a token file has ``tokens.bin`` (little-endian ids, uint16 or uint32, the end-of-document id after each
document), ``index.json`` (where documents begin, their sizes in bytes and their names) and a manifest of both.
"""

import codecs
import contextlib
import hashlib
import itertools
import json
import secrets
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from resnet_bk import files
from resnet_bk.checkpoint import CheckpointError, seal, verify
from resnet_bk.config import BYTE_OFFSET, BYTE_VOCABULARY, END_OF_DOCUMENT, ConfigError
from resnet_bk.data.corpus import AnyDocument

_FILES = ("tokens.bin", "index.json")
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


def _text_ids(document: AnyDocument, pieces: Iterable[bytes], tokenizer: TextTokenizer) -> Iterator[np.ndarray]:
    """Yield the ids that a text tokenizer gives the bytes of a document; :func:`_cut` chooses where it is cut."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, consumed = "", 0
    for piece in itertools.chain(pieces, [b""]):
        try:
            held += decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            offset = consumed + error.start - (len(error.object) - len(piece))
            raise ConfigError(
                f"data: {document.name!r} is not UTF-8 at byte {document.start + offset}; "
                "a text tokenizer cannot read it; use data.tokenizer: byte"
            ) from error
        consumed += len(piece)
        while len(held) > _TEXT_PIECE or (not piece and held):
            cut = _cut(held, _TEXT_PIECE) if len(held) > _TEXT_PIECE else len(held)
            yield np.asarray(tokenizer.encode(held[:cut], add_special_tokens=False), np.uint32)
            held = held[cut:]


def _start(tokenizer: str) -> "hashlib._Hash":
    return hashlib.sha256(f"layout 1\0{tokenizer}\0".encode())


def _hashed(document: AnyDocument, digest: "hashlib._Hash") -> Iterator[bytes]:
    """Yield the bytes of a document. Add its name and them to `digest`."""
    digest.update(f"{document.name}\0{len(document)}\0".encode(errors=sys.getfilesystemencodeerrors()))
    for piece in document.pieces():
        digest.update(piece)
        yield piece


def fingerprint(documents: Iterable[AnyDocument], tokenizer: str) -> str:
    """Return the SHA-256 of all that determines a token file: names and bytes of the documents, and the tokenizer."""
    digest = _start(tokenizer)
    for document in documents:
        for _ in _hashed(document, digest):
            pass
    return digest.hexdigest()


def write(documents: Iterable[AnyDocument], folder: Path, name: str, tokenizer: TextTokenizer | None) -> str:
    """Write a token file to a new folder, sealed by a manifest.

    Args:
        documents: in the order in which they are stored.
        folder: the new folder.
        name: identifies the tokenizer in the fingerprint.
        tokenizer: None for bytes.

    Returns:
        The fingerprint of the text that was tokenised. It differs from an earlier one if a file has changed since.

    Raises:
        ConfigError: the tokenizer has no end-of-text token or makes ids outside its vocabulary, or a text for it is not
            UTF-8.
    """
    vocabulary = _vocabulary(tokenizer)
    end = END_OF_DOCUMENT if tokenizer is None else tokenizer.eos_token_id
    if end is None:
        raise ConfigError("data.tokenizer: has no end-of-text token to separate documents with; use another tokenizer")
    dtype = np.uint16 if vocabulary <= 1 << 16 else np.uint32
    starts, sizes, names, position = [0], [], [], 0
    digest = _start(name)
    folder.mkdir(parents=True)
    with (folder / "tokens.bin").open("wb") as file:
        for document in documents:
            text = _hashed(document, digest)
            pieces = map(byte_ids, text) if tokenizer is None else _text_ids(document, text, tokenizer)
            for ids in itertools.chain(pieces, [np.asarray([end])]):
                if len(ids) and ids.max() >= vocabulary:
                    raise ConfigError(
                        f"data.tokenizer: got id {ids.max()}, allowed 0 to {vocabulary - 1}; use another tokenizer"
                    )
                file.write(ids.astype(dtype, copy=False).data)
                position += len(ids)
            starts.append(position)
            sizes.append(len(document))
            names.append(document.name)
    index = {"dtype": np.dtype(dtype).name, "starts": starts, "sizes": sizes, "names": names}
    (folder / "index.json").write_text(json.dumps(index))
    seal(folder, _FILES)
    return digest.hexdigest()


def _vocabulary(tokenizer: TextTokenizer | None) -> int:
    return BYTE_VOCABULARY if tokenizer is None else len(tokenizer)


def read(folder: Path, vocabulary: int) -> TokenFile:
    """Return the token file in `folder`. vocabulary: number of ids allowed.

    Raises:
        CheckpointError: the folder is not as it was written, or its content is not that of a token file.
    """
    verify(folder, _FILES)
    try:
        index = json.loads((folder / "index.json").read_bytes())
        ids = np.memmap(folder / "tokens.bin", {"uint16": np.uint16, "uint32": np.uint32}[index["dtype"]], mode="r")
        starts, sizes = (np.asarray(index[name], np.int64) for name in ("starts", "sizes"))
        names = tuple(map(str, index["names"]))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{folder}: expected a token file, got {type(error).__name__}: {error}") from error
    if (
        starts.shape != (len(names) + 1,)
        or sizes.shape != (len(names),)
        or (starts[0], starts[-1]) != (0, len(ids))
        or (starts[1:] <= starts[:-1]).any()
        or (sizes < 0).any()
        or ids.max() >= vocabulary
    ):
        raise CheckpointError(
            f"{folder}: expected {len(ids)} ids below {vocabulary} in {len(names)} documents, got an index that does "
            "not fit, or a larger id"
        )
    return TokenFile(ids, starts, sizes, names)


def tokenizer_digest(tokenizer: TextTokenizer) -> str:
    """Return the SHA-256 of all that determines a tokenizer's ids: vocabulary, merges, normaliser and the rest."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    settings |= {"truncation": None, "padding": None, "eos": tokenizer.eos_token_id, "class": type(tokenizer).__name__}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def cached(
    documents: Sequence[AnyDocument], cache: Path, name: str, tokenizer: TextTokenizer | None
) -> tuple[TokenFile, str]:
    """Return the token file of `documents` and its fingerprint; write the file first if it is not in the cache.

    Several processes may write to the cache at the same time, even the same file.

    Args:
        documents: as for :func:`write`.
        cache: folder of token files, each in a folder named by the beginning of its fingerprint.
        name: identifies the tokenizer in the fingerprint.
        tokenizer: None for bytes.

    Raises:
        ConfigError: as :func:`write`.
        OSError: the disk is full or fails. It names the file.
    """
    key, vocabulary = fingerprint(documents, name), _vocabulary(tokenizer)
    for _ in range(2):
        with contextlib.suppress(CheckpointError):  # missing, damaged, or just being replaced by another process
            return read(cache / key[:32], vocabulary), key
        with contextlib.suppress(FileNotFoundError, CheckpointError):  # another process was faster: see _add
            key = _add(documents, cache, key, name, tokenizer)
    return read(cache / key[:32], vocabulary), key


def _add(documents: Sequence[AnyDocument], cache: Path, key: str, name: str, tokenizer: TextTokenizer | None) -> str:
    """Write a token file into the cache and return its fingerprint. key: the fingerprint expected.

    Also remove the scratch folders of all processes that write the same token file. A killed process left its folder;
    a running one finds this file instead and tries again.
    """
    scratch = files.scratch(cache / f"{key[:32]}.{secrets.token_hex(4)}")  # threads may write the same one
    others = f".{key[:32]}.*.partial"
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"data.cache: {str(cache)!r} cannot be written to ({reason}); choose another folder"
        ) from error
    try:
        with files.writing(cache):
            key = write(documents, scratch / "new", name, tokenizer)
        with files.writing(cache / key[:32]):
            _put(scratch / "new", cache / key[:32], _vocabulary(tokenizer))
        for path in cache.glob(others):
            files.remove(path)
    finally:
        files.remove(scratch)
    return key


def _put(new: Path, folder: Path, vocabulary: int) -> None:
    """Rename the token file `new` to `folder`, unless another process has put the same one there."""
    try:
        read(folder, vocabulary)
    except CheckpointError:
        with contextlib.suppress(FileNotFoundError):
            folder.rename(new.with_name("damaged"))
        try:
            new.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
