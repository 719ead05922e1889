"""The model class for ``AutoModelForCausalLM``, ``generate()`` and ``Trainer`` of transformers.

Dimensions: B batch, N positions, D model width, V vocabulary.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput as Output

from resnet_bk.checkpoint import MANIFEST, RENAMED, CheckpointError, seal, verify
from resnet_bk.config import ConfigError
from resnet_bk.engine.decoder import KNOWN, decoder_of
from resnet_bk.engine.state import EngineState
from resnet_bk.hf.configuration import ResNetBKConfig
from resnet_bk.hf.inputs import (
    check_cache,
    check_one_sequence_a_row,
    check_options,
    kept_positions,
    one_cache,
    read_inputs,
)
from resnet_bk.hf.outputs import CACHE, CausalLMOutput, RecurrentCache
from resnet_bk.layers.block import Block
from resnet_bk.layers.checks import IDS, TARGETS, check_ids, check_positions
from resnet_bk.layers.embedding import NgramMemory, RecentNgrams
from resnet_bk.model import Features, LanguageModel
from resnet_bk.record import mean_losses, weighted_sum
from resnet_bk.weights import check_finite, check_headers, weight_files

NAMES = ("input_ids", "labels", "attention_mask", f"{CACHE}.state")  # of what a model checks, in messages
# Keywords of the forward passes, for hints in messages.
BASE_KEYWORDS = (
    *("input_ids", "attention_mask", "cache", "past_key_values", "inputs_embeds", "use_cache", "position_ids"),
    *("output_hidden_states", "output_attentions", "return_dict"),
)
KEYWORDS = (*BASE_KEYWORDS, "labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "skip_logits")


class ResNetBKModel(LanguageModel):
    """A :class:`resnet_bk.LanguageModel` that transformers' tools can also call, as the base of a causal model.

    Called with the name `input_ids` or `inputs_embeds`, it returns the features before the head instead of logits.
    """

    def forward(self, ids: Tensor | None = None, **arguments: Any) -> Any:
        """Run the model as :meth:`LanguageModel.forward` does; without `ids`, as transformers expects of a base model.

        Args:
            ids: (B, N), token ids.
            arguments: those of :meth:`LanguageModel.forward`. Without `ids`: input_ids, attention_mask, cache or
                past_key_values, inputs_embeds, use_cache, output_hidden_states and return_dict, as in
                :meth:`ResNetBKForCausalLM.forward`.

        Returns:
            A :class:`ModelOutput`; without `ids`, a BaseModelOutputWithPast whose `last_hidden_state` (B, N, D) is the
            input of the head.
        """
        if ids is not None:
            return super().forward(ids, **arguments)
        given = arguments.get
        check_options(arguments, BASE_KEYWORDS, given("output_attentions"))
        cache = one_cache(given("cache"), given("past_key_values"))
        inputs = read_inputs(self, given("input_ids"), given("inputs_embeds"), given("attention_mask"), cache)
        check_one_sequence_a_row(given("position_ids"), inputs.mask)
        self.check(inputs.ids, None, inputs.mask, inputs.state, NAMES)
        hidden: list[Tensor] | None = [] if given("output_hidden_states") else None
        features = self.features(inputs.ids, inputs.mask, inputs.state, inputs.embeds, hidden)
        results: dict[str, Any] = {"last_hidden_state": features.x}
        if hidden is not None:
            results["hidden_states"] = tuple(hidden)
        if not self.training if given("use_cache") is None else given("use_cache"):
            results[CACHE] = RecurrentCache(features.state, inputs.before + inputs.ids.shape[1])
        return _returned(BaseModelOutputWithPast(**results), given("return_dict"))


# The decoder's engine computes what a LanguageModel does; called with ids, the base model is one.
KNOWN.add(ResNetBKModel)


class ResNetBKForCausalLM(PreTrainedModel, GenerationMixin):
    """The interface of transformers around a :class:`resnet_bk.LanguageModel`, which is the attribute ``model``.

    `forward` has `labels` in its signature but not `shift_labels`: Trainer would expect every such argument of its
    batches and would score nothing if one were missing.
    """

    config: ResNetBKConfig
    config_class = ResNetBKConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["Block", "NgramMemory", "RecentNgrams", "MultiScale", "LearnedLength"]  # noqa: RUF012
    _is_stateful = True
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"model.head.weight": "model.embed.weight"}  # noqa: RUF012

    def __init__(self, config: ResNetBKConfig):
        super().__init__(config)
        self.model = ResNetBKModel.from_config(config.model_config())
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Do nothing: every module has initialised its own weights."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Load a model as transformers does, but only from safetensors, and only what is intact and fits.

        Raises:
            CheckpointError: a file of the folder differs from its manifest; a tensor is missing, unexpected, of another
                shape or kind, or not finite; or the folder cannot be loaded for another reason.
            ConfigError: config.json has settings that no model can have.
        """
        folder, wants_info = Path(path), kwargs.pop("output_loading_info", False)
        with _naming(folder) if folder.is_dir() else contextlib.nullcontext():
            files = cls._check_folder(folder, kwargs) if folder.is_dir() else {}
            renamed = {re.escape(old): new for old, new in RENAMED.items()}
            kwargs["key_mapping"] = renamed | (kwargs.get("key_mapping") or {})
            kwargs["use_safetensors"] = True
            loaded: Any = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
            model, info = loaded
            for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                if info.get(problem):
                    names = ", ".join(sorted(map(str, info[problem]))[:3])
                    raise CheckpointError(
                        f"{path}: {problem.replace('_', ' ')} in the weights: {names}; the file is of another model"
                    )
            for name, p in model.named_parameters():
                if not p.is_meta:
                    check_finite(files.get(name, folder), name, p)
            if model.model.memory is not None:
                name = "model.blocks.0.entries"
                model.model.memory.check_entries(f"{files.get(name, folder)}: {name!r}")
        return (model, info) if wants_info else model

    @classmethod
    def _check_folder(cls, folder: Path, options: dict[str, Any]) -> dict[str, Path]:
        """Raise CheckpointError unless a folder's files are intact and its weights fit its configuration.

        options: those of :meth:`from_pretrained`. If they choose other files or names, weights are not checked here.

        Returns:
            The file of each parameter, as far as it is known.
        """
        if (folder / MANIFEST).exists():
            verify(folder)
        if (folder / "adapter_config.json").exists():  # transformers loads the base model that an adapter names
            return {}
        if any(options.get(name) for name in ("subfolder", "variant", "gguf_file", "state_dict", "key_mapping")):
            return {}
        config = options.get("config")
        if not isinstance(config, ResNetBKConfig):
            config = ResNetBKConfig.from_pretrained(config or folder)
        with torch.device("meta"):
            model = LanguageModel.from_config(config.model_config())
        tensors = [*model.named_parameters(), *model.named_buffers()]
        expected = {f"{cls.base_model_prefix}.{name}": x for name, x in tensors}
        return check_headers(weight_files(folder), expected)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model as transformers does (safetensors), then seal the folder with a manifest."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            seal(Path(save_directory))

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Do nothing, see :meth:`ResNetBKConfig.register_for_auto_class`."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.model.embed

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.model.embed = value

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.model.head

    def set_output_embeddings(self, value: torch.nn.Module) -> None:
        self.model.head = value

    def get_decoder(self) -> torch.nn.Module:
        return self.model

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize the embeddings as transformers does, and update the configuration of the inner model."""
        embed = super().resize_token_embeddings(*args, **kwargs)
        self.model.config = dataclasses.replace(self.model.config, vocab_size=self.config.vocab_size)
        for layer in self.model.blocks:
            if isinstance(layer, NgramMemory | RecentNgrams):
                layer.resize(self.config.vocab_size)
        return embed

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes the cache

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        """Let every n-th block recompute its activations in the backward pass, or none; transformers calls this.

        gradient_checkpointing_func: ignored; blocks use torch's checkpoint without reentrance.
        """
        blocks = [module for module in self.modules() if isinstance(module, Block)]
        for i, block in enumerate(blocks):
            block.recomputes = enable and i % every_n_layers == 0

    @property
    def is_gradient_checkpointing(self) -> bool:
        return any(module.recomputes for module in self.modules() if isinstance(module, Block))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: RecurrentCache | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: RecurrentCache | None = None,
        **options: Any,
    ) -> CausalLMOutput | tuple:
        """Compute next-token logits and, with targets (`labels` or `shift_labels`), the loss.

        Assisted decoding does not work: it crops the cache, but a recurrent state cannot be cropped.

        Args:
            input_ids: (B, N) int64 or int32.
            attention_mask: (B, N), or with a cache (B, N + the positions before), 1 for tokens, 0 for padding, on any
                side. It is ignored with a cache and N = 1, where the position counts as a token.
            cache: the cache of the positions before; the sequences continue from there.
            labels: (B, N) int64, the same tokens as input_ids, shifted here. -100 is not counted, nor is padding.
            inputs_embeds: (B, N, D), embeddings of the tokens, instead of input_ids; for models without a layer that
                reads ids, see ModelConfig.reads_ids.
            num_items_in_batch: number of counted targets in all accumulated batches. The loss is then multiplied by
                this batch's share of them.
            use_cache: return a cache; the default is config.use_cache in evaluation mode, False in training.
            logits_to_keep: number of last positions to compute logits for, 0 for all; or a tensor of positions.
            output_hidden_states: return the `hidden_states` of :class:`resnet_bk.hf.outputs.CausalLMOutput`; default:
                as the configuration.
            output_attentions: not allowed.
            return_dict: False returns a tuple.
            past_key_values: the name of `cache` in older versions of transformers.
            options: shift_labels (B, N) int64, the token that follows each position, instead of labels; -100 is not
                counted, nor is any label at padding. skip_logits, True to leave the logits out, so that a large
                vocabulary never needs (B, N, V) memory. position_ids, which must not restart within a row.

        Raises:
            ValueError, TypeError: an argument does not fit, see :meth:`resnet_bk.LanguageModel.forward`, or is unknown.
        """
        wants_hidden, wants_attentions = (
            getattr(self.config, name) if value is None else value
            for name, value in (
                ("output_hidden_states", output_hidden_states),
                ("output_attentions", output_attentions),
            )
        )
        check_options(options, KEYWORDS, wants_attentions)
        cache, shift_labels = one_cache(cache, past_key_values), options.get("shift_labels")
        if not wants_hidden and inputs_embeds is None and self._decodes(input_ids, cache, labels, shift_labels):
            assert input_ids is not None
            assert cache is not None
            return self._decoded(input_ids, cache, use_cache, logits_to_keep, return_dict)
        inputs = read_inputs(self.model, input_ids, inputs_embeds, attention_mask, cache)
        check_one_sequence_a_row(options.get("position_ids"), inputs.mask)
        name = "shift_labels"
        if labels is not None and shift_labels is None:
            name = "labels"
            check_positions(name, labels, TARGETS, inputs.ids, inputs.ids.device)
            # The token before padding must not predict it.
            labels = labels if inputs.mask is None else labels.masked_fill(~inputs.mask, -100)
            shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        self.model.check(inputs.ids, shift_labels, inputs.mask, inputs.state, (NAMES[0], name, *NAMES[2:]))
        positions = kept_positions(logits_to_keep)
        hidden: list[Tensor] | None = [] if wants_hidden else None
        features = self.model.features(inputs.ids, inputs.mask, inputs.state, inputs.embeds, hidden)
        results: dict[str, Any] = {}
        if shift_labels is not None:
            results["loss"], results["aux_loss"] = self._losses(features, shift_labels, num_items_in_batch)
        if not options.get("skip_logits"):
            results["logits"] = self.model.head(features.x[:, positions])
        if hidden is not None:
            results["hidden_states"] = tuple(hidden)
        if use_cache if use_cache is not None else (self.config.use_cache and not self.training):
            results[CACHE] = RecurrentCache(features.state, inputs.before + inputs.ids.shape[1])
        return _returned(CausalLMOutput(**results), return_dict)

    def _losses(
        self, features: Features, targets: Tensor, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the loss, and the weighted sum of the auxiliary losses in it, None without any.

        If Trainer passes num_items_in_batch, it does not divide by its accumulation steps, so each loss is multiplied
        by this batch's share. BKTrainer's batches have no `labels`, so there Trainer passes None and divides.
        """
        loss, aux_loss = self.model.cross_entropy(features, targets), None
        share: float | Tensor = 1.0
        if num_items_in_batch is not None:
            counted = (features.counted(targets) != -100).sum()
            share = (counted.double() / torch.as_tensor(num_items_in_batch).clamp(min=1)).to(loss.dtype)
            loss = loss * share
        if losses := mean_losses(features.records):
            aux_loss = torch.as_tensor(weighted_sum(losses)) * share
            loss = loss + aux_loss
        return loss, aux_loss

    def _decodes(self, ids: Any, cache: RecurrentCache | None, *labels: Tensor | None) -> bool:
        """Return whether a call is a step of decoding, which needs no gradients and no losses."""
        if cache is None or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        check_positions("input_ids", ids, IDS, None, self.model.embed.weight.device)
        check_cache(cache)
        return ids.shape[1] == 1 and all(x is None for x in labels)

    def _decoded(
        self, ids: Tensor, cache: RecurrentCache, use_cache: bool | None, keep: int | Tensor, return_dict: bool | None
    ) -> CausalLMOutput | tuple:
        positions, state = kept_positions(keep), cache.kept
        if isinstance(state, EngineState):
            if len(state) != len(ids):
                raise ValueError(f"{CACHE}: has {len(state)} rows, expected those of input_ids, {len(ids)}")
            check_ids("input_ids", ids, self.model.config.vocab_size)
            state = state.copy()  # the cache may be used again
        else:
            self.model.check(ids, state=state, names=NAMES)
        logits, state = decoder_of(self.model).step(ids, state)
        results: dict[str, Any] = {"logits": logits.unsqueeze(1)[:, positions]}
        if use_cache if use_cache is not None else self.config.use_cache:
            results[CACHE] = RecurrentCache(state, cache.length + 1)
        return _returned(CausalLMOutput(**results), return_dict)


def _returned(output: Output, return_dict: bool | None) -> Any:
    """Return an output as a tuple if `return_dict` is False."""
    return output if return_dict is None or return_dict else output.to_tuple()


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turn the many classes of errors of transformers and safetensors into one line that names the folder."""
    try:
        yield
    except (CheckpointError, ConfigError, MemoryError, torch.OutOfMemoryError, ImportError, TypeError):
        raise  # not the fault of the folder
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise CheckpointError(f"{folder}: cannot be loaded as a ResNet-BK model ({reason})") from error


def on_device(model: ResNetBKForCausalLM) -> ResNetBKForCausalLM:
    """Move a model to this process's GPU if there is one, and return it."""
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model
