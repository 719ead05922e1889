"""Text in the terminal: plain lines, text of a model, and text colored by heat.

rich reads strings as markup and emoji codes, and a terminal obeys control characters. The functions here print a string
as its characters only; tables.py does the same for tables.
"""

import os
import re
from collections.abc import Iterable

from resnet_bk.config import visible
from resnet_bk.extras import extra

with extra("train"):
    from rich.console import Console
    from rich.segment import Segment, Segments
    from rich.text import Text

COLORS = ("grey35", "blue", "cyan", "green", "yellow", "orange1", "red", "bright_magenta")


def console() -> Console:
    """Return a console on standard output that prints strings as they are."""
    for name in ("COLUMNS", "LINES"):  # rich prints nothing if one is 0, and fails if one is "²"
        if not re.fullmatch("[1-9][0-9]{0,4}", os.environ.get(name, "")):
            os.environ.pop(name, None)
    return Console(markup=False, emoji=False, highlight=False)


def say(console: Console, text: str, style: str = "") -> None:
    """Print a line of plain text. It is not wrapped, so that paths in it can be copied."""
    console.print(plain(text, style), soft_wrap=True)


def plain(text: str, style: str = "") -> Text:
    return Text(visible(text), style, overflow="fold")


def show(console: Console, text: str) -> None:
    """Print a text of the user or of a model: unchanged into a file or a pipe, :func:`visible` in a terminal."""
    show_piece(console, text)
    show_piece(console, "\n")


def show_piece(console: Console, text: str) -> None:
    """Print a piece of a text as :func:`show` does, without a line end after it."""
    if console.file.isatty():
        console.print(plain(text), soft_wrap=True, end="")
    else:
        console.print(Segments([Segment(text)]), soft_wrap=True, end="")  # nothing if the console is quiet
    console.file.flush()


def colored(pieces: Iterable[tuple[str, float]]) -> Text:
    """Color pieces of text by their heat: 0 is dark, 1 is bright. pieces: text and heat."""
    text = Text()
    for piece, heat in pieces:
        text.append(visible(piece), style=COLORS[round(heat * (len(COLORS) - 1))])
    return text
