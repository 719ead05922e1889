"""Token files: a corpus as one memory-mapped array of ids, made once and reused while its inputs stay the same.

Layout of a token file's folder: ``tokens.bin`` (little-endian ids, uint16 or uint32, every document followed by the
end-of-document id), ``index.json`` (where documents begin, their bytes and names) and a manifest of both.
"""

import codecs
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from resnet_bk.checkpoint import CheckpointError, seal, verify
from resnet_bk.config import BYTE_OFFSET, BYTE_VOCABULARY, END_OF_DOCUMENT, ConfigError
from resnet_bk.data.corpus import Document

_TEXT_PIECE = 1 << 18  # characters a text tokenizer is given at a time


class TextTokenizer(Protocol):
    eos_token_id: int | None

    def __len__(self) -> int: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class TokenFile:
    """A tokenised corpus. ids: all tokens; starts: (documents + 1,) first token of each; sizes: bytes of each."""

    ids: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    names: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return int(self.sizes.sum())

    def document(self, i: int) -> np.ndarray:
        """Ids of document i, its end marker included."""
        return self.ids[self.starts[i] : self.starts[i + 1]]


def byte_ids(text: bytes) -> np.ndarray:
    """Bytes to ids, (len(text),) uint16: byte b is b + 3."""
    return np.frombuffer(text, np.uint8).astype(np.uint16) + BYTE_OFFSET


def _cut(text: str, limit: int) -> int:
    """Where to cut `text`, at most at `limit`: after a lone line break between two other characters, which no usual
    pre-tokenizer joins across; else after the last line break; else at the limit."""
    at = limit
    while (at := text.rfind("\n", 0, at)) > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at + 1
    return text.rfind("\n", 0, limit) + 1 or limit


def _text_ids(document: Document, tokenizer: TextTokenizer) -> Iterator[np.ndarray]:
    """Ids of a document under a text tokenizer, piece by piece; see _cut for where pieces end."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, consumed = "", 0
    for piece in itertools.chain(document.pieces(), [b""]):
        try:
            held += decoder.decode(piece, final=not piece)
        except UnicodeDecodeError as error:
            offset = consumed + error.start - (len(error.object) - len(piece))
            raise ConfigError(
                f"data: {document.name} is not UTF-8 at byte {document.start + offset}; "
                "a text tokenizer cannot read it, use data.tokenizer: byte"
            ) from error
        consumed += len(piece)
        while len(held) > _TEXT_PIECE or (not piece and held):
            cut = _cut(held, _TEXT_PIECE) if len(held) > _TEXT_PIECE else len(held)
            yield np.asarray(tokenizer.encode(held[:cut], add_special_tokens=False), np.uint32)
            held = held[cut:]


def write(documents: Iterable[Document], folder: Path, tokenizer: TextTokenizer | None) -> None:
    """Tokenise into `folder`, sealed by a manifest and in one rename at the end. `tokenizer` None: bytes."""
    vocabulary = BYTE_VOCABULARY if tokenizer is None else len(tokenizer)
    end = END_OF_DOCUMENT if tokenizer is None else tokenizer.eos_token_id
    if end is None:
        raise ConfigError("data.tokenizer: has no end-of-text token, which separates documents; use another tokenizer")
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
                            f"data.tokenizer: made id {ids.max()}, allowed 0 to {vocabulary - 1}; use another"
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
        except OSError:  # another process was faster, with the same tokens
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read(folder: Path) -> TokenFile:
    """Raises CheckpointError where the folder is not as it was written."""
    verify(folder)
    index = json.loads((folder / "index.json").read_bytes())
    dtype = {"uint16": np.uint16, "uint32": np.uint32}[index["dtype"]]
    ids = np.memmap(folder / "tokens.bin", dtype, mode="r")
    return TokenFile(ids, np.asarray(index["starts"]), np.asarray(index["sizes"]), tuple(index["names"]))


def fingerprint(documents: Iterable[Document], tokenizer: str) -> str:
    """SHA-256 of all that determines a token file: the documents' names and bytes, the tokenizer's name."""
    digest = hashlib.sha256(f"layout 1\0{tokenizer}\0".encode())
    for document in documents:
        digest.update(f"{document.name}\0{len(document)}\0".encode(errors="surrogateescape"))
        for piece in document.pieces():
            digest.update(piece)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: TextTokenizer) -> str:
    """SHA-256 of what determines a tokenizer's ids: not its vocabulary alone, also its merges, its normaliser, ..."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    settings = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    settings |= {"truncation": None, "padding": None, "eos": tokenizer.eos_token_id, "class": type(tokenizer).__name__}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def cached(documents: list[Document], cache: Path, name: str, tokenizer: TextTokenizer | None) -> tuple[TokenFile, str]:
    """The token file of `documents`, from `cache` or made now, and its fingerprint. name: identifies the tokenizer."""
    key = fingerprint(documents, name)
    folder = cache / key[:32]
    if folder.exists():
        try:
            return read(folder), key
        except CheckpointError:  # damaged, or left by a machine that lost power: made anew
            shutil.rmtree(folder)
    write(documents, folder, tokenizer)
    return read(folder), key
