"""Text colored by heat in the terminal."""

from collections.abc import Iterable

from resnet_bk.extras import extra

with extra("train"):
    from rich.text import Text

COLORS = ("grey35", "blue", "cyan", "green", "yellow", "orange1", "red", "bright_magenta")


def colored(pieces: Iterable[tuple[str, float]]) -> Text:
    """Color pieces of text by their heat: 0 is dark, 1 is bright. pieces: text and heat."""
    text = Text()
    for piece, heat in pieces:
        text.append(piece, style=COLORS[round(heat * (len(COLORS) - 1))])
    return text
