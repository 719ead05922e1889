"""The numba kernel of the sums of n-gram memory, see :mod:`resnet_bk.ops.ngram_sum`.

Dimensions: M positions, O orders, S tokens of an entry, D width.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from resnet_bk.jit import TASKS, jit
from resnet_bk.ops import chunked
from resnet_bk.ops.numba_arrays import arrays

LARGEST = 2**18  # numbers in token_vectors; each task sums a gradient of its own


@jit
def _forward(level, tokens, shares, gain, level_vectors, token_vectors, scale, y):
    positions, orders, successors = tokens.shape
    width = token_vectors.shape[1]
    for task in prange(TASKS):
        sums = np.empty(width, token_vectors.dtype)
        for m in range(task * positions // TASKS, (task + 1) * positions // TASKS):
            for j in range(width):
                y[m, j] = 0
            for o in range(orders):
                at = level[m, o]
                for j in range(width):
                    sums[j] = 0
                for s in range(successors):
                    share = shares[m, o, s]
                    if share != 0:
                        token = tokens[m, o, s]
                        for j in range(width):
                            sums[j] += share * token_vectors[token, j]
                for j in range(width):
                    y[m, j] += level_vectors[at, j] + scale[o, j] * gain[at] * sums[j]


@jit
def _backward(grad, level, tokens, shares, gain, token_vectors, scale, d_gain, d_levels, d_tokens, d_scale):
    positions, orders, successors = tokens.shape
    width = token_vectors.shape[1]
    for task in prange(TASKS):
        sums = np.empty(width, token_vectors.dtype)
        scaled = np.empty(width, token_vectors.dtype)
        for m in range(task * positions // TASKS, (task + 1) * positions // TASKS):
            for o in range(orders):
                at = level[m, o]
                for j in range(width):
                    sums[j] = 0
                    scaled[j] = grad[m, j] * scale[o, j]
                    d_levels[task, at, j] += grad[m, j]
                for s in range(successors):
                    share = shares[m, o, s]
                    if share != 0:
                        token = tokens[m, o, s]
                        weight = share * gain[at]
                        for j in range(width):
                            sums[j] += share * token_vectors[token, j]
                            d_tokens[task, token, j] += weight * scaled[j]
                for j in range(width):
                    d_gain[task, at] += scaled[j] * sums[j]
                    d_scale[task, o, j] += grad[m, j] * gain[at] * sums[j]


def _fits(token_vectors: Tensor) -> bool:
    return token_vectors.dtype in (torch.float32, torch.float64) and token_vectors.numel() <= LARGEST


def ngram_sum_forward(
    level: Tensor,
    tokens: Tensor,
    shares: Tensor,
    gain: Tensor,
    level_vectors: Tensor,
    token_vectors: Tensor,
    scale: Tensor,
) -> Tensor:
    parameters = gain, level_vectors, token_vectors, scale
    if not _fits(token_vectors):
        return chunked.ngram_sum_forward(level, tokens, shares, *parameters)
    for rows, x in ((level, level_vectors), (tokens, token_vectors)):
        if rows.min() < 0 or rows.max() >= len(x):  # the kernel would read beyond the end
            raise IndexError(f"ngram_sum: expected rows from 0 to {len(x) - 1}, got {rows.min()} to {rows.max()}")
    y = token_vectors.new_empty(len(level), token_vectors.shape[1])
    # clone: once numpy holds the storage of a parameter, sharding can no longer free it
    _forward(*arrays(level, tokens, shares, *(x.clone() for x in parameters), y))
    return y


def ngram_sum_backward(
    grad: Tensor, level: Tensor, tokens: Tensor, shares: Tensor, gain: Tensor, token_vectors: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not _fits(token_vectors):
        return chunked.ngram_sum_backward(grad, level, tokens, shares, gain, token_vectors, scale)
    parts = [gain.new_zeros(TASKS, len(gain), *shape) for shape in ((), token_vectors.shape[1:])]
    parts += [x.new_zeros(TASKS, *x.shape) for x in (token_vectors, scale)]
    _backward(*arrays(grad, level, tokens, shares, gain.clone(), token_vectors.clone(), scale.clone(), *parts))
    d_gain, d_levels, d_tokens, d_scale = (torch.sum(x, 0) for x in parts)
    return d_gain, d_levels, d_tokens, d_scale
