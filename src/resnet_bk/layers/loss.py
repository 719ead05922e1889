"""Cross-entropy of an output head that never holds the logits of all tokens if these would be large.

Dimensions: T tokens, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**24  # entries of a (T, V) matrix of logits; larger ones are computed in pieces of rows


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of ``softmax(x weight^T)`` in nats.

    More than LOGITS_AT_ONCE logits are computed piece by piece. Their mean has its gradients computed at the same time,
    so no logits are computed twice; it has no second derivatives. With "none" the backward pass computes them again.

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
    pieces = zip(x.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(_nats, part, weight, own, use_reentrant=False) for part, own in pieces])


def _nats(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), targets, reduction="none")


class _MeanNats(torch.autograd.Function):
    """The mean cross-entropy in pieces of `rows` rows. The forward pass computes the gradients too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, rows: int, learns: bool) -> Tensor:
        grad_x = torch.empty_like(x) if learns and ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if learns and ctx.needs_input_grad[1] else None
        exact = torch.promote_types(x.dtype, torch.float32)
        ignored = (targets == -100).unsqueeze(-1)
        count = (~ignored).sum().clamp(min=1)
        total = torch.zeros((), dtype=exact, device=x.device)
        for begin in range(0, len(x), rows):
            part = slice(begin, begin + rows)
            logits = F.linear(x[part], weight)
            log_p = logits.to(exact).log_softmax(-1)
            target = targets[part].unsqueeze(-1).masked_fill(ignored[part], 0)
            total -= log_p.gather(-1, target).masked_fill(ignored[part], 0).sum()
            if grad_x is None and grad_weight is None:
                continue
            # The gradient of a token's nats with respect to its logits is softmax(logits) - one_hot(target).
            grad = log_p.exp_().scatter_add_(-1, target, -torch.ones_like(target, dtype=exact))
            grad = grad.div_(count).masked_fill_(ignored[part], 0).to(logits.dtype)
            if grad_x is not None:
                grad_x[part] = grad @ weight.to(grad.dtype)
            if grad_weight is not None and grad.dtype == grad_weight.dtype == x.dtype:
                grad_weight.addmm_(grad.mT, x[part])  # in place: a product of its own would pass through memory twice
            elif grad_weight is not None:
                grad_weight += grad.mT @ x[part].to(grad.dtype)
        ctx.save_for_backward(grad_x, grad_weight)
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if g is None else (g * grad).to(g.dtype) for g in ctx.saved_tensors), None, None, None
