"""The language model: from token ids to logits on one page.

Dimensions: B batch, N positions, D model width, V vocabulary, L layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.adaptive.select import Packing
from resnet_bk.config import ModelConfig
from resnet_bk.layers.feedforward import feed_forward
from resnet_bk.layers.mixer import MIXERS, MixerState
from resnet_bk.layers.norm import Norm

LOGITS_AT_ONCE = 2**24  # entries; beyond that the loss is computed in pieces


@dataclass
class ModelOutput:
    """What a forward pass returns.

    logits: (B, N, V), or None where only the loss was asked for.
    state: one MixerState a layer; passed to the next call, the sequence goes on where this one ended.
    loss: cross-entropy in nats per predicted token plus the weighted `losses`; None without targets.
    losses: every part by name, unweighted: "cross_entropy", "balance", ...
    """

    logits: Tensor | None
    state: list[MixerState]
    loss: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)


class Block(nn.Module):
    """``x + mixer(norm x)``, then ``x + feed_forward(norm x)``; (B, N, D) -> (B, N, D)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.mixer_norm, self.mixer = Norm(config.d_model), MIXERS[config.readout](config)
        self.ff_norm, self.feed_forward = Norm(config.d_model), feed_forward(config)

    def forward(
        self, x: Tensor, state: MixerState | None, mask: Tensor | None
    ) -> tuple[Tensor, MixerState, dict[str, Tensor]]:
        y, state = self.mixer(self.mixer_norm(x), state, mask)
        x = x + y
        y, losses = self.feed_forward(self.ff_norm(x), mask)
        return x + y, state, losses


class LanguageModel(nn.Module):
    """A causal language model on the BK core (bidirectional encoder with ``causal=False``).

    ``LanguageModel(vocab_size, d_model=64, n_layers=4, n_seq=128, num_experts=4, top_k=1, ...)``; every further keyword
    is a field of :class:`resnet_bk.config.ModelConfig`. Memory and time are linear in N; decoding state is constant.
    """

    def __init__(self, vocab_size: int, **fields: Any):
        super().__init__()
        self.config = config = ModelConfig.from_dict({"vocab_size": vocab_size, **fields})
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = Norm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(self.embed.weight, std=1 / math.sqrt(config.d_model))
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        return cls(**config.to_dict())

    def forward(
        self,
        ids: Tensor,
        *,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        state: Sequence[MixerState] | None = None,
        logits: bool = True,
    ) -> ModelOutput:
        """Logits for every position, and the loss where targets are given.

        Args:
            ids: (B, N) integer token ids, N >= 1.
            targets: (B, N) integer, the token each position should predict; -100 is not counted.
            mask: (B, N) bool, False for padding anywhere; padding changes nothing else. Logits there are zero.
            state: of the same sequences up to here, as returned.
            logits: False skips them, so that a large vocabulary never takes (B, N, V) memory.

        Raises:
            ValueError, TypeError: ids, targets or mask of wrong shape, dtype, device or range.
        """
        self.check(ids, targets, mask)
        x, after, losses = self.features(ids, mask, state)
        output = ModelOutput(self.head(x) if logits else None, after, losses=losses)
        if targets is not None:
            losses["cross_entropy"] = self.cross_entropy(x, targets)
            output.loss = losses["cross_entropy"] + self.config.balance_weight * losses.get("balance", 0.0)
        return output

    def features(
        self, ids: Tensor, mask: Tensor | None = None, state: Sequence[MixerState] | None = None
    ) -> tuple[Tensor, list[MixerState], dict[str, Tensor]]:
        """What the head reads, (B, N, D); the state after the last token; the rooms' losses, mean over layers."""
        packing = None if mask is None else Packing(mask)
        sites = None if packing is None else packing.mask
        x = self.embed(ids if packing is None else packing.pack(ids))
        after, parts = [], []
        for i, block in enumerate(self.blocks):
            x, block_state, block_losses = block(x, None if state is None else state[i], sites)
            after.append(block_state)
            parts.append(block_losses)
        x = self.norm(x)
        losses = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        return (x if packing is None else packing.merge(x)), after, losses

    def cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean nats of targets (B, N) from features x (B, N, D); -100 is not counted. Large vocabularies in pieces."""
        pieces = nn.LinearCrossEntropyOptions() if targets.numel() * self.config.vocab_size > LOGITS_AT_ONCE else None
        return F.linear_cross_entropy(
            x.flatten(0, 1), self.head.weight, targets.flatten(), ignore_index=-100, options=pieces
        )

    def check(self, ids: Tensor, targets: Tensor | None, mask: Tensor | None) -> None:
        """Raise where the inputs of :meth:`forward` do not fit, before anything is computed."""
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids: expected int64 or int32 token ids, got {ids.dtype}")
        if ids.dim() != 2 or ids.numel() == 0:
            raise ValueError(f"ids: expected shape (B, N) with B, N >= 1, got {tuple(ids.shape)}")
        if ids.device != self.embed.weight.device:
            raise ValueError(f"ids: on {ids.device}, the model is on {self.embed.weight.device}; move one of them")
        for name, x in (("targets", targets), ("mask", mask)):
            if x is not None and x.shape != ids.shape:
                raise ValueError(f"{name}: expected shape {tuple(ids.shape)} as ids, got {tuple(x.shape)}")
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"mask: expected bool (True = a token, False = padding), got {mask.dtype}")
        if ids.device.type == "cpu":  # elsewhere the embedding's own device-side assertion does this
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise ValueError(
                    f"ids: token id {wrong} is outside the vocabulary, allowed 0 to {self.config.vocab_size - 1}"
                )
