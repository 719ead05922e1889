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
# # A model of your own text
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/resnet-bk/resnet-bk/blob/main/notebooks/your_own_text.ipynb)
#
# This notebook trains a small language model on a folder of your files, shows how well it predicts files that it has not
# read, lets it write, and saves it as a model of transformers. A model of bytes needs no tokenizer to be trained, so the
# files may be in any language, programming languages included. A CPU is enough.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("resnet_bk") is None:  # on Colab, whose torch stays as it is
    package = "resnet-bk[train,cpu-fast] @ git+https://github.com/resnet-bk/resnet-bk"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)

# %%
import json
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from IPython.display import display
from matplotlib import pyplot as plt
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from resnet_bk.config import DataConfig, ModelConfig, TrainConfig, preset
from resnet_bk.hf import quiet_transformers
from resnet_bk.study.run import train

SECONDS = float(os.environ.get("RESNET_BK_NOTEBOOK_SECONDS", "60"))  # of training
RUN = Path("runs/your_own_text")
shutil.rmtree(RUN, ignore_errors=True)  # the run of an earlier execution
quiet_transformers()
silent = Console(quiet=True, force_jupyter=False)

# %% [markdown]
# ## The text
#
# Put your files into the folder `my_text`, or name another folder here. Subfolders are read too. On Colab, you can drop
# files into the file browser at the left. A few hundred kilobytes are enough to see something, and more text makes a better
# model.
#
# If the folder does not exist, a copy of some packages of Python's standard library stands in for your text.

# %%
FOLDER = Path("my_text")
PROMPT = "def "  # the beginning of what the model shall write

if not FOLDER.exists():
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in ("asyncio", "email", "http", "json", "logging"):
        shutil.copytree(library / package, FOLDER / package, ignore=shutil.ignore_patterns("__pycache__"))

files = [path for path in FOLDER.rglob("*") if path.is_file()]
print(f"{len(files)} files, {sum(path.stat().st_size for path in files):,} bytes")

# %% [markdown]
# ## Training
#
# The preset `fast` is made for minutes on a CPU: one block runs on bytes, two run once per word. The n-gram memory counts
# the training text before the training starts. It looks up which bytes followed the last few there and in the text so far,
# so that the blocks can learn the rest.
#
# One in ten files is held out. `eval_every` scores them again and again while the model trains, and the figure is drawn
# anew each time. The training score is the mean over all updates since the last point, so it lags behind. If it still falls
# while the held-out score rises, the model begins to learn your files by heart: then more text helps more than more time.
# The folder `best` of the run keeps the model with the best score.

# %%
every = max(5, round(SECONDS))  # updates between two scores
config = TrainConfig(
    model=ModelConfig.from_dict(preset("fast")),
    data=DataConfig(source=str(FOLDER), val_fraction=0.1),
    output_dir=str(RUN),
    batch_size=4,
    max_seconds=SECONDS,
    log_every=every,
    eval_every=every,
    eval_bytes=131_072,
    sample=PROMPT,
)


def curves():
    """Draw the scores of the run so far."""
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for name, label in (("bits_per_byte", "training"), ("held_out_bits_per_byte", "held out")):
        scored = [line for line in lines if name in line]
        axes.plot([line["seconds"] for line in scored], [line[name] for line in scored], ".-", label=label)
    axes.set(xlabel="seconds of training", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    plt.close(figure)  # it is shown by `display`
    return figure


shown = display("The first score follows soon.", display_id=True)
results = train(config, silent, lambda progress, bits: shown.update(curves()))
print(f"{results['held_out']['bits_per_byte']:.3f} bits per byte on {results['held_out']['bytes']:,} held-out bytes")

# %% [markdown]
# Eight bits per byte would mean that the model knows nothing. A compressor is a yardstick: its files have as many bits as it
# needs to predict them. It reads all of your files one after another, and the model is scored on files that it has not read,
# after a training on the others.

# %%
import lzma

joined = b"".join(path.read_bytes() for path in files)
print(f"{8 * len(lzma.compress(joined)) / len(joined):.3f} bits per byte by lzma, of all files together")

# %% [markdown]
# ## Writing
#
# The folder `model` of the run is an ordinary folder of transformers. `generate` takes the settings that you know. On a CPU
# it uses the compiled engine of the package, which is much faster than a call of torch for each byte.

# %%
model = AutoModelForCausalLM.from_pretrained(RUN / "model")
tokenizer = AutoTokenizer.from_pretrained(RUN / "model")

torch.manual_seed(0)
batch = tokenizer([PROMPT], return_tensors="pt")
written = model.generate(**batch, max_new_tokens=400, do_sample=True, temperature=0.7)
print(tokenizer.decode(written[0], skip_special_tokens=True))

# %% [markdown]
# ## Saving and loading
#
# `save_pretrained` writes safetensors and JSON under a manifest of hashes. `push_to_hub` works as for any other model. A
# program that does not import `resnet_bk` loads the folder with `trust_remote_code=True`; the package must be installed.

# %%
model.save_pretrained("my_model")
tokenizer.save_pretrained("my_model")

again = AutoModelForCausalLM.from_pretrained("my_model")
with torch.no_grad():
    same = torch.equal(again(**batch).logits, model(**batch).logits)
print(f"the loaded model computes the same: {same}")

# %% [markdown]
# ## What next
#
# The run goes on where it stopped if you give it more time, and the commands of the package take its folder:
#
# ```sh
# resnet-bk train --config runs/your_own_text/config.yaml --resume true --max_seconds 600
# resnet-bk generate runs/your_own_text 'def ' --temperature 0.7
# resnet-bk serve runs/your_own_text     # OpenAI's completions API and a page; needs the extra `serve`
# ```
#
# The notebook `all_techniques` compares the techniques, and `what_each_byte_cost` shows where a model spends its compute.
