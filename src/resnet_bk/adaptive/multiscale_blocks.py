"""Multi-scale layers to use on their own, and what they cost.

Each is one of :func:`resnet_bk.adaptive.compose.build_stack`'s stacks. As those, they are causal; ``layer.stack``
takes token ids, state and mask and returns state and records.

Dimensions: B batch, N positions, D model width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.adaptive.compose import build_stack
from resnet_bk.adaptive.flops import flops_per_position
from resnet_bk.config import ModelConfig, MultiScaleConfig
from resnet_bk.layers.block import Block, Tokens

COUNTED_TOGETHER = 64  # sequences whose FLOPs are counted at once: experts compute whole tiles of tokens


class _Layer(nn.Module):
    def __init__(self, factors: tuple[int, ...], layers: tuple[int, ...], **fields: Any):
        super().__init__()
        self.config = ModelConfig(multiscale=MultiScaleConfig(factors, layers), **fields)
        self.stack = build_stack(self.config, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D), any N >= 1."""
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != self.config.d_model:
            raise ValueError(f"x: expected shape (B, N, {self.config.d_model}) with N >= 1, got {tuple(x.shape)}")
        tokens = Tokens(torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device))
        return self.stack(x, tokens, None, None)[0]


class MultiScaleResNetBKLayer(_Layer):
    """N -> N / factor, one block there, -> N, one block to refine. Keywords: fields of :class:`ModelConfig`."""

    def __init__(self, d_model: int = 64, n_seq: int = 128, num_experts: int = 4, factor: int = 2, **fields: Any):
        super().__init__((factor,), (0, 1, 1), d_model=d_model, n_seq=n_seq, num_experts=num_experts, **fields)


class HierarchicalMultiScaleLayer(_Layer):
    """N -> N/2 -> N/4 -> N/2 -> N: one block at each station but the first; each way up adds what the way down held."""

    def __init__(self, d_model: int = 64, n_seq: int = 128, num_experts: int = 4, **fields: Any):
        super().__init__((2, 2), (0, 1, 1, 1, 1), d_model=d_model, n_seq=n_seq, num_experts=num_experts, **fields)


class MultiScaleResNetBKBlock(nn.Module):
    """A drop-in replacement for a block, (B, N, D) -> (B, N, D); ``hierarchical`` chooses between the two layers."""

    def __init__(self, d_model: int = 64, n_seq: int = 128, num_experts: int = 4, hierarchical: bool = False):
        super().__init__()
        kind = HierarchicalMultiScaleLayer if hierarchical else MultiScaleResNetBKLayer
        self.layer = kind(d_model, n_seq, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D), any N >= 1."""
        return self.layer(x)


@dataclass(frozen=True)
class MultiScaleFlops:
    """What a multi-scale block costs beside a plain one, one sequence, forward.

    The parts up to `total` are by the simple model: ``n d^2 experts`` for a layer at length n, ``n d`` for a resampling
    of n positions. The others count two operations a multiply-add: `exact` from formulas of every matrix product and
    recurrence in the modules, `measured` by torch's counter while they ran, for the plain and the multi-scale block.
    """

    standard: int
    downsample: int
    low_res: int
    upsample: int
    refine: int
    total: int
    exact_standard: int
    exact_total: int
    measured_standard: float
    measured_total: float

    @property
    def speedup(self) -> float:
        """By the simple model; below 1 the block costs more than the one it replaces."""
        return self.standard / self.total

    @property
    def exact_speedup(self) -> float:
        return self.exact_standard / self.exact_total


def count_flops_multi_scale(d_model: int, n_seq: int, num_experts: int, hierarchical: bool = False) -> MultiScaleFlops:
    """The table of costs of ``MultiScaleResNetBKBlock(d_model, n_seq, num_experts, hierarchical)``."""
    layer = MultiScaleResNetBKBlock(d_model, n_seq, num_experts, hierarchical).layer
    block = Block(ModelConfig(d_model=d_model, n_seq=n_seq, num_experts=num_experts))
    levels = [n_seq >> i for i in range(3 if hierarchical else 2)]  # positions at each scale
    resampling = sum(n * d_model for n in levels[:-1])
    inner = sum(n * d_model**2 * num_experts for n in levels[1:] + levels[1:-1])
    full = n_seq * d_model**2 * num_experts
    return MultiScaleFlops(
        standard=full,
        downsample=resampling,
        low_res=inner,
        upsample=resampling,
        refine=full,
        total=2 * resampling + inner + full,
        exact_standard=round(n_seq * flops_per_position(block)),
        exact_total=round(n_seq * flops_per_position(layer.stack)),
        measured_standard=_counted(block, d_model, n_seq),
        measured_total=_counted(layer.stack, d_model, n_seq),
    )


@torch.no_grad()
def _counted(layer: nn.Module, d_model: int, n: int) -> float:
    x = torch.randn(COUNTED_TOGETHER, n, d_model, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        layer(x, Tokens(torch.zeros(x.shape[:2], dtype=torch.int64)), None, None)
    return counter.get_total_flops() / COUNTED_TOGETHER
