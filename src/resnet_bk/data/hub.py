"""Read datasets of the Hugging Face hub. Their rows stay in the memory-mapped files until they are needed."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from resnet_bk.config import ConfigError

_BLOCK = 64  # rows per read: one by one, they take many times as long
_PIECE = 1 << 20  # bytes


class Table:
    """The texts of one split of a dataset. One block of rows is in memory at a time."""

    def __init__(self, name: str, rows: Any):
        """Create the table. rows: a `datasets.Dataset` with a column "text"."""
        self.name, self.rows = name, rows.select_columns(["text"])
        self._block: tuple[int, list[bytes | None]] = (-1, [])  # number of the block, and its texts

    def __len__(self) -> int:
        return len(self.rows)

    def text(self, i: int) -> bytes | None:
        """Return the text of row i; None for a row without one."""
        number, block = self._block
        if number != i // _BLOCK:
            number = i // _BLOCK
            found = self.rows[number * _BLOCK : (number + 1) * _BLOCK]["text"]
            block = [None if row is None else str(row).encode() for row in found]
            self._block = number, block
        return block[i % _BLOCK]


@dataclass(frozen=True, slots=True)
class Rows:
    """A document of one row of a table, or of consecutive rows with a line end between them.

    Attributes:
        table: the texts of all rows.
        first: the first row of the document.
        count: number of rows; None for all rows of the table.
        size: number of bytes.
        start: 0, the place of the document in its text, as :class:`resnet_bk.data.corpus.Document` has it.
    """

    table: Table
    first: int
    count: int | None
    size: int
    start: ClassVar[int] = 0

    @property
    def name(self) -> str:
        """Return the names of dataset and split, and the number of the row unless the document has all rows."""
        return self.table.name if self.count is None else f"{self.table.name}[{self.first}]"

    def __len__(self) -> int:
        """Return the number of bytes."""
        return self.size

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes, at most a megabyte at a time. Rows without a text are left out."""
        between = b""
        stop = len(self.table) if self.count is None else self.first + self.count
        for begin in range(self.first, stop, _BLOCK):
            texts = map(self.table.text, range(begin, min(begin + _BLOCK, stop)))
            present = [text for text in texts if text is not None]
            if present:
                block = between + b"\n".join(present)
                yield from (block[i : i + _PIECE] for i in range(0, len(block), _PIECE))
                between = b"\n"


def hub_split(source: str, split: str, rows: str = "documents", where: str = "data.source") -> list[Rows]:
    """Return the documents of one split of a hub dataset. The texts are read once, for their sizes, and not kept.

    Args:
        source: such as ``Salesforce/wikitext:wikitext-2-raw-v1``.
        split: such as ``train``.
        rows: ``documents`` or ``lines``, see :class:`resnet_bk.config.DataConfig`.
        where: the setting that names the dataset, for messages.

    Raises:
        ConfigError: the package of the extra ``data`` is missing, the split cannot be loaded, or it has no text.
    """
    name, _, config = source.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{where}: hub dataset {name!r} needs the package datasets: pip install 'resnet-bk[data]'"
        ) from error
    try:
        loaded = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # hub, network, cache and parsers each raise their own classes
        reason = str(error).splitlines()[0] if str(error) else ""
        raise ConfigError(
            f"{where}: cannot load split {split!r} of {source!r} ({type(error).__name__}: {reason}); "
            "without a network, save its text to a file and give that path"
        ) from error
    if "text" not in loaded.column_names:
        raise ConfigError(f"{where}: {source!r} has no column 'text', only {', '.join(loaded.column_names)}")
    table = Table(f"{name}/{split}", loaded)
    if rows == "lines":
        sizes = [len(text) for text in map(table.text, range(len(table))) if text is not None]
        whole = Rows(table, 0, None, sum(sizes) + max(0, len(sizes) - 1))
        found = [whole] if whole.size else []
    else:
        found = [Rows(table, i, 1, len(text)) for i in range(len(table)) if (text := table.text(i))]
    if not found:
        raise ConfigError(f"{where}: split {split!r} of {source!r} is empty (0 bytes); choose another dataset")
    return found


def is_hub_name(source: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", source) is not None and not os.path.lexists(source)
