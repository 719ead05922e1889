"""Counts of n-grams: what followed the last few tokens in a text, in one hashed table.

See :mod:`resnet_bk.ngram_format` for an entry of the table. Contexts of all orders share the table. Where
several have one slot, the most frequent one keeps it.

Dimensions: T tokens of a text, S successors of an entry.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from resnet_bk.ngram_format import LEVELS, SHARES, TAG_BITS
from resnet_bk.ops.chunked_ngrams import slots

CHUNK = 2**15  # tokens that are hashed at a time: the numbers stay in the cache, and torch uses one thread
PART = 2**26  # tokens that are sorted at a time; counting needs about 50 bytes for each


def count(
    ids: np.ndarray, orders: Sequence[int], rows: int, successors: int, chosen: np.ndarray | None = None
) -> Tensor:
    """Return the table of a text, (rows, 1 + successors) int32.

    Args:
        ids: (T,) token ids below 2^23, two or more.
        orders: lengths n of the n-grams.
        rows: number of entries for all orders, at most 2^24.
        successors: number of tokens that an entry holds, the most frequent ones; of those as frequent, the smallest.
        chosen: (T,) bool, False for tokens that are not counted as what follows; default: all are.
    """
    bits, parts = int(ids.max()).bit_length(), -(-len(ids) // PART)
    entries, best = np.zeros((rows, 1 + successors), np.int32), np.zeros(rows, np.int64)
    for n in orders:
        for part in range(parts):
            packed = np.concatenate([np.empty(0, np.int64), *_packed(ids, n, rows, bits, chosen, part, parts)])
            packed.sort()
            if len(packed):
                _enter(packed, bits, entries, best)
    return torch.from_numpy(entries)


def _packed(
    ids: np.ndarray, n: int, rows: int, bits: int, chosen: np.ndarray | None, part: int, parts: int
) -> Iterator[np.ndarray]:
    """Yield slot, tag and next token of the counted positions as one number each, for one of equal parts of the slots.

    bits: of the next token.
    """
    for begin in range(0, len(ids) - n, CHUNK):
        chunk = torch.from_numpy(ids[begin : begin + CHUNK + n].astype(np.int64))
        slot, tag = next(slots(chunk[:-1] + 1, (n,), rows))
        packed = ((slot << TAG_BITS | tag) << bits | chunk[n:]).numpy()
        own = (slot * parts // rows == part).numpy() if parts > 1 else np.ones(len(packed), bool)
        if chosen is not None:
            own &= chosen[begin + n : begin + n + len(packed)]
        yield packed[own]


def _enter(packed: np.ndarray, bits: int, entries: np.ndarray, best: np.ndarray) -> None:
    """Enter the contexts of one order that occurred more often than what their slots have.

    With one context of slot 7 and tag 2, after which token 5 followed twice and token 9 once, `packed` has three
    numbers, (7, 2, 5), (7, 2, 5) and (7, 2, 9); the context has a total of 3 and 2 kinds.

    Args:
        packed: (M,) int64, see :func:`_packed`, in ascending order.
        bits: of a token.
        entries, best: (rows, 1 + S) the table, and (rows,) int64 the totals of its contexts; changed in place.
    """
    first = _starts(packed)
    counts, packed = np.diff(first, append=len(packed)), packed[first]
    key, token = packed >> bits, packed & (1 << bits) - 1
    first = _starts(key)
    total, kinds = np.add.reduceat(counts, first), np.diff(first, append=len(key))
    slot, tag = key[first] >> TAG_BITS, key[first] & (1 << TAG_BITS) - 1
    total = np.minimum(total, 2**30)  # so that products of two fit
    chosen = _most_frequent(slot, total)
    chosen &= total > best[slot]
    inside = np.repeat(chosen, kinds)
    slot, tag, total, kinds = (x[chosen] for x in (slot, tag, total, kinds))
    best[slot] = total
    entries[slot, 0] = tag << 8 | np.minimum(1 + np.log2(total * total).astype(np.int64), LEVELS - 1)
    rank = counts[inside] << bits | (1 << bits) - 1 - token[inside]
    entries[slot, 1:] = _successors(rank, kinds, total, bits, entries.shape[1] - 1)


def _most_frequent(slot: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return True for one context of each slot, the first of those with the largest total. Slots are in order."""
    ranked = total << 32 | np.arange(len(total))[::-1]
    chosen = np.zeros(len(total), bool)
    chosen[len(total) - 1 - (np.maximum.reduceat(ranked, _starts(slot)) & (1 << 32) - 1)] = True
    return chosen


def _successors(rank: np.ndarray, kinds: np.ndarray, total: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return the `count` most frequent tokens of each context with their shares, as in the table, (contexts, count).

    rank: what followed each context, as ``count << bits | 2^bits - 1 - token``; changed in place. kinds: how many of
    them each context has.
    """
    first, columns = np.cumsum(kinds) - kinds, []
    for _ in range(count):
        top = np.maximum.reduceat(rank, first) if len(first) else rank
        often, token = top >> bits, (1 << bits) - 1 - (top & (1 << bits) - 1)
        columns.append(np.where(often > 0, token << 8 | -(-SHARES * often // (total + kinds)), 0))
        rank[rank == np.repeat(top, kinds)] = 0
    return np.stack(columns, axis=-1)


def _starts(x: np.ndarray) -> np.ndarray:
    """Return where the runs of equal values of x begin."""
    return np.flatnonzero(np.concatenate([[True], x[1:] != x[:-1]]))
