"""Weights and optimizer as whole tensors in safetensors, however many processes hold them: a checkpoint written by any
number of processes can be read by any other number."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from resnet_bk.checkpoint import CheckpointError

WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


def whole(x: Tensor) -> Tensor:
    """All of x. Where it is sharded, every process has to call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _like(x: Tensor, model: Tensor) -> Tensor:
    """x where and as `model` is: this process's part of it where that is sharded."""
    x = x.to(model.device)
    if not isinstance(model, DTensor):
        return x
    return distribute_tensor(x, model.device_mesh, model.placements, src_data_rank=None)


def whole_weights(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """As ``model.state_dict()``, on the CPU; tied tensors stay tied. Every process has to call this; `keep` False: it
    only takes part."""
    found: dict[str, Tensor] = {}
    first_name: dict[int, str] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        same = first_name.setdefault(id(x), name)
        if same != name:
            found |= {name: found[same]} if keep else {}
            continue
        x = whole(x)
        if keep:
            found[name] = x.detach().cpu()
    return found


def load_weights(model: nn.Module, folder: Path) -> None:
    """Every parameter of `model` from a checkpoint."""
    saved = load_file(folder / WEIGHTS)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in saved or saved[name].shape != p.shape:
                raise CheckpointError(f"{folder / WEIGHTS}: no {name!r} of shape {tuple(p.shape)}; not this model's")
            p.copy_(_like(saved[name], p))


def whole_moments(model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True) -> dict[str, Tensor]:
    """All that an optimizer remembers, as "parameter name/entry". `keep` as in :func:`whole_weights`."""
    found: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        for entry, x in sorted(optimizer.state.get(p, {}).items()):
            x = whole(x)
            if keep:
                found[f"{name}/{entry}"] = x.cpu()
    return found


def save_moments(moments: dict[str, Tensor], folder: Path) -> None:
    save_file({name: x.contiguous() for name, x in moments.items()}, folder / OPTIMIZER)


def load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """The reverse of :func:`whole_moments`, for the same parameters."""
    parameters = dict(model.named_parameters())
    for key, x in load_file(folder / OPTIMIZER).items():
        name, _, entry = key.rpartition("/")
        if name not in parameters:
            raise CheckpointError(f"{folder / OPTIMIZER}: {name!r} is no parameter of this model; not its file")
        state: dict[str, Any] = optimizer.state[parameters[name]]
        p = parameters[name]
        state[entry] = _like(x, p) if x.dim() or not p.dim() else x.to(p.device)  # a step count is held whole
