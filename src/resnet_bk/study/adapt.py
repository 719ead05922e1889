"""The command ``resnet-bk adapt``: give a trained model techniques, and compare it with its base at several thresholds.

The new run starts from the base's weights and learns from its predictions (LayerSkip, arXiv:2404.16710, and
Router-Tuning, arXiv:2410.13184, adapt trained models so).
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from resnet_bk.adaptive.depth import AdaptiveDepth
from resnet_bk.config import AdaptConfig, EvalConfig
from resnet_bk.files import json_text, write_whole
from resnet_bk.inference.loading import load
from resnet_bk.model import LanguageModel
from resnet_bk.report.tables import Console, markdown_table, print_table
from resnet_bk.report.terminal import say
from resnet_bk.study.evaluate import Scores, evaluate
from resnet_bk.study.finished import read_runs
from resnet_bk.study.measure import Costs, measure
from resnet_bk.study.run import conclude
from resnet_bk.training import run as training
from resnet_bk.training.run import TrainedRun

RESULTS, TABLE = "adapt.json", "adapt.md"
EXIT_THRESHOLDS = [0.9, 0.95, 0.98, 1.0]  # confidences


@dataclass(frozen=True)
class Point:
    """One model at one threshold: the base, or the adapted model.

    Attributes:
        name: of the model.
        threshold: of its adaptive depth; None without.
        scores, costs: on the held-out text.
    """

    name: str
    threshold: float | None
    scores: Scores
    costs: Costs

    def row(self, base: "Point") -> list[str]:
        """Return the cells of a table in which other models stand beside the base."""
        perplexity = 2 ** (self.scores.bits_per_byte - base.scores.bits_per_byte) - 1
        return [
            self.name,
            "" if self.threshold is None else f"{self.threshold:g}",
            f"{self.scores.bits_per_byte:.4f}",
            f"{perplexity:+.1%}",
            "" if self.scores.blocks is None else f"{self.scores.blocks:.2f}",
            f"{self.costs.flops_per_byte / base.costs.flops_per_byte:.2f}",
            f"{self.costs.prefill / base.costs.prefill:.2f}",
            f"{self.costs.decode / base.costs.decode:.2f}",
        ]


HEAD = ["model", "threshold", "bits per byte", "perplexity", "blocks", "FLOPs", "prefill, x base", "decode, x base"]


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
        points = list(_points(config, run))
        rows = [point.row(points[0]) for point in points]
        write_whole(run.folder / TABLE, f"# {config.run}, adapted\n\n" + markdown_table([HEAD, *rows]))
        results = {"base": config.run, "points": [_values(point) for point in points]}
        write_whole(run.folder / RESULTS, json_text(results))
        print_table(console, f"{config.run}, adapted", rows, HEAD)
        say(console, f"wrote {run.folder}: {RESULTS}, {TABLE}")
    return results


def _points(config: AdaptConfig, run: TrainedRun) -> Iterator[Point]:
    """Yield the base, and the adapted model at each threshold."""
    base, _ = load(config.run)
    yield _point("base", base.model, None, config, run)
    model = run.model.model
    layers = [module for module in model.modules() if isinstance(module, AdaptiveDepth)]
    if not layers:
        yield _point("adapted", model, None, config, run)
        return
    others = config.thresholds or (EXIT_THRESHOLDS if run.config.model.depth.policy == "exit" else [])
    for threshold in dict.fromkeys([layers[0].threshold, *others]):
        for layer in layers:
            layer.threshold = threshold
        yield _point("adapted", model, threshold, config, run)


def _point(name: str, model: LanguageModel, threshold: float | None, config: AdaptConfig, run: TrainedRun) -> Point:
    scoring = EvalConfig(checkpoint=str(run.folder), max_bytes=config.max_bytes)
    scores = evaluate(model, run.held_out, run.tokenizer.eos_token_id, scoring, run.held_out_words)
    return Point(name, threshold, scores, measure(model, run.held_out.ids, run.bytes_per_token))


def _values(point: Point) -> dict[str, Any]:
    return dataclasses.asdict(point) | {"scores": point.scores.to_dict(), "costs": point.costs.to_dict()}
