"""Multi-scale layers to use on their own, and their FLOPs.

Each layer is a stack of :func:`resnet_bk.adaptive.compose.build_stack`, so it is causal. ``layer.stack`` is that stack,
with the signature of :mod:`resnet_bk.layers.block`: it also takes tokens, a state and a mask.

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

COUNTED_TOGETHER = 64  # sequences in the batch whose FLOPs are measured, so that experts' partial tiles hardly count


class _Layer(nn.Module):
    def __init__(self, factors: tuple[int, ...], layers: tuple[int, ...], **fields: Any):
        super().__init__()
        self.config = ModelConfig(multiscale=MultiScaleConfig(factors, layers), **fields)
        self.stack = build_stack(self.config, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) -> (B, N, D), any N >= 1. Raise ValueError for another shape."""
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != self.config.d_model:
            raise ValueError(f"x: expected shape (B, N, {self.config.d_model}) with N >= 1, got {tuple(x.shape)}")
        tokens = Tokens(torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device))
        return self.stack(x, tokens, None, None)[0]


class MultiScaleResNetBKLayer(_Layer):
    """N -> N / factor, one block, -> N, one block to refine. Further keywords: fields of :class:`ModelConfig`."""

    def __init__(self, d_model: int = 64, n_seq: int = 128, num_experts: int = 4, factor: int = 2, **fields: Any):
        super().__init__((factor,), (0, 1, 1), d_model=d_model, n_seq=n_seq, num_experts=num_experts, **fields)


class HierarchicalMultiScaleLayer(_Layer):
    """N -> N/2 -> N/4 -> N/2 -> N, with one block after each step. Each upsampling adds to the input of its level.

    Further keywords: fields of :class:`ModelConfig`.
    """

    def __init__(self, d_model: int = 64, n_seq: int = 128, num_experts: int = 4, **fields: Any):
        super().__init__((2, 2), (0, 1, 1, 1, 1), d_model=d_model, n_seq=n_seq, num_experts=num_experts, **fields)


class MultiScaleResNetBKBlock(nn.Module):
    """A drop-in replacement for a block, (B, N, D) -> (B, N, D).

    It holds a :class:`HierarchicalMultiScaleLayer` if `hierarchical` is True, else a :class:`MultiScaleResNetBKLayer`.
    """

    def __init__(self, d_model: int = 64, n_seq: int = 128, num_experts: int = 4, hierarchical: bool = False):
        super().__init__()
        kind = HierarchicalMultiScaleLayer if hierarchical else MultiScaleResNetBKLayer
        self.layer = kind(d_model, n_seq, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, D) -> (B, N, D), any N >= 1."""
        return self.layer(x)


@dataclass(frozen=True)
class MultiScaleFlops:
    """FLOPs of a multi-scale block and of the plain block it replaces, for the forward pass of one sequence.

    The fields up to `total` follow a simple model: ``n d^2 experts`` for a block on n positions, ``n d`` for a
    resampling of n positions. The other fields count a multiply-add as two operations.

    Attributes:
        standard: the plain block.
        downsample: all downsampling steps.
        low_res: the blocks on chunks.
        upsample: all upsampling steps.
        refine: the block on all positions.
        total: the multi-scale block.
        exact_standard: the plain block, from formulas for every matrix product and recurrence.
        exact_total: the multi-scale block, from the same formulas.
        measured_standard: the plain block, by torch's counter while it runs.
        measured_total: the multi-scale block, by the same counter.
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
        """Ratio by the simple model; below 1, the multi-scale block costs more than the plain one."""
        return self.standard / self.total

    @property
    def exact_speedup(self) -> float:
        """Ratio by the exact formulas."""
        return self.exact_standard / self.exact_total


def count_flops_multi_scale(d_model: int, n_seq: int, num_experts: int, hierarchical: bool = False) -> MultiScaleFlops:
    """Count the FLOPs of ``MultiScaleResNetBKBlock(d_model, n_seq, num_experts, hierarchical)``.

    Args:
        d_model: D.
        n_seq: N, positions of the sequence.
        num_experts: experts in each feed-forward.
        hierarchical: count the layer with two levels instead of the one with one level.
    """
    layer = MultiScaleResNetBKBlock(d_model, n_seq, num_experts, hierarchical).layer
    block = Block(ModelConfig(d_model=d_model, n_seq=n_seq, num_experts=num_experts))
    levels = [n_seq >> i for i in range(3 if hierarchical else 2)]  # number of positions at each scale
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
        measured_standard=_measured(block, d_model, n_seq),
        measured_total=_measured(layer.stack, d_model, n_seq),
    )


@torch.no_grad()
def _measured(layer: nn.Module, d_model: int, n: int) -> float:
    """Return the FLOPs per sequence of n positions that torch's counter finds."""
    x = torch.randn(COUNTED_TOGETHER, n, d_model, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        layer(x, Tokens(torch.zeros(x.shape[:2], dtype=torch.int64)), None, None)
    return counter.get_total_flops() / COUNTED_TOGETHER
