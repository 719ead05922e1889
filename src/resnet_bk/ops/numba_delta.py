"""The scan with the delta rule compiled by numba. README.md, section 4, derives its gradients.

The state is the largest operand, so each step passes over it once: forward, the pass that reads the state of a site
writes the site before it; backward, the pass that forms the gradient of a state finishes those of the site after it.

Dimensions: B batch, N sites, H chains, K key width, V value width, M chunks of SCAN_CHUNK sites.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.jit import jit
from resnet_bk.jit.simd import LANE_BYTES, load, splat, store, total
from resnet_bk.ops.chunked import SCAN_CHUNK
from resnet_bk.ops.numba_arrays import arrays


@jit
def _forward(q, k, v, alpha, beta, s0, y, last, states, error):
    batch, length, heads, width = k.shape
    values = v.shape[3]
    lanes, zero = LANE_BYTES // v.itemsize, v.dtype.type(0)
    for task in prange(batch * heads):
        b, h = task // heads, task % heads
        s = s0[b, h].copy()
        u = np.zeros(values, v.dtype)  # what the site before this one writes: at its key, k_before
        k_before = np.zeros(width, v.dtype)
        a_before = alpha.dtype.type(1)
        for t in range(length):
            site = (b * length + t) * heads + h
            a, strength, decay = splat(alpha[b, t, h]), splat(beta[b, t, h]), splat(a_before)
            qk = 0.0  # a float64, at no cost: y depends on it most
            for i in range(width):
                qk += q[b, t, h, i] * k[b, t, h, i]
            for c in range(0, values, lanes):
                at = site * values + c
                written, known, read = load(u, c), splat(zero), splat(zero)
                for i in range(width):
                    x = decay * load(s, i * values + c) + splat(k_before[i]) * written
                    store(s, i * values + c, x)
                    known += splat(k[b, t, h, i]) * x
                    read += splat(q[b, t, h, i]) * x
                e = load(v, at) - a * known
                written = strength * e
                store(error, at, e)
                store(u, c, written)
                store(y, at, a * read + splat(v.dtype.type(qk)) * written)
            if t % SCAN_CHUNK == 0:
                states[b, h, t // SCAN_CHUNK] = s
            k_before[:] = k[b, t, h]
            a_before = alpha[b, t, h]
        for i in range(width):
            for j in range(values):
                last[b, h, i, j] = a_before * s[i, j] + k_before[i] * u[j]


@jit
def _backward(grad_y, grad_last, q, k, alpha, beta, states, error, dq, dk, dv, dalpha, dbeta, ds0):
    batch, length, heads, width = k.shape
    values = error.shape[3]
    lanes, zero = LANE_BYTES // k.itemsize, k.dtype.type(0)
    size = values * width
    for task in prange(batch * heads):
        b, h = task // heads, task % heads
        # Transposed, (V, K): then of the four products with keys and values only one sums over lanes.
        # r: gradient of S at the site after t; its part through that site's decay is pending.
        r = grad_last[b, h].T.copy()
        s = np.empty((SCAN_CHUNK + 1, values, width), k.dtype)
        products = np.empty((values, lanes), k.dtype)  # summed over lanes: gradient of what the site writes
        de = np.zeros(values, k.dtype)  # gradient of the error at the site after t, whose key is k_after
        k_after = np.zeros(width, k.dtype)
        a_after = alpha.dtype.type(1)
        for m in range(states.shape[2] - 1, -1, -1):
            start, stop = m * SCAN_CHUNK, min(length, (m + 1) * SCAN_CHUNK)
            s[0] = states[b, h, m].T
            for t in range(start, stop):
                site, before = (b * length + t) * heads + h, (t - start) * size
                a = splat(alpha[b, t, h])
                for c in range(0, width, lanes):
                    key = load(k, site * width + c)
                    for j in range(values):
                        at = before + j * width + c
                        u = splat(beta[b, t, h] * error[b, t, h, j])
                        store(s, at + size, a * load(s, at) + key * u)
            for t in range(stop - 1, start - 1, -1):
                site, here = (b * length + t) * heads + h, (t - start + 1) * size
                strength, decay, flow = beta[b, t, h], splat(a_after), splat(zero)
                products[:] = 0
                for c in range(0, width, lanes):
                    at = site * width + c
                    key, query, after = load(k, at), load(q, at), load(k_after, c)
                    read, written, known = splat(zero), splat(zero), splat(zero)
                    for j in range(values):
                        state = load(s, here + j * width + c)
                        dy, lost = splat(grad_y[b, t, h, j]), splat(de[j])
                        known += lost * state
                        read += dy * state
                        x = load(r, j * width + c) - after * lost
                        flow += x * state  # summed over lanes: gradient of alpha at the site after t
                        x = decay * x + query * dy
                        store(r, j * width + c, x)
                        written += x * splat(strength * error[b, t, h, j])
                        store(products, j * lanes, load(products, j * lanes) + key * x)
                    store(dq, at, read)
                    store(dk, at, written)
                    if t + 1 < length:
                        at += heads * width
                        store(dk, at, load(dk, at) - decay * known)
                    store(k_after, c, key)
                if t + 1 < length:
                    dalpha[b, t + 1, h] = total(flow)
                sums = zero
                for j in range(values):
                    du = total(load(products, j * lanes))
                    sums += du * error[b, t, h, j]
                    de[j] = strength * du
                    dv[b, t, h, j] = de[j]
                dbeta[b, t, h] = sums
                a_after = alpha[b, t, h]
        sums = zero
        for i in range(width):
            known = zero
            for j in range(values):
                known += de[j] * states[b, h, 0, i, j]
                x = r[j, i] - k_after[i] * de[j]
                sums += x * states[b, h, 0, i, j]
                ds0[b, h, i, j] = a_after * x
            dk[b, 0, h, i] -= a_after * known
        dalpha[b, 0, h] = sums


def _whole_lanes(x: Tensor, dim: int) -> Tensor:
    """Return x with zeros added along a dimension, -1 or -2, up to whole lanes."""
    missing = -x.shape[dim] % (LANE_BYTES // x.dtype.itemsize)
    return F.pad(x, (0, missing) if dim == -1 else (0, 0, 0, missing)) if missing else x


def delta_scan_forward(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    width = v.shape[-1]
    v, s0 = _whole_lanes(v, -1), _whole_lanes(s0, -1)
    chunks = -(-q.shape[1] // SCAN_CHUNK)
    y, error, last = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, v, s0))
    states = s0.new_empty(*s0.shape[:2], chunks, *s0.shape[2:])
    _forward(*arrays(q, k, v, alpha, beta, s0, y, last, states, error))
    return tuple(x[..., :width].contiguous() for x in (y, last, states, error))  # type: ignore[return-value]


def delta_scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    alpha: Tensor,
    beta: Tensor,
    states: Tensor,
    error: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    width = k.shape[-1]
    q, k, grad_last, states = (_whole_lanes(x, dim) for x, dim in ((q, -1), (k, -1), (grad_last, -2), (states, -2)))
    dq, dk, dv, dalpha, dbeta, ds0 = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, error, alpha, beta, grad_last)
    )
    _backward(*arrays(grad_y, grad_last, q, k, alpha, beta, states, error, dq, dk, dv, dalpha, dbeta, ds0))
    return (
        dq[..., :width].contiguous(),
        dk[..., :width].contiguous(),
        dv,
        dalpha,
        dbeta,
        ds0[..., :width, :].contiguous(),
    )
