"""Self-contained HTML pages: figures are inline SVG, and there are no scripts and no references to the network."""

import contextlib
import html
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from resnet_bk.config import visible
from resnet_bk.extras import extra
from resnet_bk.folders import HELD_OUT

with extra("train"):
    from matplotlib import color_sequences, colormaps, ticker
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

Spread = tuple[float, float, float]  # median, minimum, maximum

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 54rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; margin-bottom: 0; }
h1, h3, footer { overflow-wrap: anywhere; }
.scrolls { overflow-x: auto; } table { border-collapse: collapse; } th { font-weight: 600; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1rem .3rem 0; border-bottom: 1px solid #ddd; }
.columns { font-size: .8rem; } .columns th, .columns td { padding-right: .6rem; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
.pairs { orphans: 1; widows: 1; } .pairs figure { display: inline-block; width: 49%; vertical-align: top; }
@media screen and (max-width: 45rem) { .pairs figure { width: 100%; } }
pre span { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
footer { color: #666; margin-top: 2rem; font-size: .85rem; }
@media print {
  body { margin: 0; max-width: none; } figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .scrolls { overflow: visible; } .columns { font-size: 7pt; }
}
"""


@contextlib.contextmanager
def _any_characters() -> Iterator[None]:
    """Draw boxes for characters that the font lacks, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def figure_svg(figure: Figure) -> str:
    """Return the figure as an <svg> element."""
    buffer = io.StringIO()
    with _any_characters():
        figure.savefig(buffer, format="svg", bbox_inches="tight")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def training_curves(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Draw bits per byte and speed over seconds of training. metrics: lines of metrics.jsonl."""
    seconds = [line["seconds"] for line in metrics]
    figure = Figure(figsize=(9, 3.2))  # not by pyplot, which would choose a backend for the whole process
    loss, speed = figure.subplots(1, 2)
    loss.plot(seconds, [line["bits_per_byte"] for line in metrics], color="#1f5fa8", linewidth=1.2)
    if scored := [line for line in metrics if HELD_OUT in line]:
        loss.plot(
            *zip(*((line["seconds"], line[HELD_OUT]) for line in scored), strict=True),
            "o-",
            color="#2e7d4f",
            label="held out",
        )
        loss.legend(frameon=False)
    loss.set(xlabel="seconds of training", ylabel="bits per byte", title="Training loss")
    speed.plot(seconds, [line["bytes_per_second"] / 1000 for line in metrics], color="#b3541e", linewidth=1.2)
    speed.set(xlabel="seconds of training", ylabel="kB per second", title="Training speed", ylim=(0, None))
    for axes in (loss, speed):
        _lighten(axes)
    return figure


def trade_off(points: Sequence[tuple[float, float]], front: Sequence[int], chosen: int, time_label: str) -> Figure:
    """Draw quality against time.

    Args:
        points: bits per byte and time of each trial.
        front: indices of the points on the Pareto front.
        chosen: index of the chosen point.
        time_label: label of the time axis.
    """
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    axes.scatter([time for _, time in points], [bits for bits, _ in points], s=18, color="#999999", label="trials")
    line = sorted((points[i][1], points[i][0]) for i in front)
    axes.plot(*zip(*line, strict=True), color="#1f5fa8", linewidth=1.2, marker="o", markersize=4, label="Pareto front")
    bits, time = points[chosen]
    axes.plot([time], [bits], "*", color="#b3541e", markersize=14, label="chosen")
    axes.set(xlabel=time_label, ylabel="held-out bits per byte")
    axes.legend(frameon=False)
    _lighten(axes)
    return figure


def compared_curves(curves: Mapping[str, Sequence[Sequence[tuple[float, float, float]]]], read: str) -> Figure:
    """Draw the training loss of several runs over time and over the text read.

    Args:
        curves: name -> runs drawn in one color; a run has seconds, amount read, and bits per byte of each log line.
        read: label of the axis of the amount read.
    """
    figure = Figure(figsize=(7.5, 7.5), layout="constrained")
    for x, (axes, label) in enumerate(zip(figure.subplots(2, 1), ("seconds of training", read), strict=True)):
        for color, (name, runs) in zip(_colors(len(curves)), curves.items(), strict=True):
            for i, run in enumerate(runs):
                own = {"label": visible(name)} if i == 0 else {}
                bits = [line[2] for line in run]
                axes.plot([line[x] for line in run], bits, ".-", color=color, linewidth=1.2, markersize=2, **own)
        axes.set(
            xlabel=label, ylabel="training bits per byte", yscale="log"
        )  # log scale shows the end of training better
        axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=10, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(ticker.ScalarFormatter())
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        _lighten(axes)
    legend = figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may contain dollar signs
    return figure


def pareto(points: Mapping[str, tuple[Spread, Spread]], front: Sequence[int], cost_label: str) -> Figure:
    """Draw quality against a cost.

    Args:
        points: name -> bits per byte and cost.
        front: indices of the points on the Pareto front, cheapest first.
        cost_label: label of the cost axis.
    """
    figure = Figure(figsize=(5.5, 4.2))
    axes = figure.subplots()
    places = [(cost[0], bits[0]) for bits, cost in points.values()]
    axes.plot(*zip(*(places[i] for i in front), strict=True), color="#999999", linewidth=1.2, label="Pareto front")
    for color, (bits, cost) in zip(_colors(len(points)), points.values(), strict=True):
        axes.plot(cost[1:], [bits[0]] * 2, color=color, linewidth=1)
        axes.plot([cost[0]] * 2, bits[1:], color=color, linewidth=1)
        axes.plot(cost[0], bits[0], "o", color=color, markersize=5)
    axes.set(xlabel=cost_label, ylabel="held-out bits per byte")
    axes.margins(0.15)
    axes.legend(frameon=False)
    _lighten(axes)
    _label(axes, places, list(map(visible, points)))
    return figure


def _lighten(axes: Axes) -> None:
    """Use a light grid and no upper and right border."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _colors(count: int) -> list[Any]:
    """Return colors that can be distinguished."""
    if count <= 10:
        return list(color_sequences["tab10"][:count])
    return [colormaps["turbo"](i / (count - 1)) for i in range(count)]


@_any_characters()
def _label(axes: Axes, places: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Write a name next to each place, on the side where it covers least and stays within the axes."""
    axes.autoscale_view()  # else the positions of the places are settled only when the figure is drawn
    renderer = FigureCanvasAgg(axes.get_figure(root=True)).get_renderer()
    frame = axes.get_window_extent(renderer)
    drawn = [line.get_transform().transform_path(line.get_path()).interpolated(20) for line in axes.lines]
    dots = np.concatenate([np.asarray(path.vertices) for path in drawn])
    taken: list[Bbox] = []
    sides = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]

    def box(text: Annotation, side: tuple[int, int]) -> Bbox:
        text.xyann = (6 * side[0], 6 * side[1])  # points
        text.set(ha=("center", "left", "right")[side[0]], va=("center", "bottom", "top")[side[1]])
        return text.get_window_extent(renderer)

    def crowding(one: Bbox) -> float:
        lines = 16 * float(((dots > one.min) & (dots < one.max)).all(axis=1).sum())
        return lines + _overlap(one, one) - _overlap(one, frame) + sum(_overlap(one, other) for other in taken)

    for name, place in zip(names, places, strict=True):
        text = axes.annotate(name, place, (0, 0), textcoords="offset points", fontsize=8, parse_math=False)
        best = min(sides, key=lambda side: crowding(box(text, side)))
        taken.append(box(text, best))


def _overlap(one: Bbox, other: Bbox) -> float:
    """Return the area that two boxes share."""
    common = Bbox.intersection(one, other)
    return 0.0 if common is None else float(common.width * common.height)


def figures_html(figures: Sequence[Figure]) -> str:
    """Return figures as HTML, one below the other."""
    return "".join(f"<figure>{figure_svg(figure)}</figure>" for figure in figures)


def paired(figures: Sequence[Figure]) -> str:
    """Return figures as HTML, two side by side if the page is wide enough."""
    return f'<div class="pairs">{figures_html(figures)}</div>'


def table_html(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Return a table as HTML. The first cell of each row is its name. head: names of the columns, if any."""
    lines = [f"<tr>{''.join(f'<th>{_cell(name)}</th>' for name in head)}</tr>"] if head else []
    for name, *values in rows:
        cells = "".join(f"<td>{_cell(value)}</td>" for value in values)
        lines.append(f"<tr><th>{_cell(name)}</th>{cells}</tr>")
    table = '<table class="columns">' if head else "<table>"
    return f'<div class="scrolls">{table}{"".join(lines)}</table></div>'


def _escaped(text: str) -> str:
    """Return plain text as HTML. A browser, too, obeys characters that turn the direction of text."""
    return html.escape(visible(text))


def _cell(text: str) -> str:
    """Escape the text of a cell, and allow a line break after each slash of a path."""
    return _escaped(text).replace("/", "/<wbr>")


def titled(heading: str, body: str) -> str:
    """Return a part of a section as HTML. body: HTML."""
    return f"<h3>{_escaped(heading)}</h3>{body}"


def paragraph(text: str) -> str:
    return f"<p>{_escaped(text)}</p>"


def preformatted(text: str) -> str:
    return f"<pre>{_escaped(text)}</pre>"


def heat_map(pieces: Sequence[tuple[str, float, str]]) -> str:
    """Return text as a <pre>, each piece on a background from white to orange.

    pieces: text, heat in 0 to 1, and note, which is shown where the pointer hovers.
    """
    spans = []
    for text, heat, note in pieces:
        red, green, blue = (round(255 + heat * (full - 255)) for full in (236, 112, 20))
        style = f"background:rgb({red},{green},{blue})"
        spans.append(f'<span style="{style}" title="{_escaped(note)}">{_escaped(text)}</span>')
    return f"<pre>{''.join(spans)}</pre>"


def page(title: str, rows: Sequence[Sequence[str]], sections: Sequence[tuple[str, str]], footer: Sequence[str]) -> str:
    """Return a page.

    Args:
        title: of the page.
        rows: name and values of each row of the table at its top.
        sections: heading and HTML of each section.
        footer: lines at its end, such as versions and commands.
    """
    parts = "".join(f"<h2>{_escaped(heading)}</h2>{body}" for heading, body in sections)
    notes = "<br>".join(_escaped(line) for line in footer)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{_escaped(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>'
        f"<h1>{_escaped(title)}</h1>{table_html(rows)}{parts}<footer>{notes}</footer></body></html>\n"
    )
