"""The one primitive of adaptive compute: select what goes on, pack it, run, merge back.

Dimensions: B batch, N positions, M positions kept by the fullest row, or as many as capacity allows.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 16  # rows of a matrix product that are rounded alike; packed lengths are multiples of it


def packed_width(counts: Tensor, tile: int, bound: int | None = None) -> int:
    """Positions that rows need of which `counts` are selected, or that have room for `bound`, in whole tiles."""
    most = int(counts.max()) if bound is None else bound
    return -(-max(1, most) // tile) * tile


class Packing:
    """Selected positions of each row moved to its front, order kept, and cut to the fullest row's count M.

    counts: (B,) int64, selected positions of each row.
    mask: (B, M) bool, True for the selected positions: what the packed computation may look at.
    """

    def __init__(self, keep: Tensor, tile: int = 1, bound: int | None = None):
        """keep: (B, N) bool. tile: M is rounded up to a multiple of it where N > 1, so that the rows of matrix products
        are rounded alike however many positions are selected. bound: room for at least so many positions, so that M
        does not depend on what is selected and the host need not wait to know it.

        Raises:
            RuntimeError: a row selects more than capacity allows. On a GPU its assertion stops the program later.
        """
        batch, self.length = keep.shape
        self.tile = tile if self.length > 1 else 1
        self.bound = bound
        self.counts = keep.sum(1)
        width = packed_width(self.counts, self.tile, None if bound is None else min(bound, self.length))
        if bound is not None and width < self.length:
            torch._assert_async(
                (self.counts <= width).all(),
                "more positions selected than capacity allows: raise bound, or leave it out",
            )
        self.mask = torch.arange(width, device=keep.device) < self.counts.unsqueeze(1)
        # rows of x.flatten(0, 1); where a row has nothing more to select, its first position stands in
        position = torch.arange(batch * self.length, device=keep.device).view(batch, self.length)
        place = torch.where(keep, keep.cumsum(1) - 1, width)
        index = position[:, :1].repeat(1, width + 1).scatter(1, place, position)
        self.index = index[:, :width]

    def width(self, counts: Tensor) -> int:
        """Positions that rows with these counts need."""
        return packed_width(counts, self.tile)

    def pack(self, x: Tensor) -> Tensor:
        """(B, N, ...) -> (B, M, ...); rows with fewer than M selected positions end in positions to ignore."""
        return x.flatten(0, 1).index_select(0, self.index.flatten()).unflatten(0, self.index.shape)

    def merge(self, packed: Tensor, base: Tensor | None = None) -> Tensor:
        """(B, M, ...) -> (B, N, ...): selected positions take the packed values, the others `base` (default 0)."""
        if base is None:
            base = packed.new_zeros(packed.shape[0], self.length, *packed.shape[2:])
        flat = base.flatten(0, 1)
        nowhere = len(flat)  # one row more, which takes what was not selected
        index = torch.where(self.mask, self.index, nowhere).flatten()
        table = F.pad(flat, [0, 0] * (flat.dim() - 1) + [0, 1])
        return table.index_copy(0, index, packed.flatten(0, 1))[:nowhere].view_as(base)


def capacity(share: float | None, positions: int) -> int | None:
    """Of so many positions, a share rounded up; None, where there is no share, is as many as needed."""
    return None if share is None else math.ceil(share * positions)
