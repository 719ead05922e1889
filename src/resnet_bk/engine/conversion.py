"""States of the model as states of the engine, and back."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from resnet_bk.engine.code import Place
from resnet_bk.engine.state import EngineState

if TYPE_CHECKING:
    from resnet_bk.engine.engine import Engine


def from_torch(engine: "Engine", state: Sequence[Any]) -> EngineState:
    """Return a state of the model as one of its engine."""
    leaves = pytree.tree_leaves(list(state))
    new, dtype = engine.start(len(leaves[0])), torch.from_numpy(engine.code.weights[:0]).dtype
    for x, place in zip(leaves, engine.code.places, strict=True):
        x = torch.view_as_real(x) if x.is_complex() else x
        new.part(place)[...] = (x if x.dtype == torch.int64 else x.to(dtype)).numpy()
    return new


def to_torch(state: Sequence[Any] | EngineState) -> Sequence[Any]:
    """Return a state, of the model or of its engine, as one of the model."""
    if not isinstance(state, EngineState):
        return state

    def tensor(place: Place) -> Tensor:
        x = torch.from_numpy(np.array(state.part(place), order="C"))
        return torch.view_as_complex(x) if place.imaginary else x

    assert state.engine.nested is not None  # None where the code comes from a file, which no model uses
    places, nesting = pytree.tree_flatten(state.engine.nested, is_leaf=lambda x: isinstance(x, Place))
    return pytree.tree_unflatten(list(map(tensor, places)), nesting)
