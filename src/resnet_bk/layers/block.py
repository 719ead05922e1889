"""The block, and a stack of layers. All layers of a stack, blocks and adaptive layers, have one signature:

``layer(x (B, N, D), tokens, state, mask) -> (x (B, N, D), state, records)``

- tokens: :class:`Tokens`, the token at each position.
- state: what this layer returned as its state for the preceding positions of the same sequences; None at their start.
- mask: (B, N) bool, True for tokens, False for padding; None without padding. The model has moved each row's tokens
  to its front, so that padding comes last.
- records: a list of :class:`resnet_bk.record.Record`, one for each part of the layer that reports something.

``layer.layout(x (B, N, D)) -> state`` returns a state with the right shapes and dtypes; its values have no meaning. The
model compares the states that it is given with it.

Dimensions: B batch, N positions, D model width.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from resnet_bk.config import ModelConfig
from resnet_bk.layers.attention import Attention, AttentionState
from resnet_bk.layers.feedforward import feed_forward
from resnet_bk.layers.mixer import MIXERS, ChainState
from resnet_bk.layers.norm import Norm
from resnet_bk.record import Record


class Tokens(NamedTuple):
    """The token at each position of a layer's input, packed together with the features.

    Attributes:
        ids: (B, N) int64, token ids.
        place: (B, N) int64, the index of each position in the flattened batch of the model's input. None unless a
            ledger is open, which needs it to know for which token a layer computes.
    """

    ids: Tensor
    place: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Tokens":
        """Apply `function`, a selection of positions, to every tensor."""
        return Tokens(function(self.ids), None if self.place is None else function(self.place))


class AdaptiveLayer(nn.Module):
    """Base of the layers that implement a technique around others; the ledger has entries for each, as for blocks."""


MixerState = ChainState | AttentionState  # of a chain, or of an attention


class Block(nn.Module):
    """``x + mixer(norm x)``, then ``x + feed_forward(norm x)``; (B, N, D) -> (B, N, D)."""

    recomputes = False  # True: the backward pass recomputes the block from x, see resnet_bk.training.sharded.recompute

    def __init__(self, config: ModelConfig, attends: bool = False):
        """Create the block. attends: mix by attention instead of a chain."""
        super().__init__()
        self.mixer_norm = Norm(config.d_model)
        self.mixer = Attention(config) if attends else MIXERS[config.readout](config)
        self.ff_norm, self.feed_forward = Norm(config.d_model), feed_forward(config)

    def layout(self, x: Tensor) -> MixerState:
        return self.mixer.layout(x)

    def forward(
        self, x: Tensor, tokens: Tokens | None, state: MixerState | None, mask: Tensor | None
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
    """Layers that run one after the other. The state of the stack is the list of their states."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__(layers)

    def part(self, begin: int, end: int | None = None) -> "Stack":
        """Return a stack of some of the layers: the same modules, not copies."""
        return Stack(list(self)[begin:end])

    def layout(self, x: Tensor) -> list[Any]:
        """Return a state, with None for each layer that does not describe its own, which is then not checked."""
        return [layer.layout(x) if hasattr(layer, "layout") else None for layer in self]  # type: ignore[operator]

    def forward(
        self,
        x: Tensor,
        tokens: Tokens | None,
        state: Sequence[Any] | None,
        mask: Tensor | None,
        outputs: list[Tensor] | None = None,
    ) -> tuple[Tensor, list[Any], list[Record]]:
        """Run the layers. outputs: a list to which the output of each layer (B, N, D) is appended."""
        after: list[Any] = []
        records: list[Record] = []
        for i, layer in enumerate(self):
            x, layer_state, layer_records = layer(x, tokens, None if state is None else state[i], mask)
            after.append(layer_state)
            records += layer_records
            if outputs is not None:
                outputs.append(x)
        return x, after, records
