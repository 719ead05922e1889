"""The scan with the delta rule (Schlag et al. 2021, arXiv:2102.11174; Yang et al. 2024, arXiv:2412.06464).

A site writes only the part of its value that the state does not return for its key yet, so a second write at the same
key replaces the first one instead of adding to it.

Dimensions: B batch, N sites, H chains, K key width, V value width, M chunks of SCAN_CHUNK sites.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from resnet_bk.ops.flops import DELTA, DELTA_BACKWARD
from resnet_bk.ops.kernels import backend_for, differentiable_vjp, empty_states, given


def delta_scan(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the scan of :func:`resnet_bk.ops.kernels.scan` with the error e in place of v, along dimension 1.

    ``e_t = v_t - alpha_t k_t S_{t-1}``
    ``S_t = alpha_t S_{t-1} + beta_t k_t e_t^T``
    ``y_t = q_t S_t``

    It is stable where ``|alpha_t| <= 1`` and ``0 <= beta_t |k_t|^2 <= 2``. Arguments are those of
    :func:`resnet_bk.ops.kernels.scan`.

    Returns:
        y (B, N, H, V), the last state (B, H, K, V), and e (B, N, H, V), whose gradient is computed step by step.
    """
    if q.shape[1] == 1:
        return _by_steps(q, k, v, alpha, beta, s0)
    y, last, _, error = delta_scan_op(q, k, v, alpha, beta, s0)
    return y, last, error


def _by_steps(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence under autograd, for single steps and for second derivatives."""
    s, out, errors = s0, [], []
    with torch.autocast(q.device.type, enabled=False):  # as in the operator
        for t in range(q.shape[1]):
            s = alpha[:, t, :, None, None] * s
            error = v[:, t] - (k[:, t].unsqueeze(-2) @ s).squeeze(-2)
            s = s + k[:, t].unsqueeze(-1) * (beta[:, t].unsqueeze(-1) * error).unsqueeze(-2)
            out.append((q[:, t].unsqueeze(-2) @ s).squeeze(-2))
            errors.append(error)
    return torch.stack(out, dim=1), s, torch.stack(errors, dim=1)


@torch.library.custom_op("resnet_bk::delta_scan", mutates_args=())
def delta_scan_op(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run :func:`delta_scan` and return also the states that enter each chunk, flattened: y, last, states, e."""
    with torch.autocast(q.device.type, enabled=False):  # autocast would round the inputs of the products
        y, last, states, error = backend_for(q).delta_scan_forward(q, k, v, alpha, beta, s0)
    return y, last, states.flatten(), error  # as in `scan_op`


@torch.library.custom_op("resnet_bk::delta_scan_backward", mutates_args=())
def delta_scan_backward(
    grad_y: Tensor, grad_last: Tensor, q: Tensor, k: Tensor, alpha: Tensor, beta: Tensor, states: Tensor, error: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        states = states.view(*grad_last.shape[:2], -1, *grad_last.shape[2:])
        return backend_for(q).delta_scan_backward(grad_y, grad_last, q, k, alpha, beta, states, error)


@delta_scan_op.register_fake
def _(q, k, v, alpha, beta, s0):
    return v.new_empty(v.shape), s0.new_empty(s0.shape), empty_states(q, s0), v.new_empty(v.shape)


@delta_scan_backward.register_fake
def _(grad_y, grad_last, q, k, alpha, beta, states, error):
    return tuple(x.new_empty(x.shape) for x in (q, k, error, alpha, beta, grad_last))


def _setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the states and e: 6% of forward and backward
    ctx.save_for_backward(*inputs, *output[2:])


def _autograd(ctx, grad_y: Tensor | None, grad_last: Tensor | None, grad_states: None, grad_error: Tensor | None):
    *inputs, states, error = ctx.saved_tensors
    grad_y, grad_last = given(grad_y, inputs[2]), given(grad_last, inputs[5])
    if torch.is_grad_enabled() or grad_error is not None:  # create_graph=True: the gradient must be differentiable
        return differentiable_vjp(_by_steps, tuple(inputs), (grad_y, grad_last, given(grad_error, error)))
    q, k, _, alpha, beta, _ = inputs
    return delta_scan_backward(grad_y, grad_last, q, k, alpha, beta, states, error)


delta_scan_op.register_autograd(_autograd, setup_context=_setup)


@register_flop_formula(torch.ops.resnet_bk.delta_scan)
def _flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return DELTA * torch.Size(k_shape).numel() * v_shape[-1]


@register_flop_formula(torch.ops.resnet_bk.delta_scan_backward)
def _backward_flops(grad_y_shape, grad_last_shape, q_shape, *args, out_shape=None, **kwargs) -> int:
    return DELTA_BACKWARD * torch.Size(q_shape).numel() * grad_y_shape[-1]
