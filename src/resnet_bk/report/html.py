"""One self-contained HTML page a run: figures as inline SVG, no script, no network."""

import html
import io
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; } th { font-weight: 600; }
th, td { text-align: left; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid #ddd; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; white-space: pre-wrap; }
svg { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
pre span { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
footer { color: #666; margin-top: 2rem; font-size: .85rem; }
@media print { body { margin: 0; } figure, table { break-inside: avoid; } }
"""


def figure_svg(figure: Figure) -> str:
    """The figure as an <svg> element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def training_curves(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Bits per byte and learning rate over seconds of training."""
    seconds = [line["seconds"] for line in metrics]
    figure = Figure(figsize=(9, 3.2))  # without pyplot, which would choose a backend for the whole process
    loss, rate = figure.subplots(1, 2)
    loss.plot(seconds, [line["bits_per_byte"] for line in metrics], color="#1f5fa8", linewidth=1.2)
    loss.set(xlabel="seconds of training", ylabel="bits per byte", title="Training loss")
    rate.plot(seconds, [line["bytes_per_second"] / 1000 for line in metrics], color="#b3541e", linewidth=1.2)
    rate.set(xlabel="seconds of training", ylabel="kB per second", title="Training speed", ylim=(0, None))
    for axes in (loss, rate):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def trade_off(points: Sequence[tuple[float, float]], front: Sequence[int], chosen: int, time_label: str) -> Figure:
    """Quality against time. points: (bits per byte, time); front, chosen: indices of points."""
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    axes.scatter([time for _, time in points], [bits for bits, _ in points], s=18, color="#999999", label="trials")
    line = sorted((points[i][1], points[i][0]) for i in front)
    axes.plot(*zip(*line, strict=True), color="#1f5fa8", linewidth=1.2, marker="o", markersize=4, label="Pareto front")
    bits, time = points[chosen]
    axes.plot([time], [bits], "*", color="#b3541e", markersize=14, label="chosen")
    axes.set(xlabel=time_label, ylabel="held-out bits per byte")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def figures_html(figures: Sequence[Figure]) -> str:
    return "".join(f"<figure>{figure_svg(figure)}</figure>" for figure in figures)


def table_html(rows: Sequence[Sequence[str]]) -> str:
    """The first cell of each row is its name."""
    lines = []
    for name, *values in rows:
        cells = "".join(f"<td>{html.escape(value)}</td>" for value in values)
        lines.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def heat_map(pieces: Sequence[tuple[str, float, str]]) -> str:
    """Text as a <pre>, each piece on a background from white to orange. pieces: text, heat in 0 to 1, what a pointer
    that rests on it is told."""
    spans = []
    for text, heat, note in pieces:
        red, green, blue = (round(255 + heat * (full - 255)) for full in (236, 112, 20))
        shown = html.escape(text.replace("\r", "\N{SYMBOL FOR CARRIAGE RETURN}"))
        style = f"background:rgb({red},{green},{blue})"
        spans.append(f'<span style="{style}" title="{html.escape(note, quote=True)}">{shown}</span>')
    return f"<pre>{''.join(spans)}</pre>"


def page(title: str, rows: Sequence[Sequence[str]], sections: Sequence[tuple[str, str]], footer: Sequence[str]) -> str:
    """The whole page. rows: name and values of each line of the table; sections: heading and HTML; footer: versions,
    commands."""
    parts = "".join(f"<h2>{html.escape(heading)}</h2>{body}" for heading, body in sections)
    notes = "<br>".join(html.escape(line) for line in footer)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>{html.escape(title)}</h1>{table_html(rows)}{parts}<footer>{notes}</footer></body></html>\n"
    )
