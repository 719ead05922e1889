"""Cross-entropy of an output head that never holds the logits of all tokens if these would be large.

Dimensions: T tokens, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**24  # entries of a (T, V) matrix of logits; larger ones are computed in pieces of rows


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of ``softmax(x weight^T)`` in nats.

    More than LOGITS_AT_ONCE logits are computed piece by piece. Their mean has its gradients computed at the same time,
    so no logits are computed twice. With "none" the backward pass computes them again.

    Args:
        x: (T, D) features.
        weight: (V, D) rows of the output head.
        targets: (T,) int64, the correct token of each row; -100 is not counted.
        reduction: "none" for (T,) nats, 0 where the target is -100; "mean" for their mean over counted targets, 0
            without any.
    """
    rows = max(1, LOGITS_AT_ONCE // len(weight))
    if len(targets) <= rows:
        nats = F.cross_entropy(F.linear(x, weight), targets, reduction=reduction)
        # torch's mean over no targets is NaN.
        return nats if reduction == "none" else torch.where((targets != -100).any(), nats, 0.0)
    if reduction == "mean":
        return _MeanNats.apply(x, weight, targets, rows, torch.is_grad_enabled())
    return _nats_in_pieces(x, weight, targets, rows)


def _nats_in_pieces(x: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
    pieces = zip(x.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(_nats, part, weight, own, use_reentrant=False) for part, own in pieces])


def _nats(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), targets, reduction="none")


class _MeanNats(torch.autograd.Function):
    """The mean cross-entropy in pieces of `rows` rows. The forward pass computes the gradients of the sum too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, rows: int, learns: bool) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        grad_x, grad_weight = (
            torch.zeros_like(tensor, dtype=exact) if learns and needed else None
            for tensor, needed in zip((x, weight), ctx.needs_input_grad, strict=False)
        )
        ignored = (targets == -100).unsqueeze(-1)
        total = torch.zeros((), dtype=exact, device=x.device)
        for begin in range(0, len(x), rows):
            part = slice(begin, begin + rows)
            logits = F.linear(x[part], weight)
            log_p = logits.to(exact).log_softmax(-1)
            target = targets[part].unsqueeze(-1).masked_fill(ignored[part], 0)
            total -= log_p.gather(-1, target).masked_fill(ignored[part], 0).sum()
            if grad_x is None and grad_weight is None:
                continue
            # The gradient of a token's nats with respect to its logits is softmax(logits) - one_hot(target). It is
            # divided by the number of tokens at the end only: in float16 small quotients would be 0.
            grad = log_p.exp_().scatter_add_(-1, target, -torch.ones_like(target, dtype=exact))
            grad = grad.masked_fill_(ignored[part], 0).to(logits.dtype)
            if grad_x is not None:
                grad_x[part] = grad @ weight.to(grad.dtype)
            if grad_weight is not None and grad.dtype == x.dtype == exact:
                grad_weight.addmm_(grad.mT, x[part])  # in place: a product of its own would pass through memory twice
            elif grad_weight is not None:
                grad_weight += grad.mT @ x[part].to(grad.dtype)
        count = (~ignored).sum().clamp(min=1)
        ctx.rows = rows
        ctx.save_for_backward(x, weight, targets, count, grad_x, grad_weight)
        return total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, targets, count, *found = ctx.saved_tensors
        inputs = (x, weight)
        if torch.is_grad_enabled():  # second derivatives: they need a graph, so everything is computed again
            nats = _nats_in_pieces(x, weight, targets, ctx.rows).sum() / count
            wanted = [tensor for tensor, g in zip(inputs, found, strict=True) if g is not None]
            again = iter(torch.autograd.grad(nats, wanted, grad, create_graph=True))
            return *(None if g is None else next(again) for g in found), None, None, None
        grads = (
            None if g is None else (g * (grad / count)).to(tensor) for g, tensor in zip(found, inputs, strict=True)
        )
        return *grads, None, None, None
