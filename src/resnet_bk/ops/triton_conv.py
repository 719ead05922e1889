"""The short depthwise convolution in Triton. An input is read from memory once; its W uses come from the cache.

Dimensions: B batch, N positions, C channels, W width.

Bytes moved per position and channel in float32: 8 forward, 12 backward, and 8 W / SITES of partial sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SITES, CHANNELS = 64, 64  # tile of one program


@triton.jit
def _tile_of_program(length, channels, SITES: tl.constexpr, CHANNELS: tl.constexpr):
    """Return the row, the positions (SITES,) and the channels (CHANNELS,) of this program."""
    tiles = tl.cdiv(length, SITES)
    t = (tl.program_id(0) % tiles) * SITES + tl.arange(0, SITES)
    return (tl.program_id(0) // tiles).to(tl.int64), t, tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)


@triton.jit
def _load_tile(x, row, t, c, length, channels, ACC: tl.constexpr):
    """Return a (SITES, CHANNELS) tile of x (B, length, C), 0 outside of x."""
    at = (row * length + t)[:, None] * channels + c[None, :]
    return tl.load(x + at, mask=((t >= 0) & (t < length))[:, None] & (c < channels)[None, :], other=0).to(ACC)


@triton.jit
def _forward(
    x,
    weight,
    y,
    length,
    channels,
    WIDTH: tl.constexpr,
    SITES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
):
    row, t, c = _tile_of_program(length, channels, SITES, CHANNELS)
    total = tl.zeros([SITES, CHANNELS], ACC)
    for i in tl.static_range(WIDTH):
        tap = tl.load(weight + i * channels + c, mask=c < channels, other=0).to(ACC)
        total += _load_tile(x, row, t + i, c, length + WIDTH - 1, channels, ACC) * tap[None, :]
    at = (row * length + t)[:, None] * channels + c[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(t < length)[:, None] & (c < channels)[None, :])


@triton.jit
def _backward(
    grad,
    x,
    weight,
    grad_x,
    partial,
    length,
    channels,
    WIDTH: tl.constexpr,
    SITES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write grad_x, and to partial (programs, W, C) the part of each tile in the gradient of the weights."""
    longer = length + WIDTH - 1
    row, t, c = _tile_of_program(longer, channels, SITES, CHANNELS)
    here = _load_tile(x, row, t, c, longer, channels, ACC)
    total = tl.zeros([SITES, CHANNELS], ACC)
    for i in tl.static_range(WIDTH):
        tap = tl.load(weight + i * channels + c, mask=c < channels, other=0).to(ACC)
        arriving = _load_tile(grad, row, t - i, c, length, channels, ACC)
        total += arriving * tap[None, :]
        at = (tl.program_id(0).to(tl.int64) * WIDTH + i) * channels + c
        tl.store(partial + at, tl.sum(arriving * here, 0), mask=c < channels)
    at = (row * longer + t)[:, None] * channels + c[None, :]
    tl.store(grad_x + at, total.to(grad_x.dtype.element_ty), mask=(t < longer)[:, None] & (c < channels)[None, :])


def _launch_options(batch: int, positions: int, weight: Tensor) -> tuple[tuple[int, int], dict]:
    width, channels = weight.shape
    exact = tl.float64 if weight.dtype == torch.float64 else tl.float32
    grid = batch * triton.cdiv(positions, SITES), triton.cdiv(channels, CHANNELS)
    shape = {"WIDTH": width, "SITES": SITES, "CHANNELS": CHANNELS}
    return grid, {**shape, "ACC": exact, "enable_fp_fusion": True}


def conv_forward(x: Tensor, weight: Tensor) -> Tensor:
    """Same as :func:`resnet_bk.ops.chunked.conv_forward`."""
    x, weight = x.contiguous(), weight.contiguous()
    length = x.shape[1] - weight.shape[0] + 1
    y = x.new_empty(x.shape[0], length, x.shape[2])
    grid, options = _launch_options(x.shape[0], length, weight)
    with torch.cuda.device_of(x):
        _forward[grid](x, weight, y, length, x.shape[2], **options)
    return y


def conv_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Same as :func:`resnet_bk.ops.chunked.conv_backward`."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    grid, options = _launch_options(x.shape[0], x.shape[1], weight)
    grad_x = torch.empty_like(x)
    partial = weight.new_empty(grid[0], *weight.shape, dtype=torch.promote_types(weight.dtype, torch.float32))
    with torch.cuda.device_of(x):
        _backward[grid](grad, x, weight, grad_x, partial, grad.shape[1], x.shape[2], **options)
    return grad_x, partial.sum(0).to(weight.dtype)
