"""Kernels in pure torch for any device, forward and backward, all of O(N) work.

The Green's function takes about 3 sqrt(N) vectorised steps, the scan N / SCAN_CHUNK. README.md derives both. Autograd
does not differentiate any function in this file.

Dimensions: B batch, N sites, H chains, K key width, V value width, C sites in a chunk, M chunks.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.ops.chunked_ngrams import find_ngrams, ngram_sum_backward, ngram_sum_forward, recent_ngrams  # noqa: F401

SCAN_CHUNK = 32
TINY_DECAY = 1e-30  # a decay nearer to 0 is replaced by it, so that it has a logarithm


def chunks(x_BN: Tensor, chunk: int, value: float = 0.0) -> Tensor:
    """(B, N, ...) -> (B, M, C, ...), N padded with `value` to whole chunks."""
    padding = -x_BN.shape[1] % chunk
    if padding:
        x_BN = F.pad(x_BN, (0, 0) * (x_BN.dim() - 2) + (0, padding), value=value)
    return x_BN.unflatten(1, (-1, chunk))


def _fold(x_BN: Tensor, chunk: int, value: float = 0.0) -> Tensor:
    """(B, N, ...) -> (C, B, M, ...)."""
    return chunks(x_BN, chunk, value).movedim(2, 0).contiguous()


def _unfold(x_CBM: Tensor, length: int) -> Tensor:
    """(C, B, M, ...) -> (B, N, ...)."""
    return x_CBM.movedim(0, 2).flatten(1, 2)[:, :length].contiguous()


def green_forward(d: Tensor, w: Tensor, g0: Tensor, mask: Tensor | None) -> Tensor:
    """Compute ``g_t = 1 / (d_t - w_t g_{t-1})`` chunk by chunk (README, section 2). Shapes as in ``kernels.green``."""
    length = d.shape[1]
    chunk = max(1, math.isqrt(length))
    d_, w_ = _fold(d, chunk, 1.0), _fold(w, chunk)
    m_ = None if mask is None else _fold(mask.unsqueeze(-1).expand(d.shape), chunk)
    # A chunk maps the entering g, x, to  r + x t / (1 - x l).  Compose its sites one by one, all chunks in parallel.
    r = torch.zeros_like(d_[0])
    t, left = torch.ones_like(r), torch.zeros_like(r)
    for i in range(chunk):
        g = torch.reciprocal(d_[i] - w_[i] * r)
        wg = w_[i] * g
        if m_ is None:
            r, left, t = g, left + t * wg, t * wg * g
        else:
            site = m_[i]
            r, left, t = (
                torch.where(site, g, r),
                torch.where(site, left + t * wg, left),
                torch.where(site, t * wg * g, t),
            )
    entering, g = [], g0
    for m in range(d_.shape[2]):
        entering.append(g)
        g = r[:, m] + g * t[:, m] / (1 - g * left[:, m])
    g = torch.stack(entering, dim=1)
    out = torch.empty_like(d_)
    for i in range(chunk):
        here = torch.reciprocal(d_[i] - w_[i] * g)
        g = here if m_ is None else torch.where(m_[i], here, g)
        out[i] = g
    return _unfold(out, length)


def adjoint_recurrence(x: Tensor, u: Tensor) -> Tensor:
    """Compute ``y_t = x_t + u_{t+1} y_{t+1}`` in chunks, with nothing after the last site. x, u: (B, N, H)."""
    length = x.shape[1]
    chunk = max(1, math.isqrt(length))
    u_next = torch.cat([u[:, 1:], torch.zeros_like(u[:, :1])], dim=1)
    x_, u_ = _fold(x, chunk), _fold(u_next, chunk)
    y, product = torch.empty_like(x_), torch.empty_like(u_)
    y[-1], product[-1] = x_[-1], u_[-1]
    for i in range(chunk - 2, -1, -1):
        torch.addcmul(x_[i], u_[i], y[i + 1], out=y[i])
        torch.mul(u_[i], product[i + 1], out=product[i])
    later = torch.zeros_like(x[:, 0])
    entering = []
    for m in range(x_.shape[2] - 1, -1, -1):
        entering.append(later)
        later = y[0, :, m] + product[0, :, m] * later
    entering.reverse()
    y.addcmul_(product, torch.stack(entering, dim=1).unsqueeze(0))
    return _unfold(y, length)


def green_backward(
    grad: Tensor, g: Tensor, w: Tensor, g0: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of d, w and g0.

    ``dg_t/dd_t = -g_t^2``, ``dg_t/dw_t = g_{t-1} g_t^2``, ``dg_t/dg_{t-1} = w_t g_t^2``.
    """
    before = torch.cat([g0.unsqueeze(1), g[:, :-1]], dim=1)
    squared = (g * g).conj().resolve_conj()
    u = w * squared
    if mask is not None:
        is_site = mask.unsqueeze(-1)
        u = torch.where(is_site, u, 1.0)
        squared = torch.where(is_site, squared, 0.0)
    adjoint = adjoint_recurrence(grad, u)
    grad_d = -squared * adjoint
    grad_w = -(before.conj() * grad_d).real if g.is_complex() else -before * grad_d
    return grad_d, grad_w, u[:, 0] * adjoint[:, 0]


