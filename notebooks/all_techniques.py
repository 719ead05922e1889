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
# # All techniques on one text
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/resnet-bk/resnet-bk/blob/main/notebooks/all_techniques.ipynb)
#
# ResNet-BK has six optional techniques that adapt compute to the text. This notebook trains one small byte-level model
# without any of them, one model with each of them alone, and one with all six together. All models read the same text for
# the same time. At the end, a table and a figure show what each technique does to quality and to speed.
#
# You need a CPU and no data. The models are trained one after another, each for `SECONDS` seconds. Let no other program run
# meanwhile: it would take training steps from some of the models and not from others.

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
import time
from pathlib import Path

import torch
from IPython.display import Markdown
from matplotlib import pyplot as plt
from rich.console import Console

from resnet_bk.config import DataConfig, ModelConfig, TrainConfig
from resnet_bk.hf import quiet_transformers
from resnet_bk.inference.decoding import generate
from resnet_bk.inference.loading import load
from resnet_bk.report.tables import markdown_table
from resnet_bk.study.ledger import Ledger
from resnet_bk.study.run import train

SECONDS = float(os.environ.get("RESNET_BK_NOTEBOOK_SECONDS", "60"))  # of training, for each model
RUNS = Path("runs/all_techniques")
shutil.rmtree(RUNS, ignore_errors=True)  # the runs of an earlier execution
quiet_transformers()
silent = Console(quiet=True, force_jupyter=False)

# %% [markdown]
# ## The models
#
# A model is described by a dictionary. The plain one has six blocks. In each block a mixer, linear in the length of the
# text, moves information along the sequence, and four experts follow, all of which run for every byte.
#
# Each technique is one more entry:
#
# - `memory` looks up what followed the last few bytes in the training text.
# - `multiscale` runs the inner four blocks once per word instead of once per byte.
# - `length` lets each window of the text choose how many of its bytes run all blocks.
# - `depth` lets each byte stop after as many blocks as it needs.
# - `sparsity` computes half of the positions of each mixer in full.
# - `experts` lets each byte use as many experts as its router is unsure about.
#
# The last model is plain too, with two blocks instead of six. It is the fair rival: a technique that saves compute must
# beat the model that is simply smaller.

# %%
PLAIN = {"d_model": 48, "n_layers": 6, "n_seq": 256, "num_experts": 4, "top_k": 4, "d_ff": 32}
TECHNIQUES = {
    "memory": {"orders": [1, 2, 3, 4, 6, 8], "rows": 65_536},
    "multiscale": {"factors": [4], "layers": [1, 4, 1], "boundaries": "whitespace"},
    "length": {"training": "sampled", "bins": 8, "max_length": 128, "penalty": 0.05},
    "depth": {"policy": "act", "target": 0.6},
    "sparsity": {"target": 0.5},
    "experts": {"policy": "top_p", "target": 1.5},
}
MODELS = {
    "plain": PLAIN,
    **{name: PLAIN | {name: settings} for name, settings in TECHNIQUES.items()},
    "all six": PLAIN | TECHNIQUES,
    "plain, two blocks": PLAIN | {"n_layers": 2},
}

# %% [markdown]
# ## Training
#
# The text is the source of six packages of Python's standard library. Some of its files are held out from training. `train`
# does what the command `resnet-bk train` does: it trains, scores the held-out files, measures costs on them, and writes a
# folder for each run. It returns what it found.

# %%
TEXT = DataConfig(include=("asyncio", "email", "http", "json", "logging", "unittest"), val_fraction=0.04)

folders = {name: str(RUNS / name.replace(" ", "-").replace(",", "")) for name in MODELS}
results = {}
for name, fields in MODELS.items():
    config = TrainConfig(ModelConfig.from_dict(fields), TEXT, output_dir=folders[name], max_seconds=SECONDS)
    results[name] = train(config, silent)
    print(f"{name}: {results[name]['held_out']['bits_per_byte']:.3f} bits per byte")

# %% [markdown]
# ## Quality and speed
#
# Times depend on what else the machine does. Therefore the models are timed in turn, several times, and the shortest time
# of each counts. Prefill is reading a text, decoding is writing one byte at a time.

