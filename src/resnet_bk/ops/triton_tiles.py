"""Helpers of the scans' Triton kernels: loads and stores of blocks, and the decays within a chunk.

Dimensions: K key width, V value width, C sites in a chunk. ACC is the dtype that a kernel computes in.
"""

import triton
import triton.language as tl


@triton.jit
def piece_of_program(heads, pieces):
    """Return row, head, piece (chunk or segment) and chain of this program. Heads vary fastest, as in memory."""
    program = tl.program_id(0)
    row, head = (program // (heads * pieces)).to(tl.int64), program % heads
    return row, head, program // heads % pieces, row * heads + head


@triton.jit
def dot(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def tile(x, stride, column, count, WIDTH: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Return BLOCK columns, starting at `column`, of the chunk that x points to; (C, BLOCK), 0 outside of the chunk."""
    i, j = tl.arange(0, C)[:, None], column + tl.arange(0, BLOCK)[None, :]
    return tl.load(x + i * stride + j, mask=(i < count) & (j < WIDTH), other=0).to(ACC)


@triton.jit
def store_tile(x, value, stride, column, count, WIDTH: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    i, j = tl.arange(0, C)[:, None], column + tl.arange(0, BLOCK)[None, :]
    tl.store(x + i * stride + j, value.to(x.dtype.element_ty), mask=(i < count) & (j < WIDTH))


@triton.jit
def in_state(row, column, K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr):
    """Return the offsets of a block of a (K, V) state, and which of them exist; (BLOCK_K, BLOCK_V)."""
    i, j = row + tl.arange(0, BLOCK_K)[:, None], column + tl.arange(0, BLOCK_V)[None, :]
    return i * V + j, (i < K) & (j < V)


@triton.jit
def state_block(x, row, column, K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    at, inside = in_state(row, column, K, V, BLOCK, BLOCK)
    return tl.load(x + at, mask=inside, other=0).to(ACC)


@triton.jit
def per_site(x, stride, first, last, other: tl.constexpr, C: tl.constexpr, ACC: tl.constexpr):
    """Return elements i of the chunk that x points to where first <= i < last, and `other` elsewhere; (C,)."""
    i = tl.arange(0, C)
    inside = (i >= first) & (i < last)
    # `other` is not passed to load: for bfloat16 the interpreter would reinterpret the bits of the integer 1
    return tl.where(inside, tl.load(x + i * stride, mask=inside, other=0).to(ACC), other)


@triton.jit
def decays_of(alpha, stride, count, C: tl.constexpr, ACC: tl.constexpr):
    """Return four (C,): alpha, alpha of the previous site, the products of alpha before each site and after each site.

    No logarithm is taken, so a decay can be 0.
    """
    before = per_site(alpha - stride, stride, 1, count, 1, C, ACC)
    after = per_site(alpha + stride, stride, 0, tl.minimum(count, C) - 1, 1, C, ACC)
    return per_site(alpha, stride, 0, count, 1, C, ACC), before, tl.cumprod(before), tl.cumprod(after, reverse=True)


@triton.jit
def between_sites(before, C: tl.constexpr):
    """Return (C, C): in row t and column s < t the product of alpha over the sites between s and t, else 0."""
    t, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.where(t > s, tl.cumprod(tl.where(t > s + 1, before[:, None], 1), axis=0), 0)


@triton.jit
def through_sites(alpha, between, C: tl.constexpr):
    """Return (C, C): in row t and column s <= t the product of alpha over the sites after s up to t, else 0."""
    t, s = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.where(t == s, 1, between * alpha[:, None])


@triton.jit
def first_of(x, C: tl.constexpr):
    """Return the first element of x (C,)."""
    return tl.sum(tl.where(tl.arange(0, C) == 0, x, 0))
