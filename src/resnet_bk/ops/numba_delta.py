"""The scan with the delta rule compiled by numba. README.md, section 4, derives its gradients.

The state is the largest operand, so each step passes over it once: forward, the pass that reads the state of a site
writes the site before it; backward, the pass that forms the gradient of a state finishes those of the site after it.

Dimensions: B batch, N sites, H chains, K key width, V value width, M chunks of SCAN_CHUNK sites.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from resnet_bk.ops.chunked import SCAN_CHUNK
from resnet_bk.ops.numba_jit import arrays, jit


@jit
def _forward(q, k, v, alpha, beta, s0, y, last, states, error):
    batch, length, heads, width = k.shape
    values = v.shape[3]
    for task in prange(batch * heads):
        b, h = task // heads, task % heads
        s = s0[b, h].copy()
        u = np.zeros(values, v.dtype)  # what the site before this one writes: at its key, k_before
        k_before = np.zeros(width, v.dtype)
        a_before = alpha.dtype.type(1)
        read = np.empty(values, v.dtype)
        known = np.empty(values, v.dtype)
        for t in range(length):
            a = alpha[b, t, h]
            for j in range(values):
                read[j] = 0
                known[j] = 0
            qk = 0.0  # a float64, at no cost: y depends on it most
            for i in range(width):
                ki, qi, before = k[b, t, h, i], q[b, t, h, i], k_before[i]
                k_before[i] = ki
                qk += qi * ki
                for j in range(values):
                    x = a_before * s[i, j] + before * u[j]
                    s[i, j] = x
                    known[j] += ki * x
                    read[j] += qi * x
            if t % SCAN_CHUNK == 0:
                states[b, h, t // SCAN_CHUNK] = s
            for j in range(values):
                e = v[b, t, h, j] - a * known[j]
                error[b, t, h, j] = e
                u[j] = beta[b, t, h] * e
                y[b, t, h, j] = a * read[j] + qk * u[j]
            a_before = a
        for i in range(width):
            for j in range(values):
                last[b, h, i, j] = a_before * s[i, j] + k_before[i] * u[j]


@jit
def _backward(grad_y, grad_last, q, k, alpha, beta, states, error, dq, dk, dv, dalpha, dbeta, ds0):
    batch, length, heads, width = k.shape
    values = error.shape[3]
    zero = alpha.dtype.type(0)  # "a * 0" would be a float64, and sums of float64 are not vectorised
    for task in prange(batch * heads):
        b, h = task // heads, task % heads
        r = grad_last[b, h].copy()  # gradient of S at the site after t; its part through that site's decay is pending
        s = np.empty((SCAN_CHUNK + 1, width, values), error.dtype)
        u = np.empty(values, error.dtype)
        du = np.empty(values, error.dtype)
        flows = np.empty(values, error.dtype)  # summed over j: gradient of alpha at the site after t
        de = np.zeros(values, error.dtype)  # gradient of the error at the site after t, whose key is k_after
        k_after = np.zeros(width, error.dtype)
        a_after = alpha.dtype.type(1)
        for m in range(states.shape[2] - 1, -1, -1):
            start, stop = m * SCAN_CHUNK, min(length, (m + 1) * SCAN_CHUNK)
            s[0] = states[b, h, m]
            for t in range(start, stop):
                before, here = s[t - start], s[t - start + 1]
                a = alpha[b, t, h]
                for j in range(values):
                    u[j] = beta[b, t, h] * error[b, t, h, j]
                for i in range(width):
                    ki = k[b, t, h, i]
                    for j in range(values):
                        here[i, j] = a * before[i, j] + ki * u[j]
            for t in range(stop - 1, start - 1, -1):
                here, dy = s[t - start + 1], grad_y[b, t, h]
                for j in range(values):
                    u[j] = beta[b, t, h] * error[b, t, h, j]
                    du[j] = 0
                    flows[j] = 0
                for i in range(width):
                    ki, qi, after = k[b, t, h, i], q[b, t, h, i], k_after[i]
                    k_after[i] = ki
                    read = written = known = zero
                    for j in range(values):
                        known += de[j] * here[i, j]
                        read += dy[j] * here[i, j]
                        x = r[i, j] - after * de[j]
                        flows[j] += x * here[i, j]
                        x = a_after * x + qi * dy[j]
                        r[i, j] = x
                        written += x * u[j]
                        du[j] += ki * x
                    dq[b, t, h, i] = read
                    dk[b, t, h, i] = written
                    if t + 1 < length:
                        dk[b, t + 1, h, i] -= a_after * known
                if t + 1 < length:
                    dalpha[b, t + 1, h] = flows.sum()
                total = zero
                for j in range(values):
                    total += du[j] * error[b, t, h, j]
                    de[j] = beta[b, t, h] * du[j]
                    dv[b, t, h, j] = de[j]
                dbeta[b, t, h] = total
                a_after = alpha[b, t, h]
        flow = zero
        for i in range(width):
            known = zero
            for j in range(values):
                known += de[j] * states[b, h, 0, i, j]
                x = r[i, j] - k_after[i] * de[j]
                flow += x * states[b, h, 0, i, j]
                ds0[b, h, i, j] = a_after * x
            dk[b, 0, h, i] -= a_after * known
        dalpha[b, 0, h] = flow


def delta_scan_forward(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chunks = -(-q.shape[1] // SCAN_CHUNK)
    y, error, last = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (v, v, s0))
    states = s0.new_empty(*s0.shape[:2], chunks, *s0.shape[2:])
    _forward(*arrays(q, k, v, alpha, beta, s0, y, last, states, error))
    return y, last, states, error


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
    out = tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, error, alpha, beta, grad_last)
    )
    _backward(*arrays(grad_y, grad_last, q, k, alpha, beta, states, error), *arrays(*out))
    return out  # type: ignore[return-value]
