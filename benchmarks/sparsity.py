"""Learned sparsity in the core: speed of sparse chains, and quality of trained models.

``python benchmarks/sparsity.py --out benchmarks/results/...`` first runs every training cell that is not in the log yet
(two single-thread processes at a time), then times the models on the quiet machine.

Dimensions: B sequences, N sites, D model width, H heads.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import interleaved, spread, table
from torch import Tensor
from trained import Trained, bits, by_tenth, plot_tenths, prefill, scored, training_step, worse

from resnet_bk.config import ModelConfig, SparsityConfig
from resnet_bk.layers.mixer import MIXERS
from resnet_bk.layers.sparse import SparsityRecord
from resnet_bk.ops import left_green, propagate

SHAPE = {"d_model": 128, "n_layers": 4, "n_seq": 256, "num_experts": 1}
LENGTHS = (2_048, 8_192, 65_536)
TARGETS = (0.25, 0.5, 0.75)

# name -> fields of the model
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    **{f"sparse {target}": {"sparsity": {"target": target}} for target in TARGETS},
    "diagonal": {"readout": "diagonal"},
    "diagonal, sparse 0.5": {"readout": "diagonal", "sparsity": {"target": 0.5}},
}
TRAINED = Trained("sparsity", SHAPE, MODELS, batch=12, steps=300, seeds=(0, 1, 2))


def dense_of(name: str) -> str:
    """Return the name of the dense model with the same readout."""
    return "diagonal" if name.startswith("diagonal") else "dense"


# ------------------------------------------------------------------------------------------------- clock


def core_steps(readout: str, width: int, length: int, target: float) -> dict[str, Callable[[], None]]:
    """Return runs of forward and backward of a core and of its whole mixer, dense and with `target` of sites out."""
    shape = {"d_model": 4 * width, "readout": readout, "n_heads": 4 if readout == "propagator" else None}
    mixers = {}
    for name, sparsity in (("dense", SparsityConfig()), ("sparse", SparsityConfig(target=target))):
        torch.manual_seed(0)
        mixers[name] = MIXERS[readout](ModelConfig(**shape, sparsity=sparsity))  # type: ignore[arg-type]
    batch = max(1, 16_384 // length)
    x = torch.randn(batch, length, 4 * width, requires_grad=True)
    with torch.no_grad():
        sparse = mixers["sparse"].sparse
        sparse.importance.bias -= sparse.importance(x).flatten().quantile(target)
        a, z = mixers["dense"].energies(x)
    a.requires_grad_()
    kept = sparse(x, None)[0].sites.mask.shape[1]
    v = torch.randn(*a.shape, width, requires_grad=True)
    qk = {
        name: [torch.randn(batch, sites, a.shape[2], width, requires_grad=True) for _ in range(2)]
        for name, sites in (("dense", length), ("sparse", kept))
    }

    def core(name: str) -> None:
        sparsity = None if name == "dense" else sparse(x, None)[0]
        if readout == "diagonal":
            y, _ = left_green(a, z, sparsity=sparsity)
        else:
            y, _ = propagate(*qk[name], v, a, z, sparsity=sparsity)
        y.backward(torch.ones_like(y))
        for leaf in (x, a, v, *qk[name], *sparse.parameters()):
            leaf.grad = None

    def layer(name: str) -> None:
        y, _, _ = mixers[name](x, None, None)
        y.backward(torch.ones_like(y))
        x.grad = None
        mixers[name].zero_grad()

    runs = {"core": core, "layer": layer}
    return {f"{what} {name}": (lambda r=run, n=name: r(n)) for what, run in runs.items() for name in mixers}


def clock() -> str:
    """Return the table of speed of cores and mixers with half of the sites left out."""
    lines = []
    for readout, width in (("propagator", 32), ("propagator", 64), ("diagonal", 32)):
        for length in LENGTHS:
            times = interleaved(core_steps(readout, width, length, 0.5), 9)
            row: list[Any] = [readout, width if readout == "propagator" else "", 4 * width, f"{length:,}"]
            for what in ("core", "layer"):
                dense, sparse = times[f"{what} dense"], times[f"{what} sparse"]
                row += [f"{1000 * statistics.median(dense):.1f}", f"{1000 * statistics.median(sparse):.1f}"]
                row.append(spread([d / s for d, s in zip(dense, sparse, strict=True)], 2))
            lines.append(row)
    header = ["readout", "head width", "D", "N", "core dense, ms", "sparse, ms", "x faster"]
    return table([*header, "mixer dense, ms", "sparse, ms", "x faster"], lines)


def whole_models(rows: Tensor) -> str:
    """Return the table of prefill (8 x 2,048 held-out bytes) and training steps (12 x 256), against dense models."""
    found = TRAINED.speeds({"prefill": prefill(rows), "training step": training_step(rows)}, dense_of)
    lines = [[name, spread(f["prefill"], 2), spread(f["training step"], 2)] for name, f in found.items()]
    return table(["model", "prefill, x faster than dense", "training step, x faster than dense"], lines)


# ----------------------------------------------------------------------------------------------- quality


def quality(results: list[dict[str, Any]], rows: Tensor, out: Path | None) -> str:
    """Return the table of bits per byte and sparsity; plot the share kept by tenths of the dense model's loss."""
    lines, curves = [], {}
    dense: dict[tuple[str, int], Tensor] = {}
    for name in MODELS:
        bpb, against, sparsity, tenths, correlation = [], [], [], [], []
        for seed in TRAINED.seeds:
            nats, outputs = scored(TRAINED.load(name, seed), rows)
            dense.setdefault((dense_of(name), seed), nats)
            reference = dense[dense_of(name), seed]
            bpb.append(bits(nats))
            against.append(worse(bits(nats), bits(reference)))
            if name != dense_of(name):
                kept = torch.cat([_kept(output.records) for output in outputs])
                sparsity.append(1 - kept.mean().item())
                curve, rank = by_tenth(reference, kept)
                tenths.append(curve)
                correlation.append(rank)
        parameters = next(r["parameters"] for r in results if r["cell"]["model"] == name)
        row = [name, f"{parameters:,}", spread(bpb, 3), spread(against, 1)]
        row.append(spread(sparsity, 3) if sparsity else "")
        lines.append([*row, spread(correlation, 2) if sparsity else ""])
        if tenths:
            curves[name] = tenths
    plot_tenths(curves, "dense", "share of sites kept", out)
    header = ["model", "parameters", "bits per byte", "perplexity worse than dense, %", "sparsity"]
    return table([*header, "rank correlation of sites kept and loss"], lines)


def _kept(records: list[Any]) -> Tensor:
    """Return the share of mixers that keep each position, (B, N)."""
    return torch.stack([r.kept.double() for r in records if isinstance(r, SparsityRecord)]).mean(0)


def page(results: list[dict[str, Any]], rows: Tensor, out: Path | None) -> str:
    text = (
        "\n## The clock\n\nForward and backward, both cores, dense and sparse in turn, nine times, 16,384 sites or "
        "one sequence; half of the sites left out by the predictor. Core: predictor, Green's function, scan, filling. "
        "Mixer: projections, convolution, norm and gate as well.\n\n"
    )
    text += clock()
    text += "\nWhole trained models, seven times each seed, 8 x 2,048 bytes and 12 x 256.\n\n" + whole_models(rows)
    return text + f"\n## Quality at equal steps\n\n4 blocks, {TRAINED.described()}\n\n" + quality(results, rows, out)


if __name__ == "__main__":
    TRAINED.main(__file__, __doc__, "Learned sparsity in the core", page)
