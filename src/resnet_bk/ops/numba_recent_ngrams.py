"""The numba kernel of recent n-grams, see :mod:`resnet_bk.ops.recent_ngrams`.

Dimensions: B batch, N positions, O orders, R entries of the table.
"""

import torch
from numba import prange
from torch import Tensor

from resnet_bk.jit import jit
from resnet_bk.ngram_format import LEVEL_AT, LEVELS, TAG_AT, TAG_BITS
from resnet_bk.ops.numba_arrays import arrays

TAGS, VALUES, TOKENS = (1 << TAG_BITS) - 1, (1 << LEVEL_AT) - 1, (1 << TAG_AT) - 1


@jit
def _recent_ngrams(slot, tag, ids, lengths, entries, level, token):
    batch, _, orders = slot.shape
    for b in prange(batch):
        for t in range(lengths[b]):
            for o in range(orders):
                at, value = slot[b, t, o], tag[b, t, o] << TAG_AT | ids[b, t]
                times = entries[b, at] >> LEVEL_AT if entries[b, at] & VALUES == value else 0
                entries[b, at] = min(times + 1, LEVELS - 1) << LEVEL_AT | value
            for o in range(orders):
                entry = entries[b, slot[b, t + 1, o]]
                if entry >> TAG_AT & TAGS == tag[b, t + 1, o]:
                    level[b, t, o] = entry >> LEVEL_AT
                    token[b, t, o] = entry & TOKENS


def recent_ngrams(
    slot: Tensor, tag: Tensor, ids: Tensor, lengths: Tensor, entries: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    level = torch.zeros_like(slot[:, 1:], memory_format=torch.contiguous_format)
    token, after = torch.zeros_like(level), entries.clone(memory_format=torch.contiguous_format)
    _recent_ngrams(*arrays(slot, tag, ids, lengths, after, level, token))
    return level, token, after
