"""The code of a model: what the compiler makes, the interpreter runs, and a file can hold."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file


class Place(NamedTuple):
    """Where a tensor of a state is: from `at` on in the numbers, or in the whole numbers.

    shape: of a row, (...); the last dimension takes `padded` numbers. whole: in the whole numbers. imaginary: complex.
    first: the value before the first token.
    """

    at: int
    shape: tuple[int, ...]
    padded: int = 0
    whole: bool = False
    imaginary: bool = False
    first: float = 0.0

    def part(self, numbers: np.ndarray, wholes: np.ndarray) -> np.ndarray:
        """Return a view of this part of states, (B, ...); complex numbers have an axis (real, imaginary)."""
        shape = (*self.shape, 2) if self.imaginary else self.shape
        stored = (*shape[:-1], self.padded or shape[-1]) if shape else ()
        flat = (wholes if self.whole else numbers)[:, self.at : self.at + math.prod(stored)]
        view = flat.reshape(len(flat), *stored)
        return view[..., : shape[-1]] if self.padded else view


@dataclass(frozen=True)
class Code:
    """A compiled model.

    Attributes:
        instructions: (rows, 1 + OPERANDS) int64, see :mod:`resnet_bk.engine.instructions`.
        weights: float32 or float64, all numbers of the model but those in int8.
        bytes: int8, the matrices that are stored so.
        table: (rows, columns) int32, that of n-gram memory.
        places: of the parts of a state.
        thresholds: where the state of a row has thresholds of adaptive depth, which may differ between rows.
        numbers, wholes: of the state of a row.
        most: numbers of scratch memory of a row.
        vocabulary, logits: number of logits, and where they are in the scratch memory.
        blocks: number of blocks of the model.
    """

    instructions: np.ndarray
    weights: np.ndarray
    bytes: np.ndarray
    table: np.ndarray
    places: tuple[Place, ...]
    thresholds: tuple[Place, ...]
    numbers: int
    wholes: int
    most: int
    vocabulary: int
    logits: int
    blocks: int

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.instructions, self.weights, self.bytes, self.table

    def save(self, path: Path) -> None:
        """Write a safetensors file; what is no array stands in its header."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {name: value for name, value in named.items() if isinstance(value, np.ndarray)}
        rest = {name: value for name, value in named.items() if name not in tensors}
        save_file(tensors, path, {"code": json.dumps(rest)})

    @classmethod
    def load(cls, path: Path) -> "Code":
        """Read what :meth:`save` has written. The caller knows that the file is intact: nothing checks its places."""
        with safe_open(path, "numpy") as file:
            rest: dict[str, Any] = json.loads(file.metadata()["code"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        for name in ("places", "thresholds"):
            places: Sequence[Any] = rest.pop(name)
            rest[name] = tuple(Place(at, tuple(shape), *more) for at, shape, *more in places)
        return cls(**tensors, **rest)
