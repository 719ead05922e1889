"""All techniques in one model: perplexity, executed FLOPs and speed, against the plain model with every expert on.

``python benchmarks/together.py --out benchmarks/results/...`` first runs every training cell that is not in the log yet
(two single-thread processes at a time), then times the models on the quiet machine.

Dimensions: B sequences, N tokens.
"""

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import interleaved, spread, table
from torch import Tensor
from trained import Run, Trained, bits, prefill, scored, training_step, worse

from resnet_bk.inference.decoding import generate
from resnet_bk.model import LanguageModel
from resnet_bk.study.ledger import Ledger, plain_flops

SHAPE: dict[str, Any] = {"d_model": 128, "n_seq": 256, "num_experts": 4, "top_k": 4, "d_ff": 176}
WORDS = {"factors": [4], "layers": [2, 6, 0], "boundaries": "whitespace"}

# "quality", "balanced" and "fast" were the presets of these names when the page was written
BALANCED: dict[str, Any] = {
    "balance_weight": 0.03,
    "multiscale": WORDS,
    "depth": {"policy": "act", "target": 0.6},
    "sparsity": {"target": 0.5},
    "experts": {"policy": "top_p", "target": 1.3},
}
NARROW, SMALL = "balanced, 48 and 96 wide", "plain, 3 blocks 64 wide"
LONG, SHORT = ", as long as plain", ", 0.35 as long as plain"

BY_STEPS: dict[str, dict[str, Any]] = {  # fields of the model
    "plain": {"n_layers": 8},
    "quality": {"multiscale": WORDS},
    "balanced": BALANCED,
    "fast": {"d_model": 64, "num_experts": 1, "top_k": 1, "multiscale": WORDS | {"layers": [2, 2, 0]}},
    NARROW: BALANCED | {"d_model": 48, "d_ff": 66, "multiscale": WORDS | {"widths": [96], "hidden": [132]}},
    "plain, 3 blocks": {"n_layers": 3},
}
BY_TIME: dict[str, dict[str, Any]] = {
    SMALL + LONG: {"d_model": 64, "n_layers": 3, "num_experts": 1, "top_k": 1},
    NARROW + SHORT: BY_STEPS[NARROW],
    NARROW + LONG: BY_STEPS[NARROW],
    "fast" + SHORT: BY_STEPS["fast"],
    "fast" + LONG: BY_STEPS["fast"],
}
SHOWN = NARROW + LONG
TRAINED = Trained(
    "together",
    SHAPE,
    BY_STEPS | BY_TIME,
    batch=12,
    steps=300,
    seeds=(0, 1, 2),
    timed={name: ("plain", 0.35 if name.endswith(SHORT) else 1.0) for name in BY_TIME},
    only={"prose": ("plain", SMALL + LONG, NARROW + LONG, "fast", "fast" + SHORT, "fast" + LONG)},
)


def quality(results: list[dict[str, Any]], rows: Tensor) -> str:
    """Return the table of bits per byte and of FLOPs executed on the held-out text, by the ledger."""
    lines, plain, whole = [], [], plain_flops(TRAINED.load("plain", 0).config)
    for name in TRAINED.models:
        bpb, saved = [], []
        for seed in TRAINED.seeds:
            model = TRAINED.load(name, seed)
            with Ledger(model) as ledger:
                nats, _ = scored(model, rows)
            bpb.append(bits(nats))
            saved.append(whole * nats.numel() / ledger.total)
        plain = plain or bpb
        runs = [r for r in results if r["cell"]["model"] == name]
        lines.append(
            [
                name,
                f"{runs[0]['parameters']:,}",
                spread(bpb, 3),
                spread([worse(b, p) for b, p in zip(bpb, plain, strict=True)], 1),
                spread(saved, 2),
                spread([r["steps"] for r in runs], 0),
                spread([r["seconds"] for r in runs], 0),
            ]
        )
    header = ["model", "parameters", "bits per byte", "perplexity worse than plain, %", "fewer FLOPs than plain, x"]
    return table([*header, "steps", "processor seconds"], lines)


def clock(rows: Tensor) -> str:
    """Return the table of prefill (8 x 2,048 bytes), training steps (12 x 256) and greedy decoding, against plain."""

    def decode(model: LanguageModel) -> None:
        with torch.no_grad():
            generate(model.eval(), rows[3:4, :64], 100)

    kinds = {"prefill": prefill(rows), "training step": training_step(rows), "decoding": decode}
    found = TRAINED.speeds(kinds, lambda name: "plain")
    lines = []
    for name, f in found.items():
        row = [name]
        for kind in kinds:
            row += [spread(f[kind], 2), spread(f[f"{kind} ms"], 0)]
        lines.append(row)
    header = ["model"]
    for kind in kinds:
        header += [f"{kind}, x faster", "ms"]
    return table(header, lines)


def counted(rows: Tensor) -> str:
    """Return the table of the ledger's own cost: the same runs with and without it, in turn."""
    lines = []
    for name in ("plain", "fast", NARROW + LONG):
        model, row = TRAINED.load(name, 0), [name]
        for run in (prefill(rows), training_step(rows)):

            def with_ledger(run: Run = run, model: LanguageModel = model) -> None:
                with Ledger(model):
                    run(model)

            times = interleaved({"off": partial(run, model), "on": with_ledger}, 31)
            row.append(spread([100 * (on / off - 1) for on, off in zip(times["on"], times["off"], strict=True)], 1))
        lines.append(row)
    return table(["model", "prefill, % longer", "training step, % longer"], lines)


def stages(rows: Tensor) -> str:
    """Return the table of FLOPs by part of the model SHOWN, one seed."""
    model = TRAINED.load(SHOWN, 0)
    with Ledger(model) as ledger:
        scored(model, rows[:64])
    grouped: dict[str, float] = defaultdict(float)
    for stage, flops in ledger.stages.items():
        layer, _, part = stage.rpartition(" ")
        where = "head" if not layer else "on chunks" if ".inner" in layer else "on bytes"
        grouped[where if where == "head" else f"{where}: {part}"] += flops
    lines = [[where, f"{flops / ledger.total:.1%}"] for where, flops in grouped.items()]
    return table(["where", "share of FLOPs"], [*lines, ["filling up tiles", f"{ledger.unused / ledger.total:.1%}"]])


def page(results: list[dict[str, Any]], rows: Tensor, out: Path | None) -> str:
    text = (
        f"\nPlain: 8 blocks, four experts of hidden width {SHAPE['d_ff']}, all of them for every byte; "
        f"{TRAINED.described()} quality: two blocks on bytes, six on words (2-6-0). experts: as many as make up half "
        "of the router's probability, 1.3 aimed at. balanced: adaptive computation time on the words' blocks and half "
        "of all sites left out as well, so all techniques but learned length; 48 and 96 wide: on bytes and on words. "
        "fast: 64 wide, two blocks on bytes and two on words, one feed-forward. as long as plain: trained not for as "
        "many steps, but for the processor's seconds that the plain model's steps took; 0.35 as long: for that share "
        "of them.\n\n"
        "## Quality\n\n"
    )
    text += quality(results, rows)
    text += "\n## The clock\n\nBoth cores, in turn, seven times each seed. Decoding: 100 bytes, one sequence.\n\n"
    text += clock(rows) + "\n## The ledger's own cost\n\nOpen or not, in turn, 31 times.\n\n" + counted(rows)
    return text + f"\n## Where the FLOPs run: {SHOWN}\n\n" + stages(rows)


if __name__ == "__main__":
    TRAINED.main(__file__, __doc__, "The techniques together", page)
