"""The checks of what a model is given: tensors of token positions, and a state.

Only values on the CPU are read. On a GPU that would be a host-device sync.

Dimensions: B batch, N positions.
"""

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# The dtypes that are allowed, and their description.
Kind = tuple[tuple[torch.dtype, ...], str]
IDS: Kind = ((torch.int64, torch.int32), "int64 or int32 token ids")
TARGETS: Kind = ((torch.int64,), "int64 token ids")
MASK: Kind = ((torch.bool,), "bool (True = a token, False = padding)")
_HALF = (torch.bfloat16, torch.float16)


def check_positions(name: str, x: Any, kind: Kind, like: Tensor | None, device: torch.device) -> None:
    """Raise unless x is a tensor of one entry per position.

    Args:
        name: the name of x in messages.
        x: (B, N), B and N >= 1.
        kind: IDS, TARGETS or MASK.
        like: the token ids, whose shape x must have; None if x are these ids.
        device: where x must be.

    Raises:
        ValueError: a wrong shape or device.
        TypeError: a wrong type or dtype.
    """
    dtypes, words = kind
    if not isinstance(x, Tensor) or x.dtype not in dtypes:
        raise TypeError(f"{name}: expected {words}, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if like is None and (x.dim() != 2 or x.numel() == 0):
        raise ValueError(f"{name}: expected shape (B, N) with B, N >= 1, got {tuple(x.shape)}")
    if like is not None and x.shape != like.shape:
        raise ValueError(f"{name}: expected the shape of ids, {tuple(like.shape)}, got {tuple(x.shape)}")
    if x.device != device:
        raise ValueError(f"{name}: on {x.device}, the model is on {device}; move one of them")


def check_ids(name: str, ids: Tensor, size: int, uncounted: int | None = None) -> None:
    """Raise ValueError unless all ids are from 0 to size - 1, or `uncounted`. Only tensors on the CPU are checked."""
    if ids.device.type != "cpu":
        return
    ids = ids if uncounted is None else ids.masked_fill(ids == uncounted, 0)
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= size:
        allowed = f"0 to {size - 1}" + ("" if uncounted is None else f", and {uncounted}, which is not counted")
        raise ValueError(f"{name}: token id {low if low < 0 else high} is outside the vocabulary, allowed {allowed}")


class Part(NamedTuple):
    """A tensor of a state: its shape without the batch, and the dtypes allowed."""

    shape: torch.Size
    dtypes: tuple[torch.dtype, ...]


def structure(state: Any) -> Any:
    """Return a state with a :class:`Part` in the place of each tensor."""
    return pytree.tree_map_only(Tensor, _part, state)


def _part(x: Tensor) -> Part:
    # Autocast may have rounded float32.
    return Part(x.shape[1:], (x.dtype, *_HALF) if x.dtype == torch.float32 else (x.dtype,))


def check_state(name: str, state: Any, expected: Any, batch: int, device: str) -> None:
    """Raise unless a state has the expected structure. It reads no values, because every step of decoding calls it.

    Args:
        name: the name of the state in messages.
        state: nested lists and named tuples of tensors.
        expected: its :func:`structure`; None where anything is allowed.
        batch: number of sequences, B.
        device: the type of the device where the tensors must be. Only the type is compared, because a large model may
            be spread over several GPUs.

    Raises:
        ValueError: a list has another length, or a tensor another shape, or it is on another device.
        TypeError: a part has another type or dtype.
    """
    if expected is None:
        return
    kind = type(expected)
    if kind is not Part:
        if not isinstance(state, (list, tuple) if kind is list else kind):
            _refuse(TypeError, name, f"a {kind.__name__}", type(state).__name__)
        if len(state) != len(expected):
            _refuse(ValueError, name, f"{len(expected)} entries", len(state))
        for i, (x, part) in enumerate(zip(state, expected, strict=True)):
            check_state(f"{name}[{i}]" if kind is list else f"{name}.{kind._fields[i]}", x, part, batch, device)
    elif not isinstance(state, Tensor):
        _refuse(TypeError, name, "a tensor", type(state).__name__)
    elif state.shape != (batch, *expected.shape):
        _refuse(ValueError, name, f"shape {(batch, *expected.shape)}", tuple(state.shape))
    elif state.dtype not in expected.dtypes:
        _refuse(TypeError, name, expected.dtypes[0], state.dtype)
    elif state.device.type != device:
        raise ValueError(f"{name}: on {state.device.type}, the model is on {device}; move one of them")


def _refuse(error: type[Exception], name: str, expected: object, got: object) -> NoReturn:
    raise error(
        f"{name}: expected {expected}, got {got}; pass the state that the model returned for the positions before, of "
        "the same sequences"
    )
