"""Text in the terminal, colored by heat."""

from collections.abc import Iterable

from rich.text import Text

COLORS = ("grey35", "blue", "cyan", "green", "yellow", "orange1", "red", "bright_magenta")


def colored(pieces: Iterable[tuple[str, float]]) -> Text:
    """pieces: text, and its heat in 0 to 1, from dark to bright."""
    text = Text()
    for piece, heat in pieces:
        text.append(piece, style=COLORS[round(heat * (len(COLORS) - 1))])
    return text
