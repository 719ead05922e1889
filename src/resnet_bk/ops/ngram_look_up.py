"""The look-ups of n-gram memory, in a table of counts and in one of the sequence so far, as registered operators.

See :mod:`resnet_bk.ngram_format` for the tables and for what is found. A *window* holds the tokens of which n-grams are
made: ids plus 1 of the N positions and of those before them, 0 before the start of a text.

Dimensions: B batch, N positions, O orders, S successors of an entry, R entries of a table.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_bk.ops.kernels import backend_for


@torch.library.custom_op("resnet_bk::find_ngrams", mutates_args=())
def find_ngrams(window: Tensor, entries: Tensor, orders: Sequence[int]) -> Tensor:
    """Return what a table has about the n-grams that end at each position, (B, N, O, 1 + S) int32.

    Args:
        window: (B, max(orders) - 1 + N) int64.
        entries: (R, 1 + S) int32, a table of counts.
        orders: numbers of tokens, in ascending order.
    """
    return backend_for(entries).find_ngrams(window, entries, orders)


@find_ngrams.register_fake
def _(window, entries, orders) -> Tensor:
    positions = window.shape[1] - max(orders) + 1
    return entries.new_empty(window.shape[0], positions, len(orders), entries.shape[1])


@torch.library.custom_op("resnet_bk::recent_ngrams", mutates_args=())
def recent_ngrams(window: Tensor, lengths: Tensor, entries: Tensor, orders: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Enter each token as what followed the n-grams before it, then look up those that end with it.

    Args:
        window: (B, max(orders) + N) int64.
        lengths: (B,) int64, number of tokens of each row; padding comes after them.
        entries: (B, R) int64, the table of each row before the first position.
        orders: numbers of tokens, in ascending order. Where two contexts hash to one slot, the later one overwrites the
            earlier one.

    Returns:
        (B, N, O, 2) int32, what was found, 0 at padding; and the table after the last position.
    """
    return backend_for(entries).recent_ngrams(window, lengths, entries, orders)


@recent_ngrams.register_fake
def _(window, lengths, entries, orders) -> tuple[Tensor, Tensor]:
    found = window.new_empty(window.shape[0], window.shape[1] - max(orders), len(orders), 2, dtype=torch.int32)
    return found, entries.new_empty(entries.shape)
