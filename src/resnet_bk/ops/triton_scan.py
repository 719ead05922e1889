"""The gated scan in Triton, chunks of SCAN_CHUNK sites as products on tensor cores (README, sections 3 and 6).

Dimensions: B batch, N sites, H chains, K key width, V value width, C sites in a chunk, G segments of whole chunks.

A program takes one segment of one chain, and at most BLOCK_V of its values, and keeps the state in registers from chunk
to chunk. Where chains alone fill the GPU there is one segment. Otherwise a first pass over keys and values gives each
segment's own part of the state, a short one passes states on from segment to segment, and the main pass starts each
segment from the right one.

Everything in a program is float32 (float64 where the inputs are). Products of float32 are three of TF32, or one where
torch.set_float32_matmul_precision allows TF32 or the inputs have 16 bits, which it does not round.

Numbers that a site of one chain moves (times 4 bytes in float32), with P = ceil(V / BLOCK_V) programs side by side:

    forward     P K reads of q and of k; V reads of v, V writes of y; K V / C writes of states
    backward    P K reads of q and of k, V of v and of dy, K V / C of states; K writes of dq and of dk, V of dv
                (if P > 1 first P partial sums of dq and dk: another 2 P K writes and 2 P K reads)
    segments    a forward P K of k and V of v more, a backward P K of q and V of dy, but for one segment's sites

and 2 of alpha and beta, in the backward 2 of their gradients. At K = V = 32: 160 in the forward, 256 in the backward,
64 more each with many segments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_bk.ops import chunked
from resnet_bk.ops.chunked import SCAN_CHUNK

PROGRAMS = 512  # about four for each of the 132 multiprocessors of an H100: chains are cut into segments until so many
WIDEST = 256  # key width up to which a chunk's operands fit the shared memory of a multiprocessor


@triton.jit
def _tile(x, stride, column, count, WIDTH: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """(C, BLOCK): columns from `column` on of the chunk that x points to, 0 beyond its sites and its width."""
    i, j = tl.arange(0, C)[:, None], column + tl.arange(0, BLOCK)[None, :]
    return tl.load(x + i * stride + j, mask=(i < count) & (j < WIDTH), other=0).to(ACC)


@triton.jit
def _store_tile(x, value, stride, column, count, WIDTH: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    i, j = tl.arange(0, C)[:, None], column + tl.arange(0, BLOCK)[None, :]
    tl.store(x + i * stride + j, value.to(x.dtype.element_ty), mask=(i < count) & (j < WIDTH))


@triton.jit
def _state_at(column, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """Offsets of a (BLOCK_K, BLOCK_V) part of a (K, V) state, and which exist."""
    i, j = tl.arange(0, BLOCK_K)[:, None], column + tl.arange(0, BLOCK_V)[None, :]
    return i * V + j, (i < K) & (j < V)


@triton.jit
def _row(x, stride, first, last, other: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """Elements i of the chunk that x points to, first <= i < last; (C,)."""
    i = tl.arange(0, C)
    return tl.load(x + i * stride, mask=(i >= first) & (i < last), other=other).to(ACC)


@triton.jit
def _decays(alpha, stride, count, C: tl.constexpr, ACC: tl.constexpr):
    """alpha and its products over a chunk's sites before each, and after each: (C,). No logarithm: 0 is a decay."""
    before = _row(alpha - stride, stride, 1, count, 1, C, ACC)
    after = _row(alpha + stride, stride, 0, tl.minimum(count, C) - 1, 1, C, ACC)
    return _row(alpha, stride, 0, count, 1, C, ACC), before, tl.cumprod(before), tl.cumprod(after, reverse=True)


@triton.jit
def _between(before, C: tl.constexpr):
    """(C, C): row t, column s < t: the product of alpha over the sites between s and t; else 0."""
    t, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.where(t > s, tl.cumprod(tl.where(t > s + 1, before[:, None], 1), axis=0), 0)


@triton.jit
def _through(alpha, between, C: tl.constexpr):
    """(C, C): row t, column s <= t: the product of alpha over the sites after s, t included; else 0."""
    t, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.where(t == s, 1, between * alpha[:, None])


@triton.jit
def _first(x, C: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, C) == 0, x, 0))


