"""The one primitive of adaptive compute: select positions, pack them, run a layer on them, merge the results back.

Dimensions: B batch, N positions, M packed length.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 16  # a matrix product rounds the rows of its last, partial tile differently; packed lengths are multiples of it


def packed_width(counts: Tensor, tile: int, bound: int | None = None) -> int:
    """Return the packed length M, a multiple of `tile` and at least 1.

    Args:
        counts: (B,) int64, number of selected positions of each row.
        tile: M is rounded up to a multiple of it.
        bound: capacity in positions, which replaces the largest count and saves the host-device sync that reads it.
    """
    most = int(counts.max()) if bound is None else bound
    return -(-max(1, most) // tile) * tile


class Packing:
    """The selected positions of each row, moved to the front of the row in their order; other positions are cut off.

    Attributes:
        selected: (B, N) bool, the argument.
        counts: (B,) int64, number of selected positions of each row.
        mask: (B, M) bool, True for selected positions, False for the positions that fill up a row.
        index: (B, M) int64, rows of ``x.flatten(0, 1)``; the first position of a row fills it up.
        length: N, the length before packing.
        tile, bound: the arguments.
    """

    def __init__(self, selected: Tensor, tile: int = 1, bound: int | None = None):
        """Prepare the packing of the selected positions.

        Args:
            selected: (B, N) bool, True for the positions to pack.
            tile: M is a multiple of it where N > 1, so that the rounding of matrix products does not depend on how many
                positions are selected.
            bound: capacity in positions. M then does not depend on the selection, which saves a host-device sync.

        Raises:
            RuntimeError: a row selects more positions than the capacity. On a GPU an assertion on the device stops the
                program later.
        """
        batch, self.length = selected.shape
        self.selected = selected
        self.tile = tile if self.length > 1 else 1
        self.bound = bound
        self.counts = selected.sum(1)
        width = packed_width(self.counts, self.tile, None if bound is None else min(bound, self.length))
        if bound is not None and (torch.compiler.is_exporting() or width < self.length):
            torch._assert_async(
                (self.counts <= width).all(),
                "more positions selected than capacity allows: raise bound, or leave it out",
            )
        self.mask = torch.arange(width, device=selected.device) < self.counts.unsqueeze(1)
        position = torch.arange(batch * self.length, device=selected.device).view(batch, self.length)
        column = torch.where(selected, selected.cumsum(1) - 1, width)  # the last one takes what is not selected
        index = position[:, :1].repeat(1, width + 1).scatter(1, column, position)
        self.index = index[:, :width]

    def width(self, counts: Tensor) -> int:
        """Return the packed length that rows with these counts (R,) need."""
        return packed_width(counts, self.tile)

    def pack(self, x: Tensor) -> Tensor:
        """Pack x, (B, N, ...) -> (B, M, ...). Where the mask is False, the result has no meaning."""
        return x.flatten(0, 1).index_select(0, self.index.flatten()).unflatten(0, self.index.shape)

    def merge(self, packed: Tensor, base: Tensor | None = None) -> Tensor:
        """Merge packed (B, M, ...) into base (B, N, ...): the selected positions get the packed values.

        The other positions keep the value of `base`, or 0 without one.
        """
        if base is None:
            base = packed.new_zeros(packed.shape[0], self.length, *packed.shape[2:])
        flat = base.flatten(0, 1)
        nowhere = flat.shape[0]  # one more row, for the positions that fill up rows
        index = torch.where(self.mask, self.index, nowhere).flatten()
        table = F.pad(flat, [0, 0] * (flat.dim() - 1) + [0, 1])
        return table.index_copy(0, index, packed.flatten(0, 1))[:nowhere].view_as(base)


def capacity(share: float | None, positions: int) -> int | None:
    """Return a share of `positions`, in millionths, rounded up; None, which means no cap, where the share is None.

    While torch exports a program, None counts as 1, because shapes must not depend on the text.
    """
    if share is None and not torch.compiler.is_exporting():
        return None
    millionths = 1_000_000 if share is None else math.ceil(round(share * 1_000_000, 3))
    return -(-positions * millionths // 1_000_000)  # in integers, which torch.export.save can write
