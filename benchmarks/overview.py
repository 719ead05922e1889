"""Draw the figure of the README, docs/overview.svg, from the pages in benchmarks/results: ``python overview.py``."""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from figure import column
from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
LEARNING = RESULTS / "2026-11-30-epyc-2-cores-learning-all.md"
DECODE = RESULTS / "2026-11-30-epyc-2-cores-decode-many.md"
# Colors that color-blind people tell apart, and a marker each.
FAMILIES = {
    "ours": ("#0072b2", "o"),
    "Llama": ("#d55e00", "s"),
    "GPT-2": ("#009e73", "^"),
    "Mamba-2": ("#cc79a7", "D"),
}
FIRST = 15  # seconds; before, all scores are off the axes
Curve = tuple[list[float], list[float]]  # seconds, bits per byte


def curves(page: str) -> dict[tuple[str, bool], Curve]:
    """Return the held-out scores of each family while it trains, without and with n-gram memory, in its best window."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    start = next(i for i, cells in enumerate(lines) if cells[:3] == ["model, window", "memory", "seed"])
    seconds = [float(cell.removesuffix(" s")) for cell in lines[start][3:]]
    found: dict[tuple[str, bool], Curve] = {}
    for name, memory, _, *scores in lines[start + 2 :]:
        points = [(s, float(x)) for s, x in zip(seconds, scores, strict=True) if x and s >= FIRST]
        curve, key = ([s for s, _ in points], [x for _, x in points]), (name.split()[0], memory == "yes")
        if key not in found or curve[1][-1] < found[key][1][-1]:
            found[key] = curve
    return found


def decoding() -> dict[str, float]:
    """Return bytes per second of models of four layers of width 128, ours on the engine."""
    page = DECODE.read_text("utf-8")
    ours = column(page, "engine, bytes/s")["plain, 4 blocks of 128"]
    return {"ours": ours, **column(page, "bytes/s")}


def draw(path: Path) -> None:
    """Draw the figure."""
    with mpl.rc_context({"svg.hashsalt": "resnet-bk", "font.size": 10, "svg.fonttype": "none"}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.3), layout="constrained")
        _draw_curves(left, curves(LEARNING.read_text("utf-8")))
        _draw_speeds(right, decoding())
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
        plt.close(figure)


def _draw_curves(axes: Axes, found: dict[tuple[str, bool], Curve]) -> None:
    for (name, with_memory), (seconds, bits) in found.items():
        color, marker = FAMILIES[name]
        style = "-" if with_memory else ":"
        axes.plot(seconds, bits, style, color=color, marker=marker, markersize=4, label=name if with_memory else None)
    for style, text in (("-", "with memory"), (":", "without")):
        axes.plot([], [], style, color="black", label=text)
    axes.set(xscale="log", xticks=[15, 30, 60, 120, 240], xticklabels=[15, 30, 60, 120, 240], ylim=(0.8, 3.4))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="seconds of training on one core", ylabel="bits per byte, 64 KiB held out")
    axes.set_title("Learning (lower is better)", loc="left")
    axes.legend(frameon=False, loc="upper right", labelspacing=0.25, borderaxespad=0)


def _draw_speeds(axes: Axes, speeds: dict[str, float]) -> None:
    places = range(len(FAMILIES))[::-1]
    for place, (name, (color, _)) in zip(places, FAMILIES.items(), strict=True):
        axes.barh(place, speeds[name], color=color, height=0.6)
        axes.annotate(f"{speeds[name]:,.0f}", (speeds[name], place), (4, 0), textcoords="offset points", va="center")
    axes.set(yticks=places, yticklabels=["ours, engine", *(f"{name}, torch" for name in list(FAMILIES)[1:])])
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="bytes per second, one thread (higher is better)", xlim=(0, 1.2 * max(speeds.values())))
    axes.set_title("Decoding, 4 layers of width 128", loc="left")


if __name__ == "__main__":
    draw(ROOT / "docs/overview.svg")
