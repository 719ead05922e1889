"""The hash of n-grams in numba kernels, the same as :func:`resnet_bk.ops.chunked_ngrams.slots` computes."""

import numba
import numpy as np

from resnet_bk.ngram_format import HASH_BITS, MIX, STEP, TAG_BITS


@numba.njit(forceinline=True)
def longer(key, token):
    """Return the key of an n-gram with one more token before it; token: its id plus 1, 0 before the start of a text."""
    return (key + token + 1) * np.int64(STEP)  # arithmetic modulo 2^64


@numba.njit(forceinline=True)
def place(key, rows):
    """Return slot and tag of an n-gram in a table."""
    mixed = (key ^ (key >> 29)) * np.int64(MIX)
    return ((mixed >> 32 & (1 << HASH_BITS) - 1) * rows) >> HASH_BITS, mixed >> 12 & (1 << TAG_BITS) - 1