@triton.jit
def _place(heads, segments):
    """Row, chain and segment of this program; chains, neighbours in memory, run side by side."""
    chain = tl.program_id(0) // (heads * segments) * heads + tl.program_id(0) % heads
    return (chain // heads).to(tl.int64), chain % heads, tl.program_id(0) // heads % segments, chain.to(tl.int64)


@triton.jit
def _sum_segments(
    x,
    xb,
    xn,
    xh,
    y,
    yb,
    yn,
    yh,
    alpha,
    beta,
    parts,
    decays,
    length,
    heads,
    segments,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    REVERSE: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What each segment adds to the state, parts (B, H, G, K, V), and its decay, decays (B, H, G).

    x, y: k and v; REVERSE, from the last chunk to the first: q and the gradient of y.
    """
    row, head, segment, chain = _place(heads, segments - 1)
    segment += REVERSE  # nothing comes after the last one
    column = tl.program_id(1) * BLOCK_V
    state = tl.zeros([BLOCK_K, BLOCK_V], ACC)
    decay = tl.full([], 1, ACC)
    for n in tl.range(chunks):
        m = segment * chunks + (chunks - 1 - n if REVERSE else n)
        start = m.to(tl.int64) * C
        count = length - m * C
        gates = (row * length + start) * heads + head
        x_ = _tile(x + row * xb + start * xn + head * xh, xn, 0, count, K, C, BLOCK_K, ACC)
        y_ = _tile(y + row * yb + start * yn + head * yh, yn, column, count, V, C, BLOCK_V, ACC)
        here, _, past, until = _decays(alpha + gates, heads, count, C, ACC)
        weight = past * here if REVERSE else until * _row(beta + gates, heads, 0, count, 0, C, ACC)
        whole = _first(here * until, C)
        state = whole * state + tl.dot(tl.trans(x_ * weight[:, None]), y_, input_precision=PRECISION, out_dtype=ACC)
        decay *= whole
    at, inside = _state_at(column, K, V, BLOCK_K, BLOCK_V)
    place = chain * segments + segment
    tl.store(parts + place * K * V + at, state, mask=inside)
    tl.store(decays + place, decay)


@triton.jit
def _pass_on(start, parts, decays, segments, size, REVERSE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """From segment to segment: the state that enters each takes the place of its own part."""
    chain = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    state = tl.load(start + chain * size + at, mask=at < size).to(ACC)
    for n in tl.range(segments - 1):
        place = chain * segments + (segments - 1 - n if REVERSE else n)
        part = tl.load(parts + place * size + at, mask=at < size)
        tl.store(parts + place * size + at, state, mask=at < size)
        state = tl.load(decays + place) * state + part
    place = chain * segments + (0 if REVERSE else segments - 1)
    tl.store(parts + place * size + at, state, mask=at < size)


@triton.jit
def _forward(
    q,
    qb,
    qn,
    qh,
    k,
    kb,
    kn,
    kh,
    v,
    vb,
    vn,
    vh,
    alpha,
    beta,
    entering,
    y,
    last,
    states,
    length,
    heads,
    segments,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, head, segment, chain = _place(heads, segments)
    column = tl.program_id(1) * BLOCK_V
    at, inside = _state_at(column, K, V, BLOCK_K, BLOCK_V)
    state = tl.load(entering + (chain * segments + segment) * K * V + at, mask=inside, other=0).to(ACC)
    of_chain = tl.cdiv(length, C)
    for n in tl.range(tl.minimum(chunks, of_chain - segment * chunks)):
        m = segment * chunks + n
        start = m.to(tl.int64) * C
        count = length - m * C
        gates = (row * length + start) * heads + head
        tl.store(states + (chain * of_chain + m) * K * V + at, state.to(states.dtype.element_ty), mask=inside)
        q_ = _tile(q + row * qb + start * qn + head * qh, qn, 0, count, K, C, BLOCK_K, ACC)
        k_ = _tile(k + row * kb + start * kn + head * kh, kn, 0, count, K, C, BLOCK_K, ACC)
        v_ = _tile(v + row * vb + start * vn + head * vh, vn, column, count, V, C, BLOCK_V, ACC)
        here, before, past, until = _decays(alpha + gates, heads, count, C, ACC)
        u = v_ * _row(beta + gates, heads, 0, count, 0, C, ACC)[:, None]
        scores = tl.dot(q_, tl.trans(k_), input_precision=PRECISION, out_dtype=ACC)
        scores *= _through(here, _between(before, C), C)
        read = tl.dot(q_, state, input_precision=PRECISION, out_dtype=ACC) * (past * here)[:, None]
        read += tl.dot(scores, u, input_precision=PRECISION, out_dtype=ACC)
        _store_tile(y + gates * V, read, heads * V, column, count, V, C, BLOCK_V)
        new = tl.dot(tl.trans(k_ * until[:, None]), u, input_precision=PRECISION, out_dtype=ACC)
        state = _first(here * until, C) * state + new
    if segment == segments - 1:
        tl.store(last + chain * K * V + at, state.to(last.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    q,
    qb,
    qn,
    qh,
    k,
    kb,
    kn,
    kh,
    v,
    vb,
    vn,
    vh,
    grad,
    gb,
    gn,
    gh,
    alpha,
    beta,
    states,
    leaving,
    dq,
    dk,
    dv,
    dalpha,
    dbeta,
    ds0,
    length,
    heads,
    segments,
    chunks,
    sites,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, dk, dalpha, dbeta: (P, B, N, H, ...), the part of each program of a chain's values; sites: B N H."""
    row, head, segment, chain = _place(heads, segments)
    column = tl.program_id(1) * BLOCK_V
    part = tl.program_id(1).to(tl.int64) * sites
    at, inside = _state_at(column, K, V, BLOCK_K, BLOCK_V)
    adjoint = tl.load(leaving + (chain * segments + segment) * K * V + at, mask=inside, other=0).to(ACC)
    of_chain = tl.cdiv(length, C)
    here_chunks = tl.minimum(chunks, of_chain - segment * chunks)
    for n in tl.range(here_chunks):
        m = segment * chunks + here_chunks - 1 - n
        start = m.to(tl.int64) * C
        count = length - m * C
        gates = (row * length + start) * heads + head
        q_ = _tile(q + row * qb + start * qn + head * qh, qn, 0, count, K, C, BLOCK_K, ACC)
        k_ = _tile(k + row * kb + start * kn + head * kh, kn, 0, count, K, C, BLOCK_K, ACC)
        v_ = _tile(v + row * vb + start * vn + head * vh, vn, column, count, V, C, BLOCK_V, ACC)
        dy = _tile(grad + row * gb + start * gn + head * gh, gn, column, count, V, C, BLOCK_V, ACC)
        state = tl.load(states + (chain * of_chain + m) * K * V + at, mask=inside, other=0).to(ACC)
        here, before, past, until = _decays(alpha + gates, heads, count, C, ACC)
        between = _between(before, C)
        through = _through(here, between, C)
        weight = _row(beta + gates, heads, 0, count, 0, C, ACC)[:, None]
        u = v_ * weight
        scores = tl.dot(q_, tl.trans(k_), input_precision=PRECISION, out_dtype=ACC)
        dscores = tl.dot(dy, tl.trans(u), input_precision=PRECISION, out_dtype=ACC)
        pairs = scores * dscores
        scores *= through
        dscores *= through
        from_state = tl.dot(dy, tl.trans(state), input_precision=PRECISION, out_dtype=ACC)
        to_adjoint = tl.dot(u, tl.trans(adjoint), input_precision=PRECISION, out_dtype=ACC)
        dq_ = from_state * (past * here)[:, None] + tl.dot(dscores, k_, input_precision=PRECISION, out_dtype=ACC)
        dk_ = to_adjoint * until[:, None] + tl.dot(tl.trans(dscores), q_, input_precision=PRECISION, out_dtype=ACC)
        du = tl.dot(k_, adjoint, input_precision=PRECISION, out_dtype=ACC) * until[:, None]
        du += tl.dot(tl.trans(scores), dy, input_precision=PRECISION, out_dtype=ACC)
        _store_tile(dq + (part + gates) * K, dq_, heads * K, 0, count, K, C, BLOCK_K)
        _store_tile(dk + (part + gates) * K, dk_, heads * K, 0, count, K, C, BLOCK_K)
        _store_tile(dv + gates * V, du * weight, heads * V, column, count, V, C, BLOCK_V)
        # alpha_t is on every path from a writer before t, or the entering state, to a reader from t on, or the leaving
        # state; the products on either side of t are at hand, so that nothing is divided by it
        read = tl.dot(pairs, tl.trans(between), input_precision=PRECISION, out_dtype=ACC)
        read += tl.sum(q_ * from_state, 1)[:, None] * past[None, :]
        left = tl.sum(between * tl.sum(k_ * to_adjoint, 1)[None, :], 1) + past * tl.sum(state * adjoint)
        flow = tl.sum(through * read, 0) + until * left
        i = tl.arange(0, C)
        gate_at = part + gates + i * heads
        tl.store(dalpha + gate_at, flow.to(dalpha.dtype.element_ty), mask=i < count)
        tl.store(dbeta + gate_at, tl.sum(du * v_, 1).to(dbeta.dtype.element_ty), mask=i < count)
        new = tl.dot(tl.trans(q_ * (past * here)[:, None]), dy, input_precision=PRECISION, out_dtype=ACC)
        adjoint = _first(here * until, C) * adjoint + new
    if segment == 0:
        tl.store(ds0 + chain * K * V + at, adjoint.to(ds0.dtype.element_ty), mask=inside)


class _Launch:
    """How the chains of a call are cut, in which precision, and the entering (leaving) states of the segments."""

    def __init__(self, q: Tensor, v: Tensor):
        batch, length, heads, width = q.shape
        values = v.shape[3]
        block_k = max(16, triton.next_power_of_2(width))
        block_v = min(max(16, triton.next_power_of_2(values)), 64)
        self.parts = triton.cdiv(values, block_v)  # programs side by side
        self.chains = batch * heads
        chunks = triton.cdiv(length, SCAN_CHUNK)
        self.chunks = triton.cdiv(chunks, triton.cdiv(PROGRAMS, self.chains * self.parts))
        self.segments = triton.cdiv(chunks, self.chunks)
        self.size = (length, heads, self.segments, self.chunks)
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        single = q.element_size() < 4 or torch.get_float32_matmul_precision() != "highest"
        self.options = {
            "K": width,
            "V": values,
            "C": SCAN_CHUNK,
            "BLOCK_K": block_k,
            "BLOCK_V": block_v,
            "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32,
            "PRECISION": "ieee" if q.dtype == torch.float64 else "tf32" if single else "tf32x3",
            "num_warps": 4 if block_k * block_v <= 4096 else 8,
        }
        self.grid = (self.chains * self.segments, self.parts)

    def segment_states(self, start: Tensor, x: Tensor, y: Tensor, alpha: Tensor, beta: Tensor, reverse: bool) -> Tensor:
        if self.segments == 1:
            return start
        width, values = start.shape[2:]
        parts = start.new_empty(self.chains, self.segments, width, values, dtype=self.dtype)
        decays = start.new_empty(self.chains, self.segments, dtype=self.dtype)
        grid = (self.chains * (self.segments - 1), self.parts)
        _sum_segments[grid](
            *_strided(x), *_strided(y), alpha, beta, parts, decays, *self.size, REVERSE=reverse, **self.options
        )
        entries = width * values
        block = min(1024, triton.next_power_of_2(entries))
        grid = (self.chains, triton.cdiv(entries, block))
        _pass_on[grid](start, parts, decays, self.segments, entries, reverse, BLOCK=block, ACC=self.options["ACC"])
        return parts


def _strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    x = x if x.stride(3) == 1 else x.contiguous()
    return x, x.stride(0), x.stride(1), x.stride(2)


def scan_forward(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`resnet_bk.ops.chunked.scan_forward`, which does it where K > WIDEST."""
    if q.shape[3] > WIDEST:
        return chunked.scan_forward(q, k, v, alpha, beta, s0)
    launch = _Launch(q, v)
    alpha, beta, s0 = alpha.contiguous(), beta.contiguous(), s0.contiguous()
    y, last = v.new_empty(v.shape), torch.empty_like(s0)
    states = s0.new_empty(*s0.shape[:2], triton.cdiv(q.shape[1], SCAN_CHUNK), *s0.shape[2:])
    with torch.cuda.device_of(q):
        entering = launch.segment_states(s0, k, v, alpha, beta, reverse=False)
        inputs = (*_strided(q), *_strided(k), *_strided(v), alpha, beta, entering)
        _forward[launch.grid](*inputs, y, last, states, *launch.size, **launch.options)
    return y, last, states


def scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`resnet_bk.ops.chunked.scan_backward`."""
    if q.shape[3] > WIDEST:
        return chunked.scan_backward(grad_y, grad_last, q, k, v, alpha, beta, states)
    launch = _Launch(q, v)
    alpha, beta, states, grad_last = (x.contiguous() for x in (alpha, beta, states, grad_last))
    many = launch.parts > 1
    sums = [x.new_empty(launch.parts, *x.shape, dtype=launch.dtype if many else None) for x in (q, k, alpha, beta)]
    dv, ds0 = v.new_empty(v.shape), torch.empty_like(grad_last)
    with torch.cuda.device_of(q):
        leaving = launch.segment_states(grad_last, q, grad_y, alpha, beta, reverse=True)
        inputs = (*_strided(q), *_strided(k), *_strided(v), *_strided(grad_y), alpha, beta, states, leaving)
        dq, dk, dalpha, dbeta = sums
        sites = alpha.numel()
        _backward[launch.grid](*inputs, dq, dk, dv, dalpha, dbeta, ds0, *launch.size, sites, **launch.options)
    dq, dk, dalpha, dbeta = (x.sum(0).to(q.dtype) if many else x[0] for x in sums)
    return dq, dk, dv, dalpha, dbeta, ds0
