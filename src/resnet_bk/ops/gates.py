"""The parts of a block around its matrix products: three functions of few operations and much memory traffic.

In torch each operation reads and writes whole tensors, which takes as long as the products. On CPUs with numba each
function is one kernel forward and one backward. Elsewhere it is a composition of torch's operations, which also defines
it; compilers fuse it.

Dimensions: B batch, N positions, H heads, K head width, D = H K, W positions of the convolution, F hidden width.
"""

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from resnet_bk.ops.conv import short_conv
from resnet_bk.ops.kernels import differentiable_vjp, load_backend, preferred_backend


def _lanes(x: Tensor) -> int:
    """Return how many numbers numba's kernels take at a time from tensors like x, 0 if they take none."""
    usual = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()
    transformed = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    if not usual or transformed or preferred_backend("cpu") != "numba":
        return 0
    return load_backend("numba").LANE_BYTES // x.dtype.itemsize


# ------------------------------------------------------------------------------------------------- inputs of a mixer


def mixer_inputs(
    p: Tensor, past: Tensor, weight: Tensor, heads: int, delta: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what a causal mixer computes with: queries, keys, values, gates and strengths of writing.

    The first 3 D columns go through a short convolution and SiLU, and are q, k and v. q is divided by sqrt(K). With the
    delta rule k becomes ``k / sqrt(1 + |k|^2)``: at a length of 1 and a strength of 1 the chain returns the new value
    for the key, and shorter keys write less. The gate is the SiLU of the next D columns, the strength the sigmoid of
    the last H.

    Args:
        p: (B, N, 4 D), or (B, N, 4 D + H) with the delta rule.
        past: (B, W - 1, 3 D) like p, the first columns of the positions before.
        weight: (W, 3 D), of the convolution.
        heads: H.
        delta: with the delta rule.

    Returns:
        q, k, v (B, N, H, K), float32 or float64, the gates (B, N, D) like p, and the strengths (B, N, H) like q, which
        are (B, N, 0) without the delta rule.
    """
    lanes, width = _lanes(p), weight.shape[1] // 3 // heads
    kernel = p.shape[1] > 1 and lanes and width % lanes == 0 and weight.dtype == past.dtype == p.dtype
    return (mixer_inputs_op if kernel else _mixer_inputs)(p, past, weight, heads, delta)


def _mixer_inputs(
    p: Tensor, past: Tensor, weight: Tensor, heads: int, delta: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    exact, d = torch.promote_types(p.dtype, torch.float32), weight.shape[1] // 3
    u, gate, strength = p.tensor_split([3 * d, 4 * d], dim=-1)
    u = F.silu(short_conv(torch.cat([past, u], dim=1).to(exact), weight.to(exact)))
    q, k, v = u.unflatten(-1, (3, heads, d // heads)).unbind(-3)
    return q / math.sqrt(d // heads), soften(k) if delta else k, v, F.silu(gate), strength.to(exact).sigmoid()


def soften(k: Tensor) -> Tensor:
    """Return ``k / sqrt(1 + |k|^2)`` of keys (..., K)."""
    return k / (1 + k.square().sum(-1, keepdim=True)).sqrt()


@torch.library.custom_op("resnet_bk::mixer_inputs", mutates_args=())
def mixer_inputs_op(
    p: Tensor, past: Tensor, weight: Tensor, heads: int, delta: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return load_backend("numba").mixer_inputs_forward(p, past, weight, heads, delta)


@torch.library.custom_op("resnet_bk::mixer_inputs_backward", mutates_args=())
def mixer_inputs_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, dgate: Tensor, dwrite: Tensor, p: Tensor, past: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return load_backend("numba").mixer_inputs_backward(dq, dk, dv, dgate, dwrite, p, past, weight)


@mixer_inputs_op.register_fake
def _(p, past, weight, heads, delta):
    batch, length, d = p.shape[0], p.shape[1], weight.shape[1] // 3
    of_heads = [p.new_empty(batch, length, heads, d // heads) for _ in range(3)]
    return *of_heads, p.new_empty(batch, length, d), p.new_empty(batch, length, heads if delta else 0)


@mixer_inputs_backward.register_fake
def _(dq, dk, dv, dgate, dwrite, p, past, weight):
    return tuple(x.new_empty(x.shape) for x in (p, past, weight))


def _inputs_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.heads, ctx.delta = inputs[3:]


def _inputs_autograd(ctx, *grads: Tensor):
    if torch.is_grad_enabled():  # create_graph=True: the gradient must be differentiable
        inputs = differentiable_vjp(
            lambda p, past, weight: _mixer_inputs(p, past, weight, ctx.heads, ctx.delta), ctx.saved_tensors, grads
        )
    else:
        inputs = mixer_inputs_backward(*grads, *ctx.saved_tensors)
    return *inputs, None, None


mixer_inputs_op.register_autograd(_inputs_autograd, setup_context=_inputs_setup)


@register_flop_formula(torch.ops.resnet_bk.mixer_inputs)
def _inputs_flops(p_shape, past_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * p_shape[0] * p_shape[1] * torch.Size(weight_shape).numel()


@register_flop_formula(torch.ops.resnet_bk.mixer_inputs_backward)
def _inputs_backward_flops(*shapes, out_shape=None, **kwargs) -> int:
    p_shape, _, weight_shape = shapes[5:]
    return 4 * p_shape[0] * p_shape[1] * torch.Size(weight_shape).numel()


# ------------------------------------------------------------------------------------------------- output of a mixer


def gated_norm(y: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """Return the LayerNorm of each head without bias, times the gate; (B, N, D).

    Args:
        y: (B, N, H, K).
        weight: (K,), the scale of the norm.
        gate: (B, N, D).
        eps: of the norm.
    """
    lanes = _lanes(y)
    kernel = y.shape[1] > 1 and lanes and len(weight) % lanes == 0 and weight.dtype == gate.dtype == y.dtype
    return (gated_norm_op if kernel else _gated_norm)(y, weight, gate, eps)


def _gated_norm(y: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    return F.layer_norm(y.to(gate.dtype), weight.shape, weight, eps=eps).flatten(-2) * gate


@torch.library.custom_op("resnet_bk::gated_norm", mutates_args=())
def gated_norm_op(y: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    return load_backend("numba").gated_norm_forward(y, weight, gate, eps)


@torch.library.custom_op("resnet_bk::gated_norm_backward", mutates_args=())
def gated_norm_backward(
    grad: Tensor, y: Tensor, weight: Tensor, gate: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return load_backend("numba").gated_norm_backward(grad, y, weight, gate, eps)


@gated_norm_op.register_fake
def _(y, weight, gate, eps):
    return gate.new_empty(gate.shape)


@gated_norm_backward.register_fake
def _(grad, y, weight, gate, eps):
    return tuple(x.new_empty(x.shape) for x in (y, weight, gate))


def _norm_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.eps = inputs[3]


def _norm_autograd(ctx, grad: Tensor):
    if torch.is_grad_enabled():
        inputs = differentiable_vjp(
            lambda y, weight, gate: (_gated_norm(y, weight, gate, ctx.eps),), ctx.saved_tensors, (grad,)
        )
        return *inputs, None
    return *gated_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


gated_norm_op.register_autograd(_norm_autograd, setup_context=_norm_setup)


# --------------------------------------------------------------------------------------------- inside a feed-forward


def swiglu(x: Tensor) -> Tensor:
    """Return the SiLU of the first half of the columns times the second half, (..., 2 F) -> (..., F)."""
    lanes = _lanes(x)
    kernel = lanes and x.shape[-1] >= 2 * lanes and x.numel() > x.shape[-1]
    return (swiglu_op if kernel else _swiglu)(x)


def _swiglu(x: Tensor) -> Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


@torch.library.custom_op("resnet_bk::swiglu", mutates_args=())
def swiglu_op(x: Tensor) -> Tensor:
    return load_backend("numba").swiglu_forward(x)


@torch.library.custom_op("resnet_bk::swiglu_backward", mutates_args=())
def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return load_backend("numba").swiglu_backward(grad, x)


@swiglu_op.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@swiglu_backward.register_fake
def _(grad, x):
    return x.new_empty(x.shape)


def _swiglu_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_autograd(ctx, grad: Tensor):
    (x,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        return differentiable_vjp(lambda x: (_swiglu(x),), (x,), (grad,))[0]
    return swiglu_backward(grad, x)


swiglu_op.register_autograd(_swiglu_autograd, setup_context=_swiglu_setup)
