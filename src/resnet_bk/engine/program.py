"""Compile a model into a program: its layers become instructions, its weights one flat array.

Each layer has a function that adds its instructions, which change the features in place, and returns the places of its
state, nested as the layer's own state is.

Dimensions: D model width, H heads, K head width, W positions.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.adaptive.boundaries import LONGEST, AfterWords, FixedStride, Router, WordRouter
from resnet_bk.adaptive.depth import AdaptiveDepth, Halting
from resnet_bk.adaptive.early_exit import NEVER, EarlyExit
from resnet_bk.adaptive.length import LearnedLength, LengthState
from resnet_bk.adaptive.multiscale import MultiScale, MultiScaleState
from resnet_bk.adaptive.windows import WindowState
from resnet_bk.engine.instructions import OPERANDS, Op
from resnet_bk.engine.kernels import TILE_LANES
from resnet_bk.layers.attention import FLAGS, ROPE_BASE, Attention, AttentionState
from resnet_bk.layers.block import Block, Stack
from resnet_bk.layers.embedding import NgramMemory
from resnet_bk.layers.feedforward import Experts, SwiGLU
from resnet_bk.layers.mixer import PACE, ChainState, DiagonalMixer, Energies, PropagatorMixer
from resnet_bk.layers.score import Score
from resnet_bk.model import LanguageModel
from resnet_bk.ops import PropagatorState, SparseState
from resnet_bk.ops.numba_simd import LANE_BYTES

KINDS: dict[type, int] = {FixedStride: 0, AfterWords: 1, Router: 2, WordRouter: 3}
CONFIDENCES = {"gain": 0, "probability": 1, "entropy": 2}


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


@dataclass
class Program:
    """Instructions, weights and sizes; it is filled by the functions below.

    Attributes:
        dtype: of all numbers.
        code: the instructions.
        int8: store matrices as int8 numbers, with a scale for each output.
        parts: of the weights.
        weights: number of weights so far.
        byte_parts, bytes: those of matrices in int8, if `int8`.
        scratch, most: numbers of scratch memory in use, and the most of them.
        numbers, wholes: of a state.
        table: that of n-gram memory.
        vocabulary, logits: number of logits, and where they are in the scratch memory.
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
    table: Tensor | None = None
    vocabulary: int = 0
    logits: int = 0

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
        """Return a place in the scratch memory, with room for what a LINEAR writes beyond its outputs."""
        at, tile = self.scratch, TILE_LANES * self.lanes
        self.scratch += -(-width // tile) * tile
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
        self.emit(Op.NORM, out, source, len(module.weight), self.weight(module.weight))

    def state(self, *shape: int, padded: int = 0, imaginary: bool = False, first: float = 0.0) -> Place:
        """Return a place for numbers of a row; arguments as for :class:`Place`."""
        place = Place(self.numbers, shape, padded, imaginary=imaginary, first=first)
        self.numbers += math.prod(shape[:-1]) * (padded or shape[-1]) * (2 if imaginary else 1)
        return place

    def whole(self, *shape: int) -> Place:
        """Return a place for whole numbers of a row."""
        place = Place(self.wholes, shape, whole=True)
        self.wholes += math.prod(shape)
        return place


def compiled(model: LanguageModel, int8: bool = False) -> tuple[Program, list[Any]]:
    """Return the program of a causal model, and the places of its state."""
    p = Program(model.embed.weight.dtype, int8)
    d, embedding = model.config.d_model, p.matrix(model.embed.weight)
    p.vocabulary = model.config.vocab_size
    x, p.logits = p.vector(d), p.vector(p.vocabulary)
    p.emit(Op.EMBED, x, embedding[0], d, embedding[1])
    head = embedding if model.head.weight is model.embed.weight else p.matrix(model.head.weight)

    def read() -> None:
        """Compute the logits of the features x."""
        with p.scope():
            normed = p.vector(d)
            p.norm(normed, x, model.norm)
            p.product(p.logits, normed, (p.vocabulary, d), head)

    places = _stack(p, model.blocks, x, read)
    read()
    return p, places


Read = Callable[[], None]


def _stack(p: Program, stack: Stack, x: int, read: Read) -> list[Any]:
    return [_layer(p, layer, x, read) for layer in stack]


def _layer(p: Program, layer: nn.Module, x: int, read: Read) -> Any:
    with p.scope():
        if isinstance(layer, Block):
            return _block(p, layer, x)
        if isinstance(layer, NgramMemory):
            return _memory(p, layer, x)
        if isinstance(layer, MultiScale):
            return _multiscale(p, layer, x, read)
        if isinstance(layer, LearnedLength):
            return _length(p, layer, x, read)
        assert isinstance(layer, AdaptiveDepth)
        return _depth(p, layer, x, read)


# ------------------------------------------------------------------------------------------------------- blocks


def _block(p: Program, block: Block, x: int) -> Any:
    d = len(block.mixer_norm.weight)
    normed, y = p.vector(d), p.vector(d)
    p.norm(normed, x, block.mixer_norm)
    mixer = {PropagatorMixer: _propagator, DiagonalMixer: _diagonal, Attention: _attention}[type(block.mixer)]
    with p.scope():
        place = mixer(p, block.mixer, normed, y)
    p.emit(Op.ADD, x, y, d)
    p.norm(normed, x, block.ff_norm)
    _feed_forward(p, block.feed_forward, normed, y)
    p.emit(Op.ADD, x, y, d)
    p.emit(Op.COUNT, 1)
    return place


def _feed_forward(p: Program, module: nn.Module, source: int, out: int) -> None:
    if isinstance(module, SwiGLU):
        hidden = module.down.in_features
        with p.scope():
            inside = p.vector(2 * hidden)
            p.linear(inside, source, module.up)
            p.emit(Op.SWIGLU, inside, hidden)
            p.linear(out, inside, module.down)
        return
    assert isinstance(module, Experts)
    d, hidden, settings = module.up.shape[1], module.down.shape[1], module.settings
    with p.scope():
        logits = p.vector(2 * module.all)
        p.linear(logits, source, module.router)
        top_p = p.weight(settings.top_p) if settings.policy == "top_p" else -1
        bias = -1 if module.load_bias is None else p.weight(module.load_bias)
        numbers = d, hidden, module.experts, settings.identity, module.all, module.most, settings.least
        (up, scales), (down, _) = p.matrix(module.up.mT), p.matrix(module.down.mT)
        scratch = p.vector(2 * hidden)
        p.vector(d)
        p.vector(module.all)
        p.emit(Op.EXPERTS, out, source, logits, *numbers, top_p, bias, up, down, scratch, scales)


def _energies(p: Program, energies: Energies, source: int) -> tuple[int, int]:
    """Compute the potentials; return where they are and the weights that the chain needs besides."""
    heads = energies.potential.out_features
    v = p.vector(4 * heads)
    p.linear(v, source, energies.potential)
    if energies.kind == "bonds":
        return v, p.weight((PACE - 1) * energies.potential.bias)
    z = F.softplus(energies.shift)
    return v, p.weight(z if energies.kind == "real" else torch.cat([energies.real_shift - 2, z]))


def _propagator(p: Program, mixer: PropagatorMixer, source: int, out: int) -> ChainState:
    heads, width, kind = mixer.heads, mixer.width, mixer.energies.kind
    d, channels, taps = heads * width, mixer.conv.channels, mixer.conv.width
    padded = -(-width // p.lanes) * p.lanes
    v, weights = _energies(p, mixer.energies, source)
    u, y = p.vector(mixer.in_proj.out_features), p.vector(d)
    conv = p.state(taps - 1, channels)
    g = p.state(heads, imaginary=kind == "complex", first=-1.0 if kind == "bonds" else 0.0)
    s = p.state(heads, width, width, padded=padded)
    p.linear(u, source, mixer.in_proj)
    p.emit(Op.CONV, u, channels, taps, p.weight(mixer.conv.weight), conv.at)
    p.emit(Op.SILU, u, channels)
    gate, strength = u + channels, u + channels + d
    if kind == "bonds":
        p.emit(Op.BONDS, v, heads, weights)
        p.emit(Op.SIGMOID, strength, heads)
        alpha, beta = v, strength
    elif kind == "real":
        p.emit(Op.REAL, v, heads, weights, g.at)
        alpha, beta = v, v + heads
    else:
        p.emit(Op.COMPLEX, v, heads, weights, g.at)
        p.emit(Op.ROTATE_STATE, s.at, heads, width, padded, v + heads)
        alpha, beta = v, v + 2 * heads
    value = u + channels - d

    def scan(q: int) -> None:
        p.emit(Op.QUERIES, q, q + d, heads, width, mixer.delta)
        if kind == "complex":
            p.emit(Op.ROTATE, q + d, heads, width, v + 3 * heads)
        p.emit(Op.SCAN, q, q + d, value, alpha, beta, y, heads, width, width, s.at, mixer.delta)

    core: PropagatorState | SparseState = PropagatorState(g, s)  # type: ignore[arg-type]
    if mixer.sparse is None or mixer.qk_proj is None:
        scan(u)
    else:
        last, score, q = p.state(heads, width), p.vector(1), p.vector(2 * d)
        p.linear(score, source, mixer.sparse.importance)
        left_out = p.emit(Op.UNLESS_POSITIVE, score)
        p.linear(q, source, mixer.qk_proj)
        p.emit(Op.SILU, q, 2 * d)
        scan(q)
        p.emit(Op.STORE, y, d, last.at)
        done = p.emit(Op.JUMP)
        p.land(left_out)
        assert mixer.sparse.own is not None
        fill = p.weight(torch.cat([mixer.sparse.fill.sigmoid(), mixer.sparse.own]))
        p.emit(Op.LEFT_OUT, value, alpha, beta, y, heads, width, width, s.at, last.at, fill)
        p.land(done)
        core = SparseState(g, s, last)  # type: ignore[arg-type]
    p.emit(Op.GATED_NORM, y, gate, heads, width, p.weight(mixer.norm.weight))
    p.linear(out, y, mixer.out_proj)
    return ChainState(conv, core)  # type: ignore[arg-type]


def _diagonal(p: Program, mixer: DiagonalMixer, source: int, out: int) -> ChainState:
    d, taps = mixer.conv.channels, mixer.conv.width
    heads, imaginary = mixer.energies.potential.out_features, mixer.energies.kind == "complex"
    width = heads * (2 if imaginary else 1)
    u, features = p.vector(2 * d), p.vector(width)
    conv, g = p.state(taps - 1, d), p.state(heads, imaginary=imaginary)
    p.linear(u, source, mixer.in_proj)
    p.emit(Op.CONV, u, d, taps, p.weight(mixer.conv.weight), conv.at)
    p.emit(Op.SILU, u, d)
    v, z = _energies(p, mixer.energies, u)
    if mixer.sparse is None:
        p.emit(Op.GREEN, v, heads, z, g.at, imaginary, features, -1)
    else:
        score, fill = p.vector(1), p.weight(mixer.sparse.fill.sigmoid())
        p.linear(score, source, mixer.sparse.importance)
        left_out = p.emit(Op.UNLESS_POSITIVE, score)
        p.emit(Op.GREEN, v, heads, z, g.at, imaginary, features, -1)
        done = p.emit(Op.JUMP)
        p.land(left_out)
        p.emit(Op.GREEN, v, heads, z, g.at, imaginary, features, fill)
        p.land(done)
    y = p.vector(d)
    p.norm(features, features, mixer.norm)
    p.linear(y, features, mixer.read)
    p.emit(Op.GATE, y, u, u + d, d)
    p.linear(out, y, mixer.out_proj)
    return ChainState(conv, g)  # type: ignore[arg-type]


def _attention(p: Program, mixer: Attention, source: int, out: int) -> AttentionState:
    heads, width, window = mixer.heads, mixer.width, mixer.window
    d = heads * width
    past = p.state(window - 1, 2 * d + FLAGS)
    qkv, y, scores = p.vector(3 * d), p.vector(d), p.vector(window)
    frequency = ROPE_BASE ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.outer(torch.arange(window, dtype=torch.float64), frequency)
    turns = p.weight(torch.stack([angle.cos(), angle.sin()], dim=-1))
    p.linear(qkv, source, mixer.in_proj)
    p.emit(Op.ATTEND, qkv, y, heads, width, window, past.at, turns, scores)
    p.linear(out, y, mixer.out_proj)
    return AttentionState(past)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- techniques


def _memory(p: Program, layer: NgramMemory, x: int) -> Place:
    place, vectors = p.whole(layer.reach), layer.vectors
    p.table = layer.entries
    orders = sorted(layer.orders)
    weights = [p.weight(v) for v in (vectors.gain, vectors.level_vectors, vectors.token_vectors, vectors.scale)]
    width = vectors.token_vectors.shape[1]
    p.emit(Op.NGRAMS, x, place.at, layer.reach, p.weight(list(map(float, orders))), len(orders), *weights, width)
    return place


def _score(p: Program, module: Score, source: int) -> int:
    """Compute a score of features; return where it is."""
    width = len(module.weight)
    normed, score = p.vector(width), p.vector(1)
    p.norm(normed, source, module.norm)
    line = p.weight([module.scale / width, module.scale * module.bias.item()])
    p.emit(Op.SCORE, score, normed, width, p.weight(module.weight), line)
    return score


def _multiscale(p: Program, layer: MultiScale, x: int, read: Read) -> MultiScaleState:
    d, inner_width = len(layer.norm.weight), layer.up.expand.in_features
    rule, kind = layer.boundaries, KINDS[type(layer.boundaries)]
    open_, result, since, last = p.state(d + 1), p.state(d), p.whole(), p.whole()
    weight, certain, score, pair = p.vector(1), p.vector(1), p.vector(1), p.vector(2 * d)
    p.linear(weight, x, layer.down.weigh)
    p.emit(Op.POOL, x, d, weight, open_.at)
    trust = -1
    if isinstance(rule, Router):
        with p.scope():
            normed = p.vector(d)
            p.norm(normed, x, rule.norm)
            line = p.weight([1 / d, -rule.threshold.item()])
            p.emit(Op.SCORE, score, normed, d, p.weight(rule.weight), line)
        trust = p.weight(rule.trust) if isinstance(rule, WordRouter) else -1
    longest = LONGEST * layer.factor
    stays_open = p.emit(Op.BOUNDARY, kind, score, since.at, last.at, layer.factor, longest, trust, certain)
    inside, y = p.vector(inner_width), p.vector(d)
    p.emit(Op.COPY, pair, x, d)
    p.emit(Op.MEAN, pair + d, d, open_.at, 1)
    p.linear(inside, pair, layer.down.refine)
    inner = _layers_of(p, layer.inner, inside, read)
    p.linear(y, inside, layer.up.expand)
    p.emit(Op.RESULT, y, d, result.at, certain)
    p.land(stays_open)
    p.emit(Op.LOAD, y, d, result.at)
    p.emit(Op.CARRIED, y, d, since.at, p.weight(layer.up.gain), layer.up.reach)
    p.norm(pair, x, layer.norm)
    gate = p.vector(d)
    p.linear(gate, pair, layer.gate)
    scales = p.weight([layer.scale_full_res.item(), layer.scale_low_res.item()])
    p.emit(Op.ADD_GATED, x, y, gate, d, scales)
    return MultiScaleState(open_, inner, result, since, last)  # type: ignore[arg-type]


def _layers_of(p: Program, stack: nn.Module, x: int, read: Read) -> list[Any]:
    assert isinstance(stack, Stack)
    return _stack(p, stack, x, read)


def _depth(p: Program, layer: AdaptiveDepth, x: int, read: Read) -> list[Any]:
    places = [_stack(p, layer.first, x, read)]
    threshold, stops = p.weight(layer.threshold), []
    if isinstance(layer, EarlyExit):
        threshold = p.weight(layer.threshold if layer.threshold < 1 else NEVER)
        kind = CONFIDENCES[layer.kind]
        for i, segment in enumerate(layer.stacks):
            with p.scope():
                if kind == 0:
                    sure = _score(p, layer.units[i], x)  # type: ignore[arg-type]
                else:
                    read()
                    sure = p.logits
                stops.append(p.emit(Op.EXIT, kind, sure, p.vocabulary, threshold))
            places.append(_stack(p, segment, x, read))
        p.land(*stops)
    elif isinstance(layer, Halting):
        d = len(layer.units[0].weight) if len(layer.units) else 0  # type: ignore[arg-type]
        out, left = p.vector(d), p.vector(1)
        p.emit(Op.HALT_START, out, left, d)
        for unit, segment in zip(layer.units, layer.stacks, strict=True):
            with p.scope():
                score = _score(p, unit, x)  # type: ignore[arg-type]
                stops.append(p.emit(Op.HALT, x, out, left, score, d, threshold))
            places.append(_stack(p, segment, x, read))
        p.land(*stops)
        p.emit(Op.HALT_END, x, out, left, d)
    else:
        for router, segment in zip(layer.routers, layer.stacks, strict=True):  # type: ignore[arg-type]
            with p.scope():
                skipped = p.emit(Op.SKIP, _score(p, router, x), threshold)  # type: ignore[arg-type]
            places.append(_stack(p, segment, x, read))
            p.land(skipped)
    return [*places, _stack(p, layer.last, x, read)]


def _length(p: Program, layer: LearnedLength, x: int, read: Read) -> LengthState:
    d, predictor, size = len(layer.norm.weight), layer.predictor, layer.window
    trunk = _stack(p, layer.trunk, x, read)
    offset, length, since_word, last = (p.whole() for _ in range(4))
    pooled, open_, result, since = p.state(d + 1), p.state(d + 1), p.state(d), p.whole()
    y = p.vector(d)
    _choice(p, layer, x, offset.at, pooled.at)
    if layer.pools:
        p.emit(Op.POOL, x, d, -1, open_.at)
    by_words = layer.settings.spacing != "even"
    left_out = p.emit(Op.KEEP, offset.at, size, predictor.shortest, layer.pools, by_words)
    if layer.pools:
        mean = p.vector(d)
        p.emit(Op.MEAN, mean, d, open_.at, 1)
        p.emit(Op.SUBTRACT, mean, x, d)
        p.linear(y, mean, layer.down)
        p.emit(Op.ADD, x, y, d)
    deep = _stack(p, layer.deep, x, read)
    p.emit(Op.STORE, x, d, result.at)
    p.emit(Op.SET_SINCE, since.at, 1)
    done = p.emit(Op.JUMP)
    p.land(left_out)
    p.emit(Op.SET_SINCE, since.at, 0)
    normed = p.vector(d)
    if layer.pools:
        p.emit(Op.LOAD, normed, d, result.at)
        p.linear(y, normed, layer.up.expand)
        p.emit(Op.CARRIED, y, d, since.at, p.weight(layer.up.gain), layer.up.reach)
        p.norm(normed, x, layer.gate_norm)
        gate = p.vector(d)
        p.linear(gate, normed, layer.gate)
        p.emit(Op.ADD_GATED, x, y, gate, d, -1)
    p.norm(normed, x, layer.norm)
    _feed_forward(p, layer.bypass, normed, y)
    p.emit(Op.ADD, x, y, d)
    p.land(done)
    p.emit(Op.END_OF_POSITION, offset.at, pooled.at, d, size, predictor.shortest)
    window = WindowState(offset, pooled, length)  # type: ignore[arg-type]
    return LengthState(trunk, deep, window, open_, result, since, since_word, last)  # type: ignore[arg-type]


def _choice(p: Program, layer: LearnedLength, x: int, place: int, pooled: int) -> None:
    """Add the position to its window's prefix; if a choice is due, choose the length of the window."""
    d, predictor, size, weight = len(layer.norm.weight), layer.predictor, layer.window, -1
    with p.scope():
        if predictor.attention is not None:
            weight = p.vector(1)
            p.linear(weight, x, predictor.attention)
        needed = predictor.shortest if predictor.prefix < size else 1
        not_due = p.emit(Op.WINDOW, x, d, weight, place, pooled, predictor.prefix, needed, size)
        mean, hidden = p.vector(d), p.vector(predictor.hidden.out_features)
        scores = p.vector(predictor.out.out_features)
        p.emit(Op.MEAN, mean, d, pooled, 0)
        p.norm(mean, mean, predictor.norm)
        p.linear(hidden, mean, predictor.hidden)
        p.emit(Op.SILU, hidden, predictor.hidden.out_features)
        p.linear(scores, hidden, predictor.out)
        lengths = p.weight(predictor.values(torch.empty(0, dtype=p.dtype)))
        kind, ends = int(predictor.placement == "continuous"), (predictor.shortest, predictor.longest)
        p.emit(Op.CHOOSE, scores, lengths, place, kind, predictor.groups, predictor.bins, *ends)
        p.land(not_due)


def arrays(p: Program) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return instructions, weights, int8 weights and the table as numpy arrays."""
    code = np.zeros((len(p.code), 1 + OPERANDS), np.int64)
    for row, instruction in zip(code, p.code, strict=True):
        row[: len(instruction)] = instruction
    weights = torch.cat(p.parts).numpy()
    table = np.zeros((1, 1), np.int32) if p.table is None else p.table.numpy()
    return code, weights, torch.cat([*p.byte_parts, torch.zeros(0, dtype=torch.int8)]).numpy(), table
