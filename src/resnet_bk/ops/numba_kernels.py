"""CPU kernels compiled by numba (extra ``cpu-fast``): the recurrences step by step.

The chains of all rows run in parallel, and with SIMD where they are adjacent in memory; sites run one after the other.
Signatures and results are those of :mod:`resnet_bk.ops.chunked`.

Dimensions: B batch, N sites, H chains, K key width, V value width, M chunks of SCAN_CHUNK sites.
"""

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor

from resnet_bk.jit import jit
from resnet_bk.jit.simd import LANE_BYTES
from resnet_bk.ops.chunked import SCAN_CHUNK
from resnet_bk.ops.numba_arrays import arrays
from resnet_bk.ops.numba_delta import delta_scan_backward, delta_scan_forward
from resnet_bk.ops.numba_gates import (
    gated_norm_backward,
    gated_norm_forward,
    mixer_inputs_backward,
    mixer_inputs_forward,
    swiglu_backward,
    swiglu_forward,
)
from resnet_bk.ops.numba_ngram_look_up import find_ngrams, recent_ngrams
from resnet_bk.ops.numba_ngram_sum import ngram_sum_backward, ngram_sum_forward
from resnet_bk.ops.numba_sparse import sparse_scan_backward, sparse_scan_forward

__all__ = [
    "LANE_BYTES",
    "conv_backward",
    "conv_forward",
    "delta_scan_backward",
    "delta_scan_forward",
    "find_ngrams",
    "gated_norm_backward",
    "gated_norm_forward",
    "green_backward",
    "green_forward",
    "mixer_inputs_backward",
    "mixer_inputs_forward",
    "ngram_sum_backward",
    "ngram_sum_forward",
    "recent_ngrams",
    "scan_backward",
    "scan_forward",
    "sparse_scan_backward",
    "sparse_scan_forward",
    "swiglu_backward",
    "swiglu_forward",
]

LANES = 64  # chains of one task, which advance together from site to site


@jit
def _green_forward_real(d, w, g0, mask, out):
    batch, length, heads = d.shape
    blocks = (heads + LANES - 1) // LANES
    for task in prange(batch * blocks):
        b, low = task // blocks, (task % blocks) * LANES
        high = min(heads, low + LANES)
        previous = g0[b, low:high].copy()
        for t in range(length):
            if mask.size and not mask[b, t]:
                out[b, t, low:high] = previous
                continue
            for h in range(high - low):
                g = 1 / (d[b, t, low + h] - w[b, t, low + h] * previous[h])
                previous[h] = g
                out[b, t, low + h] = g


@jit
def _green_forward_complex(d, w, g0, mask, out):
    batch, length, heads, _ = d.shape
    blocks = (heads + LANES - 1) // LANES
    for task in prange(batch * blocks):
        b, low = task // blocks, (task % blocks) * LANES
        high = min(heads, low + LANES)
        re, im = g0[b, low:high, 0].copy(), g0[b, low:high, 1].copy()
        for t in range(length):
            if mask.size and not mask[b, t]:
                out[b, t, low:high, 0] = re
                out[b, t, low:high, 1] = im
                continue
            for h in range(high - low):
                x = d[b, t, low + h, 0] - w[b, t, low + h] * re[h]
                y = d[b, t, low + h, 1] - w[b, t, low + h] * im[h]
                inverse = 1 / (x * x + y * y)
                re[h] = x * inverse
                im[h] = -y * inverse
                out[b, t, low + h, 0] = re[h]
                out[b, t, low + h, 1] = im[h]


@jit
def _green_backward_real(grad, g, w, g0, mask, grad_d, grad_w, grad_g0):
    batch, length, heads = g.shape
    blocks = (heads + LANES - 1) // LANES
    for task in prange(batch * blocks):
        b, low = task // blocks, (task % blocks) * LANES
        high = min(heads, low + LANES)
        carried = np.zeros(high - low, g.dtype)
        for t in range(length - 1, -1, -1):
            before = g[b, t - 1] if t > 0 else g0[b]
            if mask.size and not mask[b, t]:
                for h in range(high - low):
                    carried[h] += grad[b, t, low + h]
                    grad_d[b, t, low + h] = 0
                    grad_w[b, t, low + h] = 0
                continue
            for h in range(high - low):
                i = low + h
                slope = g[b, t, i] * g[b, t, i] * (grad[b, t, i] + carried[h])
                grad_d[b, t, i] = -slope
                grad_w[b, t, i] = before[i] * slope
                carried[h] = w[b, t, i] * slope
        grad_g0[b, low:high] = carried


