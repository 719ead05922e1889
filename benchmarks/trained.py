"""Models that a benchmark trains once, in cells of a resumable log, and loads again to measure.

Dimensions: B sequences, N tokens.
"""

import json
import math
import statistics
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import batches, run_cells, stdlib_ids, train
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.model import LanguageModel, ModelOutput
from resnet_bk.training.measure import rank_correlation

HELD_OUT, WINDOW = 2**18, 1024  # bytes scored, and at a time


class Trained:
    """The models of one benchmark, trained on the default corpus. models: name -> fields of the model."""

    def __init__(
        self,
        benchmark: str,
        shape: dict[str, Any],
        models: dict[str, dict[str, Any]],
        *,
        batch: int,
        steps: int,
        seeds: tuple[int, ...],
    ):
        self.benchmark, self.shape, self.models = benchmark, shape, models
        self.batch, self.steps, self.seeds = batch, steps, seeds

    def arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--cell", type=json.loads, help="internal: one training run, as JSON")
        parser.add_argument("--log", type=Path, default=Path(f"runs/benchmarks/{self.benchmark}.jsonl"))
        parser.add_argument("--train-only", action="store_true", help="fill the log and stop before the timings")

    def run(self, script: str, options: Namespace) -> list[dict[str, Any]] | None:
        """The results of every training cell; None where there is nothing more to do."""
        if options.cell is not None:
            print(json.dumps(self._train(options.cell)))
            return None
        cells = [
            {"model": name, "fields": {**self.shape, **fields}, "seed": seed, "steps": self.steps}
            for name, fields in self.models.items()
            for seed in self.seeds
        ]
        results = run_cells(script, cells, workers=2, log=options.log)
        return None if options.train_only else results

    def _train(self, spec: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(1)
        torch.manual_seed(spec["seed"])
        model = LanguageModel(259, **spec["fields"])

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            return model(x, targets=y, logits=False).loss  # type: ignore[return-value]

        ids, _ = stdlib_ids()
        draw = batches(ids, self.batch, self.shape["n_seq"], spec["seed"])
        result: dict[str, Any] = dict(train(loss_of, model, draw, steps=spec["steps"]))
        result["parameters"] = sum(p.numel() for p in model.parameters())
        save_model(model, str(self._path(spec["model"], spec["seed"])))
        return result

    def _path(self, name: str, seed: int) -> Path:
        folder = Path("runs/benchmarks") / self.benchmark
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}.safetensors"

    def load(self, name: str, seed: int) -> LanguageModel:
        model = LanguageModel(259, **{**self.shape, **self.models[name]})
        load_model(model, str(self._path(name, seed)))
        return model.eval()

    def conditions(self) -> str:
        """How they were trained, in words."""
        return (
            f"D = {self.shape['d_model']}, the default corpus, {self.steps} steps of {self.batch} x "
            f"{self.shape['n_seq']} bytes, AdamW 3e-3 cosine, one thread a run, two runs at a time; {HELD_OUT:,} "
            f"held-out bytes in windows of {WINDOW:,}. Median (least to greatest) of {len(self.seeds)} seeds."
        )


def held_out() -> Tensor:
    """(B, N + 1) ids, end to end."""
    _, ids = stdlib_ids()
    count = min(HELD_OUT, len(ids) - 1) // WINDOW
    return torch.from_numpy(np.stack([ids[i * WINDOW : (i + 1) * WINDOW + 1] for i in range(count)]).astype(np.int64))


@torch.no_grad()
def scored(model: LanguageModel, rows: Tensor) -> tuple[Tensor, list[ModelOutput]]:
    """Nats (B, N) of every token, and what the model returned for sixteen rows at a time, without logits."""
    nats, outputs = [], []
    for x in rows.split(16):
        output = model(x[:, :-1])
        nats.append(F.cross_entropy(output.logits.transpose(1, 2), x[:, 1:], reduction="none"))
        output.logits = None
        outputs.append(output)
    return torch.cat(nats), outputs


def bits(nats: Tensor) -> float:
    return nats.mean().item() / math.log(2)


def worse(bpb: float, reference: float) -> float:
    """Perplexity per byte, % above that of the reference."""
    return 100 * (2 ** (bpb - reference) - 1)


def by_tenth(loss: Tensor, what: Tensor) -> tuple[list[float], float]:
    """Means of `what` in each tenth of the tokens by loss, and the rank correlation of the two. Any shape."""
    loss, what = loss.flatten(), what.flatten().double()
    tenths = [tenth.mean().item() for tenth in what[loss.argsort()].tensor_split(10)]
    return tenths, rank_correlation(loss, what)


def middle(curves: list[list[float]]) -> list[float]:
    """The median curve, point by point."""
    return [statistics.median(values) for values in zip(*curves, strict=True)]
