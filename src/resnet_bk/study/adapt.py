"""The command ``resnet-bk adapt``: give a trained model techniques, and compare it with its base at several thresholds.

The new run starts from the base's weights and learns from its predictions (LayerSkip, arXiv:2404.16710, and
Router-Tuning, arXiv:2410.13184, adapt trained models so).
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.adaptive.depth import AdaptiveDepth
from resnet_bk.config import AdaptConfig, EvalConfig
from resnet_bk.files import json_text, write_whole
from resnet_bk.inference.loading import load
from resnet_bk.model import LanguageModel
from resnet_bk.report.tables import Console, markdown_table, print_table
from resnet_bk.report.terminal import say
from resnet_bk.study.evaluate import Scores, evaluate
from resnet_bk.study.finished import read_runs
from resnet_bk.study.ledger import Ledger
from resnet_bk.study.measure import Costs, measure, rank_correlation
from resnet_bk.study.run import conclude
from resnet_bk.training import run as training
from resnet_bk.training.run import TrainedRun

RESULTS, TABLE = "adapt.json", "adapt.md"
ROUNDS = 3  # of measurements of all models in turn, so that changes of the machine affect all of them
DIFFICULTY_TOKENS = 16_384  # of the held-out text, whose cost is compared with the base's loss
EXIT_THRESHOLDS = [0.9, 0.95, 0.98, 1.0]  # confidences


@dataclass(frozen=True)
class Point:
    """One model at one threshold: the base, or the adapted model.

    Attributes:
        name: of the model.
        threshold: of its adaptive depth; None without.
        scores, costs: on the held-out text.
        difficulty: rank correlation of the FLOPs at each position with the base's loss there; 0 if all cost the same.
    """

    name: str
    threshold: float | None
    scores: Scores
    costs: Costs
    difficulty: float

    def row(self, base: "Point") -> list[str]:
        """Return the cells of a table in which other models stand beside the base."""
        perplexity = 2 ** (self.scores.bits_per_byte - base.scores.bits_per_byte) - 1
        return [
            self.name,
            "" if self.threshold is None else f"{self.threshold:g}",
            f"{self.scores.bits_per_byte:.4f}",
            f"{perplexity:+.1%}",
            "" if self.scores.blocks is None else f"{self.scores.blocks:.2f}",
            f"{self.difficulty:.2f}",
            f"{self.costs.flops_per_byte / base.costs.flops_per_byte:.2f}",
            f"{self.costs.prefill / base.costs.prefill:.2f}",
            f"{self.costs.decode / base.costs.decode:.2f}",
        ]


HEAD = [
    "model",
    "threshold",
    "bits/byte",
    "perplexity",
    "blocks",
    "follows loss",
    "FLOPs",
    "prefill, x base",
    "decode, x base",
]


def adapt(config: AdaptConfig, console: Console) -> dict[str, Any]:
    """Train the adapted model, then score and measure it beside its base.

    Returns:
        The content of adapt.json.

    Raises:
        ConfigError: the base is not a finished run, or its model cannot have the techniques.
    """
    (base,) = read_runs("adapt.run", [config.run])
    recipe = config.recipe(base.config)
    with training.trained(recipe, console) as run:
        assert run is not None  # the command line allows one process
        conclude(run, console)
        say(console, "comparing with the base ...")
        points = _points(config, run)
        rows = [point.row(points[0]) for point in points]
        write_whole(run.folder / TABLE, f"# {config.run}, adapted\n\n" + markdown_table([HEAD, *rows]))
        results = {"base": config.run, "points": [_values(point) for point in points]}
        write_whole(run.folder / RESULTS, json_text(results))
        print_table(console, f"{config.run}, adapted", rows, HEAD)
        say(console, f"wrote {run.folder}: {RESULTS}, {TABLE}")
    return results


def _points(config: AdaptConfig, run: TrainedRun) -> list[Point]:
    """Return the base, and the adapted model at each threshold."""
    base, model = load(config.run)[0].model, run.model.model
    layers = [module for module in model.modules() if isinstance(module, AdaptiveDepth)]
    thresholds: list[float | None] = [None]
    if layers:
        others = config.thresholds or (EXIT_THRESHOLDS if run.config.model.depth.policy == "exit" else [])
        thresholds = list(dict.fromkeys([layers[0].threshold, *others]))

    def chosen(name: str, threshold: float | None) -> LanguageModel:
        if name == "base":
            return base
        for layer in layers:
            assert threshold is not None
            layer.threshold = threshold
        return model

    keys = [("base", None), *(("adapted", threshold) for threshold in thresholds)]
    scoring = EvalConfig(checkpoint=str(run.folder), max_bytes=config.max_bytes)
    end, words = run.tokenizer.eos_token_id, run.held_out_words
    scores = [evaluate(chosen(*key), run.held_out, end, scoring, words) for key in keys]
    rounds = [[measure(chosen(*key), run.held_out.ids, run.bytes_per_token) for key in keys] for _ in range(ROUNDS)]
    costs = map(_middle, zip(*rounds, strict=True))
    ids = torch.from_numpy(run.held_out.ids[:DIFFICULTY_TOKENS].astype(np.int64)).unsqueeze(0)
    loss = _loss(base, ids)
    difficulty = [_difficulty(chosen(*key), ids, loss) for key in keys]
    found = zip(keys, scores, costs, difficulty, strict=True)
    return [Point(*key, score, cost, follows) for key, score, cost, follows in found]


@torch.no_grad()
def _loss(model: LanguageModel, ids: Tensor) -> Tensor:
    """Return the loss at each position of ids (1, N) but the last, (N - 1,)."""
    logits = model(ids.to(model.head.weight.device)).logits
    assert logits is not None
    return F.cross_entropy(logits[0, :-1].cpu(), ids[0, 1:], reduction="none")


@torch.no_grad()
def _difficulty(model: LanguageModel, ids: Tensor, loss: Tensor) -> float:
    """Return the rank correlation of the FLOPs at each position with another model's loss there."""
    with Ledger(model) as ledger:
        model(ids.to(model.head.weight.device), logits=False)
    return rank_correlation(ledger.by_token[0, :-1].cpu(), loss)


def _middle(costs: Sequence[Costs]) -> Costs:
    """Return the costs of one model with the median of its speeds."""
    prefill, decode = (statistics.median(getattr(c, name) for c in costs) for name in ("prefill", "decode"))
    return dataclasses.replace(costs[0], prefill=prefill, decode=decode)


def _values(point: Point) -> dict[str, Any]:
    return dataclasses.asdict(point) | {"scores": point.scores.to_dict(), "costs": point.costs.to_dict()}