@jit
def _green_backward_complex(grad, g, w, g0, mask, grad_d, grad_w, grad_g0):
    batch, length, heads, _ = g.shape
    blocks = (heads + LANES - 1) // LANES
    for task in prange(batch * blocks):
        b, low = task // blocks, (task % blocks) * LANES
        high = min(heads, low + LANES)
        re, im = np.zeros(high - low, g.dtype), np.zeros(high - low, g.dtype)
        for t in range(length - 1, -1, -1):
            before = g[b, t - 1] if t > 0 else g0[b]
            if mask.size and not mask[b, t]:
                for h in range(high - low):
                    re[h] += grad[b, t, low + h, 0]
                    im[h] += grad[b, t, low + h, 1]
                    grad_d[b, t, low + h, 0] = 0
                    grad_d[b, t, low + h, 1] = 0
                    grad_w[b, t, low + h] = 0
                continue
            for h in range(high - low):
                i = low + h
                gr, gi = g[b, t, i, 0], g[b, t, i, 1]
                square_re, square_im = gr * gr - gi * gi, -2 * gr * gi  # conj(g^2)
                lr, li = grad[b, t, i, 0] + re[h], grad[b, t, i, 1] + im[h]
                sr = square_re * lr - square_im * li
                si = square_re * li + square_im * lr
                grad_d[b, t, i, 0] = -sr
                grad_d[b, t, i, 1] = -si
                grad_w[b, t, i] = before[i, 0] * sr + before[i, 1] * si
                re[h] = w[b, t, i] * sr
                im[h] = w[b, t, i] * si
        for h in range(high - low):
            grad_g0[b, low + h, 0] = re[h]
            grad_g0[b, low + h, 1] = im[h]


