"""The block, and a stack of layers. Whatever may stand in a stack - a block, a room - has one form of call:

``layer(x (B, N, D), ids (B, N), state, mask) -> (x (B, N, D), state, records)``

ids: the token at each position, and its place, see :func:`placed`. state: of the same sequences up to here, or None.
mask: (B, N) bool, real positions first, or None.

Dimensions: B batch, N positions, D model width.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnet_bk.config import ModelConfig
from resnet_bk.layers.feedforward import feed_forward
from resnet_bk.layers.mixer import MIXERS, MixerState
from resnet_bk.layers.norm import Norm
from resnet_bk.record import Record

TOKEN_BITS = 32


def placed(ids: Tensor) -> Tensor:
    """Token ids (B, N) that know where they are: the place in the flattened batch is in the upper half of each. It
    stays with a position wherever rooms pack it, so that the ledger can tell whose computation a layer runs."""
    place = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    return ids.long() | place << TOKEN_BITS


def token_of(ids: Tensor) -> Tensor:
    """The token alone."""
    return ids & (1 << TOKEN_BITS) - 1


def place_of(ids: Tensor) -> Tensor:
    """The place alone; 0 where ids never were placed."""
    return ids >> TOKEN_BITS


class Block(nn.Module):
    """``x + mixer(norm x)``, then ``x + feed_forward(norm x)``; (B, N, D) -> (B, N, D)."""

    recomputes = False  # whether backward computes all but x again, see resnet_bk.training.sharded.recompute

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.mixer_norm, self.mixer = Norm(config.d_model), MIXERS[config.readout](config)
        self.ff_norm, self.feed_forward = Norm(config.d_model), feed_forward(config)

    def forward(
        self, x: Tensor, ids: Tensor | None, state: MixerState | None, mask: Tensor | None
    ) -> tuple[Tensor, MixerState, list[Record]]:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(self._run, x, state, mask, use_reentrant=False)
        return self._run(x, state, mask)

    def _run(self, x: Tensor, state: MixerState | None, mask: Tensor | None) -> tuple[Tensor, MixerState, list[Record]]:
        y, state, records = self.mixer(self.mixer_norm(x), state, mask)
        x = x + y
        y, more = self.feed_forward(self.ff_norm(x), mask)
        return x + y, state, [*records, *more]


class Stack(nn.ModuleList):
    """Layers one after the other; its state is the list of theirs."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__(layers)

    def part(self, begin: int, end: int | None = None) -> "Stack":
        """Some of the layers, the same modules."""
        return Stack(list(self)[begin:end])

    def forward(
        self, x: Tensor, ids: Tensor | None, state: Sequence[Any] | None, mask: Tensor | None
    ) -> tuple[Tensor, list[Any], list[Record]]:
        after: list[Any] = []
        records: list[Record] = []
        for i, layer in enumerate(self):
            x, layer_state, layer_records = layer(x, ids, None if state is None else state[i], mask)
            after.append(layer_state)
            records += layer_records
        return x, after, records
