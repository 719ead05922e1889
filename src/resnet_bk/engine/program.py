"""A program: instructions, weights as one flat array, and where the parts of a state are."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.engine.code import Code, Place
from resnet_bk.engine.instructions import OPERANDS, Op
from resnet_bk.engine.layers import EPS, TILE_LANES
from resnet_bk.jit.simd import LANE_BYTES
from resnet_bk.layers.block import Stack


@dataclass
class Program:
    """Instructions, weights and sizes. The functions that compile layers add to it.

    Attributes:
        dtype: of all numbers.
        code: the instructions.
        int8: store matrices as int8 numbers, with a scale for each output.
        parts: of the weights.
        weights: number of weights so far.
        byte_parts, bytes: those of matrices in int8, if `int8`.
        scratch, most: numbers of scratch memory in use, and the most of them.
        numbers, wholes: of a state.
        thresholds: places of those of adaptive depth.
        table: that of n-gram memory.
        vocabulary, logits: number of logits, and where they are in the scratch memory.
        read: adds the instructions that compute the logits of the features at a place.
        stack: adds those of a stack of layers, and returns the places of its state.
    """

    dtype: torch.dtype
    int8: bool = False
    code: list[list[int]] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)
    weights: int = 0
    byte_parts: list[Tensor] = field(default_factory=list)
    bytes: int = 0
    scratch: int = 0
    most: int = 0
    numbers: int = 0
    wholes: int = 2
    thresholds: list[Place] = field(default_factory=list)
    table: Tensor | None = None
    vocabulary: int = 0
    logits: int = 0
    read: Callable[[int], None] = field(init=False)
    stack: Callable[[Stack, int], list[Any]] = field(init=False)

    @property
    def lanes(self) -> int:
        return LANE_BYTES // self.dtype.itemsize

    def emit(self, op: Op, *operands: int) -> int:
        """Add an instruction and return its row. A jump forward gets its target from :meth:`land`."""
        self.code.append([int(op), *map(int, operands)])
        return len(self.code) - 1

    def land(self, *rows: int) -> None:
        """Let the last operand of earlier instructions be the next row."""
        for row in rows:
            self.code[row].append(len(self.code))

    def vector(self, width: int) -> int:
        """Return a place in the scratch memory.

        Behind its `width` numbers it has what instructions may write beyond them: LINEAR writes whole tiles, and SCAN
        up to a register after the last head.
        """
        at, tile = self.scratch, TILE_LANES * self.lanes
        self.scratch += -(-(width + self.lanes) // tile) * tile
        self.most = max(self.most, self.scratch)
        return at

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Give the vectors of the block back at its end."""
        before = self.scratch
        yield
        self.scratch = before

    def weight(self, x: Tensor | float | list[float]) -> int:
        """Store numbers, (...), and return where they begin."""
        at, tensor = self.weights, torch.as_tensor(x, dtype=self.dtype).detach().flatten()
        self.parts.append(tensor)
        self.weights += tensor.numel()
        return at

    def matrix(self, x: Tensor) -> tuple[int, int]:
        """Store matrices (..., outer, inner) in tiles of outputs, (tiles, inner, tile), zeros after the last output.

        Returns:
            Where they begin, and where the scales of their outputs begin; -1 without int8.
        """
        tile = TILE_LANES * self.lanes
        x = F.pad(x.detach().to(self.dtype), (0, 0, 0, -x.shape[-2] % tile))
        if not self.int8:
            return self.weight(x.unflatten(-2, (-1, tile)).mT), -1
        scale = x.abs().amax(-1, keepdim=True) / 127
        x = (x / torch.where(scale > 0, scale, 1.0)).round().to(torch.int8)
        at = self.bytes
        self.byte_parts.append(x.unflatten(-2, (-1, tile)).mT.flatten())
        self.bytes += x.numel()
        return at, self.weight(scale)

    def product(self, out: int, source: int, shape: tuple[int, int], matrix: tuple[int, int], bias: int = -1) -> None:
        """Multiply with a stored matrix of a shape (outer, inner)."""
        at, scales = matrix
        op, more = (Op.LINEAR, []) if scales < 0 else (Op.LINEAR_OF_BYTES, [scales])
        self.emit(op, out, source, shape[1], shape[0], at, bias, *more)

    def linear(self, out: int, source: int, module: nn.Linear) -> None:
        outer, inner = module.weight.shape
        bias = -1
        if module.bias is not None:
            bias = self.weight(F.pad(module.bias.detach(), (0, -outer % (TILE_LANES * self.lanes))))
        self.product(out, source, (outer, inner), self.matrix(module.weight), bias)

    def norm(self, out: int, source: int, module: nn.LayerNorm) -> None:
        if module.eps != EPS:
            raise ValueError(f"eps: got {module.eps}, the engine has {EPS}")
        self.emit(Op.NORM, out, source, len(module.weight), self.weight(module.weight))

    def state(self, *shape: int, padded: int = 0, imaginary: bool = False, first: float = 0.0) -> Place:
        """Return a place for numbers of a row; arguments as for :class:`Place`."""
        place = Place(self.numbers, shape, padded, imaginary=imaginary, first=first)
        self.numbers += math.prod(shape[:-1]) * (padded or shape[-1]) * (2 if imaginary else 1)
        return place

    def threshold(self, value: float) -> int:
        """Return where a row's state has a threshold of adaptive depth, at first the model's, see :class:`Code`."""
        self.thresholds.append(self.state(1, first=value))
        return self.thresholds[-1].at

    def whole(self, *shape: int) -> Place:
        """Return a place for whole numbers of a row."""
        place = Place(self.wholes, shape, whole=True)
        self.wholes += math.prod(shape)
        return place

    def finished(self, places: Sequence[Place]) -> Code:
        """Return the code. places: of the parts of a state."""
        operands = {row[0]: len(row) for row in self.code}
        assert all(len(row) == operands[row[0]] for row in self.code), "an instruction lacks an operand"
        instructions = np.zeros((len(self.code), 1 + OPERANDS), np.int64)
        for row, instruction in zip(instructions, self.code, strict=True):
            row[: len(instruction)] = instruction
        return Code(
            instructions=instructions,
            weights=torch.cat(self.parts).numpy(),
            bytes=torch.cat([*self.byte_parts, torch.zeros(0, dtype=torch.int8)]).numpy(),
            table=np.zeros((1, 1), np.int32) if self.table is None else self.table.numpy(),
            places=tuple(places),
            thresholds=tuple(self.thresholds),
            numbers=self.numbers,
            wholes=self.wholes,
            most=self.most,
            vocabulary=self.vocabulary,
            logits=self.logits,
            blocks=sum(row[0] == Op.COUNT for row in self.code),
        )
