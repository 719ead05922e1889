"""Conditional experts: perplexity, expert FLOPs, speed and load, against always four and always one.

``python benchmarks/experts.py --out benchmarks/results/...`` first runs every training cell that is not in the log yet
(two single-thread processes at a time), then times the models on the quiet machine.

Dimensions: B sequences, N tokens, D model width, E experts.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import spread, table
from torch import Tensor, nn
from trained import (
    Run,
    Trained,
    bits,
    by_tenth,
    long_rows,
    middle,
    plot_tenths,
    prefill,
    scored,
    training_step,
    worse,
)

from resnet_bk.layers.feedforward import ExpertsRecord
from resnet_bk.model import LanguageModel
from resnet_bk.record import Record

LAYERS, EXPERTS = 4, 8
SHAPE = {"d_model": 128, "n_layers": LAYERS, "n_seq": 256, "num_experts": EXPERTS, "d_ff": 176, "balance_weight": 0.03}
TOP_P = {"policy": "top_p", "target": 1.8}

# name -> fields of the model
MODELS: dict[str, dict[str, Any]] = {
    "always four": {"top_k": 4},
    "always one": {"top_k": 1},
    "top-p": {"experts": TOP_P},
    "top-p, balanced by bias": {"experts": {**TOP_P, "balance": "bias"}},
    "top-p, two that compute nothing": {"experts": {**TOP_P, "target": 1.0, "identity": 1, "zero": 1}},
}
TRAINED = Trained("experts", SHAPE, MODELS, batch=12, steps=300, seeds=(0, 1, 2))


def of_experts(records: list[Record]) -> list[ExpertsRecord]:
    """Return the records of experts, one per feed-forward."""
    return [r for r in records if isinstance(r, ExpertsRecord)]


# ----------------------------------------------------------------------------------------------- quality


def quality(results: list[dict[str, Any]], rows: Tensor, out: Path | None) -> str:
    """Return two tables: bits per byte, experts per byte and load; experts by tenths of the loss of always four."""
    lines, tenth_lines, curves = [], [], {}
    four = [scored(TRAINED.load("always four", seed), rows)[0] for seed in TRAINED.seeds]
    one = [bits(scored(TRAINED.load("always one", seed), rows)[0]) for seed in TRAINED.seeds]
    for name in MODELS:
        bpb, used, most, least, tenths, correlation = [], [], [], [], [], []
        for seed, reference in zip(TRAINED.seeds, four, strict=True):
            nats, outputs = scored(TRAINED.load(name, seed), rows)
            bpb.append(bits(nats))
            by_token = torch.cat(
                [torch.stack([r.used for r in of_experts(o.records)]).double().mean(0) for o in outputs]
            )
            used.append(by_token.mean().item())
            load = sum(torch.stack([r.load for r in of_experts(o.records)]).double() for o in outputs)
            share = load / load.mean(1, keepdim=True)  # (layers, E), 1 where uniform
            most.append(share.max().item())
            least.append(share.min().item())
            curve, rank = by_tenth(reference, by_token)
            tenths.append(curve)
            correlation.append(rank)
        against_four = [worse(b, bits(reference)) for b, reference in zip(bpb, four, strict=True)]
        runs = [r for r in results if r["cell"]["model"] == name]
        lines.append(
            [
                name,
                spread(used, 2),
                spread([4 / u for u in used], 2),
                spread(bpb, 3),
                spread(against_four, 1),
                spread([worse(b, o) for b, o in zip(bpb, one, strict=True)], 1),
                spread(most, 2),
                spread(least, 2),
                spread([r["seconds"] / r["steps"] for r in runs], 2),
            ]
        )
        if not name.startswith("always"):
            curves[name] = tenths
            tenth_lines.append([name, *(f"{x:.2f}" for x in middle(tenths)), spread(correlation, 2)])
    plot_tenths(curves, "always four", "experts a byte", out)
    header = [
        "model",
        "computing experts a byte",
        "fewer expert FLOPs than four, x",
        "bits per byte",
        "perplexity worse than always four, %",
        "than always one, %",
        "busiest expert, x uniform",
        "idlest",
        "processor s a step",
    ]
    text = table(header, lines)
    text += "\n## Who gets more\n\nMean computing experts of the bytes in each tenth by the loss of always four.\n\n"
    return text + table(["model", *(f"{i}" for i in range(1, 11)), "rank correlation"], tenth_lines)


# ------------------------------------------------------------------------------------------------- clock


def clock(rows: Tensor) -> str:
    """Return the table of speed against always four.

    Prefill reads 8 x 2,048 held-out bytes, a training step 12 x 256. The blocks, and their feed-forwards, also run on
    their own, on the features that reach them in prefill.
    """
    runs = {
        "prefill": prefill(rows),
        "training step": training_step(rows),
        "blocks": parts_alone(lambda block: block, lambda block, x: block(x, None, None, None), rows),
        "feed-forwards": parts_alone(lambda block: block.feed_forward, lambda part, x: part(x, None), rows),
    }
    found = TRAINED.speeds(runs, lambda name: "always four")
    kinds = list(runs)
    lines = [[name, *(spread(f[kind], 2) for kind in kinds)] for name, f in found.items()]
    base = found["always four"]
    lines.append(["always four, ms", *(spread(base[f"{kind} ms"], 0) for kind in kinds)])
    return table(["model, x faster than always four", *kinds], lines)


def parts_alone(part_of: Callable[[Any], nn.Module], call: Callable[[Any, Tensor], Any], rows: Tensor) -> Run:
    """Return a run of one part of every block, on the features that reach it in prefill."""

    @functools.lru_cache(len(MODELS))  # of one seed
    @torch.no_grad()
    def given(model: LanguageModel) -> list[tuple[nn.Module, Tensor]]:
        found: list[tuple[nn.Module, Tensor]] = []
        parts = [part_of(block) for block in model.blocks]
        hooks = [part.register_forward_pre_hook(lambda m, inputs: found.append((m, inputs[0]))) for part in parts]
        model.eval()(long_rows(rows), logits=False)
        for hook in hooks:
            hook.remove()
        return found

    @torch.no_grad()
    def run(model: LanguageModel) -> None:
        for part, x in given(model):
            call(part, x)

    return run


def page(results: list[dict[str, Any]], rows: Tensor, out: Path | None) -> str:
    text = (
        f"\n{LAYERS} blocks, {EXPERTS} experts of hidden width {SHAPE['d_ff']}, {TRAINED.described()} top-p: as many "
        "experts as make up half of the router's probability, one to four.\n\n## Quality at equal steps\n\n"
    )
    text += quality(results, rows, out)
    return text + "\n## The clock\n\nBoth cores, in turn, seven times each seed.\n\n" + clock(rows)


if __name__ == "__main__":
    TRAINED.main(__file__, __doc__, "Conditional experts", page)
