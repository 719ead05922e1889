"""Adaptive depth: blocks, perplexity and speed of ACT, mixture of depths and early exit.

``python benchmarks/depth.py --out benchmarks/results/...`` first runs every training cell that is not in the log yet
(two single-thread processes at a time), then times the models on the quiet machine.

Dimensions: B sequences, N tokens.
"""

import itertools
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import interleaved, spread, table
from torch import Tensor
from torch.profiler import profile
from trained import (
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

from resnet_bk.adaptive.depth import AdaptiveDepth
from resnet_bk.inference.decoding import generate
from resnet_bk.inference.speculation import speculate
from resnet_bk.model import LanguageModel

SEEDS, BATCH, STEPS, LAYERS = (0, 1, 2), 12, 600, 8
SHAPE = {"d_model": 64, "n_seq": 256, "num_experts": 1}
THRESHOLDS = (1.0, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9)  # of early exit
DRAFTS = (4, 8, 16)  # tokens drafted at a time

# name -> fields of the model
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"n_layers": LAYERS},
    "plain, 4 blocks": {"n_layers": 4},
    "act": {"n_layers": LAYERS, "depth": {"policy": "act", "target": 0.6}},
    "exit": {"n_layers": LAYERS, "depth": {"policy": "exit", "first": 2, "every": 2}},
    "skip": {"n_layers": LAYERS, "depth": {"policy": "skip", "target": 0.6}},
}
ADAPTIVE = ("act", "exit", "skip")


TRAINED = Trained("depth", SHAPE, MODELS, batch=BATCH, steps=STEPS, seeds=SEEDS)
load = TRAINED.load


def adaptive_layer(model: LanguageModel) -> AdaptiveDepth | None:
    """Return the layer of adaptive depth; None where the model has none."""
    layer = model.blocks[0]
    return layer if isinstance(layer, AdaptiveDepth) else None


