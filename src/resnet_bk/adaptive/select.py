"""The one primitive of adaptive compute: select the positions that go on, pack them, run, merge back.

Dimensions: B batch, N positions, M positions kept by the fullest row.
"""

import torch
from torch import Tensor


class Packing:
    """Selected positions of each row moved to its front, order kept, and cut to the fullest row's count M.

    mask: (B, M) bool, True for the selected positions: what the packed computation may look at.
    """

    def __init__(self, keep: Tensor):
        """keep: (B, N) bool."""
        counts = keep.sum(1)
        width = max(1, int(counts.max()))
        self.length = keep.shape[1]
        self.index = (~keep).int().argsort(dim=1, stable=True)[:, :width]
        self.mask = torch.arange(width, device=keep.device) < counts.unsqueeze(1)

    def pack(self, x: Tensor) -> Tensor:
        """(B, N, ...) -> (B, M, ...); rows with fewer than M selected positions end in positions to ignore."""
        return x.gather(1, self._index_for(x))

    def merge(self, packed: Tensor, base: Tensor | None = None) -> Tensor:
        """(B, M, ...) -> (B, N, ...): selected positions take the packed values, the others `base` (default 0)."""
        if base is None:
            base = packed.new_zeros(packed.shape[0], self.length, *packed.shape[2:])
        index = self._index_for(packed)
        here = self.mask.view(*self.mask.shape, *[1] * (packed.dim() - 2))
        return base.scatter(1, index, torch.where(here, packed, base.gather(1, index)))

    def _index_for(self, x: Tensor) -> Tensor:
        return self.index.view(*self.index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
