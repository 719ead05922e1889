"""The sums of n-gram memory: a registered operator for forward and one for backward.

At each position m and for each order o, an entry was found with a level and S tokens with shares:

    y_m = sum_o level_vectors[level_mo] + scale_o gain[level_mo] sum_s share_mos token_vectors[token_mos]

Dimensions: M positions, O orders, S tokens of an entry, L levels of all orders, V vocabulary, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from resnet_bk.ops.chunked_ngrams import unpacked
from resnet_bk.ops.kernels import backend_for, differentiable_vjp


@torch.library.custom_op("resnet_bk::ngram_sum", mutates_args=())
def ngram_sum(found: Tensor, gain: Tensor, level_vectors: Tensor, token_vectors: Tensor, scale: Tensor) -> Tensor:
    """Return y, (M, D).

    Args:
        found: (M, O, 1 + S) int32, see :mod:`resnet_bk.ngram_format`: levels below L / O, tokens below V.
        gain: (L,) like token_vectors, those of the first order first.
        level_vectors: (L, D) like token_vectors.
        token_vectors: (V, D).
        scale: (O, D) like token_vectors.

    Raises:
        IndexError: on a CPU, a level or a token is out of range.
    """
    return backend_for(gain).ngram_sum_forward(found, gain, level_vectors, token_vectors, scale)


@torch.library.custom_op("resnet_bk::ngram_sum_backward", mutates_args=())
def ngram_sum_backward(
    grad: Tensor, found: Tensor, gain: Tensor, token_vectors: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of gain, level_vectors, token_vectors and scale."""
    return backend_for(gain).ngram_sum_backward(grad, found, gain, token_vectors, scale)


@ngram_sum.register_fake
def _(found, gain, level_vectors, token_vectors, scale) -> Tensor:
    return token_vectors.new_empty(found.shape[0], token_vectors.shape[1])


@ngram_sum_backward.register_fake
def _(grad, found, gain, token_vectors, scale) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    level_vectors = gain.new_empty(len(gain), token_vectors.shape[1])
    return (
        gain.new_empty(gain.shape),
        level_vectors,
        token_vectors.new_empty(token_vectors.shape),
        scale.new_empty(scale.shape),
    )


def _by_rows(found: Tensor, gain: Tensor, level_vectors: Tensor, token_vectors: Tensor, scale: Tensor) -> Tensor:
    """Compute the sums under autograd, for second derivatives."""
    level, tokens, shares = unpacked(found, gain)
    sums = (shares.unsqueeze(-1) * F.embedding(tokens, token_vectors)).sum(2)
    return (F.embedding(level, level_vectors) + scale * F.embedding(level, gain.unsqueeze(-1)) * sums).sum(1)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad: Tensor):
    found, *parameters = ctx.saved_tensors
    if torch.is_grad_enabled():
        grads = differentiable_vjp(lambda *p: (_by_rows(found, *p),), tuple(parameters), (grad,))
    else:
        gain, _, token_vectors, scale = parameters
        grads = ngram_sum_backward(grad, found, gain, token_vectors, scale)
    return None, *grads


ngram_sum.register_autograd(_autograd, setup_context=_setup)


@register_flop_formula(torch.ops.resnet_bk.ngram_sum)
def _flops(found_shape, *args, out_shape=None, **kwargs) -> int:
    positions, orders, columns = found_shape
    return 2 * positions * orders * (columns - 1) * torch.Size(out_shape)[-1]


@register_flop_formula(torch.ops.resnet_bk.ngram_sum_backward)
def _backward_flops(grad_shape, found_shape, *args, out_shape=None, **kwargs) -> int:
    positions, orders, columns = found_shape
    return 4 * positions * orders * (columns - 1) * torch.Size(grad_shape)[-1]
