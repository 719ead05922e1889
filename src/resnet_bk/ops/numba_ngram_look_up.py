"""The numba kernels of the look-ups of n-gram memory, see :mod:`resnet_bk.ops.ngram_look_up`.

Dimensions: B batch, N positions, O orders, S successors of an entry, R entries of a table.
"""

from collections.abc import Sequence

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

from resnet_bk.jit import TASKS, jit
from resnet_bk.jit.hashing import longer, place
from resnet_bk.ngram_format import LEVEL_AT, LEVELS, SHARES, TAG_AT, TAG_BITS
from resnet_bk.ops.numba_arrays import arrays

TAGS, VALUES, TOKENS = (1 << TAG_BITS) - 1, (1 << LEVEL_AT) - 1, (1 << TAG_AT) - 1


@numba.njit(forceinline=True)
def _contexts(tokens, end, orders, rows, slot, tag):
    """Compute slot and tag of the n-grams of each order that end with tokens[end]."""
    key, o = np.int64(0), 0
    for n in range(1, orders[-1] + 1):
        key = longer(key, tokens[end + 1 - n])
        if orders[o] == n:
            slot[o], tag[o] = place(key, rows)
            o += 1


@jit
def _find(window, entries, orders, found):
    batch, length, _, columns = found.shape
    rows = len(entries)
    for task in prange(TASKS):
        slot, tag = np.empty_like(orders), np.empty_like(orders)
        for p in range(task * batch * length // TASKS, (task + 1) * batch * length // TASKS):
            b, t = p // length, p % length
            _contexts(window[b], t + orders[-1] - 1, orders, rows, slot, tag)
            for o in range(len(orders)):  # no branch depends on an entry, so that the processor fetches many at once
                entry = entries[slot[o]]
                here = np.int32(entry[0] >> 8 == tag[o])
                found[b, t, o, 0] = here * (entry[0] & 255)
                for s in range(1, columns):
                    found[b, t, o, s] = here * entry[s]


@jit
def _recent(window, lengths, orders, entries, found):
    for b in prange(len(window)):
        slot, tag = np.empty_like(orders), np.empty_like(orders)
        tokens, table = window[b], entries[b]
        _contexts(tokens, orders[-1] - 1, orders, len(table), slot, tag)
        for t in range(lengths[b]):
            end = t + orders[-1]
            for o in range(len(orders)):
                value = tag[o] << TAG_AT | tokens[end] - 1
                times = table[slot[o]] >> LEVEL_AT if table[slot[o]] & VALUES == value else 0
                table[slot[o]] = min(times + 1, LEVELS - 1) << LEVEL_AT | value
            _contexts(tokens, end, orders, len(table), slot, tag)
            for o in range(len(orders)):
                entry = table[slot[o]]
                if entry >> LEVEL_AT > 0 and entry >> TAG_AT & TAGS == tag[o]:
                    found[b, t, o, 0] = entry >> LEVEL_AT
                    found[b, t, o, 1] = (entry & TOKENS) << 8 | SHARES


def find_ngrams(window: Tensor, entries: Tensor, orders: Sequence[int]) -> Tensor:
    shape = window.shape[0], window.shape[1] - orders[-1] + 1, len(orders), entries.shape[1]
    found = entries.new_empty(shape)
    _find(*arrays(window, entries), np.array(orders), *arrays(found))
    return found


def recent_ngrams(window: Tensor, lengths: Tensor, entries: Tensor, orders: Sequence[int]) -> tuple[Tensor, Tensor]:
    shape = window.shape[0], window.shape[1] - orders[-1], len(orders), 2
    found = window.new_zeros(shape, dtype=torch.int32)
    after = entries.clone(memory_format=torch.contiguous_format)
    _recent(*arrays(window, lengths), np.array(orders), *arrays(after, found))
    return found, after
