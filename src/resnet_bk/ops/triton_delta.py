"""The scan with the delta rule in Triton (README, sections 4 and 7).

One kernel inverts the triangular matrix of each chunk, all chunks in parallel. Another one carries the state from chunk
to chunk and computes the errors that sites write. The plain scan's kernels then compute outputs and gradients, with
errors in place of values.

Dimensions: B batch, N sites, H chains, K key width, V value width, C sites in a chunk, M chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from resnet_bk.ops.chunked import SCAN_CHUNK
from resnet_bk.ops.triton_scan import BLOCK, STAGES, Launch, strided
from resnet_bk.ops.triton_tiles import (
    between_sites,
    decays_of,
    dot,
    first_of,
    in_state,
    per_site,
    piece_of_program,
    store_tile,
    through_sites,
    tile,
)


@triton.jit
def _solve(
    k,
    kb,
    kn,
    kh,
    alpha,
    beta,
    solved,
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
    """Write the inverse of the matrix ``1 + A`` of one chunk to solved (B, H, M, C, C)."""
    row, head, m, chain = piece_of_program(heads, chunks)
    start = m.to(tl.int64) * C
    count = length - m * C
    gates = (row * length + start) * heads + head
    k += row * kb + start * kn + head * kh
    a, before, _, _ = decays_of(alpha + gates, heads, count, C, ACC)
    overlaps = tl.zeros([C, C], ACC)
    for i in tl.range(0, K, BLOCK):
        k_ = tile(k, kn, i, count, K, C, BLOCK, ACC)
        overlaps += dot(k_, tl.trans(k_), ACC, PRECISION)
    overlaps *= between_sites(before, C) * a[:, None] * per_site(beta + gates, heads, 0, count, 0, C, ACC)[None, :]
    # Row t of the inverse is that of 1, minus A_ts times row s for all s < t. Products of powers of A would take fewer
    # steps, but these powers grow where the inverse does not.
    of_writer = tl.trans(overlaps)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    inverse = tl.where(i == j, 1.0, 0.0).to(ACC)
    for t in tl.range(1, C):
        earlier = tl.sum(tl.where(j == t, of_writer, 0), 1)
        inverse -= tl.where(i == t, tl.sum(earlier[:, None] * inverse, 0)[None, :], 0)
    tl.store(solved + (chain * chunks + m) * C * C + i * C + j, inverse)


@triton.jit
def _carry_errors(
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
    solved,
    start,
    errors,
    states,
    last,
    length,
    heads,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    REVERSE: tl.constexpr,
    C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Carry BLOCK_V columns of the state, with all keys, through the chunks of a chain; write the errors of all sites.

    With REVERSE, chunks run from the last to the first, v is dy, and states and errors are the gradients of those.
    """
    row, head, _, chain = piece_of_program(heads, 1)
    column = tl.program_id(1) * BLOCK_V
    at, inside = in_state(0, column, K, V, BLOCK_K, BLOCK_V)
    state = tl.load(start + chain * K * V + at, mask=inside, other=0).to(ACC)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    for n in tl.range(chunks, num_stages=STAGES):
        m = chunks - 1 - n if REVERSE else n
        first = tl.cast(m, tl.int64) * C
        count = length - m * C
        gates = (row * length + first) * heads + head
        here = chain * chunks + m
        tl.store(states + here * K * V + at, state.to(states.dtype.element_ty), mask=inside)
        k_ = tile(k + row * kb + first * kn + head * kh, kn, 0, count, K, C, BLOCK_K, ACC)
        v_ = tile(v + row * vb + first * vn + head * vh, vn, column, count, V, C, BLOCK_V, ACC)
        inverse = tl.load(solved + here * C * C + i * C + j)
        a, before, past, until = decays_of(alpha + gates, heads, count, C, ACC)
        weight = per_site(beta + gates, heads, 0, count, 0, C, ACC)
        since = (past * a)[:, None]
        whole = first_of(a * until, C)
        known = dot(k_, state, ACC, PRECISION)
        if REVERSE:
            q_ = tile(q + row * qb + first * qn + head * qh, qn, 0, count, K, C, BLOCK_K, ACC)
            scores = dot(q_, tl.trans(k_), ACC, PRECISION) * through_sites(a, between_sites(before, C), C)
            du = dot(tl.trans(scores), v_, ACC, PRECISION) + until[:, None] * known
            error = dot(tl.trans(inverse), weight[:, None] * du, ACC, PRECISION)
            state = whole * state + dot(tl.trans(q_ * since), v_, ACC, PRECISION)
            state -= dot(tl.trans(k_ * since), error, ACC, PRECISION)
        else:
            error = dot(inverse, v_ - since * known, ACC, PRECISION)
            state = whole * state + dot(tl.trans(k_ * (until * weight)[:, None]), error, ACC, PRECISION)
        store_tile(errors + gates * V, error, heads * V, column, count, V, C, BLOCK_V)
    tl.store(last + chain * K * V + at, state.to(last.dtype.element_ty), mask=inside)


