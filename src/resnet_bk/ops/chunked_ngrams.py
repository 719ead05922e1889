"""The operators of n-gram memory in pure torch, see ``ngram_look_up.py`` and ``ngram_sum.py``.

Dimensions: B batch, N positions, M positions of all sequences, O orders, S successors of an entry, R entries of a
table, L levels of all orders, V vocabulary, D width.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.ngram_format import HASH_BITS, LEVEL_AT, LEVELS, MIX, SHARES, STEP, TAG_AT, TAG_BITS


def slots(window: Tensor, orders: Sequence[int], rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield for each order n the slot and the tag, (..., N) int64, of the n tokens up to each position.

    window: (..., max(orders) - 1 + N) int64, see :mod:`resnet_bk.ops.ngram_look_up`.
    """
    reach = max(orders) - 1
    length = window.shape[-1] - reach
    key = torch.zeros_like(window[..., reach:])
    for n in range(1, reach + 2):
        begin = reach + 1 - n
        key = (key + window[..., begin : begin + length] + 1) * STEP  # arithmetic modulo 2^64
        if n in orders:
            mixed = (key ^ (key >> 29)) * MIX
            slot = (mixed >> 32 & (2**HASH_BITS - 1)) * rows >> HASH_BITS
            yield slot, mixed >> 12 & (2**TAG_BITS - 1)


def _stacked_slots(window: Tensor, orders: Sequence[int], rows: int) -> tuple[Tensor, ...]:
    return tuple(torch.stack(part, dim=-1) for part in zip(*slots(window, orders, rows), strict=True))


def find_ngrams(window: Tensor, entries: Tensor, orders: Sequence[int]) -> Tensor:
    slot, tag = _stacked_slots(window, orders, len(entries))
    entry = entries[slot]
    entry = entry * (entry[..., 0] >> 8 == tag).unsqueeze(-1)
    return torch.cat([entry[..., :1] & 255, entry[..., 1:]], dim=-1)


def recent_ngrams(window: Tensor, lengths: Tensor, entries: Tensor, orders: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Look up recent n-grams.

    What is written is sorted by slot and time. A look-up finds what was last written in its slot before its own time.
    """
    rows, ids = entries.shape[1], window[:, max(orders) :] - 1
    slot, tag = _stacked_slots(window, orders, rows)  # of the contexts that end before the first position, and at each
    length = ids.shape[1]
    writes = length * len(orders)
    position = torch.arange(length, device=ids.device)
    entered = (position < lengths.unsqueeze(1)).unsqueeze(-1)
    time = torch.arange(writes, device=ids.device).view(length, len(orders))
    nowhere = rows  # one more slot
    key, order = (torch.where(entered, slot[:, :-1], nowhere) * writes + time).flatten(1).sort(1)
    value = (tag[:, :-1] << TAG_AT | ids.unsqueeze(-1)).flatten(1).gather(1, order)
    own = key // writes
    old = torch.cat([entries, entries.new_zeros(entries.shape[0], 1)], 1)
    initial = old.gather(1, own)
    changes = own[:, 1:] != own[:, :-1]
    edge = torch.ones_like(own[:, :1], dtype=torch.bool)
    first, last = torch.cat([edge, changes], 1), torch.cat([changes, edge], 1)
    same = value == torch.where(first, initial & (1 << LEVEL_AT) - 1, value.roll(1, 1))
    index = torch.arange(writes, device=ids.device)
    begin = torch.where(first | ~same, index, 0).cummax(1).values  # of the run of equal tokens
    carried = torch.where(first & same, initial >> LEVEL_AT, 0).gather(1, begin)
    entry = (index - begin + 1 + carried).clamp(max=LEVELS - 1) << LEVEL_AT | value
    asked = (slot[:, 1:] * writes + ((position + 1) * len(orders)).unsqueeze(-1)).flatten(1)
    at = torch.searchsorted(key, asked) - 1
    there = (at >= 0) & (own.gather(1, at.clamp(min=0)) == slot[:, 1:].flatten(1))
    read = torch.where(there, entry.gather(1, at.clamp(min=0)), entries.gather(1, slot[:, 1:].flatten(1)))
    read = read.view_as(tag[:, 1:]) * entered
    level = torch.where(read >> TAG_AT & (1 << TAG_BITS) - 1 == tag[:, 1:], (read >> LEVEL_AT).clamp(min=0), 0)
    token = (read & (1 << TAG_AT) - 1) << 8 | SHARES
    after = old.scatter(1, torch.where(last, own, nowhere), entry)[:, :rows]
    return torch.stack([level, token * (level > 0)], dim=-1).int(), after.contiguous()


def unpacked(found: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows of level_vectors (M, O), rows of token_vectors (M, O, S), and shares (M, O, S) like gain."""
    orders = found.shape[1]
    first = torch.arange(0, len(gain), len(gain) // orders, device=found.device)
    return found[..., 0] + first, (found[..., 1:] >> 8).long(), ((found[..., 1:] & 255) / SHARES).to(gain.dtype)


def ngram_sum_forward(
    found: Tensor, gain: Tensor, level_vectors: Tensor, token_vectors: Tensor, scale: Tensor
) -> Tensor:
    level, tokens, shares = unpacked(found, gain)
    weights = (shares * gain[level].unsqueeze(-1)).flatten(0, 1)
    sums = F.embedding_bag(tokens.flatten(0, 1), token_vectors, mode="sum", per_sample_weights=weights)
    return (sums.view(*level.shape, sums.shape[-1]) * scale).sum(1) + F.embedding_bag(level, level_vectors, mode="sum")


def ngram_sum_backward(
    grad: Tensor, found: Tensor, gain: Tensor, token_vectors: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of gain, level_vectors, token_vectors and scale, order by order."""
    level, tokens, shares = unpacked(found, gain)
    d_gain, d_tokens, d_scale = (torch.zeros_like(x) for x in (gain, token_vectors, scale))
    d_levels = gain.new_zeros(len(gain), token_vectors.shape[1])
    for o in range(level.shape[1]):
        at, share, own = level[:, o], shares[:, o].unsqueeze(-1), gain[level[:, o]].unsqueeze(-1)
        sums = (share * token_vectors[tokens[:, o]]).sum(1)
        scaled = grad * scale[o]
        d_gain.index_add_(0, at, (scaled * sums).sum(1))
        d_levels.index_add_(0, at, grad)
        d_tokens.index_add_(0, tokens[:, o].flatten(), (share * (own * scaled).unsqueeze(1)).flatten(0, 1))
        d_scale[o] = (grad * own * sums).sum(0)
    return d_gain, d_levels, d_tokens, d_scale
