"""Short causal depthwise convolution: a registered operator for forward and one for backward.

Dimensions: B batch, N positions, C channels, W width.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from resnet_bk.ops.kernels import backend_for, differentiable_vjp


@torch.library.custom_op("resnet_bk::short_conv", mutates_args=())
def short_conv_op(x: Tensor, weight: Tensor) -> Tensor:
    return backend_for(x).conv_forward(x, weight)


@torch.library.custom_op("resnet_bk::short_conv_backward", mutates_args=())
def short_conv_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return backend_for(x).conv_backward(grad, x, weight)


@short_conv_op.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] - weight.shape[0] + 1, x.shape[2])


@short_conv_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _by_shifts(x: Tensor, weight: Tensor) -> Tensor:
    """Run the convolution under autograd, for second derivatives."""
    width = weight.shape[0]
    length = x.shape[1] - width + 1
    return torch.stack([x[:, i : i + length] * weight[i] for i in range(width)]).sum(0)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad: Tensor):
    x, weight = ctx.saved_tensors
    if torch.is_grad_enabled():
        return differentiable_vjp(lambda *inputs: (_by_shifts(*inputs),), (x, weight), (grad,))
    return short_conv_backward(grad, x, weight)


short_conv_op.register_autograd(_autograd, setup_context=_setup)


def short_conv(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``y_t = sum_i weight_i x_{t+i}``.

    Args:
        x: (B, N + W - 1, C); it begins with the W - 1 positions before the first output.
        weight: (W, C) like x in dtype.

    Returns:
        y, (B, N, C).
    """
    single = x.shape[1] == weight.shape[0]
    return (x * weight).sum(1, keepdim=True) if single else short_conv_op(x, weight)


@register_flop_formula(torch.ops.resnet_bk.short_conv)
def _flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * weight_shape[0] * torch.Size(out_shape).numel()


@register_flop_formula(torch.ops.resnet_bk.short_conv_backward)
def _backward_flops(grad_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 4 * weight_shape[0] * torch.Size(grad_shape).numel()
