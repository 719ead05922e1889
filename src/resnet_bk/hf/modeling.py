"""The model class for ``AutoModelForCausalLM``, ``generate()`` and ``Trainer`` of transformers.

Dimensions: B batch, N positions, V vocabulary.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from resnet_bk.checkpoint import MANIFEST, RENAMED, CheckpointError, seal, verify
from resnet_bk.config import ConfigError
from resnet_bk.engine.conversion import to_torch
from resnet_bk.engine.decoder import decoder_of
from resnet_bk.engine.state import EngineState
from resnet_bk.hf.configuration import ResNetBKConfig
from resnet_bk.layers.checks import IDS, TARGETS, check_ids, check_positions
from resnet_bk.model import LanguageModel
from resnet_bk.record import mean_losses, weighted_sum
from resnet_bk.weights import check_finite, check_headers, weight_files

# The name of a cache in outputs and arguments; transformers has renamed it from `past_key_values` to `cache`.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class RecurrentCache:
    """The model's state between calls. Its size does not depend on the length, and it cannot be cropped."""

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # makes generate() pass only the positions that are not in the cache yet

    def __init__(self, state: Sequence[Any] | EngineState, length: int):
        self.kept, self.length = state, length

    @property
    def state(self) -> Sequence[Any]:
        """The state as :meth:`LanguageModel.forward` takes it."""
        return to_torch(self.kept)

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        self.kept = state

    def __getstate__(self) -> dict[str, Any]:
        return {"kept": self.state, "length": self.length}  # a state of the engine cannot be pickled

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions read so far, including padding."""
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1  # transformers' value for "no limit"

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the state of each row i by that of row ``beam_idx[i]``, for beam search."""
        if isinstance(self.kept, EngineState):
            self.kept = self.kept.rows(beam_idx.numpy())
        else:
            self.kept = pytree.tree_map(lambda x: x.index_select(0, beam_idx.to(x.device)), self.kept)


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
    _no_split_modules = ["Block", "NgramMemory", "MultiScale", "LearnedLength"]  # noqa: RUF012
    _is_stateful = True
    _tied_weights_keys = {"model.head.weight": "model.embed.weight"}  # noqa: RUF012

    def __init__(self, config: ResNetBKConfig):
        super().__init__(config)
        self.model = LanguageModel.from_config(config.model_config())
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
        if self.model.memory is not None:
            self.model.memory.resize(self.config.vocab_size)
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
            attention_mask: (B, N), or with a cache (B, N + the positions before), 1 for tokens, 0 for padding, on any
                side. It is ignored with a cache and N = 1, where the position counts as a token.
            cache: the cache of the positions before; the sequences continue from there.
            labels: (B, N) int64, the same tokens as input_ids, shifted here. -100 is not counted, nor is padding.
            shift_labels: (B, N) int64, the token that follows each position, instead of labels. -100 is not counted,
                nor is any label at padding.
            num_items_in_batch: number of counted targets in all accumulated batches. The loss is then multiplied by
                this batch's share of them.
            use_cache: return a cache; the default is config.use_cache in evaluation mode, False in training.
            logits_to_keep: number of last positions to compute logits for, 0 for all; or a tensor of positions.
            return_dict: False returns a tuple.
            past_key_values: the name of `cache` in older versions of transformers.

        Raises:
            ValueError, TypeError: an argument does not fit, see :meth:`LanguageModel.forward`.
        """
        cache = past_key_values if cache is None else cache
        # First the argument with which the others are compared.
        check_positions("input_ids", input_ids, IDS, None, self.model.embed.weight.device)
        if cache is not None and not isinstance(cache, RecurrentCache):
            raise TypeError(f"{CACHE}: expected a RecurrentCache, got {type(cache).__name__}; pass that of the output")
        if self._decodes(input_ids, cache, labels, shift_labels):
            assert cache is not None
            return self._decoded(input_ids, cache, use_cache, logits_to_keep, return_dict)
        state, before = (None, 0) if cache is None else (cache.state, cache.length)
        mask = _read_mask(attention_mask, input_ids, cache)
        name = "shift_labels"
        if labels is not None and shift_labels is None:
            name = "labels"
            check_positions(name, labels, TARGETS, input_ids, input_ids.device)
            # The token before padding must not predict it.
            labels = labels if mask is None else labels.masked_fill(~mask, -100)
            shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        self.model.check(input_ids, shift_labels, mask, state, ("input_ids", name, "attention_mask", f"{CACHE}.state"))
        positions = _kept_positions(logits_to_keep)
        features = self.model.features(input_ids, mask, state)
        loss = aux_loss = logits = None
        if shift_labels is not None:
            # If Trainer passes num_items_in_batch, it does not divide by its accumulation steps, so each loss is
            # multiplied by this batch's share. BKTrainer's batches have no `labels`, so there Trainer passes None and
            # divides.
            loss = self.model.cross_entropy(features, shift_labels)
            share: float | Tensor = 1.0
            if num_items_in_batch is not None:
                counted = (features.counted(shift_labels) != -100).sum()
                share = (counted.double() / torch.as_tensor(num_items_in_batch).clamp(min=1)).to(loss.dtype)
                loss = loss * share
            if losses := mean_losses(features.records):
                aux_loss = torch.as_tensor(weighted_sum(losses)) * share
                loss = loss + aux_loss
        if shift_labels is None or not self.training:
            logits = self.model.head(features.x[:, positions])
        results: dict[str, Any] = {"loss": loss, "logits": logits, "aux_loss": aux_loss}
        if use_cache if use_cache is not None else (self.config.use_cache and not self.training):
            results[CACHE] = RecurrentCache(features.state, before + input_ids.shape[1])
        output = CausalLMOutput(**results)
        return output if return_dict is None or return_dict else output.to_tuple()

    def _decodes(self, ids: Tensor, cache: RecurrentCache | None, *labels: Tensor | None) -> bool:
        """Return whether a call is a step of decoding, which needs no gradients and no losses."""
        step = cache is not None and ids.shape[1] == 1 and all(x is None for x in labels)
        return step and not self.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _decoded(
        self, ids: Tensor, cache: RecurrentCache, use_cache: bool | None, keep: int | Tensor, return_dict: bool | None
    ) -> CausalLMOutput | tuple:
        positions, state = _kept_positions(keep), cache.kept
        if isinstance(state, EngineState):
            if len(state) != len(ids):
                raise ValueError(f"{CACHE}: has {len(state)} rows, expected those of input_ids, {len(ids)}")
            check_ids("input_ids", ids, self.model.config.vocab_size)
            state = state.copy()  # the cache may be used again
        else:
            self.model.check(ids, state=state, names=("input_ids", "labels", "attention_mask", f"{CACHE}.state"))
        logits, state = decoder_of(self.model).step(ids, state)
        results: dict[str, Any] = {"logits": logits.unsqueeze(1)[:, positions]}
        if use_cache if use_cache is not None else self.config.use_cache:
            results[CACHE] = RecurrentCache(state, cache.length + 1)
        output = CausalLMOutput(**results)
        return output if return_dict is None or return_dict else output.to_tuple()


def _read_mask(attention_mask: Any, ids: Tensor, cache: RecurrentCache | None) -> Tensor | None:
    """Return the mask (B, N) bool that :meth:`ResNetBKForCausalLM.forward` is given, or None.

    Raises:
        ValueError: attention_mask has another shape, or (checked on the CPU only) other values than 0 and 1.
        TypeError: it is not a tensor.
    """
    length = ids.shape[1]
    if attention_mask is None or (cache is not None and length == 1):
        return None
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask: expected a tensor, got {type(attention_mask).__name__}")
    shapes = [(len(ids), length)] if cache is None else [(len(ids), length), (len(ids), cache.length + length)]
    if attention_mask.shape not in shapes:
        got = tuple(attention_mask.shape)
        raise ValueError(f"attention_mask: expected shape {' or '.join(map(str, shapes))}, got {got}")
    mask = attention_mask[:, -length:]
    if mask.dtype != torch.bool and mask.device.type == "cpu" and not torch.compiler.is_compiling():
        # elsewhere a host-device sync
        wrong = mask[(mask != 0) & (mask != 1)]
        if len(wrong):
            raise ValueError(f"attention_mask: got {wrong[0].item()}, allowed 1 for tokens and 0 for padding")
    return mask.bool()


def _kept_positions(logits_to_keep: int | Tensor) -> slice | Tensor:
    """Return the positions to compute logits for."""
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep  # torch checks the range
    if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise ValueError(f"logits_to_keep: got {logits_to_keep!r}, allowed 0 for all, or a number of last positions")
    return slice(-logits_to_keep, None)


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
