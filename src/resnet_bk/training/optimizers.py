"""The optimizers of training runs and benchmarks."""

from typing import Any, Literal

import torch
from torch import nn

from resnet_bk.layers.matrices import matrices
from resnet_bk.training.muon import Muon


def create(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    kind: Literal["adamw", "muon"] = "adamw",
) -> torch.optim.Optimizer:
    """Return an optimizer for the parameters of a model that are trained. Those of two or more dimensions decay.

    Args:
        model: the model; sharded already, if it is to be.
        learning_rate: of all parameters.
        weight_decay: decoupled.
        betas: of AdamW.
        kind: "adamw" (Loshchilov and Hutter 2017, arXiv:1711.05101), or "muon", see :mod:`resnet_bk.training.muon`.

    Raises:
        ValueError: the kind is not one of these; or it is "muon", and no layer of the model names matrices, see
            :mod:`resnet_bk.layers.matrices`.
    """
    if kind not in ("adamw", "muon"):
        raise ValueError(f"kind: got {kind!r}, allowed 'adamw' or 'muon'")
    found = matrices(model) if kind == "muon" else []
    if kind == "muon" and not found:
        raise ValueError("model: no layer names its matrices, allowed with kind 'adamw' only")
    hidden = {m.parameter for m in found}
    others = [p for p in model.parameters() if p.requires_grad and p not in hidden]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in others if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    return Muon([m for m in found if m.parameter.requires_grad], groups, learning_rate, weight_decay, betas)
