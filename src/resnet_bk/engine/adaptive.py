"""Compile n-gram memory and the adaptive techniques, see :mod:`resnet_bk.engine.blocks`.

Dimensions: D model width.
"""

from collections.abc import Sequence
from typing import Any

import torch

from resnet_bk.adaptive.boundaries import LONGEST, AfterWords, FixedStride, Router, WordRouter
from resnet_bk.adaptive.depth import AdaptiveDepth, Halting, Skipping
from resnet_bk.adaptive.early_exit import EarlyExit
from resnet_bk.adaptive.length import LearnedLength, LengthState
from resnet_bk.adaptive.multiscale import MultiScale, MultiScaleState
from resnet_bk.adaptive.windows import WindowState
from resnet_bk.engine.blocks import feed_forward
from resnet_bk.engine.instructions import Op
from resnet_bk.engine.program import Place, Program
from resnet_bk.layers.block import Stack
from resnet_bk.layers.embedding import NgramMemory, NgramVectors, RecentNgrams, RecentState
from resnet_bk.layers.score import Score

KINDS: dict[type, int] = {FixedStride: 0, AfterWords: 1, Router: 2, WordRouter: 3}
CONFIDENCES = {"gain": 0, "probability": 1, "entropy": 2}


def memory(p: Program, layer: NgramMemory, x: int) -> Place:
    place = p.whole(layer.reach)
    layer.check_entries("memory")
    p.table = layer.entries
    p.emit(Op.NGRAMS, x, place.at, layer.reach, *_ngrams(p, layer.orders, layer.vectors))
    return place


def recent(p: Program, layer: RecentNgrams, x: int) -> RecentState:
    reach = max(layer.orders)
    ids, entries = p.whole(reach), p.whole(layer.rows)
    p.emit(Op.RECENT, x, ids.at, reach, *_ngrams(p, layer.orders, layer.vectors), entries.at, layer.rows, p.vocabulary)
    return RecentState(ids, entries)  # type: ignore[arg-type]


def _ngrams(p: Program, orders: Sequence[int], vectors: NgramVectors) -> list[int]:
    """Store orders and vectors; return the operands."""
    if len(vectors.token_vectors) != p.vocabulary:
        raise ValueError(f"memory: has vectors of {len(vectors.token_vectors)} tokens, expected {p.vocabulary}")
    weights = [p.weight(v) for v in (vectors.gain, vectors.level_vectors, vectors.token_vectors, vectors.scale)]
    return [p.weight(list(map(float, sorted(orders)))), len(orders), *weights, vectors.token_vectors.shape[1]]


def _score(p: Program, module: Score, source: int) -> int:
    """Compute a score of features; return where it is."""
    width = len(module.weight)
    normed, score = p.vector(width), p.vector(1)
    p.norm(normed, source, module.norm)
    line = p.weight([module.scale / width, module.scale * module.bias.item()])
    p.emit(Op.SCORE, score, normed, width, p.weight(module.weight), line)
    return score


def multiscale(p: Program, layer: MultiScale, x: int) -> MultiScaleState:
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
    assert isinstance(layer.inner, Stack)
    inner = p.stack(layer.inner, inside)
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


def depth(p: Program, layer: AdaptiveDepth, x: int) -> list[Any]:
    places = [p.stack(layer.first, x)]
    threshold, stops = p.threshold(layer.threshold), []
    if isinstance(layer, EarlyExit):
        kind = CONFIDENCES[layer.kind]
        for i, segment in enumerate(layer.stacks):
            with p.scope():
                if kind == 0:
                    sure = _score(p, layer.units[i], x)  # type: ignore[arg-type]
                else:
                    p.read(x)
                    sure = p.logits
                stops.append(p.emit(Op.EXIT, kind, sure, p.vocabulary, threshold))
            places.append(p.stack(segment, x))
        p.land(*stops)
    elif isinstance(layer, Halting):
        d = len(layer.units[0].weight) if len(layer.units) else 0  # type: ignore[arg-type]
        out, left = p.vector(d), p.vector(1)
        p.emit(Op.HALT_START, out, left, d)
        for unit, segment in zip(layer.units, layer.stacks, strict=True):
            with p.scope():
                score = _score(p, unit, x)  # type: ignore[arg-type]
                stops.append(p.emit(Op.HALT, x, out, left, score, d, threshold))
            places.append(p.stack(segment, x))
        p.land(*stops)
        p.emit(Op.HALT_END, x, out, left, d)
    else:
        assert isinstance(layer, Skipping)
        for router, segment in zip(layer.routers, layer.stacks, strict=True):
            with p.scope():
                skipped = p.emit(Op.SKIP, _score(p, router, x), threshold)  # type: ignore[arg-type]
            places.append(p.stack(segment, x))
            p.land(skipped)
    return [*places, p.stack(layer.last, x)]


def length(p: Program, layer: LearnedLength, x: int) -> LengthState:
    d, predictor, size = len(layer.norm.weight), layer.predictor, layer.window
    trunk = p.stack(layer.trunk, x)
    offset, length, since_word, last = (p.whole() for _ in range(4))  # KEEP and WINDOW expect them in this order
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
    deep = p.stack(layer.deep, x)
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
    feed_forward(p, layer.bypass, normed, y)
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
