"""The optimizer of training runs and benchmarks."""

from typing import Any

import torch
from torch import nn


def create(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """Return AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) for the parameters of a model that are trained.

    Parameters of two or more dimensions decay.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
