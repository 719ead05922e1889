"""Bits per byte and speed: chains whose hopping the data decide (bonds), beside chains with real energies.

``python benchmarks/energies.py --out benchmarks/results/...`` runs every training cell that is not in the log yet, then
times pairs on the quiet machine. ``--hours 1`` adds trainings of an hour of a core each, in windows of 4,096 bytes.

Dimensions: B sequences, N tokens.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    CORPORA,
    arguments,
    batches,
    conditions,
    interleaved,
    mean_nats,
    publish,
    run_cells,
    spread,
    stdlib_ids,
    table,
    train,
)

from resnet_bk.config import preset
from resnet_bk.model import LanguageModel

KINDS = ("real", "bonds")
FAST = preset("fast") | {"memory": {}}
RATE, SECONDS, TOKENS, SEEDS = 0.01, 240, 3072, (0, 1, 2)
SHORT, LONG = 256, 4096  # bytes of a window
SCORED = 2**18  # held-out bytes
SHAPES: dict[str, dict[str, Any]] = {
    "preset `fast`, no memory": FAST,
    "6 blocks, D = 128": {"d_model": 128, "n_layers": 6, "n_seq": SHORT, "num_experts": 1},
}
REPEATS, PREFILL, DECODED = 15, 2048, 64


def cell(spec: dict[str, Any]) -> dict[str, Any]:
    """Train one model of the preset `fast`, without its memory, for seconds of a core, and score it."""
    torch.set_num_threads(1)
    torch.manual_seed(spec["seed"])
    window = spec["window"]
    model = LanguageModel(259, **{**FAST, "n_seq": window, "energy": spec["energy"]})
    training, held_out = CORPORA[spec["corpus"]][0]()

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return model(x, targets=y, logits=False).loss

    draw = batches(training, max(1, TOKENS // window), window, spec["seed"])
    record = train(loss_of, model, draw, seconds=spec["seconds"], learning_rate=RATE, clock=time.process_time)
    nats = mean_nats(loss_of, held_out, window, SCORED)
    return {"bits_per_byte": nats / math.log(2), **record}


def quality(results: list[dict[str, Any]]) -> str:
    """Return a table: a row for each corpus, budget and window, differences seed by seed."""
    rows = []
    for corpus, seconds, window in dict.fromkeys(
        (r["cell"]["corpus"], r["cell"]["seconds"], r["cell"]["window"]) for r in results
    ):
        wanted = {"corpus": corpus, "seconds": seconds, "window": window}
        real, bonds = (
            [r for r in results if r["cell"].items() >= {**wanted, "energy": kind}.items()] for kind in KINDS
        )
        gains = [b["bits_per_byte"] - a["bits_per_byte"] for a, b in zip(real, bonds, strict=True)]
        row = [corpus, f"{seconds:,}", f"{window:,}", len(real)]
        row += [spread([r["bits_per_byte"] for r in kind], 4) for kind in (real, bonds)]
        rows.append([*row, spread(gains, 4), *(spread([r["steps"] for r in kind], 0) for kind in (real, bonds))])
    header = ["corpus", "core-s", "window", "seeds", "real", "bonds", "difference", "steps, real", "steps, bonds"]
    return table(header, rows)


def work(model: LanguageModel) -> dict[str, Callable[[], None]]:
    """Return what is timed: a training step without the optimizer, reading a prompt, decoding."""
    text = torch.from_numpy(stdlib_ids()[1].astype("int64"))
    ids, prompt = text[: TOKENS // SHORT * (SHORT + 1)].view(-1, SHORT + 1), text[None, :PREFILL]

    def step() -> None:
        model(ids[:, :-1], targets=ids[:, 1:], logits=False).loss.backward()
        model.zero_grad()

    @torch.no_grad()
    def prefill() -> None:
        model(prompt, logits=False)

    @torch.no_grad()
    def decode() -> None:
        state = None
        for token in prompt[:, :DECODED].split(1, dim=1):
            state = model(token, state=state).state

    return {"training": step, "prefill": prefill, "decoding": decode}


def speed() -> str:
    """Return a table: the time of bonds over that of real energies, by pairs."""
    rows = []
    for name, fields in SHAPES.items():
        torch.manual_seed(0)
        both = {kind: work(LanguageModel(259, **fields, energy=kind)) for kind in KINDS}
        row = [name]
        for what in both["real"]:
            times = interleaved({kind: both[kind][what] for kind in KINDS}, REPEATS)
            row.append(spread([b / a for a, b in zip(times["real"], times["bonds"], strict=True)]))
        rows.append(row)
    return table(["model", "training step", f"prefill of {PREFILL:,}", "decoding"], rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cell", type=json.loads, help="internal: one training run, as JSON")
    parser.add_argument("--log", type=Path, default=Path("runs/benchmarks/energies.jsonl"))
    parser.add_argument("--hours", type=float, default=0, help="hours of a core of the long trainings; 0: none")
    options = parser.parse_args()
    if options.cell is not None:
        print(json.dumps(cell(options.cell)))
        return
    short = [(corpus, SECONDS, SHORT, seed) for corpus in CORPORA for seed in SEEDS]
    long = [("stdlib", round(3600 * options.hours), LONG, 0)] if options.hours else []
    names = ("corpus", "seconds", "window", "seed")
    cells = [{"energy": kind, **dict(zip(names, budget, strict=True))} for budget in short + long for kind in KINDS]
    results = run_cells(__file__, cells, workers=2, log=options.log)
    torch.set_num_threads(1)
    text = "# Bonds and real energies\n\n" + conditions(" ".join(["python benchmarks/energies.py", *sys.argv[1:]]))
    text += (
        f"\nThe preset `fast` without n-gram memory, {TOKENS:,} bytes a step (one window where windows are "
        f"longer), AdamW {RATE} cosine, one "
        f"thread a run, two runs at a time. Bits per byte on {SCORED // 1024} KiB of held-out text in windows of the "
        "training length: median (least to greatest). Differences seed by seed; less than 0: bonds are better.\n\n"
    )
    text += quality(results)
    text += (
        f"\n## Time of bonds / time of real energies\n\nOne thread, {REPEATS} pairs in turn: median (least to "
        f"greatest). A training step of {TOKENS // SHORT} x {SHORT} bytes is forward and backward.\n\n"
    )
    publish(text + speed(), options.out)


if __name__ == "__main__":
    main()
