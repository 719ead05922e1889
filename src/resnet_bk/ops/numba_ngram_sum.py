"""The numba kernel of the sums of n-gram memory, see :mod:`resnet_bk.ops.ngram_sum`.

Dimensions: M positions, O orders, S tokens of an entry, D width.
"""

import numpy as np
import torch
from numba import prange
from torch import Tensor

from resnet_bk.ops.numba_jit import arrays, jit

TASKS = 16  # their number decides in which order gradients are summed, so it does not depend on the threads


@jit
def _forward(level, tokens, shares, gain, vectors, table, scale, y):
    positions, orders, successors = tokens.shape
    width = table.shape[1]
    for task in prange(TASKS):
        sums = np.empty(width, table.dtype)
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
                            sums[j] += share * table[token, j]
                for j in range(width):
                    y[m, j] += vectors[at, j] + scale[o, j] * gain[at] * sums[j]


@jit
def _backward(grad, level, tokens, shares, gain, table, scale, d_gain, d_vectors, d_table, d_scale):
    positions, orders, successors = tokens.shape
    width = table.shape[1]
    for task in prange(TASKS):
        sums = np.empty(width, table.dtype)
        scaled = np.empty(width, table.dtype)
        for m in range(task * positions // TASKS, (task + 1) * positions // TASKS):
            for o in range(orders):
                at = level[m, o]
                for j in range(width):
                    sums[j] = 0
                    scaled[j] = grad[m, j] * scale[o, j]
                    d_vectors[task, at, j] += grad[m, j]
                for s in range(successors):
                    share = shares[m, o, s]
                    if share != 0:
                        token = tokens[m, o, s]
                        weight = share * gain[at]
                        for j in range(width):
                            sums[j] += share * table[token, j]
                            d_table[task, token, j] += weight * scaled[j]
                for j in range(width):
                    d_gain[task, at] += scaled[j] * sums[j]
                    d_scale[task, o, j] += grad[m, j] * gain[at] * sums[j]


def ngram_sum_forward(
    level: Tensor, tokens: Tensor, shares: Tensor, gain: Tensor, vectors: Tensor, table: Tensor, scale: Tensor
) -> Tensor:
    for rows, x in ((level, vectors), (tokens, table)):
        if rows.min() < 0 or rows.max() >= len(x):  # the kernel would read beyond the end
            raise IndexError(f"ngram_sum: expected rows from 0 to {len(x) - 1}, got {rows.min()} to {rows.max()}")
    y = table.new_empty(len(level), table.shape[1])
    # clone: once numpy holds the storage of a parameter, sharding can no longer free it
    parameters = (x.clone() for x in (gain, vectors, table, scale))
    _forward(*arrays(level, tokens, shares, *parameters, y))
    return y


def ngram_sum_backward(
    grad: Tensor,
    level: Tensor,
    tokens: Tensor,
    shares: Tensor,
    gain: Tensor,
    vectors: Tensor,
    table: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = [x.new_zeros(TASKS, *x.shape) for x in (gain, vectors, table, scale)]
    _backward(*arrays(grad, level, tokens, shares, gain.clone(), table.clone(), scale.clone(), *parts))
    d_gain, d_vectors, d_table, d_scale = (torch.sum(x, 0) for x in parts)
    return d_gain, d_vectors, d_table, d_scale
