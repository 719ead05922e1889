"""Draw docs/peers.svg, a figure of docs/results.md, from the tables of a results page of benchmarks/peers.py.

    python benchmarks/figure.py [--page benchmarks/results/PAGE.md] [--out docs/peers.svg]

Runs no model: every number comes from the page. The same page gives the same file, byte for byte.
"""

import argparse
import re
from pathlib import Path

import matplotlib
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "benchmarks/results/2026-11-26-epyc-2-cores-peers.md"
LENGTH = "N = 2,048"  # the prefill that is shown, and the column of the page that has it
FAST = "adaptive 64, 2-2-0"  # the shape that the preset `fast` had
WINDOWS = ("bits per byte, windows of 256", "bits per byte, windows of 1,024")  # the better one counts

# First word of a model's name -> label, color, marker. Colors of Okabe and Ito, which color-blind readers can tell
# apart; the markers differ too.
FAMILIES = {
    "adaptive": ("ResNet-BK, adaptive", "#0072B2", "o"),
    "plain": ("ResNet-BK, plain", "#56B4E9", "s"),
    "Llama": ("Llama", "#D55E00", "^"),
    "nanoGPT": ("GPT-2 (nanoGPT)", "#E69F00", "v"),
    "Mamba-2": ("Mamba-2", "#009E73", "D"),
}


def column(page: str, name: str) -> dict[str, float]:
    """Return the medians of a table column by model.

    Args:
        page: text of the results page, in Markdown.
        name: header of the column; the first table that has it counts.
    """
    found: dict[str, float] = {}
    index = None
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if index is None and name in cells:
            index = cells.index(name)
        elif index is not None and not cells:
            return found
        elif index is not None and not cells[0].startswith("---"):
            found[cells[0]] = float(cells[index].split()[0].replace(",", ""))
    raise SystemExit(f"page: got no table with a column {name!r}; give a results page of benchmarks/peers.py")


def width(model: str) -> int:
    """Return the model width that the name of a model begins with, such as 64 of "adaptive 64, 2-2-0"."""
    return int(model.split()[1].rstrip(","))


def draw(page: str) -> Figure:
    """Return the figure: held-out bits per byte against prefill time per byte, one color per family."""
    scores = [column(page, name) for name in WINDOWS]
    bits = {name: min(score[name] for score in scores) for name in scores[0]}
    microseconds = {name: 1000 * value for name, value in column(page, LENGTH).items()}
    figure = Figure(figsize=(8, 4.6), facecolor="white", layout="constrained")  # white: readable on dark pages too
    axes = figure.subplots()
    for family, (label, color, marker) in FAMILIES.items():
        models = sorted((name for name in bits if name.split()[0] == family), key=lambda name: microseconds[name])
        x, y = [microseconds[name] for name in models], [bits[name] for name in models]
        axes.plot(x, y, color=color, linewidth=1, alpha=0.5)
        axes.scatter(x, y, [width(name) for name in models], color=color, marker=marker, zorder=3, label=label)
    place = microseconds[FAST], bits[FAST]
    axes.annotate("preset fast", place, (-9, 0), textcoords="offset points", ha="right", va="center")
    budget = re.search(r"\d+ s of one core's time", page)
    _dress(axes, budget[0] if budget else "the page's training time")
    return figure


def _dress(axes: Axes, budget: str) -> None:
    axes.set(xscale="log", yscale="log", xlim=(3, 100), ylim=(1.35, 3.4))
    axes.set_xlabel(f"prefill, microseconds per byte at {LENGTH} (two CPU cores, log scale)")
    axes.set_ylabel(f"held-out bits per byte after training\nfor {budget} (log scale)")
    for axis, ticks in ((axes.xaxis, (3, 5, 10, 20, 50, 100)), (axes.yaxis, (1.4, 1.6, 1.8, 2, 2.5, 3))):
        axis.set_major_locator(ticker.FixedLocator(ticks))
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    title = "lower left is better; larger markers are wider models"
    legend = axes.legend(loc="upper left", title=title, framealpha=1, edgecolor="white")
    legend.set_alignment("left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE, help="results page of benchmarks/peers.py")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/peers.svg", help="figure to write")
    options = parser.parse_args()
    with matplotlib.rc_context({"svg.hashsalt": "peers"}):  # ids in the file do not change from run to run
        draw(options.page.read_text()).savefig(options.out, metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
