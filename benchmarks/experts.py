"""Conditional experts: perplexity, expert FLOPs, the clock and the load, against always four and always one.

``python benchmarks/experts.py --out benchmarks/results/...`` first runs every training cell that is not in the log yet
(two single-thread processes at a time), then the timings on the then quiet machine.

Dimensions: B sequences, N tokens, D model width, E experts.
"""

import statistics
from pathlib import Path
from typing import Any

import matplotlib
import torch
from common import arguments, conditions, interleaved, publish, spread, table
from torch import Tensor, nn
from trained import Trained, bits, by_tenth, held_out, middle, scored, worse

from resnet_bk.layers.feedforward import ExpertsRecord
from resnet_bk.model import LanguageModel
from resnet_bk.record import Record

matplotlib.use("Agg")
from matplotlib import pyplot as plt

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
    return [r for r in records if isinstance(r, ExpertsRecord)]


# ----------------------------------------------------------------------------------------------- quality


def quality(results: list[dict[str, Any]], rows: Tensor, out: Path | None) -> str:
    """Bits per byte, experts a token, load, and experts by tenths of the loss of the model that always uses four."""
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
            curves[name] = middle(tenths)
            tenth_lines.append([name, *(f"{x:.2f}" for x in curves[name]), spread(correlation, 2)])
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, curve in curves.items():
        axes.plot(range(1, 11), curve, marker="o", label=name)
    axes.set(xlabel="tenth of held-out bytes by the loss of always four", ylabel="experts a byte", xticks=range(1, 11))
    axes.legend(frameon=False)
    if out is not None:
        figure.savefig(out.with_suffix(".svg"), bbox_inches="tight")
    header = [
        "model",
        "computing experts a byte",
        "fewer expert FLOPs than four, x",
        "bits per byte",
        "perplexity worse than always four, %",
        "than always one, %",
        "busiest expert, x uniform",
        "idlest",
        "s a step, beside another",
    ]
    text = table(header, lines)
    text += "\n## Who gets more\n\nMean computing experts of the bytes in each tenth by the loss of always four.\n\n"
    return text + table(["model", *(f"{i}" for i in range(1, 11)), "rank correlation"], tenth_lines)


# ------------------------------------------------------------------------------------------------- clock


def clock(rows: Tensor) -> str:
    """In turn with always four: prefill of 8 x 2,048 held-out bytes, training steps of 12 x 256, and, on the features
    that reach them there, the blocks and their feed-forwards alone."""
    long, short = rows[:16, :1024].reshape(8, 2048), rows[:12, :257]
    kinds = ("prefill", "training step", "blocks", "feed-forwards")
    found: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in kinds} for name in MODELS}
    for seed in TRAINED.seeds:
        models = {name: TRAINED.load(name, seed) for name in MODELS}
        inputs = {name: features(list(model.blocks), model, long) for name, model in models.items()}
        routed = {
            name: features([block.feed_forward for block in model.blocks], model, long)
            for name, model in models.items()
        }

        @torch.no_grad()
        def prefill(name: str, models: dict[str, LanguageModel] = models) -> None:
            models[name].eval()(long, logits=False)

        def step(name: str, models: dict[str, LanguageModel] = models) -> None:
            models[name].train()(short[:, :-1], targets=short[:, 1:], logits=False).loss.backward()
            models[name].zero_grad()

        @torch.no_grad()
        def blocks(name: str, models: dict[str, LanguageModel] = models, inputs: Any = inputs) -> None:
            for block, x in zip(models[name].blocks, inputs[name], strict=True):
                block(x, None, None, None)

        @torch.no_grad()
        def feed_forwards(name: str, models: dict[str, LanguageModel] = models, inputs: Any = routed) -> None:
            for block, x in zip(models[name].blocks, inputs[name], strict=True):
                block.feed_forward(x, None)

        for kind, run in zip(kinds, (prefill, step, blocks, feed_forwards), strict=True):
            times = interleaved({name: (lambda n=name, r=run: r(n)) for name in models}, 7)
            for name, seconds in times.items():
                found[name][kind] += [f / s for f, s in zip(times["always four"], seconds, strict=True)]
                if name == "always four":
                    found[name].setdefault(f"{kind} ms", []).append(1000 * statistics.median(seconds))
    lines = [[name, *(spread(f[kind], 2) for kind in kinds)] for name, f in found.items()]
    base = found["always four"]
    lines.append(["always four, ms", *(spread(base[f"{kind} ms"], 0) for kind in kinds)])
    return table(["model, x faster than always four", *kinds], lines)


@torch.no_grad()
def features(parts: list[nn.Module], model: LanguageModel, ids: Tensor) -> list[Tensor]:
    """What each of these parts of a model is given."""
    found: list[Tensor] = []
    hooks = [part.register_forward_pre_hook(lambda m, inputs: found.append(inputs[0])) for part in parts]
    model(ids, logits=False)
    for hook in hooks:
        hook.remove()
    return found


def main() -> None:
    parser = arguments(__doc__)
    TRAINED.arguments(parser)
    options = parser.parse_args()
    results = TRAINED.run(__file__, options)
    if results is None:
        return
    rows = held_out()
    text = "# Conditional experts\n\n" + conditions("python benchmarks/experts.py")
    text += (
        f"\n{LAYERS} blocks, {EXPERTS} experts of hidden width {SHAPE['d_ff']}, {TRAINED.conditions()} top-p: as many "
        "experts as make up half of the router's probability, one to four.\n\n## Quality at equal steps\n\n"
    )
    text += quality(results, rows, options.out)
    text += "\n## The clock\n\nBoth cores, in turn, seven times each seed.\n\n" + clock(rows)
    publish(text, options.out)


if __name__ == "__main__":
    main()
