"""The sums of n-gram memory: a registered operator where the backend has a kernel, else plain torch.

At each position m and for each order o, an entry has a level and S tokens with shares:

    y_m = sum_o vectors[level_mo] + scale_o * gain[level_mo] sum_s share_mos table[token_mos]

Dimensions: M positions, O orders, S tokens of an entry, L levels of all orders, V vocabulary, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from resnet_bk.ops.kernels import backend_for, differentiable_vjp, has_kernel

LARGEST = 2**18  # numbers of a table for which each task of the kernel keeps a gradient of its own


def ngram_sum(
    level: Tensor, tokens: Tensor, shares: Tensor, gain: Tensor, vectors: Tensor, table: Tensor, scale: Tensor
) -> Tensor:
    """Return y, (M, D).

    Args:
        level: (M, O) int64, below L.
        tokens: (M, O, S) int64, below V.
        shares: (M, O, S) like table in dtype. They have no gradient.
        gain: (L,) like table.
        vectors: (L, D) like table.
        table: (V, D).
        scale: (O, D) like table.

    Raises:
        IndexError: on a CPU, a level or a token is out of range.
    """
    small = table.device.type == "cpu" and table.dtype in (torch.float32, torch.float64) and table.numel() <= LARGEST
    if small and has_kernel("ngram_sum", table.device.type):
        return ngram_sum_op(level, tokens, shares, gain, vectors, table, scale)
    weights = shares * F.embedding(level, gain.unsqueeze(-1))
    sums = F.embedding_bag(tokens.flatten(0, 1), table, mode="sum", per_sample_weights=weights.flatten(0, 1))
    return (sums.view(*level.shape, -1) * scale).sum(1) + F.embedding_bag(level, vectors, mode="sum")


@torch.library.custom_op("resnet_bk::ngram_sum", mutates_args=())
def ngram_sum_op(
    level: Tensor, tokens: Tensor, shares: Tensor, gain: Tensor, vectors: Tensor, table: Tensor, scale: Tensor
) -> Tensor:
    return backend_for(table).ngram_sum_forward(level, tokens, shares, gain, vectors, table, scale)


@torch.library.custom_op("resnet_bk::ngram_sum_backward", mutates_args=())
def ngram_sum_backward(
    grad: Tensor,
    level: Tensor,
    tokens: Tensor,
    shares: Tensor,
    gain: Tensor,
    vectors: Tensor,
    table: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backend_for(table).ngram_sum_backward(grad, level, tokens, shares, gain, vectors, table, scale)


@ngram_sum_op.register_fake
def _(level, tokens, shares, gain, vectors, table, scale) -> Tensor:
    return table.new_empty(len(level), table.shape[1])


@ngram_sum_backward.register_fake
def _(grad, level, tokens, shares, gain, vectors, table, scale) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gain, vectors, table, scale = (x.new_empty(x.shape) for x in (gain, vectors, table, scale))
    return gain, vectors, table, scale


def _by_rows(
    level: Tensor, tokens: Tensor, shares: Tensor, gain: Tensor, vectors: Tensor, table: Tensor, scale: Tensor
) -> Tensor:
    """Compute the sums from all rows, for second derivatives."""
    sums = (shares.unsqueeze(-1) * F.embedding(tokens, table)).sum(2) * F.embedding(level, gain.unsqueeze(-1))
    return (F.embedding(level, vectors) + scale * sums).sum(1)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad: Tensor):
    level, tokens, shares, *parameters = ctx.saved_tensors
    if torch.is_grad_enabled():
        grads = differentiable_vjp(lambda *p: (_by_rows(level, tokens, shares, *p),), tuple(parameters), (grad,))
    else:
        grads = ngram_sum_backward(grad, *ctx.saved_tensors)
    return None, None, None, *grads


ngram_sum_op.register_autograd(_autograd, setup_context=_setup)


@register_flop_formula(torch.ops.resnet_bk.ngram_sum)
def _flops(level_shape, tokens_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * torch.Size(tokens_shape).numel() * torch.Size(out_shape)[-1]


@register_flop_formula(torch.ops.resnet_bk.ngram_sum_backward)
def _backward_flops(grad_shape, level_shape, tokens_shape, *args, out_shape=None, **kwargs) -> int:
    return 6 * torch.Size(tokens_shape).numel() * torch.Size(grad_shape)[-1]
