"""Learned length around an existing model."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnet_bk.adaptive.compose import learned_length
from resnet_bk.adaptive.length import LengthRecord
from resnet_bk.config import ConfigError, LengthConfig, check_fields
from resnet_bk.model import LanguageModel, ModelOutput


@dataclass
class AdaptiveOutput(ModelOutput):
    """Output of a model with learned length."""

    @property
    def length(self) -> LengthRecord:
        """The record of learned length."""
        record = self.records[0]
        assert isinstance(record, LengthRecord)
        return record


class AdaptiveSequenceLengthWrapper(LanguageModel):
    """A language model with learned length around the blocks of an existing model.

    ``AdaptiveSequenceLengthWrapper(base_model=model, max_seq_len=128, num_length_bins=8, length_penalty=0.01)``: every
    further keyword is a field of ``resnet_bk.config.LengthConfig``. The base model is not changed. Its modules are
    shared, so training either model trains both. The predictor and the bypass are new.

    ``wrapper(ids)`` is ``base_model(ids)``. ``wrapper(ids, use_adaptive_length=True)`` chooses lengths and also
    returns logits for every position. Positions beyond the length take the bypass. A length beyond the input has no
    effect. Inputs longer than `max_seq_len` are cut into windows of that size, each with its own length.

    The ``state_dict`` is that of ``LanguageModel.from_config(wrapper.config)``, the same model with learned length
    always on.

    Raises:
        ConfigError: settings that do not fit the base model, such as a global mean in a causal one.
    """

    def __init__(
        self,
        base_model: LanguageModel,
        max_seq_len: int = 128,
        num_length_bins: int = 8,
        length_penalty: float = 0.01,
        **settings: Any,
    ):
        nn.Module.__init__(self)
        if base_model.config.length.bins:
            raise ConfigError("base_model: already has learned length (model.length.bins); give a model without it")
        if base_model.config.depth.policy != "none":
            raise ConfigError("base_model: has adaptive depth (model.depth.policy); make a LanguageModel with both")
        check_fields("model.length", LengthConfig, settings)
        for theirs, ours in (("bins", "num_length_bins"), ("max_length", "max_seq_len"), ("penalty", "length_penalty")):
            if theirs in settings:
                raise ConfigError(f"{theirs}: is called {ours} here; use that name")
        if num_length_bins == 0:
            raise ConfigError("num_length_bins: got 0, allowed 1 or more lengths to choose from")
        if not base_model.config.causal:
            settings = {"pooling": "global", **settings}
        length = LengthConfig(bins=num_length_bins, max_length=max_seq_len, penalty=length_penalty, **settings)
        self.config = dataclasses.replace(base_model.config, length=length)
        self.embed, self.norm, self.head = base_model.embed, base_model.norm, base_model.head
        self.blocks = learned_length(self.config, base_model.blocks, base_model.read)
        for name, part in self.blocks[-1].named_children():
            if name not in ("trunk", "deep"):  # these two are the base model's
                part.to(self.embed.weight)
        self._base = (base_model,)  # a tuple keeps its parameters from being registered a second time

    @property
    def base_model(self) -> LanguageModel:
        return self._base[0]

    def forward(self, ids: Tensor, *, use_adaptive_length: bool = False, **others: Any) -> ModelOutput | AdaptiveOutput:
        """Run the base model, or the same model with learned length.

        Args:
            ids: (B, N) integer token ids.
            use_adaptive_length: run with learned length.
            others: arguments of :meth:`resnet_bk.LanguageModel.forward`. A state fits only the mode that returned it.
        """
        if not use_adaptive_length:
            return self.base_model(ids, **others)
        return AdaptiveOutput(**vars(super().forward(ids, **others)))

    def parameters_added(self) -> list[nn.Parameter]:
        """Return the parameters that the base model does not have."""
        shared = {id(p) for p in self.base_model.parameters()}
        return [p for p in self.parameters() if id(p) not in shared]


def length_histogram(record: LengthRecord) -> dict[int, int]:
    """Return {length: number of windows that chose it}, shortest first. Undecided windows are not counted."""
    lengths, counts = torch.unique(record.predicted_lengths[record.decided], return_counts=True)
    return dict(zip(lengths.tolist(), counts.tolist(), strict=True))
