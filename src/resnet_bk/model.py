"""The language model on one page: from token ids to logits.

Dimensions: B batch, N positions, D model width, V vocabulary size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from resnet_bk.adaptive.compose import build
from resnet_bk.adaptive.length import LengthState
from resnet_bk.adaptive.multiscale import MultiScaleState
from resnet_bk.adaptive.windows import WindowState
from resnet_bk.config import BYTE_VOCABULARY, ModelConfig, preset
from resnet_bk.config.saved import saved_config
from resnet_bk.folders import model_folder
from resnet_bk.layers.attention import AttentionState
from resnet_bk.layers.block import Tokens
from resnet_bk.layers.checks import IDS, MASK, TARGETS, check_ids, check_positions, check_state, structure
from resnet_bk.layers.embedding import NgramMemory, RecentState
from resnet_bk.layers.loss import linear_cross_entropy
from resnet_bk.layers.mixer import ChainState
from resnet_bk.layers.norm import Norm
from resnet_bk.ops import PropagatorState, SparseState
from resnet_bk.ops.packing import Packing
from resnet_bk.record import Record, mean_losses, weighted_sum
from resnet_bk.weights import load_weights


@dataclass
class ModelOutput:
    """Result of a forward pass.

    Attributes:
        logits: (B, N, V), 0 at padding; None if they were not requested.
        state: one entry per layer of ``model.blocks``. The next call continues the sequences from it.
        loss: scalar, "cross_entropy" plus the weighted sum of the other `losses`; None without targets.
        losses: scalars by name, unweighted: "balance", "ratio", ..., and "cross_entropy" (nats per target; in training
            the task loss of a layer that has one, see :class:`resnet_bk.record.Record`).
        records: reports of the layers, outer layers before those inside them. With a mask, their (B, N) tensors are in
            packed order: each row's tokens come first.
    """

    logits: Tensor | None
    state: list[Any]
    loss: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)


# For torch.export. Records report to Python; a program that torch has exported has none.
pytree.register_dataclass(
    ModelOutput,
    field_names=["logits", "state", "loss", "losses"],
    drop_field_names=["records"],
    serialized_type_name="resnet_bk.ModelOutput",
)
# So that torch.export.save and load handle programs that take or return states, without pickles of unknown classes.
_STATES = (
    *(AttentionState, ChainState, LengthState, MultiScaleState, PropagatorState, RecentState, SparseState, WindowState),
)
for _state in _STATES:
    pytree._register_namedtuple(_state, serialized_type_name=f"resnet_bk.{_state.__name__}")
torch.serialization.add_safe_globals(list(_STATES))


class Features(NamedTuple):
    """Input of the head.

    Attributes:
        x: (B, N, D), normed features; 0 at padding.
        state: see :class:`ModelOutput`.
        records: see :class:`ModelOutput`.
        packing: the packing that moved each row's tokens to its front; None without a mask. `x` is merged back already;
            `records` are not.
    """

    x: Tensor
    state: list[Any]
    records: list[Record]
    packing: Packing | None

    def counted(self, targets: Tensor) -> Tensor:
        """Return the targets (B, N) with -100 at padding, so that these are not counted."""
        return targets if self.packing is None else targets.masked_fill(~self.packing.selected, -100)


class LanguageModel(nn.Module):
    """A causal language model on the BK core, or a bidirectional encoder with ``causal=False``.

    Every keyword is a field of :class:`resnet_bk.ModelConfig`; an example is
    ``LanguageModel(256, d_model=64, n_layers=4, n_seq=128, num_experts=4, top_k=1)``. Time and memory are linear in N.
    The state has a constant size.
    """

    # The last result of `_structure_of_state`, with its dtype.
    _structure: tuple[torch.dtype, list[Any]] | None = None
    # In training, predictions to learn beside the targets: log-probabilities (B, N, V), and their share of the loss.
    taught: tuple[Tensor, float] | None = None

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
        """Return a new model with the settings of a preset.

        Args:
            name: one of ``resnet_bk.config.PRESETS``: "plain", "quality", "balanced", "fast". All but the first
                have n-gram memory. Its table of the training text is empty until ``memory.count`` is called;
                ``memory={}`` leaves out this table and that of the text so far.
            vocab_size: number of token ids.
            fields: fields of ModelConfig that replace those of the preset. A section that is given, such as `sparsity`,
                replaces the preset's whole section; the two are not merged.

        Raises:
            ConfigError: the name or a field is not allowed.
        """
        return cls(vocab_size, **{**preset(name), **fields})

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """Return a trained model in float32, in evaluation mode.

        Args:
            path: folder of a run or of a model, or a name of ``resnet_bk.folders.BUNDLED``: "fast-python".

        Raises:
            CheckpointError: there is no model, or it is damaged.
            ConfigError: its config.json has settings that no model can have.
        """
        folder = model_folder(str(path))
        model = cls.from_config(saved_config(folder))
        load_weights(model, folder, "model.")
        if model.memory is not None:
            model.memory.check_entries(str(folder))
        return model.eval()

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
        """Compute the logits of every position and, with targets, the loss.

        Args:
            ids: (B, N) int64 or int32, token ids; B, N >= 1.
            targets: (B, N) int64, the token that each position should predict. -100 is not counted, nor is any target
                at padding.
            mask: (B, N) bool, False for padding, which may be anywhere and does not affect the other positions.
            state: `state` of the output for the preceding positions of the same sequences; None at their start.
            logits: False leaves the logits out, so that a large vocabulary never needs (B, N, V) memory.

        Raises:
            ValueError: ids are not (B, N) with B, N >= 1; targets or mask have another shape; a tensor is on another
                device than the model; ids or targets are outside the vocabulary (checked on the CPU only, and not when
                compiled); or the state is not one of B sequences of this model (not checked when compiled).
            TypeError: an argument, or a part of the state, has another type or dtype.
        """
        self.check(ids, targets, mask, state)
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

    def features(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        state: Sequence[Any] | None = None,
        embeds: Tensor | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Features:
        """Compute the input of the head: embed, blocks, norm.

        With a mask, the tokens of each row are first packed to its front, so layers meet padding only at the end.

        Args:
            ids, mask, state: as for :meth:`forward`.
            embeds: (B, N, D), in place of the embeddings of the ids. Layers that read ids still read `ids`.
            hidden: a list that gets the embeddings and the output of each layer, (B, N, D), the last one normed.
        """
        whole = mask.shape[1] if mask is not None and torch.compiler.is_compiling() else None  # a width without a sync
        packing = None if mask is None else Packing(mask, bound=whole)
        tokens = Tokens(ids.long())
        if packing is not None:
            tokens, mask = tokens.map(packing.pack), packing.mask
            embeds = None if embeds is None else packing.pack(embeds)
        x = self.embed(tokens.ids) if embeds is None else embeds
        if mask is not None:  # so that not even a NaN in an embedding gets from padding to a gradient
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
        if hidden is not None:
            hidden.append(x)
        x, after, records = self.blocks(x, tokens, state, mask, outputs=hidden)
        x = self.norm(x)
        if hidden is not None:
            hidden[-1] = x
            hidden[:] = hidden if packing is None else map(packing.merge, hidden)
        return Features(x if packing is None else packing.merge(x), after, records, packing)

    @property
    def memory(self) -> NgramMemory | None:
        """The n-gram memory that was counted from a text; None in a model without one."""
        return next((layer for layer in self.blocks if isinstance(layer, NgramMemory)), None)

    def read(self, x: Tensor) -> Tensor:
        """Apply the norm and the head to the features (..., D) that any block returns; return logits (..., V)."""
        return self.head(self.norm(x))

    def cross_entropy(self, features: Features, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy over the counted targets (B, N), in nats; 0 where none is counted.

        -100 is not counted, nor is any target at padding. In training, a layer may replace the loss of each position,
        see :class:`resnet_bk.record.Record`.
        """
        targets = features.counted(targets)
        task_loss = next((r.task_loss for r in features.records if r.task_loss is not None), None)
        if task_loss is None:
            return self._nats(features.x, targets, "mean")
        if features.packing is not None:
            targets = features.packing.pack(targets).masked_fill(~features.packing.mask, -100)
        scored = targets != -100
        losses = task_loss(lambda x: self._nats(self.norm(x), targets, "none"), scored)
        return losses.sum() / scored.sum().clamp(min=1)

    def _nats(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Return the cross-entropy in nats of the targets (B, N), given normed features x (B, N, D).

        reduction: "none" for that of each target, (B, N); "mean" for their mean over counted targets.
        """
        if self.taught is not None and self.training:
            return self._nats_of_taught(x, targets, reduction, *self.taught)
        nats = linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten(), reduction)
        return nats.view_as(targets) if reduction == "none" else nats

    def _nats_of_taught(self, x: Tensor, targets: Tensor, reduction: str, taught: Tensor, share: float) -> Tensor:
        """Return what `_nats` does, with a share of cross-entropy with taught predictions; 0 at uncounted targets."""
        log_p, counted = self.head(x).log_softmax(-1), targets != -100
        hard = -log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        nats = (hard.lerp(-(taught.exp() * log_p).sum(-1), share)).masked_fill(~counted, 0)
        return nats if reduction == "none" else nats.sum() / counted.sum().clamp(min=1)

    def check(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
        state: Sequence[Any] | None = None,
        names: Sequence[str] = ("ids", "targets", "mask", "state"),
    ) -> None:
        """Raise the errors that :meth:`forward` lists. names: the names of the arguments in messages."""
        device, size = self.embed.weight.device, self.config.vocab_size
        check_positions(names[0], ids, IDS, None, device)
        if targets is not None:
            check_positions(names[1], targets, TARGETS, ids, device)
        if mask is not None:
            check_positions(names[2], mask, MASK, ids, device)
        if torch.compiler.is_compiling():
            return
        check_ids(names[0], ids, size)
        if targets is not None:
            check_ids(names[1], targets if mask is None else targets.masked_fill(~mask, -100), size, -100)
        if state is not None:
            if not self.config.causal:
                raise ValueError(f"{names[3]}: got a state, allowed None; a bidirectional model reads whole sequences")
            check_state(names[3], state, self._structure_of_state(), len(ids), device.type)

    def _structure_of_state(self) -> list[Any]:
        """Return the structure of a state. It is kept until the dtype of the model changes."""
        dtype, kept = torch.promote_types(self.embed.weight.dtype, torch.float32), self._structure
        if kept is None or kept[0] != dtype:
            x = torch.empty(1, 1, self.config.d_model, dtype=dtype, device="meta")
            kept = self._structure = dtype, structure(self.blocks.layout(x))
        return kept[1]


ConfigurableResNetBK = LanguageModel  # an alias of LanguageModel, which takes any subset of the techniques
