# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What each byte cost
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/resnet-bk/resnet-bk/blob/main/notebooks/what_each_byte_cost.ipynb)
#
# A Transformer spends the same compute on every token. The models of ResNet-BK do not have to. This notebook reads a short
# text with two of them and colors each byte by what it cost and by how surprising it was. The first model comes with the
# package and runs most of its blocks once per word. The second one is trained here and lets each byte leave early.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("resnet_bk") is None:  # on Colab, whose torch stays as it is
    package = "resnet-bk[train,cpu-fast] @ git+https://github.com/resnet-bk/resnet-bk"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)

# %%
import os
import shutil
from pathlib import Path

import numpy as np
from IPython.display import Markdown
from matplotlib import pyplot as plt
from rich.console import Console

from resnet_bk.adaptive.depth import DepthRecord
from resnet_bk.adaptive.multiscale import ChunkRecord
from resnet_bk.config import DataConfig, EvalConfig, ModelConfig, TrainConfig
from resnet_bk.hf import quiet_transformers
from resnet_bk.inference.loading import load
from resnet_bk.report.tables import markdown_table
from resnet_bk.study.evaluation import evaluate_checkpoint
from resnet_bk.study.inspection import spend
from resnet_bk.study.measure import rank_correlation
from resnet_bk.study.run import train

SECONDS = float(os.environ.get("RESNET_BK_NOTEBOOK_SECONDS", "120"))  # of training
RUN = Path("runs/what_each_byte_cost")
shutil.rmtree(RUN, ignore_errors=True)  # the run of an earlier execution
quiet_transformers()
silent = Console(quiet=True, force_jupyter=False)

# %% [markdown]
# ## The text
#
# Any text of a few hundred ASCII characters will do. The models below have read Python code, so code suits them.

# %%
TEXT = '''\
class Inventory:
    """Count the things on a shelf."""

    def __init__(self, things=()):
        self.counts = {}
        for thing in things:
            self.add(thing)

    def add(self, thing, number=1):
        if number < 0:
            raise ValueError(f"cannot add {number} of {thing!r}")
        self.counts[thing] = self.counts.get(thing, 0) + number

    def __len__(self):
        return sum(self.counts.values())
'''

# %% [markdown]
# The next cell draws a text as a grid of characters. The background of a character is darker where its value is higher. A
# blue bar follows each character that ends a chunk, if the model has chunks.

# %%
COLUMNS = 72


def draw(values, title, ends=()):
    """Draw TEXT, colored by one value per character. ends: True where a chunk ends, one per character."""
    places, row, column = [], 0, 0
    for character in TEXT:
        places.append((row, column))
        line_ends = character == "\n" or column == COLUMNS - 1
        row, column = (row + 1, 0) if line_ends else (row, column + 1)
    grid = np.full((places[-1][0] + 1, COLUMNS), np.nan)
    grid[tuple(zip(*places, strict=True))] = values
    figure, axes = plt.subplots(figsize=(9, 0.24 * len(grid) + 0.7), layout="constrained")
    colors = axes.imshow(grid, cmap="Oranges", aspect="auto", alpha=0.7)
    for (row, column), character in zip(places, TEXT, strict=True):
        shown = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}" if character == "\n" else character
        axes.text(column, row, shown, family="DejaVu Sans Mono", fontsize=9, ha="center", va="center")
    for row, column in (place for place, end in zip(places, ends, strict=False) if end):
        axes.plot([column + 0.5] * 2, [row - 0.45, row + 0.45], color="tab:blue", linewidth=2)
    axes.set_title(title, loc="left", fontsize=10)
    axes.axis("off")
    figure.colorbar(colors, fraction=0.02, pad=0.01)
    plt.show()


# %% [markdown]
# ## Most blocks run once per word
#
# `fast-python` is a small model that comes with the package. Two blocks run on every byte. The others run only where a chunk
# ends, which is after a word or within a long one, and their result reaches the bytes after it. `spend` runs the model on the text and counts the FLOPs that each byte
# took part in.

# %%
model, tokenizer = load("fast-python")
spending = spend(model, tokenizer, TEXT, max_tokens=10_000, name="TEXT")
chunks = next(record for record in spending.records if isinstance(record, ChunkRecord))
ends = chunks.closes[0].tolist()

