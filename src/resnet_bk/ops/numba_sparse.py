"""The sparse scan compiled by numba. A site left out costs O(V) instead of O(K V), and v and y are not packed.

:mod:`resnet_bk.ops.sparse` has the recurrence, README.md, section 5, derives its gradients.

Dimensions: B batch, N sites, H chains, K key width, V value width, M chunks of SCAN_CHUNK kept sites.
"""

import numpy as np
from numba import prange
from torch import Tensor

from resnet_bk.jit import jit
from resnet_bk.ops.chunked import SCAN_CHUNK
from resnet_bk.ops.numba_arrays import arrays


@jit
def _forward(q, k, v, alpha, beta, fade, own, gate, s0, r0, delta, y, last_s, last_r, states, error):
    batch, length, heads, values = v.shape
    width = k.shape[3]
    for task in prange(batch * heads):
        b, h = task // heads, task % heads
        s, r = s0[b, h].copy(), r0[b, h].copy()
        u = np.empty(values, v.dtype)
        site = 0  # kept sites so far
        pending = alpha.dtype.type(1)  # decay that s has not been multiplied by yet
        states[b, h, 0] = s
        for t in range(length):
            if gate[b, t] == 0:
                pending *= alpha[b, t, h]
                for j in range(values):
                    r[j] *= fade[b, t, h]
                    y[b, t, h, j] = r[j] + own[b, t, h] * v[b, t, h, j]
                continue
            if site % SCAN_CHUNK == 0 and site > 0:
                s *= pending
                pending = alpha.dtype.type(1)
                states[b, h, site // SCAN_CHUNK] = s
            a = alpha[b, t, h] * pending
            pending = alpha.dtype.type(1)
            for j in range(values):
                u[j] = v[b, t, h, j]
                r[j] = 0
            if delta:
                for i in range(width):
                    known = a * k[b, site, h, i]
                    for j in range(values):
                        u[j] -= known * s[i, j]
                error[b, site, h] = u
            for j in range(values):
                u[j] *= beta[b, t, h]
            for i in range(width):
                ki, qi = k[b, site, h, i], q[b, site, h, i]
                for j in range(values):
                    s[i, j] = a * s[i, j] + ki * u[j]
                    r[j] += qi * s[i, j]
            y[b, t, h] = r
            site += 1
        last_s[b, h] = s * pending
        last_r[b, h] = r
        states[b, h, max(1, -(-site // SCAN_CHUNK)) :] = 0
        error[b, site:, h] = 0


@jit
def _backward(
    grad_y,
    grad_s,
    grad_r,
    q,
    k,
    v,
    alpha,
    beta,
    fade,
    own,
    gate,
    r0,
    y,
    states,
    error,
    delta,
    dq,
    dk,
    dv,
    dalpha,
    dbeta,
    dfade,
    d_own,
    dgate,
    ds0,
    dr0,
):
    batch, length, heads, values = v.shape
    width = k.shape[3]
    zero = alpha.dtype.type(0)
    for task in prange(batch * heads):
        b, h = task // heads, task % heads
        x = grad_s[b, h].copy()  # gradient of the state
        dr = grad_r[b, h].copy()  # gradient of the r that later sites left out read
        s = np.empty((SCAN_CHUNK + 1, width, values), v.dtype)  # S after each kept site of the chunk
        r = np.empty(values, v.dtype)  # r before a site
        e = np.empty(values, v.dtype)  # what the site writes, but for beta: v, or the error
        u = np.empty(values, v.dtype)
        du = np.empty(values, v.dtype)
        dread = np.empty(values, v.dtype)
        sites = np.empty(length + 1, np.int64)  # positions of the kept sites
        count = 0
        for t in range(length):
            sites[count] = t
            count += gate[b, t] != 0
        dq[b, count:, h] = 0
        dk[b, count:, h] = 0
        stop = length
        for m in range(max(1, -(-count // SCAN_CHUNK)) - 1, -1, -1):
            site = m * SCAN_CHUNK
            start = sites[site] if m > 0 else 0
            s[0] = states[b, h, m]
            kept = 0
            pending = alpha.dtype.type(1)
            for t in range(start, stop):
                dalpha[b, t, h] = pending  # until the reverse loop: decay between the last kept site and this one
                if gate[b, t] == 0:
                    pending *= alpha[b, t, h]
                    continue
                a = alpha[b, t, h] * pending
                pending = alpha.dtype.type(1)
                earlier, here = s[kept], s[kept + 1]
                e[:] = error[b, site + kept, h] if delta else v[b, t, h]
                for j in range(values):
                    u[j] = beta[b, t, h] * e[j]
                for i in range(width):
                    ki = k[b, site + kept, h, i]
                    for j in range(values):
                        here[i, j] = a * earlier[i, j] + ki * u[j]
                kept += 1
            flow = zero  # gradient of the decay from the last kept site to the next one, or to the chunk's end
            if gate[b, stop - 1] == 0:
                for i in range(width):
                    for j in range(values):
                        flow += x[i, j] * s[kept, i, j]
                        x[i, j] *= pending
            after = alpha.dtype.type(1)  # decay between this site and the next kept one
            for t in range(stop - 1, start - 1, -1):
                before = dalpha[b, t, h]
                if t == 0:
                    r[:] = r0[b, h]
                elif gate[b, t - 1] == 0:
                    for j in range(values):
                        r[j] = y[b, t - 1, h, j] - own[b, t - 1, h] * v[b, t - 1, h, j]
                else:
                    r[:] = y[b, t - 1, h]
                vy = zero
                faded = zero
                if gate[b, t] == 0:
                    for j in range(values):
                        dy = grad_y[b, t, h, j]
                        dv[b, t, h, j] = own[b, t, h] * dy
                        vy += dy * v[b, t, h, j]
                        faded += (dr[j] + dy) * r[j]
                        dr[j] = fade[b, t, h] * (dr[j] + dy)
                    dalpha[b, t, h] = flow * before * after
                    after *= alpha[b, t, h]
                    dbeta[b, t, h] = 0
                    dfade[b, t, h] = faded
                    d_own[b, t, h] = vy
                    dgate[b, t, h] = 0
                    continue
                a = alpha[b, t, h] * before
                after = alpha[b, t, h]
                flow = zero
                qk = zero
                read = zero
                self_read = zero
                eu = zero
                earlier, here = s[kept - 1], s[kept]
                kept -= 1
                e[:] = error[b, site + kept, h] if delta else v[b, t, h]
                for j in range(values):
                    dy = grad_y[b, t, h, j]
                    dread[j] = dr[j] + dy
                    u[j] = beta[b, t, h] * e[j]
                    du[j] = 0
                    vy += dy * v[b, t, h, j]
                    faded += dread[j] * r[j]
                    self_read += dread[j] * u[j]
                    dr[j] = 0
                for i in range(width):
                    ki, qi = k[b, site + kept, h, i], q[b, site + kept, h, i]
                    dqi = zero
                    dki = zero
                    for j in range(values):
                        dqi += dread[j] * here[i, j]
                        grad = x[i, j] + qi * dread[j]
                        dki += grad * u[j]
                        du[j] += ki * grad
                        x[i, j] = grad
                    qk += qi * ki
                    read += qi * dqi
                    dq[b, site + kept, h, i] = dqi
                    dk[b, site + kept, h, i] = dki
                for j in range(values):
                    eu += du[j] * e[j]
                    dv[b, t, h, j] = beta[b, t, h] * du[j]
                for i in range(width):
                    # the error falls by what the state returns for the key
                    ki = k[b, site + kept, h, i] if delta else zero
                    known = zero
                    for j in range(values):
                        known += dv[b, t, h, j] * earlier[i, j]
                        grad = x[i, j] - ki * dv[b, t, h, j]
                        flow += grad * earlier[i, j]
                        x[i, j] = a * grad
                    if delta:
                        dk[b, site + kept, h, i] -= a * known
                dalpha[b, t, h] = flow * before
                dbeta[b, t, h] = eu
                dfade[b, t, h] = 0
                d_own[b, t, h] = 0
                # what the site reads and what later sites read of it, minus its output if it were left out
                written = beta[b, t, h] * eu - qk * self_read
                dgate[b, t, h] = read + written - fade[b, t, h] * faded - own[b, t, h] * vy
            stop = start
        ds0[b, h] = x
        dr0[b, h] = dr


def sparse_scan_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    fade: Tensor,
    own: Tensor,
    gate: Tensor,
    s0: Tensor,
    r0: Tensor,
    delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    chunks = -(-q.shape[1] // SCAN_CHUNK)
    out = (v.new_empty(v.shape), s0.new_empty(s0.shape), r0.new_empty(r0.shape))
    states = s0.new_empty(*s0.shape[:2], chunks, *s0.shape[2:])
    error = v.new_empty(*q.shape[:3], v.shape[3] if delta else 0)
    _forward(*arrays(q, k, v, alpha, beta, fade, own, gate, s0, r0), delta, *arrays(*out, states, error))
    return *out, states, error


def sparse_scan_backward(
    grad_y: Tensor, grad_s: Tensor, grad_r: Tensor, *saved: Tensor, delta: bool
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v, alpha, beta, fade, own, gate, s0 and r0.

    saved: q, k, v, alpha, beta, fade, own, gate, r0, y, states, error.
    """
    q, k, v, alpha, beta, fade, own = saved[:7]
    found = [x.new_empty(x.shape) for x in (q, k, v, alpha, beta, fade, own, own, grad_s, grad_r)]
    _backward(*arrays(grad_y, grad_s, grad_r, *saved), delta, *arrays(*found))
    *edges, dgate, ds0, dr0 = found
    return *edges, dgate.sum(-1), ds0, dr0
