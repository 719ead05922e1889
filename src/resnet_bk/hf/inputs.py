"""Arguments of transformers' forward passes: checked, and in the terms of :class:`LanguageModel`.

Dimensions: B batch, N positions, D model width.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_bk.hf.outputs import CACHE, RecurrentCache
from resnet_bk.layers.checks import IDS, check_positions
from resnet_bk.model import LanguageModel

# What transformers and its tokenizers may pass and these models have no use for: no result depends on it.
UNUSED = ("cache_position", "token_type_ids")


class Inputs(NamedTuple):
    """The sequences of a forward pass.

    Attributes:
        ids: (B, N), token ids; zeros where embeddings are given.
        embeds: (B, N, D), embeddings that replace those of the ids, or None.
        mask: (B, N) bool, False for padding, or None.
        state: of the positions before, or None.
        before: number of the positions before.
    """

    ids: Tensor
    embeds: Tensor | None
    mask: Tensor | None
    state: Sequence[Any] | None
    before: int


def read_inputs(network: LanguageModel, input_ids: Any, inputs_embeds: Any, attention_mask: Any, cache: Any) -> Inputs:
    """Check the sequences that a forward pass is given. The caller passes ids, mask and state to `network.check`.

    Raises:
        ValueError: ids and embeddings are given; a layer reads ids, but embeddings are given; or a shape or a value
            does not fit.
        TypeError: an argument has another type or dtype.
    """
    if inputs_embeds is None:
        check_positions("input_ids", input_ids, IDS, None, network.embed.weight.device)
    elif input_ids is not None:
        raise ValueError("input_ids, inputs_embeds: got both, expected one of them")
    else:
        _check_embeds(network, inputs_embeds)
        input_ids = torch.zeros(inputs_embeds.shape[:2], dtype=torch.int64, device=inputs_embeds.device)
    check_cache(cache)
    mask = _read_mask(attention_mask, input_ids, cache)
    state, before = (None, 0) if cache is None else (cache.state, cache.length)
    return Inputs(input_ids, inputs_embeds, mask, state, before)


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """Return the cache, which may be given under either name.

    Raises:
        ValueError: two different caches are given.
    """
    if cache is None or past_key_values is None or cache is past_key_values:
        return past_key_values if cache is None else cache
    raise ValueError("cache, past_key_values: got both, expected one of them; they are two names of one argument")


def check_cache(cache: Any) -> None:
    if cache is not None and not isinstance(cache, RecurrentCache):
        raise TypeError(f"{CACHE}: expected a RecurrentCache, got {type(cache).__name__}; pass that of the output")


def check_options(options: Mapping[str, Any], known: Sequence[str], output_attentions: bool | None) -> None:
    """Raise unless the further keywords of a forward pass can be followed. None counts as not given.

    Raises:
        TypeError: an unknown keyword, which might be meant to change the result.
        ValueError: attentions are wanted, or a row holds several sequences.
    """
    if output_attentions:
        raise ValueError("output_attentions: got True, allowed False; no layer of these models returns attentions")
    for name in (name for name in options if name.startswith("cu_seq_lens") and options[name] is not None):
        raise ValueError(f"{name}: several sequences in a row, expected one; switch off packing and padding_free")
    for name in options:
        if options[name] is not None and name not in known and name not in UNUSED:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise TypeError(f"forward: unknown keyword {name!r}; {hint}")


def check_one_sequence_a_row(position_ids: Tensor | None, mask: Tensor | None) -> None:
    """Raise ValueError if positions restart within a row: it then holds several sequences, one would see the other."""
    if position_ids is None or torch.compiler.is_compiling():
        return
    restarts = position_ids.diff(dim=-1) < 0
    if bool((restarts if mask is None else restarts & mask[:, :-1]).any()):
        raise ValueError("position_ids: got a restart within a row, expected one sequence; give each a row of its own")


def _check_embeds(network: LanguageModel, embeds: Any) -> None:
    weight, readers = network.embed.weight, network.config.reads_ids
    if readers:
        raise ValueError(
            f"inputs_embeds: model.{readers[0]} reads token ids, embeddings are not enough; pass input_ids"
        )
    if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
        got = embeds.dtype if isinstance(embeds, Tensor) else type(embeds).__name__
        raise TypeError(f"inputs_embeds: expected floating-point embeddings, got {got}")
    if embeds.dim() != 3 or embeds.numel() == 0 or embeds.shape[2] != weight.shape[1]:
        shape = tuple(embeds.shape)
        raise ValueError(f"inputs_embeds: expected shape (B, N, {weight.shape[1]}) with B, N >= 1, got {shape}")
    if embeds.device != weight.device:
        raise ValueError(f"inputs_embeds: on {embeds.device}, the model is on {weight.device}; move one of them")


def _read_mask(attention_mask: Any, ids: Tensor, cache: RecurrentCache | None) -> Tensor | None:
    """Return the mask (B, N) bool of the positions, or None.

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


def kept_positions(logits_to_keep: int | Tensor) -> slice | Tensor:
    """Return the positions to compute logits for."""
    if isinstance(logits_to_keep, Tensor):
        return logits_to_keep  # torch checks the range
    if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise ValueError(f"logits_to_keep: got {logits_to_keep!r}, allowed 0 for all, or a number of last positions")
    return slice(-logits_to_keep, None)
