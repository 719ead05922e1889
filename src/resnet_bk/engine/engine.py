"""The engine: a model as a program, and steps of sequences.

Dimensions: B rows, V vocabulary.
"""

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from resnet_bk.engine.compiler import compiled
from resnet_bk.engine.interpreter import BLOCKS, TOKEN, run, run_one
from resnet_bk.engine.program import Place, arrays
from resnet_bk.engine.state import EngineState
from resnet_bk.model import LanguageModel


class Engine:
    """A causal model on a CPU, compiled for decoding. It computes what the model does, one token at a time.

    Later changes of the model's weights do not reach it. Several threads may run steps, of states of their own.
    """

    def __init__(self, model: LanguageModel, int8: bool = False):
        """Compile a model.

        Args:
            model: on a CPU, in float32 or float64.
            int8: store matrices as int8 numbers, with a scale for each output.
        """
        self.program, self.places = compiled(model, int8)
        self.arrays = arrays(self.program)
        self._threads = threading.local()

    def start(self, rows: int = 1) -> EngineState:
        """Return the states of `rows` sequences before their first token."""
        numbers = np.zeros((rows, self.program.numbers), self.arrays[1].dtype)
        state = EngineState(numbers, np.zeros((rows, self.program.wholes), np.int64), self)
        for place in self._leaves():
            _part(state, place)[...] = place.first
        return state

    def step(self, ids: np.ndarray | Sequence[int], state: EngineState) -> np.ndarray:
        """Read one token of each row, (B,), and return the logits (B, V). The state changes in place.

        The logits are in memory that the next step of this thread overwrites.

        Raises:
            IndexError: a token is outside the vocabulary.
            ValueError: the number of ids is not that of the rows, or the state is one of another model.
        """
        p, shape = self.program, np.shape(ids)
        if shape != (len(state),):
            raise ValueError(f"ids: expected shape ({len(state)},), one token for each row of the state, got {shape}")
        if not self.fits(state):
            raise ValueError("state: is one of another model; pass a state of this model")
        if min(ids) < 0 or max(ids) >= p.vocabulary:
            raise IndexError(f"ids: got {min(ids)} to {max(ids)}, allowed 0 to {p.vocabulary - 1}")
        scratch = getattr(self._threads, "scratch", None)
        if scratch is None or len(scratch) < len(state):
            scratch = self._threads.scratch = np.zeros((len(state), p.most), self.arrays[1].dtype)
        state.wholes[:, TOKEN] = ids
        (run if len(state) > 1 else run_one)(*self.arrays, state.numbers, state.wholes, scratch)
        return scratch[: len(state), p.logits : p.logits + p.vocabulary]

    def fits(self, state: EngineState) -> bool:
        """Return whether a state is one of this model."""
        other = state.engine
        same = other is self or (other.places == self.places and other.arrays[1].dtype == self.arrays[1].dtype)
        return same and state.numbers.shape[1] == self.program.numbers

    def blocks(self, state: EngineState) -> np.ndarray:
        """Return how many blocks the last step ran for each row, (B,)."""
        return state.wholes[:, BLOCKS]

    def from_torch(self, state: Sequence[Any]) -> EngineState:
        """Return a state of the model as one of the engine."""
        leaves, places = pytree.tree_leaves(list(state)), self._leaves()
        new = self.start(len(leaves[0]))
        for x, place in zip(leaves, places, strict=True):
            x = torch.view_as_real(x) if x.is_complex() else x
            _part(new, place)[...] = (x if x.dtype == torch.int64 else x.to(self.program.dtype)).numpy()
        return new

    def to_torch(self, state: EngineState) -> list[Any]:
        """Return a state of the engine as one of the model."""

        def tensor(place: Place) -> Tensor:
            x = torch.from_numpy(np.array(_part(state, place), order="C"))
            return torch.view_as_complex(x) if place.imaginary else x

        _, spec = pytree.tree_flatten(self.places, is_leaf=_is_place)
        return pytree.tree_unflatten([tensor(place) for place in self._leaves()], spec)

    def _leaves(self) -> list[Place]:
        return pytree.tree_leaves(self.places, is_leaf=_is_place)


def _is_place(x: Any) -> bool:
    return isinstance(x, Place)


def _part(state: EngineState, place: Place) -> np.ndarray:
    """Return a view of a part of a state, (B, ...); complex numbers have an axis (real, imaginary)."""
    shape = (*place.shape, 2) if place.imaginary else place.shape
    whole = (*shape[:-1], place.padded or shape[-1]) if shape else ()
    flat = (state.wholes if place.whole else state.numbers)[:, place.at : place.at + math.prod(whole)]
    view = flat.reshape(len(flat), *whole)
    return view[..., : shape[-1]] if place.padded else view