@jit
def _scan_forward(q, k, v, alpha, beta, s0, y, last, states):
    batch, length, heads, width = k.shape
    values = v.shape[3]
    for task in prange(batch * heads):
        b, h = task // heads, task % heads
        s = s0[b, h].copy()
        u = np.empty(values, v.dtype)
        row = np.empty(values, v.dtype)
        for t in range(length):
            if t % SCAN_CHUNK == 0:
                states[b, h, t // SCAN_CHUNK] = s
            a = alpha[b, t, h]
            for j in range(values):
                u[j] = beta[b, t, h] * v[b, t, h, j]
                row[j] = 0
            for i in range(width):
                ki, qi = k[b, t, h, i], q[b, t, h, i]
                for j in range(values):
                    s[i, j] = a * s[i, j] + ki * u[j]
                    row[j] += qi * s[i, j]
            y[b, t, h] = row
        last[b, h] = s


@jit
def _scan_backward(grad_y, grad_last, q, k, v, alpha, beta, states, dq, dk, dv, dalpha, dbeta, ds0):
    batch, length, heads, width = k.shape
    values = v.shape[3]
    zero = alpha.dtype.type(0)  # "a * 0" would be a float64, and sums of float64 are not vectorised
    for task in prange(batch * heads):
        b, h = task // heads, task % heads
        r = grad_last[b, h].copy()
        s = np.empty((SCAN_CHUNK + 1, width, values), v.dtype)
        u = np.empty(values, v.dtype)
        du = np.empty(values, v.dtype)
        for m in range(states.shape[2] - 1, -1, -1):
            start, stop = m * SCAN_CHUNK, min(length, (m + 1) * SCAN_CHUNK)
            s[0] = states[b, h, m]
            for t in range(start, stop):
                before, here = s[t - start], s[t - start + 1]
                a = alpha[b, t, h]
                for j in range(values):
                    u[j] = beta[b, t, h] * v[b, t, h, j]
                for i in range(width):
                    ki = k[b, t, h, i]
                    for j in range(values):
                        here[i, j] = a * before[i, j] + ki * u[j]
            for t in range(stop - 1, start - 1, -1):
                before, here = s[t - start], s[t - start + 1]
                dy = grad_y[b, t, h]
                a = alpha[b, t, h]
                for j in range(values):
                    u[j] = beta[b, t, h] * v[b, t, h, j]
                    du[j] = 0
                flow = zero
                for i in range(width):
                    ki, qi = k[b, t, h, i], q[b, t, h, i]
                    total = read = zero
                    for j in range(values):
                        read += here[i, j] * dy[j]
                        x = r[i, j] + qi * dy[j]
                        total += x * u[j]
                        du[j] += ki * x
                        flow += x * before[i, j]
                        r[i, j] = a * x
                    dq[b, t, h, i] = read
                    dk[b, t, h, i] = total
                total = zero
                for j in range(values):
                    total += du[j] * v[b, t, h, j]
                    dv[b, t, h, j] = beta[b, t, h] * du[j]
                dbeta[b, t, h] = total
                dalpha[b, t, h] = flow
        ds0[b, h] = r


def _mask(mask: Tensor | None) -> np.ndarray:
    return np.empty((0, 0), np.bool_) if mask is None else mask.contiguous().numpy()


def green_forward(d: Tensor, w: Tensor, g0: Tensor, mask: Tensor | None) -> Tensor:
    out = torch.empty_like(d, memory_format=torch.contiguous_format)
    kernel: Any = _green_forward_complex if d.is_complex() else _green_forward_real
    kernel(*arrays(d, w, g0), _mask(mask), *arrays(out))
    return out


def green_backward(
    grad: Tensor, g: Tensor, w: Tensor, g0: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    out = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (g, w, g0))
    kernel: Any = _green_backward_complex if g.is_complex() else _green_backward_real
    kernel(*arrays(grad.resolve_conj(), g, w, g0), _mask(mask), *arrays(*out))
    return out  # type: ignore[return-value]


def scan_forward(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    chunks = -(-q.shape[1] // SCAN_CHUNK)
    y, last = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, s0))
    states = s0.new_empty(*s0.shape[:2], chunks, *s0.shape[2:])
    _scan_forward(*arrays(q, k, v, alpha, beta, s0, y, last, states))
    return y, last, states


def scan_backward(
    grad_y: Tensor, grad_last: Tensor, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (q, k, v, alpha, beta)
    out = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (*inputs, grad_last))
    _scan_backward(*arrays(grad_y, grad_last, *inputs, states), *arrays(*out))
    return out  # type: ignore[return-value]


@jit
def _conv_forward(x, weight, y):
    batch, length, channels = y.shape
    width = weight.shape[0]
    for task in prange(batch * length):
        b, t = task // length, task % length
        for c in range(channels):
            y[b, t, c] = weight[0, c] * x[b, t, c]
        for i in range(1, width):
            for c in range(channels):
                y[b, t, c] += weight[i, c] * x[b, t + i, c]


@jit
def _conv_backward(grad, x, weight, grad_x, grad_weight):
    batch, length, channels = grad.shape
    width = weight.shape[0]
    partial = np.zeros((batch, width, channels), weight.dtype)
    for b in prange(batch):
        for t in range(length + width - 1):
            for c in range(channels):
                grad_x[b, t, c] = 0
            for i in range(max(0, t - length + 1), min(width, t + 1)):
                for c in range(channels):
                    grad_x[b, t, c] += weight[i, c] * grad[b, t - i, c]
                    partial[b, i, c] += x[b, t, c] * grad[b, t - i, c]
    for i in range(width):
        for c in range(channels):
            grad_weight[i, c] = 0
        for b in range(batch):
            for c in range(channels):
                grad_weight[i, c] += partial[b, i, c]


def conv_forward(x: Tensor, weight: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], x.shape[1] - weight.shape[0] + 1, x.shape[2])
    # clone: once numpy holds the storage of a parameter, sharding can no longer free it
    _conv_forward(*arrays(x, weight.clone(), y))
    return y


def conv_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight))
    _conv_backward(*arrays(grad, x, weight.clone(), grad_x, grad_weight))
    return grad_x, grad_weight
