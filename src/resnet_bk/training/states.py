"""Weights and optimizer state as full tensors in safetensors.

A checkpoint does not depend on how many processes wrote it; any number of processes can read it.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from resnet_bk.checkpoint import OPTIMIZER, WEIGHTS, CheckpointError
from resnet_bk.layers.embedding import NgramMemory
from resnet_bk.weights import read_tensors

_MOMENTS, _STEP = ("exp_avg", "exp_avg_sq"), "step"  # the entries of AdamW's state


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
    """Load every parameter and buffer of `model` from a checkpoint.

    Raises:
        CheckpointError: the weights are not those of `model`, see :func:`resnet_bk.weights.read_tensors`.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    saved = read_tensors(folder / WEIGHTS, tensors)
    with torch.no_grad():
        for name, x in tensors.items():
            x.copy_(_place_like(saved[name], x))
    for name, module in model.named_modules():
        if isinstance(module, NgramMemory):
            module.check_entries(f"{folder / WEIGHTS}: '{name}.entries'")


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
    """Load what :func:`gather_optimizer_state` returned for the same parameters and AdamW.

    Parameters that are not trained get no state.

    Raises:
        CheckpointError: the file lacks an entry of a trained parameter; an entry has another shape, is not floating
            point, not finite, or cannot be one of AdamW.
    """
    path, parameters = folder / OPTIMIZER, dict(model.named_parameters())
    optimized = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    # Fused AdamW reads the memory of moments as the parameter's dtype, and that of steps as float32.
    expected: dict[str, Tensor] = {f"{name}/{entry}": p for name, p in parameters.items() for entry in _MOMENTS}
    expected |= {f"{name}/{_STEP}": torch.empty((), dtype=torch.float32) for name in parameters}
    trained = [key for key in expected if parameters[key.rpartition("/")[0]] in optimized]
    saved = read_tensors(path, expected, trained)
    for key in trained:
        if not key.endswith("/exp_avg") and saved[key].min() < 0:  # its root would be NaN
            raise CheckpointError(f"{path}: {key!r}: expected 0 or more, got {saved[key].min():g}; it is damaged")
    for key in trained:
        name, _, entry = key.rpartition("/")
        p, x = parameters[name], saved[key]
        optimizer.state[p][entry] = x.to(p.device) if entry == _STEP else _place_like(x, p)
