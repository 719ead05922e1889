"""The rules of a search for settings: its space, which trials it stops, and which one it chooses."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from resnet_bk.config import ConfigError, TrainConfig

MARGIN, NEEDED = 0.1, 4  # see `hopeless`


@dataclass(frozen=True)
class Point:
    """A finished trial.

    Attributes:
        name: its folder.
        settings: its values of the searched settings.
        bits_per_byte: on held-out text.
        ms_per_kb: measured milliseconds per kilobyte.
    """

    name: str
    settings: dict[str, float]
    bits_per_byte: float
    ms_per_kb: float

    @property
    def perplexity(self) -> float:
        """Perplexity per byte."""
        return float(2**self.bits_per_byte)


def front(pairs: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices, cheapest first, of the pairs that no other pair dominates.

    A pair dominates another if it is better in one value and at least as good in both. pairs: bits per byte and cost.
    """
    found: list[int] = []
    for i in sorted(range(len(pairs)), key=lambda i: (pairs[i][1], pairs[i][0])):
        last = pairs[found[-1]] if found else None
        if last is None or pairs[i][0] < last[0] or pairs[i] == last:
            found.append(i)
    return found


def pareto_front(points: Sequence[Point]) -> list[int]:
    """Return the indices of the trials on the front of bits per byte and time, fastest first."""
    return front([(point.bits_per_byte, point.ms_per_kb) for point in points])


def choose(points: Sequence[Point], max_loss: float) -> int:
    """Return the index of the fastest point with a perplexity of at most 1 + max_loss times the lowest perplexity.

    Of equally fast points it is the one with the lowest perplexity.
    """
    allowed = min(point.perplexity for point in points) * (1 + max_loss)
    good = [i for i, point in enumerate(points) if point.perplexity <= allowed]
    return min(good, key=lambda i: (points[i].ms_per_kb, points[i].bits_per_byte))


def hopeless(bits_per_byte: float, finished: Sequence[float]) -> bool:
    """Return True to stop a trial at a rung: it is worse by a tenth (MARGIN) than the worst finished trial was there.

    The rule needs at least NEEDED finished trials. Optuna's own pruners do not support studies with two objectives.
    The speed of a model is measured at the end only, so the rule reads quality; it is lenient, to keep every trial that
    could be chosen for its speed.

    Args:
        bits_per_byte: training bits per byte of the trial at the rung.
        finished: training bits per byte of the finished trials at the same rung.
    """
    return len(finished) >= NEEDED and bits_per_byte > (1 + MARGIN) * max(finished)


def default_space(recipe: TrainConfig) -> dict[str, list[float]]:
    """Return the default space: the settings of adaptive depth that its policy reads."""
    policy = recipe.model.depth.policy
    if policy == "none":
        raise ConfigError(
            "tune.space: missing, and the default, the settings of adaptive depth, has no effect with "
            "model.depth.policy = 'none'; give --space '{learning_rate: [0.001, 0.01]}'"
        )
    if policy == "exit":
        return {"model.depth.threshold": [0.9 if recipe.model.depth.confidence == "gain" else 0.5, 0.99]}
    return {
        "model.depth.threshold": [0.5, 0.99],
        "model.depth.penalty": [0.01, 1.0],
        "model.depth.target": [0.3, 0.9],
    }


def with_settings(recipe: Any, settings: dict[str, Any]) -> Any:
    """Replace settings of a recipe together, by their dotted names; ConfigError if they do not fit each other."""
    changes: dict[str, Any] = {name: value for name, value in settings.items() if "." not in name}
    for section in {name.partition(".")[0] for name in settings if "." in name}:
        inner = {name.partition(".")[2]: value for name, value in settings.items() if name.startswith(f"{section}.")}
        changes[section] = with_settings(getattr(recipe, section), inner)
    return dataclasses.replace(recipe, **changes)


def recipe_settings(recipe: TrainConfig, space: dict[str, list[float]]) -> dict[str, float] | None:
    """Return the recipe's own values of the settings in `space`; None if one is outside its range or has no value."""
    found: dict[str, Any] = {name: functools.reduce(getattr, name.split("."), recipe) for name in space}
    if found.get("model.depth.threshold", 0) is None:
        found["model.depth.threshold"] = recipe.model.depth.stops_at
    inside = all(found[name] is not None and low <= found[name] <= high for name, (low, high) in space.items())
    return found if inside else None
