"""The scan of a chain with sites left out: a registered operator where the backend has a kernel, else plain torch.

A site with a gate of 0 is left out. It neither writes to the state S nor reads from it, but S decays there as at any
other site. The output of the site is that of the last kept site, faded, plus a part of the site's own value.

Dimensions: B batch, N sites, M packed length, H chains, K key width, V value width.
"""

import functools

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from resnet_bk.ops.chain import can_read_values
from resnet_bk.ops.chunked import SCAN_CHUNK, chunks
from resnet_bk.ops.delta import delta_scan
from resnet_bk.ops.flops import DELTA, DELTA_BACKWARD, FILL, FILL_BACKWARD, SCAN, SCAN_BACKWARD
from resnet_bk.ops.kernels import (
    backend_for,
    differentiable_vjp,
    empty_states,
    given,
    load_backend,
    preferred_backend,
    scan,
)
from resnet_bk.ops.packing import Packing


def sparse_scan(
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
    *,
    delta: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the scan with gates m (`gate`).

    q and k hold only the kept sites, packed in order; below, q_t and k_t are the entries of site t:

    ``S_t = alpha_t S_{t-1} + m_t beta_t k_t v_t^T``
    ``r_t = (1 - m_t) fade_t r_{t-1} + m_t (alpha_t q_t S_{t-1} + beta_t <q_t, k_t> v_t)``
    ``y_t = r_t + (1 - m_t) own_t v_t``

    With m = 1 everywhere this is :func:`resnet_bk.ops.kernels.scan`. Gradients are those of these formulas, except that
    a gate of 0 gets none: its gradient would need what the site would have read, and that is not computed.

    All inputs must be real and of one dtype. Neither this nor the values of the gates are checked here.

    Args:
        q: (B, M, H, K), M >= 1; in each row, what follows the last kept site is ignored.
        k: (B, M, H, K), as q.
        v: (B, N, H, V).
        alpha: (B, N, H), decay of S.
        beta: (B, N, H), weight of what is written.
        fade: (B, N, H), decay of r at sites left out.
        own: (B, N, H), weight of v at sites left out.
        gate: (B, N), exactly 1 at kept sites, else 0.
        s0: (B, H, K, V), S before the first site.
        r0: (B, H, V), r before the first site.
        delta: kept sites write ``v_t - alpha_t k_t S_{t-1}`` in place of v_t, and read it of themselves.

    Returns:
        y (B, N, H, V), and S (B, H, K, V) and r (B, H, V) after the last site.

    Raises:
        ValueError: for N > 1, q and k differ in shape or, on a CPU outside torch.compile, have no site or fewer sites
            than the gates keep.
    """
    inputs = (q, k, v, alpha, beta, fade, own, gate, s0, r0)
    if v.shape[1] == 1:
        return _by_steps(*inputs, delta=delta)
    if q.shape != k.shape:
        raise ValueError(f"k: expected the shape of q, {tuple(q.shape)}, got {tuple(k.shape)}")
    # fewer sites than the gates keep, and a kernel would read beyond them
    if can_read_values(gate) and q.shape[1] < (most := max(1, int((gate != 0).sum(1).max()))):
        raise ValueError(f"q and k: expected at least {most} sites (1, or those of the fullest row), got {q.shape[1]}")
    if not _has_sparse_kernel(v.device.type):
        return _on_packed_sites(*inputs, delta=delta)
    return sparse_scan_op(*inputs, delta)[:3]


@torch.compiler.assume_constant_result
def _has_sparse_kernel(device_type: str) -> bool:
    """Return True if the backend for a device type has a kernel for sparse chains."""
    return hasattr(load_backend(preferred_backend(device_type)), "sparse_scan_forward")


def _by_steps(*inputs: Tensor, delta: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence under autograd, for single steps and for second derivatives."""
    q, k, v, alpha, beta, fade, own, gate, s0, r0 = inputs
    keep = gate > 0
    m = torch.where(keep, gate, 0)[..., None, None]  # gates of 0 get no gradient
    row, index = torch.arange(len(q), device=q.device), (keep.cumsum(1) - 1).clamp(min=0)
    s, r, out = s0, r0, []
    with torch.autocast(q.device.type, enabled=False):  # as in the operator
        for t in range(v.shape[1]):
            q_t, k_t = (torch.where(keep[:, t, None, None], x[row, index[:, t]], 0) for x in (q, k))
            s = alpha[:, t, :, None, None] * s
            error = v[:, t] - (k_t.unsqueeze(-2) @ s).squeeze(-2) if delta else v[:, t]
            new = beta[:, t].unsqueeze(-1) * error
            read = (q_t.unsqueeze(-2) @ s).squeeze(-2) + (q_t * k_t).sum(-1, keepdim=True) * new
            s = s + k_t.unsqueeze(-1) * (m[:, t] * new).unsqueeze(-2)
            r = (1 - m[:, t]) * fade[:, t].unsqueeze(-1) * r + m[:, t] * read
            out.append(r + (1 - m[:, t]) * own[:, t].unsqueeze(-1) * v[:, t])
    return torch.stack(out, dim=1), s, r


def _on_packed_sites(*inputs: Tensor, delta: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Run the dense scan on the kept sites, packed: for backends without a sparse kernel."""
    q, k, v, alpha, beta, fade, own, gate, s0, r0 = inputs
    keep = gate > 0
    packing = Packing(keep, bound=q.shape[1])
    site = packing.mask.unsqueeze(-1)
    q, k, v_ = (torch.where(site.unsqueeze(-1), x[:, : site.shape[1]], 0) for x in (q, k, packing.pack(v)))
    # decay[:, i] is the product of alpha after kept site i - 1, up to kept site i (up to the end after the last one).
    # `run`: the number of kept sites before each site, which is the i that its alpha belongs to.
    run = (keep.cumsum(1) - keep.long()).unsqueeze(-1).expand_as(alpha)
    ones = alpha.new_ones(len(alpha), site.shape[1] + 1, alpha.shape[2])
    decay = ones.scatter_reduce(1, run, alpha, "prod")
    trailing = decay[torch.arange(len(alpha), device=alpha.device), packing.counts]
    m = packing.pack(gate).unsqueeze(-1)
    beta_ = torch.where(site, packing.pack(beta), 0)
    decay = torch.where(site, decay[:, :-1], 1)
    read, s, *error = (delta_scan if delta else scan)(q, k, v_, decay, m * beta_, s0)
    read = _ReadOfItself.apply(read, m, beta_ * (q * k).sum(-1), error[0] if delta else v_)
    rest = (1 - torch.where(keep, gate, 0)).unsqueeze(-1)  # gates of 0 get no gradient
    r = _carry((rest * fade).unsqueeze(-1), packing.merge(m.unsqueeze(-1) * read), r0)
    return r + (rest * own).unsqueeze(-1) * v, s * trailing[..., None, None], r[:, -1]


class _ReadOfItself(torch.autograd.Function):
    """Add what is missing in the scan of packed sites, ``(1 - m) c e`` with ``c = beta <q, k>``, to its outputs.

    With gates in the weights of the scan, a site reads ``m c e`` of itself in place of ``c e``. At m = 1 the difference
    is 0, but m has a gradient. The gradients of c and e are 0 and needed for second derivatives only.

    Shapes: outputs and e (B, M, H, V), m (B, M, 1), c (B, M, H).
    """

    @staticmethod
    def forward(ctx, read, m, c, e):
        ctx.save_for_backward(m, c, e)
        return read.view_as(read)

    @staticmethod
    def backward(ctx, grad):
        m, c, e = ctx.saved_tensors
        written = (grad * e).sum(-1)
        dm = -(c * written).sum(-1, keepdim=True)
        if not torch.is_grad_enabled():
            return grad, dm, None, None
        return grad, dm, (1 - m) * written, ((1 - m) * c).unsqueeze(-1) * grad


def _carry(fade: Tensor, new: Tensor, r0: Tensor) -> Tensor:
    """Compute ``r_t = fade_t r_{t-1} + new_t`` along dimension 1, (B, N, H, V).

    Only products and sums are used: fade stands for (1 - m) fade, which is exactly 0 at kept sites, and the dense scan
    would take its logarithm. Chunks are counted from the first site, so the rounding of a site does not depend on N.

    Args:
        fade: (B, N, H, 1).
        new: (B, N, H, V).
        r0: (B, H, V), r before the first site.
    """
    fades, news = (chunks(x, SCAN_CHUNK).unbind(2) for x in (fade, new))  # SCAN_CHUNK tensors (B, chunks, H, ...)
    parts, products = [news[0]], [fades[0]]
    for here, added in zip(fades[1:], news[1:], strict=True):
        parts.append(here * parts[-1] + added)
        products.append(here * products[-1])
    entering = [r0]
    for part, product in zip(parts[-1].unbind(1)[:-1], products[-1].unbind(1)[:-1], strict=True):
        entering.append(product * entering[-1] + part)
    before = torch.stack(entering, 1).unsqueeze(2)
    return (torch.stack(products, 2) * before + torch.stack(parts, 2)).flatten(1, 2)[:, : new.shape[1]]


@torch.library.custom_op("resnet_bk::sparse_scan", mutates_args=())
def sparse_scan_op(
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
    """Run :func:`sparse_scan` and return also the states that enter each chunk, and the errors.

    Returns:
        y, S, r; the S before each SCAN_CHUNK kept sites, (B, H, chunks, K, V) flattened as in `scan_op`, of which the
        first is s0; the errors of kept sites (B, M, H, V), with V = 0 without the delta rule.
    """
    y, s, r, states, error = backend_for(q).sparse_scan_forward(q, k, v, alpha, beta, fade, own, gate, s0, r0, delta)
    return y, s, r, states.flatten(), error


@torch.library.custom_op("resnet_bk::sparse_scan_backward", mutates_args=())
def sparse_scan_backward(
    grad_y: Tensor,
    grad_s: Tensor,
    grad_r: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    fade: Tensor,
    own: Tensor,
    gate: Tensor,
    r0: Tensor,
    y: Tensor,
    states: Tensor,
    error: Tensor,
    delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    states = states.view(*grad_s.shape[:2], -1, *grad_s.shape[2:])
    saved = (q, k, v, alpha, beta, fade, own, gate, r0, y, states, error)
    return backend_for(q).sparse_scan_backward(grad_y, grad_s, grad_r, *saved, delta=delta)


@sparse_scan_op.register_fake
def _(q, k, v, alpha, beta, fade, own, gate, s0, r0, delta):
    error = v.new_empty(*q.shape[:3], v.shape[3] if delta else 0)
    return v.new_empty(v.shape), s0.new_empty(s0.shape), r0.new_empty(r0.shape), empty_states(q, s0), error


@sparse_scan_backward.register_fake
def _(grad_y, grad_s, grad_r, q, k, v, alpha, beta, fade, own, gate, *others):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, alpha, beta, fade, own, gate, grad_s, grad_r))


def _setup(ctx, inputs, output) -> None:
    *tensors, ctx.delta = inputs
    ctx.set_materialize_grads(False)  # no zeros for the states and errors, which nothing differentiates
    ctx.save_for_backward(*tensors, *output)


def _autograd(ctx, *grads: Tensor | None):
    *inputs, y, s, r, states, error = ctx.saved_tensors  # inputs[8] is s0, also the first of `states`; inputs[9] is r0
    grad_y, grad_s, grad_r = (given(grad, x) for grad, x in zip(grads[:3], (y, s, r), strict=True))
    if torch.is_grad_enabled():
        run = functools.partial(_by_steps, delta=ctx.delta)
        return *differentiable_vjp(run, tuple(inputs), (grad_y, grad_s, grad_r)), None
    saved = (*inputs[:8], inputs[9], y, states, error)
    return *sparse_scan_backward(grad_y, grad_s, grad_r, *saved, ctx.delta), None


sparse_scan_op.register_autograd(_autograd, setup_context=_setup)


# FLOPs depend on the values of the gates, hence get_raw. A kept site costs as much as a site of the dense scan.


@register_flop_formula(torch.ops.resnet_bk.sparse_scan, get_raw=True)
def _flops(q, k, v, alpha, beta, fade, own, gate, s0, r0, delta, *args, out_val=None, **kwargs) -> int:
    return _count(k, v, gate, DELTA if delta else SCAN, FILL)


@register_flop_formula(torch.ops.resnet_bk.sparse_scan_backward, get_raw=True)
def _backward_flops(
    grad_y, grad_s, grad_r, q, k, v, alpha, beta, fade, own, gate, r0, y, states, error, delta, *args, **kwargs
) -> int:
    return _count(k, v, gate, DELTA_BACKWARD if delta else SCAN_BACKWARD, FILL_BACKWARD)


def _count(k: Tensor, v: Tensor, gate: Tensor, each: int, fill: int) -> int:
    """Return the FLOPs of all chains: `each` for an entry of the state at a kept site, `fill` for a value elsewhere."""
    heads, keys, values, kept = k.shape[-2], k.shape[-1], v.shape[-1], int((gate > 0).sum())
    return heads * (each * keys * values * kept + fill * values * (gate.numel() - kept))
