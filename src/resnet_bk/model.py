"""The language model: from token ids to logits on one page.

Dimensions: B batch, N positions, D model width, V vocabulary, L layers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from resnet_bk.adaptive.compose import build
from resnet_bk.config import BYTE_VOCABULARY, ModelConfig, preset
from resnet_bk.layers.block import Tokens
from resnet_bk.layers.loss import linear_cross_entropy
from resnet_bk.layers.norm import Norm
from resnet_bk.ops.packing import Packing
from resnet_bk.record import Record, mean_losses, weighted_sum

RENAMED = {".way_out.": ".bypass."}  # parts of parameter names in checkpoints of earlier versions -> now


def current_name(name: str) -> str:
    """Return today's name of a parameter of a checkpoint, which an earlier version may have written."""
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


@dataclass
class ModelOutput:
    """What a forward pass returns.

    logits: (B, N, V), or None where only the loss was asked for.
    state: one entry a layer; passed to the next call, the sequence goes on where this one ended.
    loss: cross-entropy in nats per predicted token plus the weighted `losses`; None without targets.
    losses: every part by name, unweighted: "cross_entropy", "balance", "ratio", ...
    records: what each part of the model reports, outer parts before those inside them. What it holds of positions is
        of packed ones where there was a mask.
    """

    logits: Tensor | None
    state: list[Any]
    loss: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)


class Features(NamedTuple):
    """x: (B, N, D), what the head reads; state: after the last token; records: what each part reports; packing: where
    padding was left out."""

    x: Tensor
    state: list[Any]
    records: list[Record]
    packing: Packing | None


class LanguageModel(nn.Module):
    """A causal language model on the BK core (bidirectional encoder with ``causal=False``).

    ``LanguageModel(vocab_size, d_model=64, n_layers=4, n_seq=128, num_experts=4, top_k=1, ...)``; every further keyword
    is a field of :class:`resnet_bk.config.ModelConfig`. Memory and time are linear in N; decoding state is constant.
    """

    def __init__(self, vocab_size: int, **fields: Any):
        super().__init__()
        self.config = config = ModelConfig.from_dict({"vocab_size": vocab_size, **fields})
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = build(config, self.read)
        self.norm = Norm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        nn.init.normal_(self.embed.weight, std=1 / math.sqrt(config.d_model))
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    @classmethod
    def from_preset(cls, name: str, vocab_size: int = BYTE_VOCABULARY, **fields: Any) -> Self:
        """One of :data:`resnet_bk.config.PRESETS`: "plain", "quality", "balanced", "fast". Further fields, whole
        sections among them, take the place of the preset's. ConfigError for any other name."""
        return cls(vocab_size, **{**preset(name), **fields})

    @classmethod
    def from_config(cls, config: ModelConfig) -> Self:
        return cls(**config.to_dict())

    def forward(
        self,
        ids: Tensor,
        *,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        state: Sequence[Any] | None = None,
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
        features = self.features(ids, mask, state)
        auxiliary = mean_losses(features.records)
        output = ModelOutput(
            logits=self.head(features.x) if logits else None,
            state=features.state,
            losses={name: loss.value for name, loss in auxiliary.items()},
            records=features.records,
        )
        if targets is not None:
            output.losses["cross_entropy"] = self.cross_entropy(features, targets)
            output.loss = output.losses["cross_entropy"] + weighted_sum(auxiliary)
        return output

    def features(self, ids: Tensor, mask: Tensor | None = None, state: Sequence[Any] | None = None) -> Features:
        """The path from token ids to what the head reads."""
        packing = None if mask is None else Packing(mask)
        sites = None if packing is None else packing.mask
        tokens = Tokens(ids.long())
        if packing is not None:
            tokens = tokens.map(packing.pack)
        x, after, records = self.blocks(self.embed(tokens.ids), tokens, state, sites)
        x = self.norm(x)
        return Features(x if packing is None else packing.merge(x), after, records, packing)

    def read(self, x: Tensor) -> Tensor:
        """Logits (..., V) of features (..., D) that have not been normed: what is known after any block."""
        return self.head(self.norm(x))

    def cross_entropy(self, features: Features, targets: Tensor) -> Tensor:
        """Mean nats of targets (B, N); -100 is not counted. Large vocabularies in pieces.

        In training a room may have its say about how its output is scored, see :class:`resnet_bk.record.Record`.
        """
        task_loss = next((r.task_loss for r in features.records if r.task_loss is not None), None)
        if task_loss is None:
            return self._nats(features.x, targets, "mean")
        if features.packing is not None:
            targets = features.packing.pack(targets).masked_fill(~features.packing.mask, -100)
        scored = targets != -100
        losses = task_loss(lambda x: self._nats(self.norm(x), targets, "none"), scored)
        return losses.sum() / scored.sum().clamp(min=1)

    def _nats(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Nats of targets (B, N) from normed features x (B, N, D): "none" (B, N), or "mean"."""
        nats = linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten(), reduction)
        return nats.view_as(targets) if reduction == "none" else nats

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
        # elsewhere, and when compiled, the embedding's own assertion does this
        if ids.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.config.vocab_size:
                wrong = low if low < 0 else high
                raise ValueError(
                    f"ids: token id {wrong} is outside the vocabulary, allowed 0 to {self.config.vocab_size - 1}"
                )


ConfigurableResNetBK = LanguageModel  # any subset of the techniques is on in it, see ModelConfig
