"""Figures as inline SVG whose text is text, and whose colors are those of the page."""

import contextlib
import html
import io
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from resnet_bk.config import visible
from resnet_bk.extras import extra
from resnet_bk.folders import HELD_OUT, METRICS

with extra("train"):
    import matplotlib
    from matplotlib import ticker
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

Spread = tuple[float, float, float]  # median, minimum, maximum

MOST_POINTS = 1000  # of a curve; more would only make the page larger
_SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#1a1a1a")  # --s0 to --s4 of page.css, in its light form
_MARKERS, _DASHES = "os^Dv<>", ("-", "--", "-.", ":")
_LINE, _EDGE = "#cccccc", "#767676"
_VARIABLES = {"#000000": "text", _LINE: "line", _EDGE: "edge", **{color: f"s{i}" for i, color in enumerate(_SERIES)}}
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text that can be selected, searched and read aloud
    "path.simplify": False,  # every point of a curve is drawn
    "font.sans-serif": ["DejaVu Sans"],
    "svg.hashsalt": None,  # with one salt, the markers of all figures of a page would have the same ids
}
# What matplotlib numbers: several figures on one page would have the same ids.
_NUMBERED = re.compile(r' id="(?:\w+\.)?[a-zA-Z]\w*_\d+"')


@contextlib.contextmanager
def _any_characters() -> Iterator[None]:
    """Draw boxes for characters that the font lacks, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def figure_svg(figure: Figure) -> str:
    """Return the figure as an <svg> element, on white. Its text alternative names the axes."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    (axes,) = figure.axes
    with _any_characters(), matplotlib.rc_context(_SETTINGS):
        for line in axes.lines:
            line.recache(always=True)  # a line keeps the setting of when it was drawn first
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata=nothing)
    text = buffer.getvalue()
    name = html.escape(f"Chart: {axes.get_ylabel()} over {axes.get_xlabel()}")
    return _NUMBERED.sub("", text[text.index("<svg") :]).replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


def figures_html(figures: Sequence[Figure]) -> str:
    """Return figures as HTML, side by side where the page is wide enough. The label of each is its caption."""
    parts = []
    for figure in figures:
        figure.set_facecolor("none")
        figure.axes[0].set_facecolor("none")
        colored = re.sub("#[0-9a-f]{6}", _variable, figure_svg(figure))
        caption = html.escape(visible(str(figure.get_label())))
        parts.append(f"<figure>{colored}<figcaption>{caption}</figcaption></figure>")
    return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def _variable(color: re.Match[str]) -> str:
    """Return the page's variable for a color of a figure."""
    return f"var(--{_VARIABLES[color[0]]})" if color[0] in _VARIABLES else color[0]