def nats_and_blocks(model: LanguageModel, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nats of every token and the number of blocks it ran, (B, N) each."""
    nats, outputs = scored(model, rows)
    if adaptive_layer(model) is None:
        return nats, torch.full(nats.shape, model.config.blocks)
    return nats, torch.cat([output.records[0].blocks for output in outputs])


# ----------------------------------------------------------------------------------------------- quality


def quality(results: list[dict[str, Any]], rows: Tensor, scores: dict[tuple[str, int], tuple[Tensor, Tensor]]) -> str:
    """Return the table at equal steps: bits per byte and blocks, against the plain model and against full depth."""
    lines = []
    for name in MODELS:
        bpb, full, blocks, seconds = [], [], [], []
        for seed in SEEDS:
            nats, depth = scores[name, seed]
            bpb.append(bits(nats))
            blocks.append(depth.double().mean().item())
            seconds += [r["seconds"] / r["steps"] for r in results if r["cell"]["model"] == name]
            if name in ADAPTIVE:
                full.append(bits(nats_and_blocks(everywhere(load(name, seed)), rows)[0]))
        plain = [bits(scores["plain", seed][0]) for seed in SEEDS]
        parameters = next(r["parameters"] for r in results if r["cell"]["model"] == name)
        lines.append(
            [
                name,
                f"{parameters:,}",
                spread(blocks, 2),
                spread(bpb, 3),
                spread([worse(a, b) for a, b in zip(bpb, plain, strict=True)], 1),
                spread(full, 3) if full else "",
                spread([worse(a, b) for a, b in zip(bpb, full, strict=True)], 1) if full else "",
                spread(seconds, 2),
            ]
        )
    header = ["model", "parameters", "blocks a byte", "bits per byte", "perplexity worse than plain's, %"]
    header += [
        "same network, no position stops: bits per byte",
        "perplexity worse than that, %",
        "s a step, beside another",
    ]
    return table(header, lines)


def everywhere(model: LanguageModel) -> LanguageModel:
    """Set the threshold so that every position runs all blocks; return the model."""
    layer = adaptive_layer(model)
    assert layer is not None
    layer.threshold = 0.0 if layer.settings.policy == "skip" else 1.0
    return model


# ------------------------------------------------------------------------------------------------- clock


def clock(rows: Tensor) -> str:
    """Return the table of prefill (8 x 2,048 held-out bytes) and training steps (12 x 256), against the plain model."""
    found = TRAINED.speeds({"prefill": prefill(rows), "training": training_step(rows)}, lambda name: "plain")
    for name, seed in itertools.product(MODELS, SEEDS):
        model = load(name, seed)
        with torch.no_grad():
            records = model(long_rows(rows), logits=False).records
        blocks = model.config.blocks if adaptive_layer(model) is None else records[0].mean_blocks
        found[name]["count"].append(LAYERS / blocks)
    lines = [
        [
            name,
            spread(f["count"], 2),
            spread(f["prefill"], 2),
            spread(f["prefill ms"], 0),
            spread(f["training"], 2),
            spread(f["training ms"], 0),
        ]
        for name, f in found.items()
    ]
    header = ["model", "fewer blocks, x", "prefill, x faster", "prefill, ms", "training step, x faster", "ms"]
    return table(header, lines)


def where_time_goes(rows: Tensor) -> str:
    """Return the table of milliseconds by kind of operation, by the profiler, for prefill of 8 x 2,048 bytes."""
    long = long_rows(rows)
    kinds = {
        "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
        "core and convolution": ("resnet_bk::",),
        "normalisation, activations, arithmetic": ("aten::native_layer_norm", "aten::silu", "aten::mul", "aten::add"),
        "packing and merging": ("aten::index", "aten::gather", "aten::scatter", "aten::constant_pad", "aten::cumsum"),
    }
    columns, names = [], [*kinds, "rest"]
    for name in ("plain", *ADAPTIVE):
        model = load(name, 0)
        with torch.no_grad():
            model(long, logits=False)
            with profile() as profiler:
                model(long, logits=False)
        milliseconds = dict.fromkeys(names, 0.0)
        for event in profiler.key_averages():
            kind = next((k for k, starts in kinds.items() if event.key.startswith(starts)), "rest")
            milliseconds[kind] += event.self_cpu_time_total / 1000
        columns.append(milliseconds)
    lines = [[kind, *(f"{milliseconds[kind]:.0f}" for milliseconds in columns)] for kind in names]
    lines.append(["together", *(f"{sum(milliseconds.values()):.0f}" for milliseconds in columns)])
    return table(["", "plain", *ADAPTIVE], lines)


# ---------------------------------------------------------------------------------------------- decoding


def decode(rows: Tensor) -> str:
    """Return the table of early exit by threshold: quality on all held-out text, and the speed of 256 single steps."""
    found: dict[float, dict[str, list[float]]] = {t: defaultdict(list) for t in THRESHOLDS}
    text = rows[3:4, :320]
    for seed in SEEDS:
        models = {t: load("exit", seed) for t in THRESHOLDS}
        for threshold, model in models.items():
            adaptive_layer(model).threshold = threshold  # type: ignore[union-attr]

        def steps(model: LanguageModel) -> float:
            with torch.no_grad():
                output = model(text[:, :64])
                for t in range(64, text.shape[1]):
                    output = model(text[:, t : t + 1], state=output.state)
            return 0.0

        times = interleaved({str(t): (lambda m=m: steps(m)) for t, m in models.items()}, 5)
        for threshold, model in models.items():
            nats, blocks = nats_and_blocks(model, rows)
            f = found[threshold]
            f["bpb"].append(bits(nats))
            f["blocks"].append(blocks.double().mean().item())
            f["x"] += [a / b for a, b in zip(times["1.0"], times[str(threshold)], strict=True)]
            f["ms"].append(1000 * statistics.median(times[str(threshold)]) / 256)
    lines = []
    for threshold in THRESHOLDS:
        f = found[threshold]
        loss = [worse(a, b) for a, b in zip(f["bpb"], found[1.0]["bpb"], strict=True)]
        values = (spread(f["blocks"], 2), spread(f["bpb"], 3), spread(loss, 1), spread(f["ms"], 2), spread(f["x"], 2))
        lines.append([threshold, *values])
    header = ["threshold", "mean exit block", "bits per byte", "perplexity worse than at full depth, %", "ms a byte"]
    return table([*header, "x faster"], lines)


def speculation(rows: Tensor) -> str:
    """Return the table of greedy continuations of 200 bytes: full depth against drafts by the first blocks."""
    prompts = [rows[i : i + 1, :64] for i in (2, 60, 120, 180)]
    found: dict[int, dict[str, list[float]]] = {k: defaultdict(list) for k in DRAFTS}
    for seed in SEEDS:
        model = everywhere(load("exit", seed))
        for prompt in prompts:
            full = generate(model, prompt, 200)
            runs: dict[str, Any] = {"full": lambda m=model, p=prompt: generate(m, p, 200)}
            runs |= {str(k): (lambda m=model, p=prompt, k=k: speculate(m, p, 200, k)) for k in DRAFTS}
            times = interleaved(runs, 3)
            for k in DRAFTS:
                drafts = speculate(model, prompt, 200, k)
                found[k]["same"].append(float(torch.equal(drafts.tokens, full)))
                found[k]["accepted"].append(drafts.accepted / drafts.drafted)
                found[k]["a round"].append(200 / drafts.rounds)
                found[k]["x"] += [a / b for a, b in zip(times["full"], times[str(k)], strict=True)]
    lines = [
        [
            k,
            f"{int(sum(f['same']))} of {len(f['same'])}",
            spread(f["accepted"], 2),
            spread(f["a round"], 1),
            spread(f["x"], 2),
        ]
        for k, f in found.items()
    ]
    return table(["drafts at most", "same text", "accepted", "bytes a round", "x faster than full depth"], lines)


# -------------------------------------------------------------------------------------------- difficulty


def difficulty(scores: dict[tuple[str, int], tuple[Tensor, Tensor]], out: Path | None) -> str:
    """Return the table of mean blocks in each tenth of the tokens by the plain model's loss; plot it."""
    lines, curves = [], {}
    for name in ADAPTIVE:
        pairs = [by_tenth(scores["plain", seed][0], scores[name, seed][1]) for seed in SEEDS]
        curves[name] = [tenths for tenths, _ in pairs]
        lines.append([name, *(f"{x:.2f}" for x in middle(curves[name])), spread([rank for _, rank in pairs], 2)])
    plot_tenths(curves, "plain", "mean blocks", out)
    return table(["policy", *(f"{i}" for i in range(1, 11)), "rank correlation"], lines)


def page(results: list[dict[str, Any]], rows: Tensor, out: Path | None) -> str:
    text = (
        f"\n{LAYERS} blocks, {TRAINED.described()} act and skip: the first and the last block "
        "for all, a decision before each of the other six, target 0.6. exit: exits after blocks 2, 4 and 6, confidence "
        "by gain, threshold 0.95.\n\n## The clock\n\nBoth cores, in turn with the plain model of eight blocks, seven "
        "times each seed. Prefill: 8 x 2,048 held-out bytes. Training: forward and backward, 12 x 256.\n\n"
    )
    text += clock(rows)
    text += "\n## Where prefill's time goes\n\nMilliseconds by the profiler, one seed.\n\n" + where_time_goes(rows)
    text += "\n## Early exit in decoding\n\nSteps through 256 bytes, one sequence, five times each seed.\n\n" + decode(
        rows
    )
    text += "\n## Self-speculation\n\nFour prompts a seed, three times each.\n\n" + speculation(rows)
    scores = {(name, seed): nats_and_blocks(load(name, seed), rows) for name in MODELS for seed in SEEDS}
    text += "\n## Quality at equal steps\n\n" + quality(results, rows, scores)
    text += "\n## Who goes deep\n\nMean blocks of the held-out bytes in each tenth by the plain model's loss.\n\n"
    return text + difficulty(scores, out)


if __name__ == "__main__":
    TRAINED.main(__file__, __doc__, "Adaptive depth", page)
