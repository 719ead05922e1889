"""The engine: a model as a program, and the states of sequences as flat arrays.

Dimensions: B rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from resnet_bk.engine.compiler import compiled
from resnet_bk.engine.interpreter import BLOCKS, TOKEN, run, run_one
from resnet_bk.engine.program import Place, arrays
from resnet_bk.model import LanguageModel


class EngineState:
    """States of B sequences, and the memory in which their steps compute.

    Attributes:
        numbers: (B, S), numbers of the states.
        wholes: (B, I) int64, whole numbers of the states; first the token to read, and the blocks that it ran.
        scratch: (B, X).
    """

    def __init__(self, numbers: np.ndarray, wholes: np.ndarray, scratch: np.ndarray):
        self.numbers, self.wholes, self.scratch = numbers, wholes, scratch

    def rows(self, index: Any) -> "EngineState":
        """Return copies of the states of some rows, such as those that a beam search goes on with."""
        return EngineState(self.numbers[index], self.wholes[index], self.scratch[index])


class Engine:
    """A causal model on a CPU, compiled for decoding. It computes what the model does, one token at a time.

    Later changes of the model's weights do not reach it.

    Raises:
        ImportError: numba is not installed.
    """

    def __init__(self, model: LanguageModel, int8: bool = False):
        self.model = model
        self.program, self.places = compiled(model, int8)
        self.arrays = arrays(self.program)

    def start(self, rows: int = 1) -> EngineState:
        """Return the states of `rows` sequences before their first token."""
        p, dtype = self.program, self.arrays[1].dtype
        numbers, scratch = (np.zeros((rows, size), dtype) for size in (p.numbers, p.most))
        state = EngineState(numbers, np.zeros((rows, p.wholes), np.int64), scratch)
        for place in self._leaves():
            self._part(state, place)[...] = place.first
        return state

    def _leaves(self) -> list[Place]:
        return pytree.tree_leaves(self.places, is_leaf=lambda x: isinstance(x, Place))

    def step(self, ids: np.ndarray | Sequence[int], state: EngineState) -> np.ndarray:
        """Read one token of each row, (B,), and return the logits (B, V). The state changes in place.

        The logits are in memory that the next step overwrites.
        """
        state.wholes[:, TOKEN] = ids
        (run if len(state.numbers) > 1 else run_one)(*self.arrays, state.numbers, state.wholes, state.scratch)
        return state.scratch[:, self.program.logits : self.program.logits + self.program.vocabulary]

    def blocks(self, state: EngineState) -> np.ndarray:
        """Return how many blocks the last step ran for each row, (B,)."""
        return state.wholes[:, BLOCKS]

    def from_torch(self, state: Sequence[Any]) -> EngineState:
        """Return a state of the model as one of the engine."""
        leaves, places = pytree.tree_leaves(list(state)), self._leaves()
        new = self.start(len(leaves[0]))
        for x, place in zip(leaves, places, strict=True):
            self._part(new, place)[...] = (torch.view_as_real(x) if x.is_complex() else x).numpy()
        return new

    def to_torch(self, state: EngineState) -> list[Any]:
        """Return a state of the engine as one of the model."""

        def tensor(place: Place) -> Tensor:
            x = torch.from_numpy(np.ascontiguousarray(self._part(state, place)).copy())
            return torch.view_as_complex(x) if place.imaginary else x

        leaves, spec = pytree.tree_flatten(self.places, is_leaf=lambda x: isinstance(x, Place))
        return pytree.tree_unflatten([tensor(place) for place in leaves], spec)

    def _part(self, state: EngineState, place: Place) -> np.ndarray:
        """Return a view of a part of the state, (B, ...); complex numbers have an axis (real, imaginary)."""
        shape = (*place.shape, 2) if place.imaginary else place.shape
        last = place.padded or (shape[-1] if shape else 1)
        whole = (*shape[:-1], last) if shape else ()
        size = int(np.prod(whole))
        flat = (state.wholes if place.whole else state.numbers)[:, place.at : place.at + size]
        view = flat.reshape(len(flat), *whole)
        return view[..., : shape[-1]] if place.padded else view
