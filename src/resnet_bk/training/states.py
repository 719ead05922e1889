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
from resnet_bk.weights import check_headers, read_tensors

# The entries of an optimizer's state for each parameter. A group of parameters whose entries are not those of AdamW
# names them as "entries".
ADAMW_ENTRIES, MUON_ENTRIES = ("exp_avg", "exp_avg_sq", "step"), ("momentum",)
_STEP, _SIGNED = "step", ("exp_avg", "momentum")


def full_tensor(x: Tensor) -> Tensor:
    """Gather all shards of x. If x is sharded, every process must call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def place_like(x: Tensor, reference: Tensor) -> Tensor:
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
            x.copy_(place_like(saved[name], x))
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
    """Load what :func:`gather_optimizer_state` returned for the same parameters and the same kind of optimizer.

    Parameters that are not trained get no state.

    Raises:
        CheckpointError: the file has the state of another optimizer or lacks an entry of a trained parameter; an entry
            has another shape, is not floating point, not finite, or cannot be one of the optimizer.
    """
    path, parameters = folder / OPTIMIZER, dict(model.named_parameters())
    entries = {
        p: group.get("entries", ADAMW_ENTRIES)
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad
    }
    # Fused AdamW reads the memory of moments as the parameter's dtype, and that of steps as float32.
    step = torch.empty((), dtype=torch.float32)
    expected = {
        f"{name}/{entry}": step if entry == _STEP else p
        for entry in (*ADAMW_ENTRIES, *MUON_ENTRIES)
        for name, p in parameters.items()
    }
    trained = [key for key in expected if _entry(key) in entries.get(parameters[_name(key)], ())]
    for key in check_headers([path], expected, ()):
        if _entry(key) not in entries.get(parameters[_name(key)], (_entry(key),)):
            kinds = ("muon", "adamw") if _entry(key) in MUON_ENTRIES else ("adamw", "muon")
            raise CheckpointError(
                f"{path}: {key!r}: is of the optimizer {kinds[0]!r}, expected the state of {kinds[1]!r}; resume with "
                f"--optimizer {kinds[0]}"
            )
    saved = read_tensors(path, expected, trained)
    for key in trained:
        if _entry(key) not in _SIGNED and saved[key].min() < 0:  # the root of a second moment would be NaN
            raise CheckpointError(f"{path}: {key!r}: expected 0 or more, got {saved[key].min():g}; it is damaged")
    for key in trained:
        p, x = parameters[_name(key)], saved[key]
        optimizer.state[p][_entry(key)] = x.to(p.device) if _entry(key) == _STEP else place_like(x, p)


def _name(key: str) -> str:
    return key.rpartition("/")[0]


def _entry(key: str) -> str:
    return key.rpartition("/")[2]