class _ScanChunks:
    """The inputs of the gated scan folded to (B, H, M, C, ...), and their decays, for forward and backward.

    Attributes:
        decay: (B, H, M, C, C), ``decay_ts = prod_{s<j<=t} alpha_j`` within a chunk, 0 for s > t.
        since: (B, H, M, C), ``since_t = prod_{j<=t} alpha_j`` from the start of the chunk.
        until: (B, H, M, C), ``until_s = prod_{j>s} alpha_j`` to the end of the chunk.
        past: (C, C) bool, True for s <= t.
        u: (B, H, M, C, V), ``beta v``.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor):
        chunk = min(SCAN_CHUNK, max(1, q.shape[1]))

        def fold(x: Tensor, value: float = 0.0) -> Tensor:
            return chunks(x, chunk, value).movedim(3, 1)

        self.fold = fold
        self.q, self.k, self.v = (fold(x).contiguous() for x in (q, k, v))
        self.alpha = fold(alpha, 1.0)
        self.alpha = torch.where(self.alpha.abs() < TINY_DECAY, TINY_DECAY, self.alpha)
        self.beta = fold(beta)
        cumulated = self.alpha.abs().log().cumsum(-1)
        sign = self.alpha.sign().cumprod(-1)
        self.since = sign * cumulated.exp()
        self.until = sign[..., -1:] * sign * (cumulated[..., -1:] - cumulated).exp()
        exponent = cumulated.unsqueeze(-1) - cumulated.unsqueeze(-2)
        self.past = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
        self.decay = exponent.masked_fill_(~self.past, -torch.inf).exp_()
        self.decay.mul_(sign.unsqueeze(-1)).mul_(sign.unsqueeze(-2))
        self.u = self.beta.unsqueeze(-1) * self.v

    def entering_states(self, s0: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state at the start of each chunk, (B, H, M, K, V), and after the last, (B, H, K, V)."""
        local = (self.k * self.until.unsqueeze(-1)).mT @ self.u
        whole = self.since[..., -1, None, None]
        states, s = torch.empty_like(local), s0
        for m in range(local.shape[2]):
            states[:, :, m] = s
            s = torch.addcmul(local[:, :, m], whole[:, :, m], s)
        return states, s

    def overlaps(self) -> Tensor:
        """Return (B, H, M, C, C): 1 on the diagonal; for s < t, what a write of 1 at s returns for the key of t."""
        below = (self.k @ self.k.mT).mul_(self.decay).mul_(self.beta.unsqueeze(-2)).tril_(-1)
        below.diagonal(dim1=-2, dim2=-1).fill_(1)
        return below

    def through_states(self, dy: Tensor, states: Tensor, leaving: Tensor) -> tuple[Tensor, Tensor]:
        """Return the parts of dq, from the entering states, and of dk, from the gradients of the leaving ones."""
        from_state = (dy @ states.mT).mul_(self.since.unsqueeze(-1))
        return from_state, (self.u @ leaving.mT).mul_(self.until.unsqueeze(-1))

    def flow(self, straddling: Tensor, entered: Tensor, left: Tensor, states: Tensor, leaving: Tensor) -> Tensor:
        """Return the gradient of alpha, (B, H, M, C).

        alpha_t is a factor of every pair (reader at t or later, writer before t) and of every path across t. All terms
        of the sum contain it, so the division by alpha_t at the end is safe however small alpha_t is.

        Args:
            straddling: (B, H, M, C, C), contribution of each reader t and writer s < t; what is at s = t is ignored.
            entered: (B, H, M, C), contribution of each reader of the entering state.
            left: (B, H, M, C), contribution of each writer to the leaving state.
            states, leaving: (B, H, M, K, V), the entering state, and the gradient of the leaving one.
        """
        readers = self.past[:, 1:]
        flow = F.pad((straddling.cumsum(-1)[..., :-1] * readers).sum(-2), (1, 0))
        flow += _reverse_cumsum(entered)
        flow += F.pad(left[..., :-1].cumsum(-1), (1, 0))
        flow += self.since[..., -1:] * (states * leaving).sum((-1, -2)).unsqueeze(-1)
        return flow / self.alpha


