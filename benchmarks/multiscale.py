"""Multi-scale against flat: the clock, then bits per byte at equal steps and at equal training time, and boundaries.

``python benchmarks/multiscale.py --out benchmarks/results/...`` first runs every training cell that is not in the log
yet (two single-thread processes at a time), then the timings on the then quiet machine.

Dimensions: B sequences, N tokens.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    SHARED,
    arguments,
    batches,
    conditions,
    mean_nats,
    publish,
    run_cells,
    spread,
    stdlib_ids,
    table,
    train,
)

from resnet_bk.adaptive.multiscale import ChunkRecord, build_stack
from resnet_bk.config import ModelConfig
from resnet_bk.data.tokens import byte_ids
from resnet_bk.model import LanguageModel
from resnet_bk.training.measure import greedy

SEEDS, BATCH, LENGTH, STEPS, WINDOW = (0, 1, 2), 12, 256, 300, 1024
SHAPE = {"d_model": 128, "n_seq": LENGTH, "num_experts": 1}


def scales(layers: list[int], boundaries: str = "fixed", factor: int = 4) -> dict[str, Any]:
    return {"multiscale": {"factors": [factor], "layers": layers, "boundaries": boundaries}}


# name -> fields of the model. Eight blocks each, and equal parameters but for the resampling.
MODELS: dict[str, dict[str, Any]] = {
    "flat": {"n_layers": 8},
    "stride 4, 1-6-1": scales([1, 6, 1]),
    "words, 1-6-1": scales([1, 6, 1], "whitespace"),
    "words, 2-5-1": scales([2, 5, 1], "whitespace"),
    "learned, 1-6-1": scales([1, 6, 1], "learned", 5),
    "stride 5, 1-6-1": scales([1, 6, 1], factor=5),
}


def build(name: str, **shape: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(259, **{**SHAPE, **shape, **MODELS[name]})


def corpus(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name == "stdlib":
        return stdlib_ids()
    ids = byte_ids((SHARED / "data" / "tinyshakespeare.txt").read_bytes())
    return ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]


def chunk_share(model: LanguageModel, ids: torch.Tensor) -> float:
    """Chunks per position, 1 for a flat model."""
    records = [r for r in model(ids, logits=False).records if isinstance(r, ChunkRecord)]
    return records[0].closes.float().mean().item() if records else 1.0  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------ quality


def cell(spec: dict[str, Any]) -> dict[str, Any]:
    """One training run; what it reached, the seconds it took and the size of its chunks."""
    torch.set_num_threads(1)
    train_ids, val_ids = corpus(spec["corpus"])
    torch.manual_seed(spec["seed"])
    model = LanguageModel(259, **SHAPE, **MODELS[spec["model"]])

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return model(x, targets=y, logits=False).loss

    def cross_entropy(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return model(x, targets=y, logits=False).losses["cross_entropy"]

    budget = {key: spec[key] for key in ("steps", "seconds") if key in spec}
    record = train(loss_of, model, batches(train_ids, BATCH, LENGTH, spec["seed"]), **budget)
    model.eval()
    nats = mean_nats(cross_entropy, val_ids, WINDOW, limit=2**18)
    sample = torch.from_numpy(val_ids[: 64 * WINDOW].astype(np.int64)).view(64, WINDOW)
    return {
        "bits_per_byte": nats / math.log(2),
        "parameters": sum(p.numel() for p in model.parameters()),
        "chunk": 1 / chunk_share(model, sample),
        **record,
    }


# ------------------------------------------------------------------------------------------------- clock


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, taken in turn so that the machine's moods fall on all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return times


def ratios(times: dict[str, list[float]], base: str) -> dict[str, str]:
    """Base over each, pair by pair: median (least to greatest)."""
    return {n: spread([b / t for b, t in zip(times[base], ts, strict=True)], 2) for n, ts in times.items()}


def inner_stack_ratio(repeats: int = 9) -> str:
    """Six blocks on 2,048 positions against the same six on 512, forward and backward."""
    torch.manual_seed(0)
    stack = build_stack(ModelConfig(d_model=160, n_layers=6, num_experts=1))

    def step(n: int) -> Callable[[], None]:
        x = torch.randn(4, n, 160, requires_grad=True)
        return lambda: stack(x, None, None, None)[0].sum().backward()

    return ratios(interleaved({"N": step(2048), "N/4": step(512)}, repeats), "N")["N/4"]


def clock(ids: np.ndarray, width: int, batch: int, length: int, repeats: int = 7) -> list[list[str]]:
    """Training step, prefill and decode of every model, as ratios to the flat one."""
    models = {name: build(name, d_model=width) for name in MODELS}
    draw = batches(ids, batch, length, 0)
    x, y = draw()
    long, _ = batches(ids, 8, 2048, 1)()

    def step(model: LanguageModel) -> Callable[[], None]:
        def run() -> None:
            model(x, targets=y, logits=False).loss.backward()
            model.zero_grad()

        return run

    def prefill(model: LanguageModel) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                model(long, logits=False)

        return run

    def decode(model: LanguageModel) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                state = model(long[:1, :64]).state
                for t in range(64, 264):
                    state = model(long[:1, t : t + 1], state=state).state

        return run

    trained = interleaved({n: step(m) for n, m in models.items()}, repeats)
    filled = interleaved({n: prefill(m) for n, m in models.items()}, repeats)
    decoded = interleaved({n: decode(m.eval()) for n, m in models.items()}, repeats)
    rows = []
    for name, model in models.items():
        rows.append([name, f"{sum(p.numel() for p in model.parameters()):,}", f"{1 / chunk_share(model, long):.2f}"])
        rows[-1] += [ratios(times, "flat")[name] for times in (trained, filled, decoded)]
        rows[-1].append(f"{1e3 * statistics.median(decoded[name]) / 200:.2f}")
    return rows
