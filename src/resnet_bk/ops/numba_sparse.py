"""The sparse scan compiled by numba: sites whose gate is 0 cost O(K + V) instead of O(K V), and nothing is moved.

Dimensions: B batch, N sites, H chains, K key width, V value width, M chunks of SCAN_CHUNK sites. The recurrence is in
:mod:`resnet_bk.ops.sparse`, the derivation of the gradients in README.md, section 4.
"""

import numpy as np
from numba import prange
from torch import Tensor

from resnet_bk.ops.chunked import SCAN_CHUNK
from resnet_bk.ops.numba_jit import arrays, jit


@jit
def _forward(q, k, v, alpha, beta, fill, gate, s0, r0, y, last_s, last_r, states):
    batch, length, heads, width = k.shape
    values = v.shape[3]
    for task in prange(batch * heads):
        b, h = task // heads, task % heads
        s, r = s0[b, h].copy(), r0[b, h].copy()
        u = np.empty(values, v.dtype)
        row = np.empty(values, v.dtype)
        pending = alpha.dtype.type(1)  # decay since the state was last touched
        for t in range(length):
            if t % SCAN_CHUNK == 0:
                if pending != 1:
                    s *= pending
                    pending = alpha.dtype.type(1)
                states[b, h, t // SCAN_CHUNK, :width] = s
                states[b, h, t // SCAN_CHUNK, width] = r
            g = gate[b, t]
            own = alpha.dtype.type(0)
            if g == 0:
                pending *= alpha[b, t, h]
                for i in range(width):
                    own += q[b, t, h, i] * k[b, t, h, i]
                own *= beta[b, t, h]
                for j in range(values):
                    r[j] *= fill[b, t, h]
                    y[b, t, h, j] = r[j] + own * v[b, t, h, j]
                continue
            a = alpha[b, t, h] * pending
            pending = alpha.dtype.type(1)
            for j in range(values):
                u[j] = g * beta[b, t, h] * v[b, t, h, j]
                row[j] = 0
            for i in range(width):
                ki, qi = k[b, t, h, i], q[b, t, h, i]
                own += qi * ki
                for j in range(values):
                    s[i, j] = a * s[i, j] + ki * u[j]
                    row[j] += qi * s[i, j]
            if g == 1:
                r[:] = row
                y[b, t, h] = row
                continue
            rest = 1 - g
            own *= rest * beta[b, t, h]
            for j in range(values):
                r[j] = rest * fill[b, t, h] * r[j] + g * (row[j] + own * v[b, t, h, j])
                y[b, t, h, j] = r[j] + own * v[b, t, h, j]
        last_s[b, h] = s * pending
        last_r[b, h] = r


@jit
def _backward(
    grad_y, grad_s, grad_r, q, k, v, alpha, beta, fill, gate, states, dq, dk, dv, dalpha, dbeta, dfill, dgate, ds0, dr0
):
    batch, length, heads, width = k.shape
    values = v.shape[3]
    for task in prange(batch * heads):
        b, h = task // heads, task % heads
        x = grad_s[b, h].copy()  # of the state
        dr = grad_r[b, h].copy()  # of what is carried on to sites that are left out
        s = np.empty((SCAN_CHUNK + 1, width, values), v.dtype)  # after each kept site
        r = np.empty((SCAN_CHUNK + 1, values), v.dtype)  # after each site
        before = np.empty(SCAN_CHUNK, v.dtype)  # decay between the kept site before each site and that site
        u = np.empty(values, v.dtype)
        du = np.empty(values, v.dtype)
        dread = np.empty(values, v.dtype)
        down = np.empty(values, v.dtype)
        for m in range(states.shape[2] - 1, -1, -1):
            start, stop = m * SCAN_CHUNK, min(length, (m + 1) * SCAN_CHUNK)
            s[0] = states[b, h, m, :width]
            r[0] = states[b, h, m, width]
            kept = 0
            pending = alpha.dtype.type(1)
            for t in range(start, stop):
                c = t - start
                g, f = gate[b, t], fill[b, t, h]
                before[c] = pending
                if g == 0:
                    pending *= alpha[b, t, h]
                    for j in range(values):
                        r[c + 1, j] = f * r[c, j]
                    continue
                a = alpha[b, t, h] * pending
                pending = alpha.dtype.type(1)
                rest = 1 - g
                own = alpha.dtype.type(0)
                for j in range(values):
                    u[j] = g * beta[b, t, h] * v[b, t, h, j]
                    du[j] = 0
                for i in range(width):
                    ki, qi = k[b, t, h, i], q[b, t, h, i]
                    own += qi * ki
                    for j in range(values):
                        here = a * s[kept, i, j] + ki * u[j]
                        s[kept + 1, i, j] = here
                        du[j] += qi * here
                own *= rest * beta[b, t, h]
                for j in range(values):
                    r[c + 1, j] = rest * f * r[c, j] + g * (du[j] + own * v[b, t, h, j])
                kept += 1
            flow = alpha.dtype.type(0)  # gradient of the decay up to the next kept site, or to the end of the chunk
            if gate[b, stop - 1] == 0:
                for i in range(width):
                    for j in range(values):
                        flow += x[i, j] * s[kept, i, j]
                        x[i, j] *= pending
            after = alpha.dtype.type(1)  # decay between each site and the next kept one
            for t in range(stop - 1, start - 1, -1):
                c = t - start
                g, f, bt = gate[b, t], fill[b, t, h], beta[b, t, h]
                qk = alpha.dtype.type(0)
                dfar = alpha.dtype.type(0)
                vy = alpha.dtype.type(0)
                dalpha[b, t, h] = flow * before[c] * after
                after *= alpha[b, t, h]
                if g == 0:
                    for i in range(width):
                        qk += q[b, t, h, i] * k[b, t, h, i]
                    for j in range(values):
                        dy = grad_y[b, t, h, j]
                        vy += dy * v[b, t, h, j]
                        dv[b, t, h, j] = bt * qk * dy
                        dfar += (dr[j] + dy) * r[c, j]
                        dr[j] = f * (dr[j] + dy)
                    for i in range(width):
                        dq[b, t, h, i] = bt * vy * k[b, t, h, i]
                        dk[b, t, h, i] = bt * vy * q[b, t, h, i]
                    dbeta[b, t, h] = qk * vy
                    dfill[b, t, h] = dfar
                    dgate[b, t, h] = 0
                    continue
                rest = 1 - g
                a = alpha[b, t, h] * before[c]
                after = alpha[b, t, h]
                flow = alpha.dtype.type(0)
                vr = alpha.dtype.type(0)
                vown = alpha.dtype.type(0)
                for j in range(values):
                    dy = grad_y[b, t, h, j]
                    dread[j] = dr[j] + dy
                    down[j] = rest * (g * dread[j] + dy)
                    u[j] = g * bt * v[b, t, h, j]
                    du[j] = 0
                    vy += dy * v[b, t, h, j]
                    vr += dread[j] * v[b, t, h, j]
                    vown += down[j] * v[b, t, h, j]
                    dfar += dread[j] * r[c, j]
                    dr[j] = rest * f * dread[j]
                dg = alpha.dtype.type(0)
                for i in range(width):
                    ki, qi = k[b, t, h, i], q[b, t, h, i]
                    qk += qi * ki
                    read = alpha.dtype.type(0)
                    written = alpha.dtype.type(0)
                    for j in range(values):
                        read += dread[j] * s[kept, i, j]
                        grad = x[i, j] + g * qi * dread[j]
                        written += grad * u[j]
                        du[j] += ki * grad
                        flow += grad * s[kept - 1, i, j]
                        x[i, j] = a * grad
                    dq[b, t, h, i] = g * read + bt * vown * ki
                    dk[b, t, h, i] = written + bt * vown * qi
                    dg += qi * read
                kept -= 1
                dalpha[b, t, h] = flow * before[c]
                vu = alpha.dtype.type(0)
                for j in range(values):
                    vu += du[j] * v[b, t, h, j]
                    dv[b, t, h, j] = g * bt * du[j] + bt * qk * down[j]
                dbeta[b, t, h] = g * vu + qk * vown
                dfill[b, t, h] = rest * dfar
                dgate[b, t, h] = dg - f * dfar + bt * (qk * ((1 - 2 * g) * vr - vy) + vu)
        ds0[b, h] = x
        dr0[b, h] = dr


def sparse_scan_forward(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, fill: Tensor, gate: Tensor, s0: Tensor, r0: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chunks = -(-q.shape[1] // SCAN_CHUNK)
    out = (v.new_empty(v.shape), s0.new_empty(s0.shape), r0.new_empty(r0.shape))
    states = s0.new_empty(*s0.shape[:2], chunks, s0.shape[2] + 1, s0.shape[3])
    _forward(*arrays(q, k, v, alpha, beta, fill, gate, s0, r0, *out, states))
    return *out, states


def sparse_scan_backward(grad_y: Tensor, grad_s: Tensor, grad_r: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
    """saved: q, k, v, alpha, beta, fill, gate, states. Gradients of the first seven, s0 and r0."""
    q, k, v, alpha, beta, fill, _, _ = saved
    *found, dgate, ds0, dr0 = (x.new_empty(x.shape) for x in (q, k, v, alpha, beta, fill, fill, grad_s, grad_r))
    _backward(*arrays(grad_y, grad_s, grad_r, *saved, *found, dgate, ds0, dr0))
    return *found, dgate.sum(-1), ds0, dr0