def _flat(x_BHMC: Tensor, length: int) -> Tensor:
    """(B, H, M, C, ...) -> (B, N, H, ...)."""
    return x_BHMC.movedim(1, 3).flatten(1, 2)[:, :length].contiguous()


def scan_forward(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``S_t = alpha_t S_{t-1} + beta_t k_t v_t^T`` and ``y_t = q_t S_t``. Shapes as in ``kernels.scan``.

    Returns:
        y (B, N, H, V), the last S (B, H, K, V), and the S that enters each chunk (B, H, M, K, V).
    """
    c = _ScanChunks(q, k, v, alpha, beta)
    states, last = c.entering_states(s0)
    y = ((c.q @ c.k.mT).mul_(c.decay) @ c.u).add_((c.q @ states).mul_(c.since.unsqueeze(-1)))
    return _flat(y, q.shape[1]), last, states


def scan_backward(
    grad_y: Tensor, grad_last: Tensor, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, alpha, beta and s0 (README, section 3)."""
    c = _ScanChunks(q, k, v, alpha, beta)
    dy = c.fold(grad_y).contiguous()
    # The gradient of the state that leaves each chunk, last chunk first.
    local = (c.q * c.since.unsqueeze(-1)).mT @ dy
    whole = c.since[..., -1, None, None]
    leaving, r = torch.empty_like(local), grad_last
    for m in range(local.shape[2] - 1, -1, -1):
        leaving[:, :, m] = r
        r = torch.addcmul(local[:, :, m], whole[:, :, m], r)
    scores, dscores = (c.q @ c.k.mT).mul_(c.decay), dy @ c.u.mT
    weights = dscores.mul(c.decay)
    from_state, u_leaving = c.through_states(dy, states, leaving)
    dq = (weights @ c.k).add_(from_state)
    dk = (weights.mT @ c.q).add_(u_leaving)
    du = (scores.mT @ dy).add_((c.k @ leaving).mul_(c.until.unsqueeze(-1)))
    flow = c.flow(scores.mul_(dscores), (c.q * from_state).sum(-1), (c.k * u_leaving).sum(-1), states, leaving)
    dv, dbeta = du * c.beta.unsqueeze(-1), (du * c.v).sum(-1)
    dq, dk, dv, flow, dbeta = (_flat(x, q.shape[1]) for x in (dq, dk, dv, flow, dbeta))
    return dq, dk, dv, flow, dbeta, r


def delta_scan_forward(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute ``S_t = alpha_t S_{t-1} + beta_t k_t e_t^T`` with ``e_t = v_t - alpha_t k_t S_{t-1}``, ``y_t = q_t S_t``.

    Shapes as in ``delta.delta_scan``.

    Returns:
        y (B, N, H, V), the last S (B, H, K, V), the S that enters each chunk (B, H, M, K, V), and e (B, N, H, V).
    """
    c = _ScanChunks(q, k, v, alpha, beta)
    matrix, reader = c.overlaps(), c.k * c.since.unsqueeze(-1)
    solved = torch.linalg.solve_triangular(matrix, torch.cat([c.v, reader], dim=-1), upper=False)
    alone, response = solved.split([v.shape[-1], k.shape[-1]], dim=-1)  # e = alone - response S, S the entering state
    writer = (c.k * (c.until * c.beta).unsqueeze(-1)).mT
    whole = c.since[..., -1, None, None]
    states, error, s = s0.new_empty(*writer.shape[:-1], v.shape[-1]), torch.empty_like(c.v), s0
    for m in range(writer.shape[2]):
        states[:, :, m] = s
        error[:, :, m] = alone[:, :, m] - response[:, :, m] @ s
        s = torch.addcmul(writer[:, :, m] @ error[:, :, m], whole[:, :, m], s)
    y = ((c.q @ c.k.mT).mul_(c.decay) @ (error * c.beta.unsqueeze(-1))).add_((c.q @ states).mul_(c.since.unsqueeze(-1)))
    return _flat(y, q.shape[1]), s, states, _flat(error, q.shape[1])


def delta_scan_backward(
    grad_y: Tensor, grad_last: Tensor, q: Tensor, k: Tensor, alpha: Tensor, beta: Tensor, states: Tensor, error: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, alpha, beta and s0 (README, section 4)."""
    c = _ScanChunks(q, k, error, alpha, beta)
    dy, since, until = c.fold(grad_y).contiguous(), c.since.unsqueeze(-1), c.until.unsqueeze(-1)
    scores = (c.q @ c.k.mT).mul_(c.decay)
    written = torch.cat([scores.mT @ dy, c.k * until], dim=-1).mul_(c.beta.unsqueeze(-1))
    solved = torch.linalg.solve_triangular(c.overlaps().mT, written, upper=True)
    alone, response = solved.split([dy.shape[-1], k.shape[-1]], dim=-1)  # de = alone + response R
    local, reader = (c.q * since).mT @ dy, (c.k * since).mT
    whole = c.since[..., -1, None, None]
    leaving, de, r = torch.empty_like(local), torch.empty_like(dy), grad_last
    for m in range(local.shape[2] - 1, -1, -1):
        leaving[:, :, m] = r
        de[:, :, m] = alone[:, :, m] + response[:, :, m] @ r
        r = torch.addcmul(local[:, :, m] - reader[:, :, m] @ de[:, :, m], whole[:, :, m], r)
    # Two readers of one chain: q with the gradient dy, and before each site writes, k with the gradient -de.
    before = c.decay.tril(-1)
    overlaps = (c.k @ c.k.mT).mul_(before)
    dscores, doverlaps = dy @ c.u.mT, (de @ c.u.mT).neg_()
    weights, own_weights = dscores.mul(c.decay), doverlaps.mul(before)
    from_state, u_leaving = c.through_states(dy, states, leaving)
    own_from_state = (de @ states.mT).mul_(since).neg_()
    dq = (weights @ c.k).add_(from_state)
    dk = weights.mT @ c.q + (own_weights + own_weights.mT) @ c.k + u_leaving + own_from_state
    du = scores.mT @ dy - overlaps.mT @ de + (c.k @ leaving) * until
    straddling = scores.mul_(dscores).addcmul_(overlaps, doverlaps)
    entered = (c.q * from_state + c.k * own_from_state).sum(-1)
    flow = c.flow(straddling, entered, (c.k * u_leaving).sum(-1), states, leaving)
    dq, dk, dv, flow, dbeta = (_flat(x, q.shape[1]) for x in (dq, dk, de, flow, (du * c.v).sum(-1)))
    return dq, dk, dv, flow, dbeta, r


def _reverse_cumsum(x: Tensor) -> Tensor:
    return x.flip(-1).cumsum(-1).flip(-1)


def conv_forward(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``y_t = sum_i weight_i x_{t+i}``, (B, N, C). x: (B, N + W - 1, C), weight: (W, C), C channels."""
    length = x.shape[1] - weight.shape[0] + 1
    y = x[:, :length] * weight[0]
    for i in range(1, weight.shape[0]):
        y.addcmul_(x[:, i : i + length], weight[i])
    return y


def conv_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight."""
    length = grad.shape[1]
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for i in range(weight.shape[0]):
        grad_x[:, i : i + length].addcmul_(grad, weight[i])
        grad_weight[i] = (x[:, i : i + length] * grad).sum((0, 1))
    return grad_x, grad_weight
