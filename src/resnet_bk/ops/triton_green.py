"""The Green's function in Triton: chunks of about sqrt(N) sites, a lane of the grid each (README, sections 2 and 6).

Dimensions: B batch, N sites, H chains, C sites in a chunk, M chunks. In memory a complex number is a pair, in a kernel
two tensors; the second is carried along unused where numbers are real, and the compiler drops it.

Bytes that a site of one chain moves in float32 (real, complex), beside 2 of a mask and 1/C of 24 to 64 between chunks:

    forward    reads d, w twice        16, 24    writes g        4, 8     together 20, 32
    backward   reads grad, g, w twice  24, 40    writes dd, dw   8, 12    together 32, 52
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 128  # chunks, of all chains of a row, that one program takes
STAGES = 4  # sites loaded ahead: a step is one division, far less than memory takes to answer


@triton.jit
def _times(a, ai, b, bi, COMPLEX: tl.constexpr):
    return (a * b - ai * bi, a * bi + ai * b) if COMPLEX else (a * b, ai)


@triton.jit
def _inverse(a, ai, COMPLEX: tl.constexpr):
    scale = 1 / (a * a + ai * ai if COMPLEX else a)
    return (a * scale, -ai * scale) if COMPLEX else (scale, ai)


@triton.jit
def _load(x, at, live, COMPLEX: tl.constexpr, other: tl.constexpr = 0):
    real = tl.load(x + (2 * at if COMPLEX else at), mask=live, other=other)
    return real, tl.load(x + 2 * at + 1, mask=live, other=other) if COMPLEX else real


@triton.jit
def _store(x, at, re, im, live, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(x + 2 * at, re, mask=live)
        tl.store(x + 2 * at + 1, im, mask=live)
    else:
        tl.store(x + at, re, mask=live)


@triton.jit
def _lanes(heads, chunks, LANES: tl.constexpr):
    """Row, chunk and chain of each lane, chains fastest as in memory, and which lanes there are."""
    blocks = tl.cdiv(chunks * heads, LANES)
    lane = (tl.program_id(0) % blocks) * LANES + tl.arange(0, LANES)
    return (tl.program_id(0) // blocks).to(tl.int64), (lane // heads).to(tl.int64), lane % heads, lane < chunks * heads


@triton.jit
def _is_site(mask, at, live, MASKED: tl.constexpr):
    return live & (tl.load(mask + at, mask=live, other=0) != 0) if MASKED else live


@triton.jit
def _compose(
    d,
    w,
    mask,
    pieces,
    length,
    heads,
    chunk,
    chunks,
    size,
    COMPLEX: tl.constexpr,
    MASKED: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """pieces, (3, B, M, H): r, t, l of each chunk, which answers ``r + x t / (1 - x l)`` to the g that enters it."""
    row, m, head, lane = _lanes(heads, chunks, LANES)
    r = tl.zeros([LANES], w.dtype.element_ty)
    ri, left, left_i, ti = r, r, r, r
    t = r + 1
    for i in tl.range(chunk, num_stages=STAGES):
        site = row * length + m * chunk + i
        live = lane & (m * chunk + i < length)
        d_re, d_im = _load(d, site * heads + head, live, COMPLEX, other=1)
        link = tl.load(w + site * heads + head, mask=live, other=0)
        here = _is_site(mask, site, live, MASKED)
        g, gi = _inverse(d_re - link * r, d_im - link * ri, COMPLEX)
        through, through_i = _times(t, ti, link * g, link * gi, COMPLEX)
        left, left_i = tl.where(here, left + through, left), tl.where(here, left_i + through_i, left_i)
        through, through_i = _times(through, through_i, g, gi, COMPLEX)
        t, ti = tl.where(here, through, t), tl.where(here, through_i, ti)
        r, ri = tl.where(here, g, r), tl.where(here, gi, ri)
    at = (row * chunks + m) * heads + head
    _store(pieces, at, r, ri, lane, COMPLEX)
    _store(pieces, size + at, t, ti, lane, COMPLEX)
    _store(pieces, 2 * size + at, left, left_i, lane, COMPLEX)


@triton.jit
def _enter(pieces, g0, heads, chunks, size, lanes, COMPLEX: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr):
    """From piece to piece: the g that enters each chunk takes the place of its r."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    live = lane < lanes
    g, gi = _load(g0, lane, live, COMPLEX)
    first = (lane // heads).to(tl.int64) * chunks * heads + lane % heads
    for m in tl.range(chunks, num_stages=STAGES):
        at = first + m * heads
        r, ri = _load(pieces, at, live, COMPLEX)
        t, ti = _load(pieces, size + at, live, COMPLEX)
        left, left_i = _load(pieces, 2 * size + at, live, COMPLEX)
        _store(pieces, at, g, gi, live, COMPLEX)
        back, back_i = _times(g, gi, left, left_i, COMPLEX)
        back, back_i = _inverse(1 - back, -back_i, COMPLEX)
        g, gi = _times(g, gi, t, ti, COMPLEX)
        g, gi = _times(g, gi, back, back_i, COMPLEX)
        g, gi = r + g, ri + gi


@triton.jit
def _recur(
    d,
    w,
    mask,
    entering,
    out,
    length,
    heads,
    chunk,
    chunks,
    size,
    COMPLEX: tl.constexpr,
    MASKED: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    row, m, head, lane = _lanes(heads, chunks, LANES)
    g, gi = _load(entering, (row * chunks + m) * heads + head, lane, COMPLEX)
    for i in tl.range(chunk, num_stages=STAGES):
        site = row * length + m * chunk + i
        live = lane & (m * chunk + i < length)
        d_re, d_im = _load(d, site * heads + head, live, COMPLEX, other=1)
        link = tl.load(w + site * heads + head, mask=live, other=0)
        here = _is_site(mask, site, live, MASKED)
        new, new_i = _inverse(d_re - link * g, d_im - link * gi, COMPLEX)
        g, gi = tl.where(here, new, g), tl.where(here, new_i, gi)
        _store(out, site * heads + head, g, gi, live, COMPLEX)


@triton.jit
def _adjoint(
    grad,
    g,
    w,
    g0,
    mask,
    leaving,
    grad_d,
    grad_w,
    length,
    heads,
    chunk,
    chunks,
    size,
    COMPLEX: tl.constexpr,
    MASKED: tl.constexpr,
    COMPOSE: tl.constexpr,
    LANES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``carried <- conj(w g^2) (grad + carried)`` from each chunk's last site to its first.

    COMPOSE: as a function ``c + p carried`` of what enters at the chunk's end, into leaving (2, B, M, H). Otherwise
    what enters is read from there, and grad_d and grad_w are written.
    """
    row, m, head, lane = _lanes(heads, chunks, LANES)
    at = (row * chunks + m) * heads + head
    p = tl.zeros([LANES], w.dtype.element_ty)
    carried, carried_i, pi = p, p, p
    p += 1
    if not COMPOSE:
        carried, carried_i = _load(leaving, at, lane, COMPLEX)
    for i in tl.range(chunk, num_stages=STAGES):
        t = m * chunk + chunk - 1 - i
        site = row * length + t
        live = lane & (t < length)
        value, value_i = _load(g, site * heads + head, live, COMPLEX)
        arriving, arriving_i = _load(grad, site * heads + head, live, COMPLEX)
        link = tl.load(w + site * heads + head, mask=live, other=0)
        here = _is_site(mask, site, live, MASKED)
        square, square_i = _times(value, value_i, value, value_i, COMPLEX)
        carried, carried_i = carried + arriving, carried_i + arriving_i
        slope, slope_i = _times(square, -square_i, carried, carried_i, COMPLEX)
        if COMPOSE:
            through, through_i = _times(link * square, -link * square_i, p, pi, COMPLEX)
            p, pi = tl.where(here, through, p), tl.where(here, through_i, pi)
        else:
            slope, slope_i = tl.where(here, slope, 0), tl.where(here, slope_i, 0)
            before, before_i = _load(g, (site - 1) * heads + head, live & (t > 0), COMPLEX)
            first, first_i = _load(g0, row * heads + head, live & (t == 0), COMPLEX)
            before, _ = _times(before + first, -before_i - first_i, slope, slope_i, COMPLEX)
            _store(grad_d, site * heads + head, -slope, -slope_i, live, COMPLEX)
            tl.store(grad_w + site * heads + head, before, mask=live)
        carried, carried_i = (
            tl.where(here, link * slope, carried),
            tl.where(here, link * slope_i, carried_i),
        )
    if COMPOSE:
        _store(leaving, at, carried, carried_i, lane, COMPLEX)
        _store(leaving, size + at, p, pi, lane, COMPLEX)


@triton.jit
def _leave(
    leaving, grad_g0, heads, chunks, size, lanes, COMPLEX: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr
):
    """From the last chunk to the first: what enters each chunk at its end takes the place of its c."""
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    live = lane < lanes
    later = tl.zeros([LANES], leaving.dtype.element_ty)
    later_i = later
    first = (lane // heads).to(tl.int64) * chunks * heads + lane % heads
    for i in tl.range(chunks, num_stages=STAGES):
        at = first + (chunks - 1 - i) * heads
        c, ci = _load(leaving, at, live, COMPLEX)
        p, pi = _load(leaving, size + at, live, COMPLEX)
        _store(leaving, at, later, later_i, live, COMPLEX)
        later, later_i = _times(p, pi, later, later_i, COMPLEX)
        later, later_i = c + later, ci + later_i
    _store(grad_g0, lane, later, later_i, live, COMPLEX)


class _Launch:
    """How the chains of a call are cut, and what its kernels are told."""

    def __init__(self, w: Tensor, mask: Tensor | None, is_complex: bool):
        batch, length, heads = w.shape
        chunk = max(1, math.isqrt(length))
        chunks = triton.cdiv(length, chunk)
        self.mask = w if mask is None else mask.contiguous().view(torch.uint8)
        self.pieces = batch, chunks, heads
        size, lanes = batch * chunks * heads, batch * heads
        self.sites = length, heads, chunk, chunks, size
        self.chains = heads, chunks, size, lanes
        self.kind = {"COMPLEX": is_complex, "LANES": LANES, "STAGES": STAGES, "enable_fp_fusion": True}
        self.kind_of_sites = {**self.kind, "MASKED": mask is not None}
        self.by_site = (batch * triton.cdiv(chunks * heads, LANES),)
        self.by_chain = (triton.cdiv(lanes, LANES),)


def _numbers(x: Tensor) -> Tensor:
    """Contiguous; complex numbers as a last axis of (real, imaginary)."""
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).contiguous()


def green_forward(d: Tensor, w: Tensor, g0: Tensor, mask: Tensor | None) -> Tensor:
    """As :func:`resnet_bk.ops.chunked.green_forward`."""
    launch, w = _Launch(w, mask, d.is_complex()), w.contiguous()
    out = torch.empty_like(d, memory_format=torch.contiguous_format)
    d, g0, pieces, g = (_numbers(x) for x in (d, g0, d.new_empty(3, *launch.pieces), out))
    with torch.cuda.device_of(w):
        _compose[launch.by_site](d, w, launch.mask, pieces, *launch.sites, **launch.kind_of_sites)
        _enter[launch.by_chain](pieces, g0, *launch.chains, **launch.kind)
        _recur[launch.by_site](d, w, launch.mask, pieces, g, *launch.sites, **launch.kind_of_sites)
    return out


def green_backward(
    grad: Tensor, g: Tensor, w: Tensor, g0: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`resnet_bk.ops.chunked.green_backward`."""
    launch, w = _Launch(w, mask, g.is_complex()), w.contiguous()
    out = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (g, w, g0))
    grad_d, grad_w, grad_g0 = (_numbers(x) for x in out)
    leaving = _numbers(g.new_empty(2, *launch.pieces))
    inputs = (*(_numbers(x) for x in (grad, g)), w, _numbers(g0), launch.mask, leaving, grad_d, grad_w)
    with torch.cuda.device_of(w):
        _adjoint[launch.by_site](*inputs, *launch.sites, COMPOSE=True, **launch.kind_of_sites)
        _leave[launch.by_chain](leaving, grad_g0, *launch.chains, **launch.kind)
        _adjoint[launch.by_site](*inputs, *launch.sites, COMPOSE=False, **launch.kind_of_sites)
    return out  # type: ignore[return-value]
