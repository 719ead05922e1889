"""The Green's function in Triton, in chunks of about sqrt(N) sites, one lane for each chunk (README, sections 2 and 7).

A complex number is a pair in memory and two tensors in a kernel. With real numbers the second tensor is unused, and the
compiler removes it.

Dimensions: B batch, N sites, H chains, C sites in a chunk, M chunks.

Bytes moved per site and chain in float32, for real and for complex numbers:

    forward    reads d, w twice        16, 24    writes g        4, 8     total 20, 32
    backward   reads grad, g, w twice  24, 40    writes dd, dw   8, 12    total 32, 52

A mask adds 2. What passes between chunks adds 24 to 64 per chunk.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LANES = 128  # chunks of one program, from all chains of a row
STAGES = 4  # sites loaded ahead: the one division of a step takes far less time than a load


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
    """Return row, chunk and chain of each lane, and which lanes exist. Heads vary fastest, as in memory."""
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
    """Write r, t, l of each chunk, which maps the entering g, x, to ``r + x t / (1 - x l)``, to pieces (3, B, M, H)."""
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
def _carry_g(pieces, g0, heads, chunks, size, lanes, COMPLEX: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr):
    """Carry g from chunk to chunk, and replace r of each chunk in pieces by the g that enters it."""
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
    """Compute ``carried <- conj(w g^2) (grad + carried)`` from the last site of each chunk to its first.

    With COMPOSE, the result is a function ``c + p carried`` of what enters at the end of the chunk; c and p are written
    to leaving (2, B, M, H). Without, what enters is read from leaving, and grad_d and grad_w are written.
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
def _carry_adjoint(
    leaving, grad_g0, heads, chunks, size, lanes, COMPLEX: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr
):
    """Carry the adjoint from the last chunk to the first, and replace c of each chunk by what enters at its end."""
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
    """Chunk sizes, grids and options of the kernels of one call.

    Attributes:
        mask: uint8; w in its place if there is none, which the kernels then do not read.
        pieces: shape (B, M, H).
        sites: integer arguments of the kernels that run over the sites of chunks.
        chains: integer arguments of the kernels that run over the chunks of chains.
        site_options: options of the former kernels.
        chain_options: options of the latter.
        site_grid: grid of the former.
        chain_grid: grid of the latter.
    """

    def __init__(self, w: Tensor, mask: Tensor | None, is_complex: bool):
        batch, length, heads = w.shape
        chunk = max(1, math.isqrt(length))
        chunks = triton.cdiv(length, chunk)
        self.mask = w if mask is None else mask.contiguous().view(torch.uint8)
        self.pieces = batch, chunks, heads
        size, lanes = batch * chunks * heads, batch * heads
        self.sites = length, heads, chunk, chunks, size
        self.chains = heads, chunks, size, lanes
        self.chain_options = {"COMPLEX": is_complex, "LANES": LANES, "STAGES": STAGES, "enable_fp_fusion": True}
        self.site_options = {**self.chain_options, "MASKED": mask is not None}
        self.site_grid = (batch * triton.cdiv(chunks * heads, LANES),)
        self.chain_grid = (triton.cdiv(lanes, LANES),)


def _as_real(x: Tensor) -> Tensor:
    """Return x contiguous; a complex number becomes a last axis of (real, imaginary)."""
    return (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x).contiguous()


def green_forward(d: Tensor, w: Tensor, g0: Tensor, mask: Tensor | None) -> Tensor:
    """Same as :func:`resnet_bk.ops.chunked.green_forward`."""
    launch, w = _Launch(w, mask, d.is_complex()), w.contiguous()
    out = torch.empty_like(d, memory_format=torch.contiguous_format)
    d, g0, pieces, g = (_as_real(x) for x in (d, g0, d.new_empty(3, *launch.pieces), out))
    with torch.cuda.device_of(w):
        _compose[launch.site_grid](d, w, launch.mask, pieces, *launch.sites, **launch.site_options)
        _carry_g[launch.chain_grid](pieces, g0, *launch.chains, **launch.chain_options)
        _recur[launch.site_grid](d, w, launch.mask, pieces, g, *launch.sites, **launch.site_options)
    return out


def green_backward(
    grad: Tensor, g: Tensor, w: Tensor, g0: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Same as :func:`resnet_bk.ops.chunked.green_backward`."""
    launch, w = _Launch(w, mask, g.is_complex()), w.contiguous()
    out = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (g, w, g0))
    grad_d, grad_w, grad_g0 = (_as_real(x) for x in out)
    leaving = _as_real(g.new_empty(2, *launch.pieces))
    inputs = (*(_as_real(x) for x in (grad, g)), w, _as_real(g0), launch.mask, leaving, grad_d, grad_w)
    with torch.cuda.device_of(w):
        _adjoint[launch.site_grid](*inputs, *launch.sites, COMPOSE=True, **launch.site_options)
        _carry_adjoint[launch.chain_grid](leaving, grad_g0, *launch.chains, **launch.chain_options)
        _adjoint[launch.site_grid](*inputs, *launch.sites, COMPOSE=False, **launch.site_options)
    return out  # type: ignore[return-value]
