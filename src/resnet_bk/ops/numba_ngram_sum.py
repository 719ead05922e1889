"""The numba kernel of the sums of n-gram memory, see :mod:`resnet_bk.ops.ngram_sum`.

Dimensions: M positions, O orders, S tokens of an entry, D width, which fills whole registers.
"""

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.jit import TASKS, jit
from resnet_bk.jit.simd import LANE_BYTES, load, splat, store, total
from resnet_bk.ngram_format import SHARES
from resnet_bk.ops import chunked_ngrams
from resnet_bk.ops.numba_arrays import arrays

LARGEST = 2**18  # numbers in token_vectors; each task sums a gradient of its own


@numba.njit(forceinline=True)
def _unpack(found, levels, tokens, token, share):
    """Write the tokens and shares that an entry found (1 + S,) has, and return their number.

    It is -1 if the level is not below `levels`, or a token not below `tokens`.
    """
    if not 0 <= found[0] < levels:
        return -1
    count = 0
    for s in range(1, len(found)):
        part = found[s] & 255
        if part:
            if not 0 <= found[s] >> 8 < tokens:
                return -1
            token[count], share[count] = found[s] >> 8, np.float32(part) / np.float32(SHARES)
            count += 1
    return count


@jit
def _forward(found, gain, level_vectors, token_vectors, scale, y, wrong):
    positions, orders, columns = found.shape
    levels, (tokens, width) = len(gain) // orders, token_vectors.shape
    lanes = LANE_BYTES // y.itemsize
    for task in prange(TASKS):
        token, share = np.empty(columns, np.int64), np.empty(columns, y.dtype)
        for m in range(task * positions // TASKS, (task + 1) * positions // TASKS):
            for o in range(orders):
                count = _unpack(found[m, o], levels, tokens, token, share)
                if count < 0:
                    wrong[task] = 1
                    continue
                at = o * levels + found[m, o, 0]
                for j in range(0, width, lanes):
                    sums = load(level_vectors, at * width + j)
                    if count:
                        own = splat(share[0]) * load(token_vectors, token[0] * width + j)
                        for s in range(1, count):
                            own += splat(share[s]) * load(token_vectors, token[s] * width + j)
                        sums += splat(gain[at]) * load(scale, o * width + j) * own
                    if o:
                        sums += load(y, m * width + j)
                    store(y, m * width + j, sums)


@jit
def _backward(grad, found, gain, token_vectors, scale, d_gain, d_levels, d_tokens, d_scale):
    positions, orders, columns = found.shape
    levels, (tokens, width) = len(gain) // orders, token_vectors.shape
    lanes = LANE_BYTES // grad.itemsize
    for task in prange(TASKS):
        token, share = np.empty(columns, np.int64), np.empty(columns, grad.dtype)
        zero = splat(grad.dtype.type(0))
        levels_at, tokens_at = task * len(gain) * width, task * tokens * width
        for m in range(task * positions // TASKS, (task + 1) * positions // TASKS):
            for o in range(orders):
                count = _unpack(found[m, o], levels, tokens, token, share)
                if count < 0:
                    continue
                at, of_gain = o * levels + found[m, o, 0], zero
                for j in range(0, width, lanes):
                    g, place = load(grad, m * width + j), levels_at + at * width + j
                    store(d_levels, place, load(d_levels, place) + g)
                    if not count:
                        continue
                    scaled = g * load(scale, o * width + j)
                    weighted = splat(gain[at]) * scaled
                    sums = zero
                    for s in range(count):
                        part = splat(share[s])
                        sums += part * load(token_vectors, token[s] * width + j)
                        place = tokens_at + token[s] * width + j
                        store(d_tokens, place, load(d_tokens, place) + part * weighted)
                    of_gain += scaled * sums
                    place = (task * orders + o) * width + j
                    store(d_scale, place, load(d_scale, place) + splat(gain[at]) * g * sums)
                d_gain[task, at] += total(of_gain)


def _fits(token_vectors: Tensor) -> bool:
    return token_vectors.dtype in (torch.float32, torch.float64) and token_vectors.numel() <= LARGEST


def _whole_registers(x: Tensor) -> Tensor:
    """Return a copy of x (..., D) with zeros up to whole registers.

    It must be a copy: once numpy holds the storage of a parameter, sharding can no longer free it.
    """
    return F.pad(x, (0, -x.shape[-1] % (LANE_BYTES // x.itemsize)))  # which copies without padding, too


def ngram_sum_forward(
    found: Tensor, gain: Tensor, level_vectors: Tensor, token_vectors: Tensor, scale: Tensor
) -> Tensor:
    if not _fits(token_vectors):
        return chunked_ngrams.ngram_sum_forward(found, gain, level_vectors, token_vectors, scale)
    vectors = [_whole_registers(x) for x in (level_vectors, token_vectors, scale)]
    y, wrong = vectors[0].new_empty(len(found), vectors[0].shape[1]), gain.new_zeros(TASKS)
    _forward(*arrays(found, gain.clone(), *vectors, y, wrong))
    if wrong.any():
        levels, tokens = len(gain) // found.shape[1], len(token_vectors)
        raise IndexError(f"ngram_sum: expected levels below {levels} and tokens below {tokens}")
    return y[:, : token_vectors.shape[1]].contiguous()


def ngram_sum_backward(
    grad: Tensor, found: Tensor, gain: Tensor, token_vectors: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _fits(token_vectors):
        return chunked_ngrams.ngram_sum_backward(grad, found, gain, token_vectors, scale)
    width = token_vectors.shape[1]
    grad, token_vectors, scale = (_whole_registers(x) for x in (grad, token_vectors, scale))
    parts = [
        gain.new_zeros(TASKS, *shape)
        for shape in (gain.shape, (len(gain), grad.shape[1]), token_vectors.shape, scale.shape)
    ]
    _backward(*arrays(grad, found, gain.clone(), token_vectors, scale, *parts))
    d_gain, *others = (torch.sum(x, 0) for x in parts)
    d_levels, d_tokens, d_scale = (x[:, :width].contiguous() for x in others)
    return d_gain, d_levels, d_tokens, d_scale
