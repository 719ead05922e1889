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

# The price of keeping a site is 1 for each BAND of the sites that are kept above the goal, and never beyond STEEPEST.
BAND, STEEPEST = 0.02, 4.0
# Before learning nearly every site is kept, what it read fades little, and little of a left out one's value is read.
START, OWN = 2.0, 0.2


@dataclass(kw_only=True)
class SparsityRecord(Record):
    """kept: (B, N) bool, sites that the core computed; False for padding. sites: how many there are, padding not
    counted."""

    kept: Tensor
    sites: Tensor

    @property
    def sparsity(self) -> float:
        """Share of the sites that were left out."""
        return 1 - int(self.kept.sum()) / max(1, int(self.sites))


class SparseBKCore(nn.Module):
    """An importance predictor for the sites of one mixer: those above 0 are kept, in all heads alike.

    Each head learns how fast what its last kept site read fades at sites left out (`fill`), and how much of their own
    value these read (`own`; the diagonal readout has no values). Decisions are hard and have the gradient of a
    log-sigmoid (straight-through): kept sites tell what they are worth to the task, the price pushes all of them
    towards the target. A decision reads its own position, so it is causal, and indifferent to batch-mates.
    """

    def __init__(self, config: ModelConfig, heads: int):
        super().__init__()
        self.settings = config.sparsity
        self.importance = nn.Linear(config.d_model, 1)
        nn.init.constant_(self.importance.bias, START)
        self.fill = nn.Parameter(torch.full((heads,), START))
        self.own = nn.Parameter(torch.full((heads,), OWN)) if config.readout == "propagator" else None
        self.progress = 1.0  # of training, 0 to 1: see `anneal`

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Sparsity, SparsityRecord]:
        """x: (B, N, D). The record's loss "sparsity" is the mean probability to be kept times its price, which follows
        the share that would be kept outside training: negative below the goal."""
        exact = torch.promote_types(x.dtype, torch.float32)
        importance = self.importance(x).squeeze(-1).to(exact)
        real = torch.ones_like(importance, dtype=torch.bool) if mask is None else mask
        number = real.sum().clamp(min=1)
        goal = 1 - self.settings.target * min(1.0, self.progress / max(1e-9, self.settings.warmup))
        factor = price(((importance > 0) & real).sum() / number, goal, BAND, STEEPEST)
        loss = factor * (importance.sigmoid() * real).sum() / number
        if self.training and self.settings.sampling == "gumbel":  # logistic noise: the difference of two Gumbel's
            importance = importance + torch.rand_like(importance).logit(1e-6)
        kept = (importance > 0) & real
        soft = importance.sigmoid()
        gate = torch.where(kept, soft / soft.detach(), 0)  # exactly 1 or 0
        record = SparsityRecord(losses={"sparsity": Loss(loss, self.settings.penalty)}, kept=kept, sites=real.sum())
        fill = self.fill.to(exact).sigmoid()
        own = torch.zeros_like(fill) if self.own is None else self.own.to(exact)
        return Sparsity(gate, fill, own, TILE, capacity(self.settings.bound, x.shape[1])), record


def anneal(model: nn.Module, progress: float) -> None:
    """Tell the parts whose goals follow a schedule how much of training is done, 0 to 1. Without it: all."""
    for module in model.modules():
        if isinstance(module, SparseBKCore):
            module.progress = progress
