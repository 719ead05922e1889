"""Tables in the terminal and in Markdown."""

from collections.abc import Sequence

from resnet_bk.extras import extra
from resnet_bk.report.terminal import plain

with extra("train"):
    from rich import box
    from rich.console import Console
    from rich.table import Table

_LEAST_WIDTH = 40  # characters: a narrower table would leave its values out


def print_table(console: Console, title: str, rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> None:
    """Print a table; cells and title are plain text, not rich's markup. head: names of the columns, if any."""
    table = Table(title=plain(title, "table.title"), show_header=bool(head), box=None if head else box.HEAVY_HEAD)
    table.width = _LEAST_WIDTH if console.width < _LEAST_WIDTH else None
    for name in head:
        table.add_column(plain(name.replace(".", ".\n")))  # dotted names are long
    for row in rows:
        table.add_row(*map(plain, row))
    console.print(table, crop=False)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Return the rows as a Markdown table; the first row is its head."""
    head, *lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *lines]) + "\n"
