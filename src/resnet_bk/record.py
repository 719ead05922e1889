"""What a part of the model reports about one forward pass, beside its output."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Record:
    """losses: by name, unweighted scalars. Rooms that decide something return a subclass that holds their decisions."""

    losses: dict[str, Tensor] = field(default_factory=dict)


def mean_losses(records: list[Record]) -> dict[str, Tensor]:
    """Every loss by name: the mean over the parts of the model that report it."""
    names = dict.fromkeys(name for record in records for name in record.losses)
    return {name: torch.stack([r.losses[name] for r in records if name in r.losses]).mean() for name in names}
