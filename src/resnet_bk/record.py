"""What a part of the model reports about one forward pass, beside its output."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

TaskLoss = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


@dataclass(kw_only=True)
class Record:
    """losses: by name, unweighted scalars. Rooms that decide something return a subclass that holds their decisions.

    task_loss: how a room wants its output scored in training, where the loss of the output alone would not tell it
    what its decisions were worth. It is given a function from features (B, N, D) to the nats (B, N) of each
    position's target, and which positions have one, (B, N) bool; nats are 0 at the others. It returns the loss of each
    position (B, N).
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    task_loss: TaskLoss | None = None


def mean_losses(records: list[Record]) -> dict[str, Tensor]:
    """Every loss by name: the mean over the parts of the model that report it."""
    names = dict.fromkeys(name for record in records for name in record.losses)
    return {name: torch.stack([r.losses[name] for r in records if name in r.losses]).mean() for name in names}