# %%
models = {name: load(folder)[0].model for name, folder in folders.items()}
code = b"".join(path.read_bytes() for path in sorted(Path(os.__file__).parent.glob("c*.py")))
ids = torch.frombuffer(bytearray(code[:4096]), dtype=torch.uint8).long().view(4, 1024) + 3  # an id is the byte + 3
ids = ids.to(models["plain"].head.weight.device)
ACTIONS = {
    "prefill": lambda model: model(ids, logits=False),
    "decoding": lambda model: generate(model, ids[:1, :64], 100),
}
SIZES = {"prefill": ids.numel(), "decoding": 100}  # bytes

times = {name: {kind: [] for kind in ACTIONS} for name in MODELS}
for _ in range(5):
    for name, model in models.items():
        for kind, action in ACTIONS.items():
            started = time.perf_counter()
            with torch.no_grad():
                action(model)
            times[name][kind].append(time.perf_counter() - started)


def microseconds(name, kind):
    """Return the time per byte."""
    return 1e6 * min(times[name][kind]) / SIZES[kind]


# %% [markdown]
# Bits per byte measure how well a model predicts the held-out text; lower is better. FLOPs are those that a forward pass
# really executed on this text, because what an adaptive model computes depends on what it reads. FLOPs and speeds are
# relative to the plain model.


# %%
def row(name):
    """Return the cells of one model's line."""
    held_out, costs, training = (results[name][part] for part in ("held_out", "costs", "training"))
    return [
        name,
        f"{held_out['bits_per_byte']:.3f}",
        f"{training['steps']:,}",
        f"{costs['flops_per_byte'] / results['plain']['costs']['flops_per_byte']:.0%}",
        *(f"{microseconds('plain', kind) / microseconds(name, kind):.2f}x" for kind in ACTIONS),
    ]


HEAD = ["model", "bits per byte", "training steps", "FLOPs", *ACTIONS]
Markdown(markdown_table([HEAD, *map(row, MODELS)]))

# %% [markdown]
# Models that compute less per byte also take more training steps in the same time. Therefore the score shows both sides of
# a technique: what it loses by computing less, and what it gains by reading more text.
#
# In the figure, a model is better the further it lies to the lower left. A line joins the two plain models. A technique is
# worth its complexity if neither of them lies to the lower left of its point: then no plain model is better and cheaper.

# %%
figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
for axes, label, cost in (
    (panels[0], "million FLOPs per byte", lambda name: results[name]["costs"]["flops_per_byte"] / 1e6),
    (panels[1], "microseconds of prefill per byte", lambda name: microseconds(name, "prefill")),
):
    points = {name: (cost(name), found["held_out"]["bits_per_byte"]) for name, found in results.items()}
    axes.plot(*zip(points["plain, two blocks"], points["plain"], strict=True), "--", color="grey", linewidth=1)
    for name, point in points.items():
        axes.scatter(*point, s=28)
        axes.annotate(name, point, (5, 4), textcoords="offset points", fontsize=9)
    axes.set_xlabel(label)
    axes.margins(0.18, 0.1)
    axes.grid(alpha=0.3)
panels[0].set_ylabel("held-out bits per byte")
plt.show()

# %% [markdown]
# ## Where the compute goes
#
# The ledger counts the FLOPs of a forward pass while it runs, for each layer and for each byte. Here it watches the model
# with all techniques on the text that was timed. In the names, `trunk` runs on every byte, `deep` on those that learned
# length selects, and `inner` once per word.

# %%
with torch.no_grad(), Ledger(models["all six"]) as ledger:
    models["all six"](ids)

stages = sorted(ledger.stages.items(), key=lambda stage: -stage[1])[:10]
Markdown(markdown_table([["stage", "share of FLOPs"], *([name, f"{own / ledger.total:.1%}"] for name, own in stages)]))

# %% [markdown]
# ## What next
#
# One run of a minute with one seed says little about small differences. `resnet-bk ablate` trains every combination of
# techniques with several seeds and separates the effect of each one from their interactions, and `resnet-bk report` puts
# finished runs on one page:
#
# ```sh
# resnet-bk report runs/all_techniques/plain runs/all_techniques/multiscale runs/all_techniques/memory
# resnet-bk ablate configs/everything.yaml --seeds '[0, 1, 2]'
# ```
#
# The notebook `what_each_byte_cost` looks at single bytes, and `your_own_text` trains a model on your own files.
# [The results](https://github.com/resnet-bk/resnet-bk/blob/main/docs/results.md) have measurements with more time and
# several seeds.
