"""``AutoModelForCausalLM``, ``generate()`` and ``Trainer`` for :class:`resnet_bk.model.LanguageModel`.

Dimensions: B batch, N positions, V vocabulary.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from resnet_bk.checkpoint import MANIFEST, CheckpointError, seal, verify
from resnet_bk.hf.configuration import ResNetBKConfig
from resnet_bk.model import LanguageModel
from resnet_bk.record import mean_losses


class RecurrentCache:
    """What decoding carries from token to token: the model's state, of constant size. Cannot be cropped."""

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # so that generate() passes on only the positions that the cache has not seen

    def __init__(self, state: list[Any], seen: int):
        self.state, self.seen = state, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions consumed so far, padding included."""
        return self.seen

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1  # transformers' word for "no limit"

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i continues as what row ``beam_idx[i]`` was, for beam search."""
        self.state = pytree.tree_map(lambda x: x.index_select(0, beam_idx.to(x.device)), self.state)


@dataclass
class CausalLMOutput(ModelOutput):
    """loss: weighted sum, see ModelOutput; logits: (B, N or logits_to_keep, V); aux_loss: the weighted part of it that
    is not cross-entropy."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: RecurrentCache | None = None
    aux_loss: Tensor | None = None


class ResNetBKForCausalLM(PreTrainedModel, GenerationMixin):
    """A :class:`LanguageModel` under transformers' conventions; the model itself is the attribute ``model``."""

    config: ResNetBKConfig
    config_class = ResNetBKConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Block", "MultiScale", "LearnedLength"]  # noqa: RUF012
    _is_stateful = True
    _tied_weights_keys = {"model.head.weight": "model.embed.weight"}  # noqa: RUF012

    def __init__(self, config: ResNetBKConfig):
        super().__init__(config)
        if not config.causal:
            raise ValueError(
                "model.causal: got False; a bidirectional model has no next token, use LanguageModel itself"
            )
        self.model = LanguageModel.from_config(config.model_config())
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: every module has initialised itself."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As transformers', but damaged files and weights that do not fit are an error before anything runs."""
        if Path(path).is_dir() and (Path(path) / MANIFEST).exists():
            verify(Path(path))
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(problem):
                names = ", ".join(sorted(map(str, info[problem]))[:3])
                raise CheckpointError(
                    f"{path}: {problem.replace('_', ' ')} in the weights: {names}; not this model's file"
                )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers' (safetensors), then a manifest of sizes and hashes over the folder."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            seal(Path(save_directory))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.model.embed = value

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.model.head

    def set_output_embeddings(self, value: torch.nn.Module) -> None:
        self.model.head = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; the model inside then knows its new vocabulary too."""
        embed = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = dataclasses.replace(self.model.config, vocab_size=self.config.vocab_size)
        return embed

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes the cache

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: RecurrentCache | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple:
        """Next-token logits and loss.

        Args:
            input_ids: (B, N).
            attention_mask: (B, at least N), 0 for padding, on any side.
            labels: (B, N), the same tokens as input_ids (shifted here); -100 is not counted.
            shift_labels: (B, N), the token that follows each position (not shifted); instead of labels.
            num_items_in_batch: tokens in the whole accumulated batch; the loss is then a share of their mean.
            logits_to_keep: compute logits for that many last positions only; 0 for all; a tensor names the positions.

        A recurrent state cannot forget: the cache cannot be cropped, so no assisted decoding.
        """
        length = input_ids.shape[1]
        mask = None
        if attention_mask is not None and not (cache is not None and length == 1):
            mask = attention_mask[:, -length:].bool()
        if labels is not None and shift_labels is None:
            shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            if mask is not None:  # the last padding before a text does not predict its first token
                shift_labels = shift_labels.masked_fill(~mask, -100)
        self.model.check(input_ids, shift_labels, mask)
        state = None if cache is None else cache.state
        features = self.model.features(input_ids, mask, state)
        output = CausalLMOutput()
        if shift_labels is not None:
            # Trainer does not divide by its accumulation steps; the share of this batch does it, of every loss.
            output.loss = self.model.cross_entropy(features, shift_labels)
            share: float | Tensor = 1.0
            if num_items_in_batch is not None:
                share = ((shift_labels != -100).sum().double() / num_items_in_batch).to(output.loss.dtype)
                output.loss = output.loss * share
            if losses := mean_losses(features.records):
                output.aux_loss = self.model.auxiliary(losses) * share
                output.loss = output.loss + output.aux_loss
        if shift_labels is None or not self.training:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output.logits = self.model.head(features.x[:, kept])
        if use_cache if use_cache is not None else (self.config.use_cache and not self.training):
            seen = length if cache is None else cache.seen + length
            output.cache = RecurrentCache(features.state, seen)
        wants_dict = return_dict if return_dict is not None else True
        return output if wants_dict else output.to_tuple()


def on_device(model: ResNetBKForCausalLM) -> ResNetBKForCausalLM:
    """On this process's GPU, where there is one."""
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model
