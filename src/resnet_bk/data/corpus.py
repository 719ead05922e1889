"""Read documents from the standard library, from files and folders, or from a dataset of the Hugging Face hub."""

import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from resnet_bk.config import ConfigError

_PIECE = 1 << 20  # bytes per read
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One document: a byte range of a file, or a text in memory.

    Attributes:
        name: str, shown in messages and stored in token files.
        path: file that holds the document; None for a text in memory.
        start, stop: byte range within the file.
        text: the bytes of a document in memory.
    """

    name: str
    path: Path | None = None
    start: int = 0
    stop: int = 0
    text: bytes = b""

    def __len__(self) -> int:
        """Return the number of bytes."""
        return len(self.text) if self.path is None else self.stop - self.start

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes, at most a megabyte at a time."""
        if self.path is None:
            yield self.text
            return
        with self.path.open("rb") as file:
            file.seek(self.start)
            left = len(self)
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise ConfigError(
                        f"data: {self.path} became shorter by {left} bytes while it was read; start again"
                    )
                left -= len(piece)
                yield piece


def _whole_file(path: Path, name: str) -> Document:
    return Document(name, path, 0, path.stat().st_size)


def _stdlib() -> list[Document]:
    """Return the modules of the running Python's standard library in sorted order, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, inner, files in os.walk(root):
        inner[:] = set(inner) - _NOT_STDLIB
        paths += [Path(folder, file) for file in files if file.endswith(".py")]
    names = sorted(path.relative_to(root).as_posix() for path in paths)
    return [_whole_file(root / name, name) for name in names]


def _folder(root: Path) -> list[Document]:
    names = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    visible = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return [_whole_file(root / name, name.as_posix()) for name in visible]


def documents(source: str) -> list[Document]:
    """Return the documents of a file, of a folder (all files that are not hidden), or of ``stdlib``.

    Empty files are left out.

    Raises:
        ConfigError: there is nothing to read.
    """
    path = Path(source)
    if not source or "\0" in source:
        raise ConfigError(f"data: {source!r} is not a file name; give a file, a folder or 'stdlib'")
    if source == "stdlib":
        found = _stdlib()
    elif path.is_dir():
        found = _folder(path)
    elif path.is_file():
        found = [_whole_file(path, path.name)]
    else:
        raise ConfigError(f"data: {source!r} is not a file, a folder, 'stdlib' or a hub dataset ('owner/name')")
    kept = [document for document in found if len(document)]
    if not kept:
        raise ConfigError(f"data: {source!r} is empty (0 bytes in {len(found)} files); give a file or folder with text")
    return kept


def hub_split(source: str, split: str) -> list[Document]:
    """Return one split of a hub dataset as one document.

    Args:
        source: such as ``Salesforce/wikitext:wikitext-2-raw-v1``.
        split: such as ``train``.

    Raises:
        ConfigError: the package of the extra ``data`` is missing, the split cannot be loaded, or it has no text.
    """
    name, _, config = source.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data.source: hub dataset {name!r} needs the package datasets: pip install 'resnet-bk[data]'"
        ) from error
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # hub, network, cache and parsers each raise their own classes
        reason = str(error).splitlines()[0] if str(error) else ""
        raise ConfigError(
            f"data.source: cannot load split {split!r} of {source!r} ({type(error).__name__}: {reason}); "
            "without a network, save its text to a file and give that path"
        ) from error
    if "text" not in rows.column_names:
        raise ConfigError(f"data.source: {source!r} has no column 'text', only {', '.join(rows.column_names)}")
    text = "\n".join(str(row) for row in rows["text"] if row is not None).encode()
    if not text:
        raise ConfigError(f"data.source: split {split!r} of {source!r} is empty (0 bytes); choose another dataset")
    return [Document(f"{name}/{split}", text=text)]


def hub_splits(source: str) -> tuple[list[Document], list[Document]]:
    """Return the training and the validation documents of a hub dataset."""
    return hub_split(source, "train"), hub_split(source, "validation")


def is_hub_name(source: str) -> bool:
    return not Path(source).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", source) is not None


def split(source: str, val_source: str | None, val_fraction: float) -> tuple[list[Document], list[Document]]:
    """Return the training and the held-out documents.

    Args:
        source: a hub dataset, or a source as :func:`documents` takes it.
        val_source: text to hold out, as :func:`documents` takes it. None holds out a part of `source`: the validation
            split of a hub dataset; of several files, every k-th in sorted order from the first on, with
            k = 1 / val_fraction rounded; of a single file, its end, cut between two characters.
        val_fraction: share of `source` to hold out; not used with a hub dataset or with `val_source`.

    Raises:
        ConfigError: as :func:`documents`, or a single file is too small to be cut.
    """
    if is_hub_name(source) and val_source is None:
        return hub_splits(source)
    train = hub_split(source, "train") if is_hub_name(source) else documents(source)
    if val_source is not None:
        return train, documents(val_source)
    if len(train) == 1:
        return _cut_file(train[0], val_fraction)
    every = max(2, round(1 / val_fraction))
    return [d for i, d in enumerate(train) if i % every], train[::every]


def _cut_file(document: Document, val_fraction: float) -> tuple[list[Document], list[Document]]:
    assert document.path is not None
    cut = document.start + round(len(document) * (1 - val_fraction))
    with document.path.open("rb") as file:
        file.seek(cut)
        ahead = file.read(4)
    cut += next((i for i, byte in enumerate(ahead) if byte & 0xC0 != 0x80), 0)  # to the start of a UTF-8 character
    if not document.start < cut < document.stop:
        raise ConfigError(
            f"data: {document.path} has {len(document)} bytes, too few to hold out {val_fraction:g} of them; "
            "give more text"
        )
    first = Document(f"{document.name}[:{cut}]", document.path, document.start, cut)
    return [first], [Document(f"{document.name}[{cut}:]", document.path, cut, document.stop)]