def _carry(
    launch: Launch, start: Tensor, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states that enter each chunk, (B, H, M, K, V), the last state and the errors, (B, N, H, V).

    In reverse, from the end, v is dy, and all three are gradients.
    """
    chains, width = start.shape[:2], k.shape[3]
    exact = torch.promote_types(k.dtype, torch.float32)
    solved = k.new_empty(*chains, launch.chunks, SCAN_CHUNK, SCAN_CHUNK, dtype=exact)
    _solve[launch.grid,](*strided(k), alpha, beta, solved, *launch.all_chunks, BLOCK=BLOCK, **launch.options)
    states, last = start.new_empty(*chains, launch.chunks, *start.shape[2:]), torch.empty_like(start)
    errors = v.new_empty(v.shape)
    inputs = (*strided(q), *strided(k), *strided(v), alpha, beta, solved, start, errors, states, last)
    block_k = max(16, triton.next_power_of_2(width))
    block_v = 32 if block_k <= 64 else 16
    options = {"REVERSE": reverse, "BLOCK_K": block_k, "BLOCK_V": block_v, "STAGES": STAGES, **launch.options}
    _carry_errors[chains.numel(), triton.cdiv(v.shape[3], block_v)](*inputs, *launch.all_chunks, **options)
    return states, last, errors


def delta_scan_forward(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same as :func:`resnet_bk.ops.chunked.delta_scan_forward`."""
    launch = Launch(q, v)
    alpha, beta, s0 = alpha.contiguous(), beta.contiguous(), s0.contiguous()
    with torch.cuda.device_of(q):
        states, last, error = _carry(launch, s0, q, k, v, alpha, beta, reverse=False)
        return launch.outputs(q, k, error, alpha, beta, states), last, states, error


def delta_scan_backward(
    grad_y: Tensor, grad_last: Tensor, q: Tensor, k: Tensor, alpha: Tensor, beta: Tensor, states: Tensor, error: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Same as :func:`resnet_bk.ops.chunked.delta_scan_backward`."""
    launch = Launch(q, error)
    alpha, beta, states, grad_last = (x.contiguous() for x in (alpha, beta, states, grad_last))
    with torch.cuda.device_of(q):
        adjoints, grad_s0, dv = _carry(launch, grad_last, q, k, grad_y, alpha, beta, reverse=True)
        # Two readers of one chain: q with the gradient dy, and before each site writes, k with the gradient -dv.
        dq, dk, _, dalpha, dbeta = launch.gradients(q, k, error, grad_y, alpha, beta, states, adjoints)
        nothing = torch.zeros_like(adjoints)
        dreader, dwriter, _, *rest = launch.gradients(k, k, error, -dv, alpha, beta, states, nothing, strict=True)
    return dq, dk + dreader + dwriter, dv, dalpha + rest[0], dbeta + rest[1], grad_s0
