"""Learned sparsity in the BK core: which sites of a mixer's chain are computed.

Dimensions: B batch, N positions, D model width, H heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resnet_bk.config import ModelConfig
from resnet_bk.layers.price import price
from resnet_bk.ops import Sparsity
from resnet_bk.ops.packing import TILE, capacity
from resnet_bk.record import Loss, Record

BAND = 0.02  # distance of the share of kept sites from its goal at which the price is 1
LARGEST_PRICE = 4.0
START = 2.0  # initial importance and initial logit of `fill`: nearly every site is kept, and readouts fade slowly
OWN = 0.2  # initial part of its own value that a left-out site reads


@dataclass(kw_only=True)
class SparsityRecord(Record):
    """Decisions of learned sparsity.

    Attributes:
        kept: (B, N) bool, True for sites that the core computed; False for padding.
        sites: scalar int64, number of sites, without padding.
    """

    kept: Tensor
    sites: Tensor

    @property
    def sparsity(self) -> float:
        """Share of the sites that are left out."""
        return 1 - int(self.kept.sum()) / max(1, int(self.sites))


class SparseBKCore(nn.Module):
    """An importance predictor for the sites of one mixer. Sites with an importance above 0 are kept, in all heads.

    A left-out site reads what the last kept site read, faded, plus a part of its own value. Each head learns the fading
    (`fill`) and that part (`own`; the diagonal readout has no values).

    Decisions are hard and have the gradient of a log-sigmoid (straight-through). Kept sites get the gradient of the
    task, and the price moves all sites towards the target. A decision reads its own position only. It is therefore
    causal and does not depend on batch-mates.
    """

    def __init__(self, config: ModelConfig, heads: int):
        super().__init__()
        self.settings = config.sparsity
        self.importance = nn.Linear(config.d_model, 1)
        nn.init.constant_(self.importance.bias, START)
        self.fill = nn.Parameter(torch.full((heads,), START))
        self.own = nn.Parameter(torch.full((heads,), OWN)) if config.readout == "propagator" else None
        self.progress = 1.0  # share of training that is done, see `anneal`

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Sparsity, SparsityRecord]:
        """Decide which sites to keep.

        The record's loss "sparsity" is the mean probability to keep a site, times a price. The price follows the share
        of sites that would be kept outside training; below the goal it is negative.

        Args:
            x: (B, N, D), features.
            mask: (B, N) bool, False for padding; None without padding.
        """
        exact = torch.promote_types(x.dtype, torch.float32)
        importance = self.importance(x).squeeze(-1).to(exact)
        mask = torch.ones_like(importance, dtype=torch.bool) if mask is None else mask
        number = mask.sum().clamp(min=1)
        goal = 1 - self.settings.target * min(1.0, self.progress / max(1e-9, self.settings.warmup))
        factor = price(((importance > 0) & mask).sum() / number, goal, BAND, LARGEST_PRICE)
        loss = factor * (importance.sigmoid() * mask).sum() / number
        if self.training and self.settings.sampling == "gumbel":  # logistic noise, the difference of two Gumbel samples
            importance = importance + torch.rand_like(importance).logit(1e-6)
        kept = (importance > 0) & mask
        soft = importance.sigmoid()
        gate = torch.where(kept, soft / soft.detach(), 0)  # exactly 1 or 0
        record = SparsityRecord(losses={"sparsity": Loss(loss, self.settings.penalty)}, kept=kept, sites=mask.sum())
        fill = self.fill.to(exact).sigmoid()
        own = torch.zeros_like(fill) if self.own is None else self.own.to(exact)
        return Sparsity(gate, fill, own, TILE, capacity(self.settings.bound, x.shape[1])), record


def anneal(model: nn.Module, progress: float) -> None:
    """Set the share of training that is done, 0 to 1, for the layers whose goal follows a schedule. It starts at 1."""
    for module in model.modules():
        if isinstance(module, SparseBKCore):
            module.progress = progress
