"""The model class for ``AutoModelForCausalLM``, ``generate()`` and ``Trainer`` of transformers.

Dimensions: B batch, N positions, V vocabulary.
"""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from resnet_bk.checkpoint import MANIFEST, RENAMED, CheckpointError, seal, verify
from resnet_bk.hf.configuration import ResNetBKConfig
from resnet_bk.model import LanguageModel
from resnet_bk.record import mean_losses, weighted_sum

# The name of a cache in outputs and arguments; transformers has renamed it from `past_key_values` to `cache`.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class RecurrentCache:
    """The model's state between calls. Its size does not depend on the length, and it cannot be cropped."""

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # makes generate() pass only the positions that are not in the cache yet

    def __init__(self, state: list[Any], length: int):
        self.state, self.length = state, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions read so far, including padding."""
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1  # transformers' value for "no limit"

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the state of each row i by that of row ``beam_idx[i]``, for beam search."""
        self.state = pytree.tree_map(lambda x: x.index_select(0, beam_idx.to(x.device)), self.state)


@dataclass
class CausalLMOutput(CausalLMOutputWithPast):
    """Output of transformers' causal language models, with the weighted sum of the auxiliary losses.

    Attributes:
        loss: (), the cross-entropy plus `aux_loss`; None without targets.
        logits: (B, N or logits_to_keep, V); None in training mode if targets are given.
        cache: :class:`RecurrentCache`; called past_key_values in older versions of transformers.
        aux_loss: (), weighted sum of the auxiliary losses, a part of `loss`.
    """

    aux_loss: Tensor | None = None


class ResNetBKForCausalLM(PreTrainedModel, GenerationMixin):
    """The interface of transformers around a :class:`LanguageModel`, which is the attribute ``model``."""

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
                "model.causal: got False, allowed True; use LanguageModel itself for a bidirectional model"
            )
        self.model = LanguageModel.from_config(config.model_config())
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Do nothing: every module has initialised its own weights."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load a model as transformers does, but refuse damaged files and weights that do not fit the model.

        Raises:
            CheckpointError: the folder has a manifest and a file differs from it, or weights are missing or unexpected.
            RuntimeError: weights have another shape. transformers raises it.
        """
        if Path(path).is_dir() and (Path(path) / MANIFEST).exists():
            verify(Path(path))
        wants_info = kwargs.pop("output_loading_info", False)
        renamed = {re.escape(old): new for old, new in RENAMED.items()}
        kwargs["key_mapping"] = renamed | (kwargs.get("key_mapping") or {})
        loaded: Any = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info.get(problem):
                names = ", ".join(sorted(map(str, info[problem]))[:3])
                raise CheckpointError(
                    f"{path}: {problem.replace('_', ' ')} in the weights: {names}; the file is of another model"
                )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model as transformers does (safetensors), then seal the folder with a manifest."""
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
        """Resize the embeddings as transformers does, and update the configuration of the inner model."""
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
        past_key_values: RecurrentCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput | tuple:
        """Compute next-token logits and, with targets (`labels` or `shift_labels`), the loss.

        In training mode, the logits are None if targets are given.

        Assisted decoding does not work: it crops the cache, but a recurrent state cannot be cropped.

        Args:
            input_ids: (B, N) int64 or int32.
            attention_mask: (B, at least N), 0 for padding, on any side. The last N columns are read. It is ignored with
                a cache and N = 1, where the position counts as a token.
            cache: the cache of the positions before; the sequences continue from there.
            labels: (B, N), the same tokens as input_ids, shifted here; -100 is not counted.
            shift_labels: (B, N), the token that follows each position, instead of labels.
            num_items_in_batch: number of counted targets in all accumulated batches. The loss is then multiplied by
                this batch's share of them.
            use_cache: return a cache; the default is config.use_cache in evaluation mode, False in training.
            logits_to_keep: number of last positions to compute logits for, 0 for all; or a tensor of positions.
            return_dict: False returns a tuple.
            past_key_values: the name of `cache` in older versions of transformers.
        """
        cache = past_key_values if cache is None else cache
        length = input_ids.shape[1]
        mask = None
        if attention_mask is not None and not (cache is not None and length == 1):
            mask = attention_mask[:, -length:].bool()
        if labels is not None and shift_labels is None:
            shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            if mask is not None:  # padding before a text must not predict its first token
                shift_labels = shift_labels.masked_fill(~mask, -100)
        self.model.check(input_ids, shift_labels, mask)
        state = None if cache is None else cache.state
        features = self.model.features(input_ids, mask, state)
        loss = aux_loss = logits = None
        if shift_labels is not None:
            # If Trainer passes num_items_in_batch, it does not divide by its accumulation steps, so each loss is
            # multiplied by this batch's share. BKTrainer's batches have no `labels`, so there Trainer passes None and
            # divides.
            loss = self.model.cross_entropy(features, shift_labels)
            share: float | Tensor = 1.0
            if num_items_in_batch is not None:
                share = ((shift_labels != -100).sum().double() / num_items_in_batch).to(loss.dtype)
                loss = loss * share
            if losses := mean_losses(features.records):
                aux_loss = torch.as_tensor(weighted_sum(losses)) * share
                loss = loss + aux_loss
        if shift_labels is None or not self.training:
            positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.model.head(features.x[:, positions])
        results: dict[str, Any] = {"loss": loss, "logits": logits, "aux_loss": aux_loss}
        if use_cache if use_cache is not None else (self.config.use_cache and not self.training):
            results[CACHE] = RecurrentCache(features.state, length + (0 if cache is None else cache.length))
        output = CausalLMOutput(**results)
        return output if return_dict is None or return_dict else output.to_tuple()


def on_device(model: ResNetBKForCausalLM) -> ResNetBKForCausalLM:
    """Move a model to this process's GPU if there is one, and return it."""
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model
