"""Read documents from the standard library and from files and folders, and divide them into two texts."""

import contextlib
import fnmatch
import hashlib
import itertools
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from resnet_bk.config import ConfigError, DataConfig, shown
from resnet_bk.data.hub import Rows, hub_split, is_hub_name

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
        with _readable("data", self.path), self.path.open("rb") as file:
            file.seek(self.start)
            left = len(self)
            while left:
                piece = file.read(min(left, _PIECE))
                if not piece:
                    raise ConfigError(
                        f"data: {str(self.path)!r} became shorter by {left} bytes while it was read; start again"
                    )
                left -= len(piece)
                yield piece


AnyDocument = Document | Rows


class Split(NamedTuple):
    """A training text and a held-out text. Each content is in one of them, once.

    Attributes:
        train, held_out: their documents.
        copies: number of documents that were left out because another one has the same content.
    """

    train: list[AnyDocument]
    held_out: list[AnyDocument]
    copies: int

    @property
    def note(self) -> str:
        """One line about the copies; empty if there are none."""
        return f"documents left out because another one has the same content: {self.copies}" if self.copies else ""


@contextlib.contextmanager
def _readable(where: str, path: Path) -> Iterator[None]:
    """Turn an OSError within the block into a ConfigError that names the file, `path` if the system names none."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{where}: {str(error.filename or path)!r} cannot be read ({error.strerror or error}); "
            "make it readable, or take it out of the text, and start again"
        ) from error


def _paths(root: Path, where: str, left_out: Collection[str] = ()) -> Iterator[Path]:
    """Yield everything below a folder that is not a folder, in any order.

    Links to folders are followed, after all other folders. No folder is read twice, so loops of links end.

    Args:
        root: the folder.
        where: the setting that names it, for messages.
        left_out: names to leave out, in addition to hidden ones.
    """
    known = set(root.resolve().parents)  # a link to one of these would bring in what is next to `root`
    folders, links = [root], list[Path]()
    while folders or links:
        if not folders:
            links.sort(reverse=True)
            folders.append(links.pop())
        folder = folders.pop()
        with _readable(where, folder):
            if (target := folder.resolve()) in known:
                continue
            known.add(target)
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name in left_out:
                        continue
                    if not entry.is_dir():
                        yield Path(entry.path)
                    else:
                        (links if entry.is_symlink() else folders).append(Path(entry.path))


def _whole_files(root: Path, names: Iterable[Path], where: str) -> list[Document]:
    """Return a document for each regular file among `names`, which are relative to `root`."""
    found = []
    for name in names:
        path = root / name
        with _readable(where, path):
            status = path.stat()
        if stat.S_ISREG(status.st_mode):
            found.append(Document(name.as_posix(), path, 0, status.st_size))
    return found


def _stdlib(where: str) -> list[Document]:
    """Return the modules of the running Python's standard library in sorted order, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root) for path in _paths(root, where, _NOT_STDLIB) if path.suffix == ".py"]
    return _whole_files(root, sorted(names, key=Path.as_posix), where)


