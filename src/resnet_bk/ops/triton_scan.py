"""The gated scan in Triton, in chunks of SCAN_CHUNK sites as products on tensor cores (README, sections 3 and 7).

One kernel carries a block of the state from chunk to chunk and stores the state that enters each chunk. Another one
computes outputs or gradients from these states, all chunks in parallel. Too few chains to fill a GPU are cut into
segments: each segment first sums up its own part of the state, and a short kernel carries states from segment to
segment.

Dimensions: B batch, N sites, H chains, K key width, V value width, C sites in a chunk, M chunks, G segments of chunks.

Sums are float32, or float64 for float64 inputs. A product of float32 is three products of TF32. It is one if torch may
use TF32 (``torch.backends.cuda.matmul.fp32_precision``) or if the inputs have 16 bits, which TF32 represents exactly.

Elements moved per site and chain (4 bytes each in float32), and their number for K = V = 32:

    carry      reads k, v (q, dy), writes states       K + V + KV/C           96
    outputs    reads q, k, v, states, writes y         2K + 2V + KV/C        160
    gradients  reads q, k, v, dy, both kinds of state  2K + 2V + 2KV/C       192
               writes dq, dk, dv                       2K + V                 96
    segments   reads k, v (q, dy) of some sites        K + V at most          64

Without segments that is 256 forward and 384 backward. alpha and beta add 2 to each, their gradients 2 to backward. If K
or V is above BLOCK, the operands of a block are read again for the next block, from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_bk.ops.chunked import SCAN_CHUNK
from resnet_bk.ops.triton_tiles import (
    between_sites,
    decays_of,
    dot,
    first_of,
    in_state,
    per_site,
    piece_of_program,
    state_block,
    store_tile,
    through_sites,
    tile,
)

PROGRAMS = 512  # chains are cut into segments to get so many programs: about four for each of an H100's 132 processors
STAGES = 3  # chunks loaded ahead of the one that is added to the state
BLOCK = 32  # of K and V in a product: with three products of TF32, both halves of its operands must fit in registers


@triton.jit
def _carry_state(
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
    entering,
    decays,
    states,
    last,
    length,
    heads,
    segments,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    REVERSE: tl.constexpr,
    KEEP: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Carry a block of the state through the chunks of a segment.

    x and y are k and v. With REVERSE they are q and dy, and chunks run from the last to the first.

    With KEEP, the state starts from entering (B, H, G, K, V); the states that enter each chunk (B, H, M, K, V) and the
    last state are written. Without, it starts from 0; the state after the segment is written to entering, the decay of
    the segment to decays (B, H, G), and the segment that runs last is left out.
    """
    row, head, segment, chain = piece_of_program(heads, segments if KEEP else segments - 1)
    if REVERSE and not KEEP:
        segment += 1
    row_k, row_v = tl.program_id(1) * BLOCK_K, tl.program_id(2) * BLOCK_V
    at, inside = in_state(row_k, row_v, K, V, BLOCK_K, BLOCK_V)
    entering += (chain * segments + segment) * K * V
    of_chain = tl.cdiv(length, C)
    chunks_here = tl.minimum(chunks, of_chain - segment * chunks)
    state = tl.zeros([BLOCK_K, BLOCK_V], ACC)
    if KEEP:
        state = tl.load(entering + at, mask=inside, other=0).to(ACC)
    decay = tl.full([], 1, ACC)
    for n in tl.range(chunks_here, num_stages=STAGES):
        m = segment * chunks + (chunks_here - 1 - n if REVERSE else n)
        start = m.to(tl.int64) * C
        count = length - m * C
        gates = (row * length + start) * heads + head
        if KEEP:
            here = states + (chain * of_chain + m) * K * V
            tl.store(here + at, state.to(states.dtype.element_ty), mask=inside)
        x_ = tile(x + row * xb + start * xn + head * xh, xn, row_k, count, K, C, BLOCK_K, ACC)
        y_ = tile(y + row * yb + start * yn + head * yh, yn, row_v, count, V, C, BLOCK_V, ACC)
        a, _, past, until = decays_of(alpha + gates, heads, count, C, ACC)
        weight = past * a if REVERSE else until * per_site(beta + gates, heads, 0, count, 0, C, ACC)
        whole = first_of(a * until, C)
        state = whole * state + dot(tl.trans(x_ * weight[:, None]), y_, ACC, PRECISION)
        decay *= whole
    if not KEEP:
        tl.store(entering + at, state, mask=inside)
        tl.store(decays + chain * segments + segment, decay)
    elif segment == (0 if REVERSE else segments - 1):
        tl.store(last + chain * K * V + at, state.to(last.dtype.element_ty), mask=inside)


