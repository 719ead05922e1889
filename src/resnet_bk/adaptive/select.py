"""The one primitive of adaptive compute: select the positions that go on, pack them, run, merge back.

Dimensions: B batch, N positions, M positions kept by the fullest row.
"""

import torch
from torch import Tensor


class Packing:
    """Selected positions of each row moved to its front, order kept, and cut to the fullest row's count M.

    counts: (B,) int64, selected positions of each row.
    mask: (B, M) bool, True for the selected positions: what the packed computation may look at.
    """

    def __init__(self, keep: Tensor, tile: int = 1):
        """keep: (B, N) bool. tile: M is rounded up to a multiple of it, unless it is 1."""
        batch, self.length = keep.shape
        self.counts = keep.sum(1)
        width = max(1, int(self.counts.max()))
        width = width if width == 1 else -(-width // tile) * tile
        self.mask = torch.arange(width, device=keep.device) < self.counts.unsqueeze(1)
        position = torch.arange(batch * self.length, device=keep.device)[keep.flatten()]
        # rows of x.flatten(0, 1); where a row has nothing more to select, its first position stands in
        first = torch.arange(batch, device=keep.device).unsqueeze(1) * self.length
        self.index = first.expand(-1, width).masked_scatter(self.mask, position)

    def pack(self, x: Tensor) -> Tensor:
        """(B, N, ...) -> (B, M, ...); rows with fewer than M selected positions end in positions to ignore."""
        return x.flatten(0, 1).index_select(0, self.index.flatten()).unflatten(0, self.index.shape)

    def merge(self, packed: Tensor, base: Tensor | None = None) -> Tensor:
        """(B, M, ...) -> (B, N, ...): selected positions take the packed values, the others `base` (default 0)."""
        if base is None:
            base = packed.new_zeros(packed.shape[0], self.length, *packed.shape[2:])
        selected = self.mask.flatten()
        merged = base.flatten(0, 1).index_copy(0, self.index.flatten()[selected], packed.flatten(0, 1)[selected])
        return merged.view_as(base)
