"""The numba kernels of the parts of a block around its matrix products, see :mod:`resnet_bk.ops.gates`.

Backward they compute again what forward they did not store: it takes less time than to read it.

Dimensions: B batch, N positions, H heads, K head width, D = H K, W positions of the convolution.
"""

import math

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from resnet_bk.jit import TASKS, jit
from resnet_bk.jit.simd import LANE_BYTES, load, sigmoid, splat, store, total
from resnet_bk.ops.numba_arrays import arrays

BLOCK = 32  # positions of a task


@njit(forceinline=True)
def _convolve(p, past, weight, b, t, x):
    """Write the convolution at position t of row b into x, (3 D,)."""
    taps, channels = weight.shape
    length, columns = p.shape[1:]
    early = max(0, taps - 1 - t)  # taps that read the past
    for c in range(0, channels, LANE_BYTES // p.itemsize):
        sums = splat(p.dtype.type(0))
        for i in range(early):
            sums += load(weight, i * channels + c) * load(past, (b * (taps - 1) + t + i) * channels + c)
        at = (b * length + t - taps + 1) * columns + c
        for i in range(early, taps):
            sums += load(weight, i * channels + c) * load(p, at + i * columns)
        store(x, c, sums)


@njit(forceinline=True)
def _slope(x, one):
    """Return the derivative of ``x sigmoid(x)``."""
    s = sigmoid(x, one)
    return s * (one + x * (one - s))


@jit
def _inputs_forward(p, past, weight, q, k, v, gate, write):
    batch, length, columns = p.shape
    heads, width = q.shape[2:]
    d, lanes, blocks = heads * width, LANE_BYTES // p.itemsize, -(-length // BLOCK)
    for task in prange(batch * blocks):
        b, start = task // blocks, task % blocks * BLOCK
        one, scale = splat(p.dtype.type(1)), splat(p.dtype.type(1 / math.sqrt(width)))
        u = np.empty(3 * d, p.dtype)
        for t in range(start, min(length, start + BLOCK)):
            site = b * length + t
            _convolve(p, past, weight, b, t, u)
            for h in range(heads):
                squares = splat(p.dtype.type(0))
                for c in range(h * width, (h + 1) * width, lanes):
                    x = load(u, c)
                    store(q, site * d + c, scale * x * sigmoid(x, one))
                    x = load(u, d + c)
                    x *= sigmoid(x, one)
                    store(k, site * d + c, x)
                    squares += x * x
                    x = load(u, 2 * d + c)
                    store(v, site * d + c, x * sigmoid(x, one))
                    x = load(p, site * columns + 3 * d + c)
                    store(gate, site * d + c, x * sigmoid(x, one))
                if write.shape[2]:
                    shorter = splat(p.dtype.type(1 / math.sqrt(1 + total(squares))))
                    for c in range(h * width, (h + 1) * width, lanes):
                        store(k, site * d + c, shorter * load(k, site * d + c))
                    write[b, t, h] = 1 / (1 + math.exp(-p[b, t, 4 * d + h]))


@njit(forceinline=True)
def _gradient_of_heads(dq, dk, dv, site, softened, u):
    """Turn the convolution at a site, u (3 D,), into its gradient."""
    heads, width = dq.shape[2:]
    d, lanes = heads * width, LANE_BYTES // dq.itemsize
    one, scale = splat(dq.dtype.type(1)), splat(dq.dtype.type(1 / math.sqrt(width)))
    for h in range(heads):
        squares, along = splat(dq.dtype.type(0)), splat(dq.dtype.type(0))
        for c in range(h * width, (h + 1) * width, lanes):
            store(u, c, scale * load(dq, site * d + c) * _slope(load(u, c), one))
            store(u, 2 * d + c, load(dv, site * d + c) * _slope(load(u, 2 * d + c), one))
            x = load(u, d + c)
            x *= sigmoid(x, one)
            squares += x * x
            along += x * load(dk, site * d + c)
        shrinks = 1 / (1 + total(squares)) if softened else dq.dtype.type(0)
        shorter = splat(dq.dtype.type(math.sqrt(shrinks))) if softened else one
        along = splat(dq.dtype.type(shrinks * total(along)))
        for c in range(h * width, (h + 1) * width, lanes):
            x = load(u, d + c)
            s = sigmoid(x, one)
            grad = shorter * (load(dk, site * d + c) - along * x * s)
            store(u, d + c, grad * s * (one + x * (one - s)))


@jit
def _inputs_backward(dq, dk, dv, dgate, dwrite, p, past, weight, dp, dpast, dweight):
    batch, length, columns = p.shape
    taps, channels = weight.shape
    heads = dq.shape[2]
    d, lanes, blocks = channels // 3, LANE_BYTES // p.itemsize, -(-length // BLOCK)
    for task in prange(batch * blocks):
        b, start = task // blocks, task % blocks * BLOCK
        one, zero = splat(p.dtype.type(1)), splat(p.dtype.type(0))
        stop = min(length, start + BLOCK)
        ahead = min(length, stop + taps - 1)  # these positions read positions of this task
        du = np.empty((BLOCK + taps - 1, channels), p.dtype)
        for t in range(start, ahead):
            _convolve(p, past, weight, b, t, du[t - start])
            _gradient_of_heads(dq, dk, dv, b * length + t, dwrite.shape[2] > 0, du[t - start])
        for c in range(0, channels, lanes):
            for at in range(start if start else 1 - taps, stop):
                sums = zero
                for t in range(max(start, at), min(ahead, at + taps)):
                    sums += load(weight, (at - t + taps - 1) * channels + c) * load(du, (t - start) * channels + c)
                if at >= 0:
                    store(dp, (b * length + at) * columns + c, sums)
                else:
                    store(dpast, ((b + 1) * (taps - 1) + at) * channels + c, sums)
            for i in range(taps):
                sums = zero
                reach = i - taps + 1
                for t in range(start, min(stop, -reach)):
                    x = load(past, ((b + 1) * (taps - 1) + t + reach) * channels + c)
                    sums += load(du, (t - start) * channels + c) * x
                for t in range(max(start, -reach), stop):
                    x = load(p, (b * length + t + reach) * columns + c)
                    sums += load(du, (t - start) * channels + c) * x
                store(dweight, (task * taps + i) * channels + c, sums)
        for t in range(start, stop):
            site = b * length + t
            for c in range(0, d, lanes):
                at = site * columns + channels + c
                store(dp, at, load(dgate, site * d + c) * _slope(load(p, at), one))
            if dwrite.shape[2]:
                for h in range(heads):
                    x = 1 / (1 + math.exp(-p[b, t, 4 * d + h]))
                    dp[b, t, 4 * d + h] = dwrite[b, t, h] * x * (1 - x)


def mixer_inputs_forward(
    p: Tensor, past: Tensor, weight: Tensor, heads: int, delta: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, length, d = *p.shape[:2], weight.shape[1] // 3
    q, k, v = (p.new_empty(batch, length, heads, d // heads) for _ in range(3))
    gate, write = p.new_empty(batch, length, d), p.new_empty(batch, length, heads if delta else 0)
    # clone: once numpy holds the storage of a parameter, sharding can no longer free it
    _inputs_forward(*arrays(p, past, weight.clone(), q, k, v, gate, write))
    return q, k, v, gate, write


def mixer_inputs_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dgate: Tensor, dwrite: Tensor, p: Tensor, past: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dp, dpast = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (p, past))
    dweight = weight.new_empty(p.shape[0] * -(-p.shape[1] // BLOCK), *weight.shape)
    _inputs_backward(*arrays(dq, dk, dv, dgate, dwrite, p, past, weight.clone(), dp, dpast, dweight))
    return dp, dpast, dweight.sum(0)


@njit(forceinline=True)
def _mean_and_scale(y, row, width, eps):
    """Return the mean of a row and the inverse of its standard deviation, in all lanes."""
    lanes = LANE_BYTES // y.itemsize
    sums, squares = splat(y.dtype.type(0)), splat(y.dtype.type(0))
    for c in range(0, width, lanes):
        sums += load(y, row * width + c)
    mean = splat(y.dtype.type(total(sums) / width))
    for c in range(0, width, lanes):
        x = load(y, row * width + c) - mean
        squares += x * x
    variance = total(squares) / width
    # An overflow must end a training, and 1 / inf would hide it.
    return mean, splat(y.dtype.type(1 / math.sqrt(variance + eps) if variance < np.inf else np.nan))


@jit
def _norm_forward(y, weight, gate, eps, out):
    rows, width = y.shape
    lanes = LANE_BYTES // y.itemsize
    for task in prange(TASKS):
        for row in range(task * rows // TASKS, (task + 1) * rows // TASKS):
            mean, scale = _mean_and_scale(y, row, width, eps)
            for c in range(0, width, lanes):
                at = row * width + c
                store(out, at, (load(y, at) - mean) * scale * load(weight, c) * load(gate, at))


@jit
def _norm_backward(grad, y, weight, gate, eps, dy, dweight, dgate):
    rows, width = y.shape
    lanes = LANE_BYTES // y.itemsize
    for task in prange(TASKS):
        for row in range(task * rows // TASKS, (task + 1) * rows // TASKS):
            mean, scale = _mean_and_scale(y, row, width, eps)
            sums, along = splat(y.dtype.type(0)), splat(y.dtype.type(0))
            for c in range(0, width, lanes):
                at = row * width + c
                x, through = (load(y, at) - mean) * scale, load(grad, at) * load(gate, at)
                store(dgate, at, load(grad, at) * x * load(weight, c))
                store(dweight, task * width + c, load(dweight, task * width + c) + through * x)
                through *= load(weight, c)
                store(dy, at, through)
                sums += through
                along += through * x
            mean_of_gradient = splat(y.dtype.type(total(sums) / width))
            part = splat(y.dtype.type(total(along) / width))
            for c in range(0, width, lanes):
                at = row * width + c
                x = (load(y, at) - mean) * scale
                store(dy, at, scale * (load(dy, at) - mean_of_gradient - x * part))


def gated_norm_forward(y: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    out, width = torch.empty_like(gate, memory_format=torch.contiguous_format), len(weight)
    inputs = arrays(y.reshape(-1, width), weight.clone(), gate.reshape(-1, width))
    _norm_forward(*inputs, eps, *arrays(out.view(-1, width)))
    return out


def gated_norm_backward(
    grad: Tensor, y: Tensor, weight: Tensor, gate: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dy, dgate = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (y, gate))
    width = len(weight)
    dweight = weight.new_zeros(TASKS, width)
    inputs = arrays(grad.reshape(-1, width), y.reshape(-1, width), weight.clone(), gate.reshape(-1, width))
    _norm_backward(*inputs, eps, *arrays(dy.view(-1, width), dweight, dgate.view(-1, width)))
    return dy, dweight.sum(0), dgate


@jit
def _swiglu_forward(x, y):
    rows, width = y.shape
    lanes = LANE_BYTES // x.itemsize
    for task in prange(TASKS):
        one = splat(x.dtype.type(1))
        for row in range(task * rows // TASKS, (task + 1) * rows // TASKS):
            for group in range(0, width, lanes):
                c = min(group, width - lanes)  # the last group may overlap the one before it
                gate, value = load(x, 2 * row * width + c), load(x, (2 * row + 1) * width + c)
                store(y, row * width + c, gate * sigmoid(gate, one) * value)


@jit
def _swiglu_backward(grad, x, dx):
    rows, width = grad.shape
    lanes = LANE_BYTES // x.itemsize
    for task in prange(TASKS):
        one = splat(x.dtype.type(1))
        for row in range(task * rows // TASKS, (task + 1) * rows // TASKS):
            for group in range(0, width, lanes):
                c = min(group, width - lanes)
                of_gate, of_value = 2 * row * width + c, (2 * row + 1) * width + c
                gate, dy = load(x, of_gate), load(grad, row * width + c)
                s = sigmoid(gate, one)
                store(dx, of_value, dy * gate * s)
                store(dx, of_gate, dy * load(x, of_value) * s * (one + gate * (one - s)))


def swiglu_forward(x: Tensor) -> Tensor:
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _swiglu_forward(*arrays(x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])))
    return y


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    _swiglu_backward(*arrays(grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]), dx.view(-1, x.shape[-1])))
    return dx
