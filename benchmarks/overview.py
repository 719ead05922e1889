"""Draw the figure of the README, docs/overview.svg, from the pages in benchmarks/results: ``python overview.py``."""

import math
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from figure import column

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
LEARNING, DECODE = RESULTS / "2026-11-30-epyc-2-cores-learning.md", RESULTS / "2026-11-30-epyc-2-cores-decode.md"
OURS, OTHERS, LIGHT = "#0072b2", "#7f7f7f", "#c8c8c8"  # told apart by brightness too
FAMILIES = ("ours", "Llama", "GPT-2", "Mamba-2")


def best_bits() -> dict[tuple[str, bool], float]:
    """Return the best bits per byte of each family, without and with n-gram memory."""
    found: dict[tuple[str, bool], float] = {}
    for line in LEARNING.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| 240 "):
            key = cells[1].split()[0], cells[2] == "yes"
            found[key] = min(found.get(key, math.inf), float(cells[8].split()[0]))
    return found


def decoding() -> dict[str, float]:
    """Return bytes per second of models of four layers of width 128, ours on the engine."""
    page = DECODE.read_text("utf-8")
    ours = column(page, "engine, bytes/s")["plain, 4 blocks of 128"]
    return {"ours": ours, **column(page, "bytes/s")}


def draw(path: Path) -> None:
    """Draw the figure."""
    with mpl.rc_context({"svg.hashsalt": "resnet-bk", "font.size": 10, "svg.fonttype": "none"}):
        _draw(path)


def _draw(path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 2.9), layout="constrained")
    places = range(len(FAMILIES))[::-1]
    bits, speeds = best_bits(), decoding()
    for place, name in zip(places, FAMILIES, strict=True):
        color = OURS if name == "ours" else OTHERS
        without, with_memory = bits[name, False], bits[name, True]
        left.plot([with_memory, without], [place, place], color=LIGHT, zorder=1)
        left.scatter(without, place, s=60, facecolors="white", edgecolors=color)
        left.scatter(with_memory, place, s=60, color=color)
        for value in (without, with_memory):
            left.annotate(f"{value:.2f}", (value, place), (0, 7), textcoords="offset points", ha="center")
        right.barh(place, speeds[name], color=color, height=0.6)
        right.annotate(f"{speeds[name]:,.0f}", (speeds[name], place), (4, 0), textcoords="offset points", va="center")
    for with_memory, text in ((True, "with n-gram memory"), (False, "without")):
        left.annotate(text, (bits["ours", with_memory], 3), (0, 21), textcoords="offset points", ha="center")
    left.set(yticks=places, yticklabels=FAMILIES, ylim=(-0.5, 4.1), xlim=(0.9, 1.5))
    left.set_xlabel("held-out bits per byte (lower is better)")
    left.set_title("After 240 s of training on one core", loc="left")
    right.set(yticks=places, yticklabels=("ours, engine", *(f"{name}, torch" for name in FAMILIES[1:])))
    right.set_xlabel("bytes per second (higher is better)")
    right.set_title("Decoding, four layers of width 128, one thread", loc="left")
    right.set_xlim(0, 1.2 * max(speeds.values()))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    draw(ROOT / "docs/overview.svg")