cost = spending.cost.numpy()
surprise = np.concatenate([[0.0], spending.bits.numpy()])  # nothing predicts the first byte
print(f"{cost.mean() / 1e6:.2f} MFLOPs per byte, from {cost.min() / 1e6:.2f} to {cost.max() / 1e6:.2f}")
print(f"{len(ends) / max(1, sum(ends)):.1f} bytes per chunk")
draw(cost / 1e6, "Cost of each byte, in MFLOPs; blue: a chunk ends", ends)

# %% [markdown]
# Now the same text by surprise: how many bits the model needs for a byte after it has read all bytes before it. Look at
# where words begin and where they end.

# %%
draw(surprise, "Surprise of each byte, in bits; blue: a chunk ends", ends)


# %% [markdown]
# Does the model compute where the text is hard? There are two ways to ask, and a rank correlation answers both. It is 1 if
# the bytes have the same order by cost and by surprise, 0 if the two orders have nothing to do with each other, and
# negative if they are opposed.
#
# - Does a byte that *was* surprising cost much to read?
# - Does the model compute much *before* a byte that will be surprising? The cost is then that of the byte before, from which
#   the surprising one is predicted.


# %%
def correlations(spending):
    """Return two rank correlations of cost and surprise: of the same byte, and of the cost of the byte before."""
    return rank_correlation(spending.cost[1:], spending.bits), rank_correlation(spending.cost[:-1], spending.bits)


same, before = correlations(spending)
print(f"cost and surprise of a byte: {same:+.2f}; cost of a byte and surprise of the next one: {before:+.2f}")

# %% [markdown]
# ## Each byte may leave early
#
# With early exit, a byte stops after two, four or six of eight blocks. A small unit decides: it predicts by how much the
# remaining blocks would improve the prediction of the next byte, and the byte stops where that is little. This model is
# trained here, on the source of some packages of Python's standard library.

# %%
config = TrainConfig(
    model=ModelConfig.from_dict(
        {"d_model": 64, "n_layers": 8, "n_seq": 256, "depth": {"policy": "exit", "first": 2, "every": 2}}
    ),
    data=DataConfig(include=("asyncio", "email", "http", "json", "logging", "unittest"), val_fraction=0.04),
    output_dir=str(RUN),
    max_seconds=SECONDS,
)
results = train(config, silent)
print(f"{results['held_out']['bits_per_byte']:.3f} bits per byte on held-out text")

# %% [markdown]
# The threshold is the share of its quality that a prediction must keep for its byte to stop, and you may change it at any
# time. At 1 every byte runs all blocks. The table scores the held-out text at several thresholds.

# %%
rows = []
for threshold in (1.0, 0.98, 0.95, 0.9):
    scores = evaluate_checkpoint(EvalConfig(str(RUN), depth_threshold=threshold), silent)
    rows.append([f"{threshold:g}", f"{scores['blocks']:.2f}", f"{scores['bits_per_byte']:.3f}"])
Markdown(markdown_table([["threshold", "blocks per byte", "bits per byte"], *rows]))

# %% [markdown]
# This is our text again, first by the number of blocks that each byte ran, then by surprise.

# %%
THRESHOLD = 0.95
model, tokenizer = load(str(RUN), THRESHOLD)
spending = spend(model, tokenizer, TEXT, max_tokens=10_000, name="TEXT")
depth = next(record for record in spending.records if isinstance(record, DepthRecord))

print(f"{depth.mean_blocks:.2f} of {depth.available} blocks per byte")
draw(depth.blocks[0].numpy(), "Blocks that ran for each byte")
draw(np.concatenate([[0.0], spending.bits.numpy()]), "Surprise of each byte, in bits")

# %% [markdown]
# Here the second question is the right one, because a byte stops or runs on for the sake of the *next* byte. Even so, do
# not expect the two orders to agree: the unit looks for bytes after which more blocks help. After some bytes anything may
# follow, so that the next one is surprising however many blocks run.

# %%
same, before = correlations(spending)
print(f"cost and surprise of a byte: {same:+.2f}; cost of a byte and surprise of the next one: {before:+.2f}")

# %% [markdown]
# ## What next
#
# `resnet-bk inspect` makes the same for any file, as a page with a note on each byte, and `resnet-bk serve` shows the colors
# while a model writes. `resnet-bk adapt` gives early exits to a model that you have trained without them:
#
# ```sh
# resnet-bk inspect fast-python README.md
# resnet-bk serve runs/what_each_byte_cost
# resnet-bk adapt runs/base --techniques '{depth: {policy: exit}}' --max_seconds 60
# ```
#
# The notebook `all_techniques` compares all techniques, and `your_own_text` trains a model on your own files.
