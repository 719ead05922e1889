"""Cross-entropy of an output head that never holds the logits of all tokens if these would be large.

Dimensions: T tokens, D model width, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**24  # entries of a (T, V) matrix of logits; larger ones are computed in pieces of rows


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of ``softmax(x weight^T)`` in nats.

    More than LOGITS_AT_ONCE logits are computed piece by piece, and once more in the backward pass.

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
    pieces = zip(x.split(rows), targets.split(rows), strict=True)
    nats = torch.cat([checkpoint(_nats, part, weight, own, use_reentrant=False) for part, own in pieces])
    return nats if reduction == "none" else nats.sum() / (targets != -100).sum().clamp(min=1)


def _nats(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), targets, reduction="none")