def thinned(lines: Sequence[Any]) -> tuple[Sequence[Any], int]:
    """Return every k-th line, counted from the last, so that at most MOST_POINTS are left; and k."""
    every = -(-len(lines) // MOST_POINTS) or 1
    return lines[(len(lines) - 1) % every :: every], every


def training_curves(metrics: Sequence[dict[str, Any]]) -> list[Figure]:
    """Draw bits per byte, and speed, over seconds of training. metrics: lines of metrics.jsonl."""
    drawn, every = thinned(metrics)
    points = f" A point is a line of {METRICS}." if every == 1 else f" A point is one in {every} lines of {METRICS}."
    seconds, bits = ([line[name] for line in drawn] for name in ("seconds", "bits_per_byte"))
    loss, axes = _figure("seconds of training", "bits per byte")
    axes.plot(seconds, bits, label="training text", gid="loss", markersize=2, **_series(0))
    caption = f"Loss on the training text: {bits[0]:.3f} at first, {bits[-1]:.3f} at last. Lower is better."
    if scored := [(line["seconds"], line[HELD_OUT]) for line in metrics if HELD_OUT in line]:
        axes.plot(*zip(*scored, strict=True), label="held-out text", gid="held-out", markersize=4, **_series(1))
        least = min(value for _, value in scored)
        caption += f" On held-out text: {scored[0][1]:.3f} at first, {scored[-1][1]:.3f} at last, {least:.3f} at best."
    _legend(loss)
    loss.set_label(caption + points)
    speed, axes = _figure("seconds of training", "training speed, kB per second")
    pace = [line["bytes_per_second"] / 1000 for line in drawn]
    axes.plot(seconds, pace, gid="speed", markersize=2, **_series(0))
    axes.set_ylim(0, None)
    caption = (
        f"Text read per second of training: {min(pace):.1f} to {max(pace):.1f} kB, median {np.median(pace):.1f} kB."
    )
    speed.set_label(caption + points)
    return [loss, speed]


def trade_off(points: Sequence[tuple[float, float]], front: Sequence[int], chosen: int, time_label: str) -> Figure:
    """Draw quality against time.

    Args:
        points: bits per byte and time of each trial.
        front: indices of the points on the Pareto front.
        chosen: index of the chosen point.
        time_label: label of the time axis.
    """
    figure, axes = _figure(time_label, "held-out bits per byte")
    axes.scatter([time for _, time in points], [bits for bits, _ in points], s=18, color=_EDGE, label="trials")
    line = sorted((points[i][1], points[i][0]) for i in front)
    axes.plot(*zip(*line, strict=True), label="Pareto front", markersize=4, **_series(0))
    bits, time = points[chosen]
    axes.plot([time], [bits], "*", color=_SERIES[1], markersize=14, label="chosen")
    _legend(figure)
    return figure


def compared_curves(curves: Mapping[str, Sequence[Sequence[tuple[float, float, float]]]], read: str) -> list[Figure]:
    """Draw the training loss of several runs over time, and over the text read.

    Args:
        curves: name -> runs drawn in one style; a run has seconds, amount read, and bits per byte of each log line.
        read: label of the axis of the amount read.
    """
    figures = []
    last = {name: " and ".join(f"{run[-1][2]:.3f}" for run in runs) for name, runs in curves.items() if runs}
    ends = "; ".join(f"{name} {bits}" for name, bits in last.items())
    for x, label in enumerate(("seconds of training", read)):
        figure, axes = _figure(label, "training bits per byte")
        for number, (name, runs) in enumerate(curves.items()):
            for i, run in enumerate(runs):
                drawn, _ = thinned(run)
                own: dict[str, Any] = {"label": visible(name)} if i == 0 else {}
                place, bits = [line[x] for line in drawn], [line[2] for line in drawn]
                axes.plot(place, bits, gid=f"curve-{x}-{number}-{i}", markersize=2.5, **own, **_series(number))
        axes.set_yscale("log")  # shows the end of training better
        axes.yaxis.set_major_locator(ticker.MaxNLocator(nbins=10, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(ticker.ScalarFormatter())
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        _legend(figure)
        figure.set_label(f"The vertical scale is logarithmic. Bits per byte at the last log line: {ends}.")
        figures.append(figure)
    return figures


def pareto(points: Mapping[str, tuple[Spread, Spread]], front: Sequence[int], cost_label: str) -> Figure:
    """Draw quality against a cost.

    Args:
        points: name -> bits per byte and cost.
        front: indices of the points on the Pareto front, cheapest first.
        cost_label: label of the cost axis.
    """
    figure, axes = _figure(cost_label, "held-out bits per byte")
    places = [(cost[0], bits[0]) for bits, cost in points.values()]
    axes.plot(*zip(*(places[i] for i in front), strict=True), color=_EDGE, linewidth=1.2, label="Pareto front")
    for number, (bits, cost) in enumerate(points.values()):
        style = _series(number) | {"linestyle": "-", "linewidth": 1}
        axes.plot(cost[1:], [bits[0]] * 2, **style | {"marker": None})
        axes.plot([cost[0]] * 2, bits[1:], **style | {"marker": None})
        axes.plot(cost[0], bits[0], markersize=5, **style)
    if max(cost[2] for _, cost in points.values()) >= 1e5:
        axes.xaxis.set_major_formatter(ticker.EngFormatter(sep="\N{NO-BREAK SPACE}"))
    axes.margins(0.15)
    if len(front) > 1:
        _legend(figure)
    names = [visible(name) for name in points]
    _label(axes, places, names)
    best = "; ".join(names[i] for i in front)
    bars = (
        " Bars span the runs of a group."
        if any(low < high for point in points.values() for _, low, high in point)
        else ""
    )
    figure.set_label(f"Lower and further to the left is better.{bars} On the Pareto front, cheapest first: {best}.")
    return figure


def _figure(x: str, y: str) -> tuple[Figure, Axes]:
    """Return an empty figure, one of two that stand side by side, and its axes with their labels."""
    figure = Figure(figsize=(4.2, 3.1), layout="constrained")  # not by pyplot, which chooses a backend for the process
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color=_LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_EDGE)
    axes.tick_params(color=_EDGE)
    return figure, axes


def _series(number: int) -> dict[str, Any]:
    """Return the style of a series. Color, marker and dashes differ, so that none of them is needed alone."""
    cycle = (values[number % len(values)] for values in (_SERIES, _MARKERS, _DASHES))
    return {"linewidth": 1.2, **dict(zip(("color", "marker", "linestyle"), cycle, strict=True))}


def _legend(figure: Figure) -> None:
    """Add a legend above the axes, where it hides nothing; each row makes the figure taller."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    names = [textwrap.fill(name, 42) if len(name) > 42 else name for name in names]
    columns = 1 if max(map(len, names)) > 14 else 2
    rows = sum(max(map(len, map(str.splitlines, names[i : i + columns]))) for i in range(0, len(names), columns))
    figure.set_figheight(figure.get_figheight() + 0.2 * rows)
    legend = figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name may contain dollar signs


@_any_characters()
def _label(axes: Axes, places: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Write a name next to each place, on the side where it covers least and stays within the axes."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # else the positions of the places are settled only when the figure is drawn
    renderer = FigureCanvasAgg(figure).get_renderer()
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
        short = textwrap.fill(name, 24) if len(name) > 24 else name
        text = axes.annotate(short, place, (0, 0), textcoords="offset points", fontsize=9, parse_math=False)
        best = min(sides, key=lambda side: crowding(box(text, side)))
        taken.append(box(text, best))


def _overlap(one: Bbox, other: Bbox) -> float:
    """Return the area that two boxes share."""
    common = Bbox.intersection(one, other)
    return 0.0 if common is None else float(common.width * common.height)
