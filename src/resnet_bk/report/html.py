"""HTML pages in one file each: there are no scripts, and a policy forbids the browser to load anything."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

from resnet_bk.config import visible

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
LEVELS = 8  # of heat, as in the terminal; page.css has their colors
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_SPACES = str.maketrans({" ": "␠", "\n": "␊", "\t": "␉"})


def table_html(rows: Sequence[Sequence[str]], caption: str, head: Sequence[str] = ()) -> str:
    """Return a table as HTML, in a box of its own that scrolls where the table is wider than the page.

    Args:
        rows: cells of each row; the first one is its name.
        caption: explanation above the table.
        head: names of the columns, if any.
    """
    columns = "".join(f'<th scope="col">{_cell(name)}</th>' for name in head)
    table, columns = ('<table class="columns">', f"<thead><tr>{columns}</tr></thead>") if head else ("<table>", "")
    lines = []
    for name, *values in rows:
        cells = "".join(f"<td>{_cell(value)}</td>" for value in values)
        lines.append(f'<tr><th scope="row">{_cell(name)}</th>{cells}</tr>')
    return (
        f'<div class="scrolls" role="region" tabindex="0" aria-label="{_escaped(caption)}">'
        f"{table}<caption>{_escaped(caption)}</caption>{columns}<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _escaped(text: str) -> str:
    """Return plain text as HTML. A browser, too, obeys characters that turn the direction of text."""
    return html.escape(visible(text))


def _cell(text: str) -> str:
    """Escape the text of a cell; allow a line break after each slash of a path, and none within short parentheses."""
    broken = _escaped(text).replace("/", "/<wbr>")
    return re.sub(r"\([^()<>]{1,30}\)", r'<span class="whole">\g<0></span>', broken)


def titled(heading: str, body: str) -> str:
    """Return a part of a section as HTML. body: HTML."""
    return f"<h3>{_escaped(heading)}</h3>{body}"


def paragraph(text: str) -> str:
    return f"<p>{_escaped(text)}</p>"


def preformatted(text: str) -> str:
    return f"<pre>{_escaped(text)}</pre>"


def heat_map(pieces: Sequence[tuple[str, float, str]]) -> str:
    """Return text as HTML, each piece on the color of its level, and a table with the notes of all pieces.

    pieces: text, heat in 0 to 1, and note, which is also shown where the pointer hovers.
    """
    spans = [
        f'<span class="{_level(heat)}" title="{_escaped(note)}">{_escaped(text)}</span>' for text, heat, note in pieces
    ]
    rows = [(str(i + 1), text.translate(_SPACES), note) for i, (text, _, note) in enumerate(pieces)]
    table = table_html(rows, "What each piece of the text cost, in order.", ["number", "text", "cost and decisions"])
    return f"<pre>{''.join(spans)}</pre><details><summary>The same as a table</summary>{table}</details>"


def scale(name: str, values: Sequence[tuple[str, float]]) -> str:
    """Return the legend of a heat map as HTML. name: what the values are; values: text and heat of each."""
    steps = "".join(f'<span class="{_level(heat)}">{_escaped(text)}</span>' for text, heat in values)
    return f'<p class="scale">{_escaped(name)}: {steps}</p>'


def _level(heat: float) -> str:
    return f"h{round(heat * (LEVELS - 1))}"


def page(title: str, intro: str, sections: Sequence[tuple[str, str]], footer: Sequence[str]) -> str:
    """Return a page.

    Args:
        title: of the page.
        intro: one or two sentences that say what the page shows.
        sections: heading and HTML of each section; a section without HTML is left out.
        footer: lines at its end, such as versions and commands.
    """
    parts = "".join(f"<section><h2>{_escaped(heading)}</h2>{body}</section>" for heading, body in sections if body)
    notes = "<br>".join(_escaped(line) for line in footer)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_escaped(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{STYLE}</style></head><body>'
        f"<main><h1>{_escaped(title)}</h1>{paragraph(intro)}{parts}</main><footer>{notes}</footer></body></html>\n"
    )
