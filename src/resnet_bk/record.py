"""Records: the losses and decisions that a layer reports about one forward pass, next to its output."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

TaskLoss = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


class Loss(NamedTuple):
    """An auxiliary loss: a scalar, and its weight in the model's loss."""

    value: Tensor
    weight: float


@dataclass(kw_only=True)
class Record:
    """The report of a layer. Layers that make decisions return a subclass that holds the decisions too.

    Attributes:
        losses: the layer's own losses by name.
        task_loss: in training, replaces the cross-entropy of the model's output, for a layer whose decisions would get
            no gradient from that. If several records have one, the model uses the first. Called as
            ``task_loss(nats, scored)``: `nats` maps features (B, N, D), before the final norm, to the cross-entropy
            (B, N) of each position's target, 0 where there is none; `scored` (B, N) bool is True where there is a
            target. Returns a loss per position (B, N).
    """

    losses: dict[str, Loss] = field(default_factory=dict)
    task_loss: TaskLoss | None = None


def mean_losses(records: Sequence[Record]) -> dict[str, Loss]:
    """Average each loss, by its name, over the records that report it."""
    found: dict[str, list[Loss]] = {}
    for record in records:
        for name, loss in record.losses.items():
            found.setdefault(name, []).append(loss)
    return {name: Loss(torch.stack([x.value for x in own]).mean(), own[0].weight) for name, own in found.items()}


def weighted_sum(losses: dict[str, Loss]) -> Tensor | float:
    """Sum the losses with their weights: what the model adds to the cross-entropy. 0.0 where there are none."""
    return sum((loss.weight * loss.value for loss in losses.values()), 0.0)
