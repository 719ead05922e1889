"""A table of what followed n-grams in the sequence so far, read and written token by token, as a registered operator.

See :mod:`resnet_bk.ngram_format` for its entries. Contexts of all orders share the table. The context of a slot
that came last has it.

Dimensions: B batch, N positions, O orders, R entries of the table.
"""

import torch
from torch import Tensor

from resnet_bk.ops.kernels import backend_for


@torch.library.custom_op("resnet_bk::recent_ngrams", mutates_args=())
def recent_ngrams(
    slot: Tensor, tag: Tensor, ids: Tensor, lengths: Tensor, entries: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Enter each token as what followed the contexts before it, then look up the contexts that end with it.

    Args:
        slot, tag: (B, 1 + N, O) int64, of the contexts that end before the first position, and at each position.
        ids: (B, N) int64, the tokens, below 2^24.
        lengths: (B,) int64, number of tokens of each row; padding comes after them.
        entries: (B, R) int64, the table of each row before the first position.

    Returns:
        (B, N, O) int64 each, the level and the token that were found, 0 where there is none and at padding; and the
        table after the last position.
    """
    return backend_for(entries).recent_ngrams(slot, tag, ids, lengths, entries)


@recent_ngrams.register_fake
def _(slot, tag, ids, lengths, entries) -> tuple[Tensor, Tensor, Tensor]:
    found = slot.new_empty(slot.shape[0], ids.shape[1], slot.shape[2])
    return found, found.clone(), entries.new_empty(entries.shape)