@triton.jit
def _carry_over_segments(
    start,
    parts,
    decays,
    segments,
    size,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Carry the state over the segments, and replace the part of each segment by the state that enters it."""
    chain = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    state = tl.load(start + chain * size + at, mask=at < size).to(ACC)
    for n in tl.range(segments - 1, num_stages=STAGES):
        place = chain * segments + (segments - 1 - n if REVERSE else n)
        part = tl.load(parts + place * size + at, mask=at < size)
        tl.store(parts + place * size + at, state, mask=at < size)
        state = tl.load(decays + place) * state + part
    place = chain * segments + (0 if REVERSE else segments - 1)
    tl.store(parts + place * size + at, state, mask=at < size)


@triton.jit
def _outputs(
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
    states,
    y,
    length,
    heads,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute BLOCK values of y in one chunk."""
    row, head, m, chain = piece_of_program(heads, chunks)
    column = tl.program_id(1) * BLOCK
    start = m.to(tl.int64) * C
    count = length - m * C
    gates = (row * length + start) * heads + head
    q += row * qb + start * qn + head * qh
    k += row * kb + start * kn + head * kh
    states += (chain * chunks + m) * K * V
    scores, read = tl.zeros([C, C], ACC), tl.zeros([C, BLOCK], ACC)
    for i in tl.range(0, K, BLOCK):
        q_ = tile(q, qn, i, count, K, C, BLOCK, ACC)
        k_ = tile(k, kn, i, count, K, C, BLOCK, ACC)
        scores += dot(q_, tl.trans(k_), ACC, PRECISION)
        read += dot(q_, state_block(states, i, column, K, V, BLOCK, ACC), ACC, PRECISION)
    a, before, past, _ = decays_of(alpha + gates, heads, count, C, ACC)
    u = tile(v + row * vb + start * vn + head * vh, vn, column, count, V, C, BLOCK, ACC)
    u *= per_site(beta + gates, heads, 0, count, 0, C, ACC)[:, None]
    scores *= through_sites(a, between_sites(before, C), C)
    read = read * (past * a)[:, None] + dot(scores, u, ACC, PRECISION)
    store_tile(y + gates * V, read, heads * V, column, count, V, C, BLOCK)


@triton.jit
def _gradients(
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
    adjoints,
    dq,
    dk,
    dv,
    dalpha,
    dbeta,
    length,
    heads,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    STRICT: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute all gradients of one chunk, from the entering states and the gradients (adjoints) of the leaving ones.

    With STRICT, q reads the state before its own site writes.
    """
    row, head, m, chain = piece_of_program(heads, chunks)
    start = m.to(tl.int64) * C
    count = length - m * C
    gates = (row * length + start) * heads + head
    q += row * qb + start * qn + head * qh
    k += row * kb + start * kn + head * kh
    v += row * vb + start * vn + head * vh
    grad += row * gb + start * gn + head * gh
    states += (chain * chunks + m) * K * V
    adjoints += (chain * chunks + m) * K * V
    a, before, past, until = decays_of(alpha + gates, heads, count, C, ACC)
    weight = per_site(beta + gates, heads, 0, count, 0, C, ACC)[:, None]
    between = between_sites(before, C)
    through = through_sites(a, between, C)
    scores, dscores = tl.zeros([C, C], ACC), tl.zeros([C, C], ACC)
    for i in tl.range(0, K, BLOCK):
        k_ = tile(k, kn, i, count, K, C, BLOCK, ACC)
        scores += dot(tile(q, qn, i, count, K, C, BLOCK, ACC), tl.trans(k_), ACC, PRECISION)
    for j in tl.range(0, V, BLOCK):
        u = tile(v, vn, j, count, V, C, BLOCK, ACC) * weight
        dscores += dot(tile(grad, gn, j, count, V, C, BLOCK, ACC), tl.trans(u), ACC, PRECISION)
    # alpha_t is on each path from a writer before t, or the entering state, to a reader at t or later, or the leaving
    # state. The products before and after it are known, so nothing is divided by it. First the paths between sites:
    read = dot(scores * dscores, tl.trans(between), ACC, PRECISION)
    flow = tl.sum(through * read, 0)
    reached = between * a[:, None] if STRICT else through
    scores *= reached
    dscores *= reached
    written = tl.zeros([C], ACC)
    for j in tl.range(0, V, BLOCK):
        du = tl.zeros([C, BLOCK], ACC)
        for i in tl.range(0, K, BLOCK):
            k_ = tile(k, kn, i, count, K, C, BLOCK, ACC)
            du += dot(k_, state_block(adjoints, i, j, K, V, BLOCK, ACC), ACC, PRECISION)
        dy = tile(grad, gn, j, count, V, C, BLOCK, ACC)
        du = du * until[:, None] + dot(tl.trans(scores), dy, ACC, PRECISION)
        store_tile(dv + gates * V, du * weight, heads * V, j, count, V, C, BLOCK)
        written += tl.sum(du * tile(v, vn, j, count, V, C, BLOCK, ACC), 1)
    entered, left, passed = tl.zeros([C], ACC), tl.zeros([C], ACC), tl.zeros([BLOCK], ACC)
    for i in tl.range(0, K, BLOCK):
        from_state, to_adjoint = tl.zeros([C, BLOCK], ACC), tl.zeros([C, BLOCK], ACC)
        for j in tl.range(0, V, BLOCK):
            state, adjoint = state_block(states, i, j, K, V, BLOCK, ACC), state_block(adjoints, i, j, K, V, BLOCK, ACC)
            from_state += dot(tile(grad, gn, j, count, V, C, BLOCK, ACC), tl.trans(state), ACC, PRECISION)
            u = tile(v, vn, j, count, V, C, BLOCK, ACC) * weight
            to_adjoint += dot(u, tl.trans(adjoint), ACC, PRECISION)
            passed += tl.sum(state * adjoint, 0)
        q_, k_ = tile(q, qn, i, count, K, C, BLOCK, ACC), tile(k, kn, i, count, K, C, BLOCK, ACC)
        entered += tl.sum(q_ * from_state, 1)
        left += tl.sum(k_ * to_adjoint, 1)
        from_state = from_state * (past * a)[:, None] + dot(dscores, k_, ACC, PRECISION)
        to_adjoint = to_adjoint * until[:, None] + dot(tl.trans(dscores), q_, ACC, PRECISION)
        store_tile(dq + gates * K, from_state, heads * K, i, count, K, C, BLOCK)
        store_tile(dk + gates * K, to_adjoint, heads * K, i, count, K, C, BLOCK)
    # then the paths from the entering state and to the leaving one
    flow += past * tl.sum(through * entered[:, None], 0)
    flow += until * (tl.sum(between * left[None, :], 1) + past * tl.sum(passed))
    i = tl.arange(0, C)
    tl.store(dalpha + gates + i * heads, flow.to(dalpha.dtype.element_ty), mask=i < count)
    tl.store(dbeta + gates + i * heads, written.to(dbeta.dtype.element_ty), mask=i < count)


class Launch:
    """Sizes and options of the kernels of one call."""

    def __init__(self, q: Tensor, v: Tensor):
        self.batch, self.length, self.heads, width = q.shape
        self.widths = width, v.shape[3]
        self.chunks = triton.cdiv(self.length, SCAN_CHUNK)
        rounded = q.element_size() < 4 or torch.backends.cuda.matmul.fp32_precision == "tf32"
        self.options = {
            "K": width,
            "V": v.shape[3],
            "C": SCAN_CHUNK,
            "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32,
            "PRECISION": "ieee" if q.dtype == torch.float64 else "tf32" if rounded else "tf32x3",
            "enable_fp_fusion": True,
        }
        self.all_chunks = (self.length, self.heads, self.chunks)
        self.grid = self.batch * self.heads * self.chunks

    def states(
        self, start: Tensor, x: Tensor, y: Tensor, alpha: Tensor, beta: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the states that enter each chunk, (B, H, M, K, V), and the last state; in reverse, from the end."""
        chains, (width, values) = self.batch * self.heads, self.widths
        block_k, block_v = (min(64, max(16, triton.next_power_of_2(n))) for n in self.widths)
        blocks = triton.cdiv(width, block_k), triton.cdiv(values, block_v)
        chunks = triton.cdiv(self.chunks, triton.cdiv(PROGRAMS, max(1, chains * blocks[0] * blocks[1])))
        segments = triton.cdiv(self.chunks, chunks)
        last, states = torch.empty_like(start), start.new_empty(*start.shape[:2], self.chunks, width, values)
        entering, decays = start, alpha
        if segments > 1:
            exact = torch.promote_types(start.dtype, torch.float32)
            entering = start.new_empty(chains, segments, width, values, dtype=exact)
            decays = entering.new_empty(chains, segments)
        sequence = (*strided(x), *strided(y), alpha, beta, entering, decays, states, last)
        options = {"BLOCK_K": block_k, "BLOCK_V": block_v, "REVERSE": reverse, "STAGES": STAGES, **self.options}
        sizes = (self.length, self.heads, segments, chunks)
        if segments > 1:
            _carry_state[chains * (segments - 1), *blocks](*sequence, *sizes, KEEP=False, **options)
            entries = width * values
            block = min(1024, triton.next_power_of_2(entries))
            grid = chains, triton.cdiv(entries, block)
            shared = {name: self.options[name] for name in ("ACC", "enable_fp_fusion")}
            _carry_over_segments[grid](
                start, entering, decays, segments, entries, reverse, BLOCK=block, STAGES=STAGES, **shared
            )
        _carry_state[chains * segments, *blocks](*sequence, *sizes, KEEP=True, **options)
        return states, last

    def outputs(self, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, states: Tensor) -> Tensor:
        """Return y, (B, N, H, V)."""
        y = v.new_empty(v.shape)
        inputs = (*strided(q), *strided(k), *strided(v), alpha, beta, states)
        _outputs[self.grid, triton.cdiv(v.shape[3], BLOCK)](*inputs, y, *self.all_chunks, BLOCK=BLOCK, **self.options)
        return y

    def gradients(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grad: Tensor,
        alpha: Tensor,
        beta: Tensor,
        states: Tensor,
        adjoints: Tensor,
        strict: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of q, k, v, alpha and beta."""
        found = tuple(x.new_empty(x.shape) for x in (q, k, v, alpha, beta))
        inputs = (*strided(q), *strided(k), *strided(v), *strided(grad), alpha, beta, states, adjoints)
        _gradients[self.grid,](*inputs, *found, *self.all_chunks, STRICT=strict, BLOCK=BLOCK, **self.options)
        return found  # type: ignore[return-value]


def strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Return x (B, N, H, width), copied if its last axis is not contiguous, and its first three strides."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return x, x.stride(0), x.stride(1), x.stride(2)


def scan_forward(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Same as :func:`resnet_bk.ops.chunked.scan_forward`."""
    launch = Launch(q, v)
    alpha, beta, s0 = alpha.contiguous(), beta.contiguous(), s0.contiguous()
    with torch.cuda.device_of(q):
        states, last = launch.states(s0, k, v, alpha, beta, reverse=False)
        return launch.outputs(q, k, v, alpha, beta, states), last, states


def scan_backward(
    grad_y: Tensor, grad_last: Tensor, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same as :func:`resnet_bk.ops.chunked.scan_backward`."""
    launch = Launch(q, v)
    alpha, beta, states, grad_last = (x.contiguous() for x in (alpha, beta, states, grad_last))
    with torch.cuda.device_of(q):
        adjoints, grad_s0 = launch.states(grad_last, q, grad_y, alpha, beta, reverse=True)
        return *launch.gradients(q, k, v, grad_y, alpha, beta, states, adjoints), grad_s0
