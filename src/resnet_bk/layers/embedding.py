"""N-gram memory: vectors of their own for the last few tokens, looked up in hashed tables.

Dimensions: B batch, N positions, D model width, O orders, W width of a row.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.config import ModelConfig
from resnet_bk.layers.block import AdaptiveLayer, Tokens
from resnet_bk.layers.mixer import last_positions
from resnet_bk.ops.sequence_parallel import Pieces
from resnet_bk.record import Record

STEP, MIX = 0x5851F42D4C957F2D, 0x14057B7EF767814F  # odd 64-bit constants (Knuth's MMIX generator)


class NgramMemory(AdaptiveLayer):
    """Add to each position a row for each of the n-grams that end there, (B, N, D) -> (B, N, D).

    Every order has a table. An n-gram's row is its hash modulo the number of rows; n-grams that collide share a row.
    A forward pass costs the same with tables of any size. The gradient is as large as the tables. The idea is that of
    hashed n-gram embeddings in BLT (arXiv:2412.09871) and Engram (arXiv:2601.07372).
    """

    pieces: Pieces | None = None  # see Mixer

    def __init__(self, config: ModelConfig):
        super().__init__()
        memory = config.memory
        self.orders, self.rows = memory.orders, memory.rows
        self.reach = max(self.orders) - 1  # number of tokens before a position that its rows depend on
        width = memory.width or config.d_model
        self.table = nn.Parameter(torch.zeros(len(self.orders) * self.rows, width))
        self.project = nn.Identity() if width == config.d_model else nn.Linear(width, config.d_model, bias=False)

    def layout(self, x: Tensor) -> Tensor:
        """Return a state of sequences x (B, N, D), see :mod:`resnet_bk.layers.block`."""
        return torch.empty(len(x), self.reach, dtype=torch.int64, device=x.device)

    def forward(
        self, x: Tensor, tokens: Tokens, state: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Record]]:
        """Add the rows.

        The state is the last max(orders) - 1 ids plus 1, (B, max(orders) - 1) int64; 0 before the start of a sequence.
        """
        ids = tokens.ids + 1
        if state is None:
            state = ids.new_zeros(len(ids), self.reach)
        if self.pieces is not None:
            state = self.pieces.inputs(ids, self.reach)
        window = torch.cat([state, ids], dim=1)
        y = self.project(F.embedding(self.rows_of(window), self.table).sum(-2)).to(x.dtype)
        if mask is not None:
            y = y.masked_fill(~mask.unsqueeze(-1), 0)
        return x + y, last_positions(window, self.reach, mask), []

    def rows_of(self, window: Tensor) -> Tensor:
        """Return the rows (B, N, O) of the n-grams that end at each position, as indices of the table.

        window: (B, max(orders) - 1 + N) int64, the ids plus 1 of the positions and of those before them.
        """
        length = window.shape[1] - self.reach
        key = torch.zeros_like(window[:, self.reach :])
        rows: list[Tensor] = []
        for n in range(1, self.reach + 2):
            begin = self.reach + 1 - n
            key = (key + window[:, begin : begin + length] + 1) * STEP  # arithmetic modulo 2^64
            if n in self.orders:
                mixed = (key ^ (key >> 29)) * MIX
                rows.append((mixed ^ (mixed >> 32)).remainder(self.rows) + len(rows) * self.rows)
        return torch.stack(rows, dim=-1)
