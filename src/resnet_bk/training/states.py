"""Weights and optimizer state as full tensors in safetensors.

A checkpoint does not depend on how many processes wrote it; any number of processes can read it.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from resnet_bk.checkpoint import CheckpointError, current_name

WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


def full_tensor(x: Tensor) -> Tensor:
    """Gather all shards of x. If x is sharded, every process must call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _place_like(x: Tensor, reference: Tensor) -> Tensor:
    """Move x to the device of `reference`; if `reference` is sharded, keep this process's shard only."""
    x = x.to(reference.device)
    if not isinstance(reference, DTensor):
        return x
    return distribute_tensor(x, reference.device_mesh, reference.placements, src_data_rank=None)


def gather_weights(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """Return ``model.state_dict()`` as full CPU tensors; tied tensors stay tied.

    Every process must call this. With `keep` False a process takes part in the gathering and returns nothing.
    """
    weights: dict[str, Tensor] = {}
    first_name: dict[int, str] = {}
    for name, x in model.state_dict(keep_vars=True).items():
        tied_to = first_name.setdefault(id(x), name)
        if tied_to != name:
            weights |= {name: weights[tied_to]} if keep else {}
            continue
        x = full_tensor(x)
        if keep:
            weights[name] = x.detach().cpu()
    return weights


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load every parameter of `model` from a checkpoint.

    Raises:
        CheckpointError: the checkpoint lacks a parameter, or has it in another shape.
    """
    saved = {current_name(name): x for name, x in load_file(folder / WEIGHTS).items()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in saved or saved[name].shape != p.shape:
                raise CheckpointError(
                    f"{folder / WEIGHTS}: has no {name!r} of shape {tuple(p.shape)}; the file belongs to another model"
                )
            p.copy_(_place_like(saved[name], p))


def gather_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True) -> dict[str, Tensor]:
    """Return the state of an optimizer as full CPU tensors, each named "parameter name/entry".

    Every process must call this; `keep` is that of :func:`gather_weights`.
    """
    state: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        for entry, x in sorted(optimizer.state.get(p, {}).items()):
            x = full_tensor(x)
            if keep:
                state[f"{name}/{entry}"] = x.cpu()
    return state


def save_optimizer_state(state: dict[str, Tensor], folder: Path) -> None:
    save_file({name: x.contiguous() for name, x in state.items()}, folder / OPTIMIZER)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load what :func:`gather_optimizer_state` returned for the same parameters.

    Raises:
        CheckpointError: the file names a parameter that `model` does not have.
    """
    parameters = dict(model.named_parameters())
    for key, x in load_file(folder / OPTIMIZER).items():
        name, _, entry = current_name(key).rpartition("/")
        if name not in parameters:
            raise CheckpointError(
                f"{folder / OPTIMIZER}: {name!r} is not a parameter of this model; the file belongs to another model"
            )
        state: dict[str, Any] = optimizer.state[parameters[name]]
        p = parameters[name]
        state[entry] = _place_like(x, p) if x.dim() or not p.dim() else x.to(p.device)  # step counts are not sharded
