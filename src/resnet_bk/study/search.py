"""The rules of a search: where it looks, which trials it stops, what it chooses. Nothing here trains."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resnet_bk.config import ConfigError, TrainConfig

MARGIN, NEEDED = 0.1, 4  # of `hopeless`


@dataclass(frozen=True)
class Point:
    """A finished trial. name: its folder; settings: those searched; bits_per_byte: held-out; ms_per_kb: measured."""

    name: str
    settings: dict[str, float]
    bits_per_byte: float
    ms_per_kb: float

    @property
    def perplexity(self) -> float:
        """Per byte."""
        return float(2**self.bits_per_byte)


def front(pairs: Sequence[tuple[float, float]]) -> list[int]:
    """Indices, cheapest first, of the pairs (bits per byte, cost) than which no other is better in one way and at least
    as good in both."""
    found: list[int] = []
    for i in sorted(range(len(pairs)), key=lambda i: (pairs[i][1], pairs[i][0])):
        last = pairs[found[-1]] if found else None
        if last is None or pairs[i][0] < last[0] or pairs[i] == last:
            found.append(i)
    return found


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Indices of the trials on the front of bits per byte and time, fastest first."""
    return front([(point.bits_per_byte, point.ms_per_kb) for point in points])


def choose(points: Sequence[Point], max_loss: float) -> int:
    """Index of the fastest point, of equals the best, whose perplexity is at most 1 + max_loss times the least one."""
    allowed = min(point.perplexity for point in points) * (1 + max_loss)
    good = [i for i, point in enumerate(points) if point.perplexity <= allowed]
    return min(good, key=lambda i: (points[i].ms_per_kb, points[i].bits_per_byte))


def hopeless(bits_per_byte: float, finished: Sequence[float]) -> bool:
    """Whether to stop a trial at a rung: its training bits per byte are more than MARGIN (a tenth) above those that any
    of the finished trials, at least NEEDED of them, had there.

    Optuna's own pruners refuse studies of two objectives. How fast a model is shows only at the end, so quality alone
    decides, by a rule that spares whatever could be chosen: a trial that is worse than the worst by so much.
    """
    return len(finished) >= NEEDED and bits_per_byte > (1 + MARGIN) * max(finished)


def default_space(recipe: TrainConfig) -> dict[str, list[float]]:
    """The settings of adaptive depth that its policy reads."""
    policy = recipe.model.depth.policy
    if policy == "none":
        raise ConfigError(
            "tune.space: missing, and the default, settings of adaptive depth, means nothing with model.depth.policy = "
            "'none'; give --space '{learning_rate: [0.001, 0.01]}'"
        )
    if policy == "exit":
        return {"model.depth.threshold": [0.9 if recipe.model.depth.confidence == "gain" else 0.5, 0.99]}
    return {
        "model.depth.threshold": [0.5, 0.99],
        "model.depth.penalty": [0.01, 1.0],
        "model.depth.target": [0.3, 0.9],
    }


def with_settings(recipe: Any, settings: dict[str, Any]) -> Any:
    """The recipe with dotted settings replaced, all at once; ConfigError where no run can have them together."""
    changes: dict[str, Any] = {name: value for name, value in settings.items() if "." not in name}
    for section in {name.partition(".")[0] for name in settings if "." in name}:
        inner = {name.partition(".")[2]: value for name, value in settings.items() if name.startswith(f"{section}.")}
        changes[section] = with_settings(getattr(recipe, section), inner)
    return dataclasses.replace(recipe, **changes)


def recipe_settings(recipe: TrainConfig, space: dict[str, list[float]]) -> dict[str, float] | None:
    """What the recipe itself has for the settings of `space`; None where one lies outside of it or has no value."""
    found: dict[str, Any] = {name: functools.reduce(getattr, name.split("."), recipe) for name in space}
    if found.get("model.depth.threshold", 0) is None:
        found["model.depth.threshold"] = recipe.model.depth.stops_at
    inside = all(found[name] is not None and low <= found[name] <= high for name, (low, high) in space.items())
    return found if inside else None
