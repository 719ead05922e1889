"""Compile blocks: their mixers and feed-forwards.

Each function adds the instructions of a module, which reads the vector `source` and writes `out`, or changes the
features x in place. It returns the places of the module's state, nested as that state is.

Dimensions: D model width, H heads, K head width, W positions.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from resnet_bk.engine.instructions import Op
from resnet_bk.engine.program import Program
from resnet_bk.layers.attention import FLAGS, ROPE_BASE, Attention, AttentionState
from resnet_bk.layers.block import Block
from resnet_bk.layers.feedforward import Experts, SwiGLU
from resnet_bk.layers.mixer import PACE, ChainState, DiagonalMixer, Energies, PropagatorMixer
from resnet_bk.ops import PropagatorState, SparseState


def block(p: Program, block: Block, x: int) -> Any:
    d = len(block.mixer_norm.weight)
    normed, y = p.vector(d), p.vector(d)
    p.norm(normed, x, block.mixer_norm)
    mixers: dict[type, Any] = {PropagatorMixer: _propagator, DiagonalMixer: _diagonal, Attention: _attention}
    with p.scope():
        place = mixers[type(block.mixer)](p, block.mixer, normed, y)
    p.emit(Op.ADD, x, y, d)
    p.norm(normed, x, block.ff_norm)
    feed_forward(p, block.feed_forward, normed, y)
    p.emit(Op.ADD, x, y, d)
    p.emit(Op.COUNT, 1)
    return place


def feed_forward(p: Program, module: nn.Module, source: int, out: int) -> None:
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
        scratch = p.vector(2 * hidden)  # followed by the output of an expert, and by the probabilities
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