def _mode(source: str, where: str) -> int:
    """Return the mode bits of a file or folder, 0 if there is none of that name."""
    with _readable(where, Path(source)), contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
        return Path(source).stat().st_mode if source else 0  # ValueError: a null character in the name
    return 0


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Return True if one of the patterns fits a path or one of the folders on the way to it.

    name: the path below the source, with slashes. A pattern fits a path or the last part of it.
    """
    parts = name.split("/")
    paths = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    return any(fnmatch.fnmatchcase(text, pattern.rstrip("/")) for pattern in patterns for text in (*paths, *parts))


def documents(
    source: str, where: str = "data.source", include: Collection[str] = (), exclude: Collection[str] = ()
) -> list[Document]:
    """Return the documents of a file, of a folder (all files that are not hidden), or of ``stdlib``, in sorted order.

    Empty files, pipes and devices are left out.

    Args:
        source: the file or folder, or ``stdlib``.
        where: the setting that names it, for messages.
        include: patterns of the files to read, see :class:`resnet_bk.config.DataConfig`; empty for all.
        exclude: patterns of files to leave out.

    Raises:
        ConfigError: there is nothing to read, or a file or folder that cannot be read.
    """
    path = Path(source)
    if source == "stdlib":
        found = _stdlib(where)
    elif stat.S_ISDIR(mode := _mode(source, where)):
        found = _whole_files(path, sorted(p.relative_to(path) for p in _paths(path, where)), where)
    elif stat.S_ISREG(mode):
        found = _whole_files(path.parent, [Path(path.name)], where)
    else:
        hub = "" if where == "data.val_source" else ", nor a hub dataset ('owner/name')"
        raise ConfigError(f"{where}: {shown(source)} is not a file, a folder or 'stdlib'{hub}; give one of them")
    chosen = [d for d in found if (not include or _matches(d.name, include)) and not _matches(d.name, exclude)]
    if found and not chosen:
        raise ConfigError(
            f"{where}: data.include = {list(include)} and data.exclude = {list(exclude)} leave out all {len(found)} "
            f"files of {shown(source)}; change the patterns"
        )
    kept = [document for document in chosen if len(document)]
    if not kept:
        raise ConfigError(
            f"{where}: {shown(source)} is empty (0 bytes in {len(chosen)} files); give a file or folder with text"
        )
    return kept


def without_copies(documents: Sequence[AnyDocument]) -> list[AnyDocument]:
    """Return the first document of each content. Only documents of equal size are read."""
    return _without_copies([documents])[0]


def _without_copies(groups: Sequence[Sequence[AnyDocument]]) -> list[list[AnyDocument]]:
    """Return the groups with the first document of each content in all of them."""
    sizes, known = Counter(len(document) for group in groups for document in group), set()
    kept: list[list[AnyDocument]] = [[] for _ in groups]
    for group, left in zip(groups, kept, strict=True):
        for document in group:
            if sizes[len(document)] > 1:
                digest = hashlib.sha256()
                for piece in document.pieces():
                    digest.update(piece)
                if digest.digest() in known:
                    continue
                known.add(digest.digest())
            left.append(document)
    return kept


def split(data: DataConfig) -> Split:
    """Return the training and the held-out documents of all sources.

    Without `val_source`, a part of each source is held out: the validation split of a hub dataset; of several files,
    every k-th in sorted order from the first on, with k = 1 / val_fraction rounded; of a single file, its end, cut
    between two characters. Of documents with the same content, the first one stays: those of `val_source` come before
    those of the sources, and a validation split before the rest of its source.

    Raises:
        ConfigError: as :func:`documents` and :func:`resnet_bk.data.hub.hub_split`; patterns are given for hub datasets
            only; a single file is too small to be cut; or no text of a source is left to train on.
    """
    return split_by_source(data)[0]


def split_by_source(data: DataConfig) -> tuple[Split, list[int]]:
    """Return the documents as :func:`split` does, and the index of the first training document of each source."""
    name = "include" if data.include else "exclude"
    if (data.include or data.exclude) and all(map(is_hub_name, data.shares)):
        hub = ", ".join(map(shown, data.shares))
        raise ConfigError(f"data.{name}: got patterns for the hub dataset {hub}, allowed for files only")
    groups, chosen = zip(*(_read(data, source) for source in data.shares), strict=True)
    separate: list[Document] = []
    if data.val_source is not None:
        separate = documents(data.val_source, "data.val_source", data.include, data.exclude)
    outside: set[AnyDocument] = {*separate, *itertools.chain.from_iterable(chosen)}
    held_out, *kept = _without_copies([separate, *groups])
    train: list[AnyDocument] = []
    starts, count = [], sum(map(len, groups)) + len(separate)
    copies = count - len(held_out) - sum(map(len, kept))
    for source, group in zip(data.shares, kept, strict=True):
        starts.append(len(train))
        first = group[0] if group else None
        if len(group) == 1 and data.val_source is None and isinstance(first, Document):
            before, after = _cut_file(first, data.val_fraction, data.setting)
            train.append(before)
            held_out.append(after)
            continue
        train += (document for document in group if document not in outside)
        held_out += (document for document in group if document in outside)
        if len(train) == starts[-1]:
            raise ConfigError(
                f"{data.setting}: nothing of {shown(source)} is left to train on: all of its text is held out, too"
                f"{', or in a source before it' * (len(kept) > 1)}; give more text, or another data.val_source"
            )
    return Split(train, held_out, copies), starts


def _read(data: DataConfig, source: str) -> tuple[Sequence[AnyDocument], Sequence[AnyDocument]]:
    """Return the documents of a source, and those of them that are held out. Copies are still among them."""
    if not is_hub_name(source):
        files = documents(source, data.setting, data.include, data.exclude)
        every = max(2, round(1 / data.val_fraction))
        return files, files[::every] if data.val_source is None else []
    train = hub_split(source, "train", data.rows, data.setting)
    if data.val_source is not None:
        return train, []
    validation = hub_split(source, "validation", data.rows, data.setting)
    return [*validation, *train], validation


def held_out(source: str, where: str, rows: str = "documents") -> Split:
    """Return a text to score as held-out text: the validation split of a hub dataset, or all documents of a source.

    Args:
        source: a hub dataset, or a source as :func:`documents` takes it.
        where: the setting that names it, for messages.
        rows: of a hub dataset, see :class:`resnet_bk.config.DataConfig`.
    """
    found: Sequence[AnyDocument]
    found = hub_split(source, "validation", rows, where) if is_hub_name(source) else documents(source, where)
    kept = without_copies(found)
    return Split([], kept, len(found) - len(kept))


def _cut_file(document: Document, val_fraction: float, where: str) -> tuple[Document, Document]:
    """Cut a file before its last `val_fraction`. where: the setting that names it, for messages."""
    assert document.path is not None
    cut = round(len(document) * (1 - val_fraction))
    near = range(max(0, cut - 3), min(cut + 4, len(document)))
    with _readable(where, document.path), document.path.open("rb") as file:
        file.seek(near.start)
        starts = [i for i, byte in zip(near, file.read(len(near)), strict=False) if byte & 0xC0 != 0x80]
    if cut < len(document):  # to the next beginning of a UTF-8 character, or back to that of the last one
        last = starts[-1] if starts and near.stop == len(document) else cut
        cut = next((i for i in starts if i >= cut), last)
    if not 0 < cut < len(document):
        raise ConfigError(
            f"{where}: {str(document.path)!r} has {len(document)} bytes, too few to hold out {val_fraction:g} of "
            "them; give more text"
        )
    before = Document(f"{document.name}[:{cut}]", document.path, 0, cut)
    return before, Document(f"{document.name}[{cut}:]", document.path, cut, document.stop)


def count_words(documents: Iterable[AnyDocument]) -> int:
    """Count whitespace-separated words and line ends."""
    count = 0
    for document in documents:
        in_word = False  # at the end of the last piece
        for piece in document.pieces():
            count += piece.count(b"\n") + len(piece.split()) - (in_word and not piece[:1].isspace())
            in_word = not piece[-1:].isspace()
    return count
