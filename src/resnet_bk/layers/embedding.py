"""N-gram memory: what followed the last few tokens in the training text, looked up instead of computed.

Dimensions: B batch, N positions, D model width, O orders, S successors of an entry.
"""

import numpy as np
import torch
from torch import Tensor, nn

from resnet_bk.config import ModelConfig
from resnet_bk.layers import ngrams
from resnet_bk.layers.block import AdaptiveLayer, Tokens
from resnet_bk.layers.mixer import last_positions
from resnet_bk.layers.ngrams import Found
from resnet_bk.ops.ngram_sum import ngram_sum
from resnet_bk.ops.sequence_parallel import Pieces
from resnet_bk.record import Record


class NgramMemory(AdaptiveLayer):
    """Add to each position what followed its last n tokens in a text, (B, N, D) -> (B, N, D).

    For each order n, the entry of the last n tokens in a table (see :mod:`resnet_bk.layers.ngrams`) names the tokens
    that followed and their shares. The layer adds their vectors, weighted by share and by a learned gain, and a learned
    vector that says how often the n tokens occurred. The table is counted, not trained: by :meth:`count`, in seconds
    for a whole corpus. Before, it is empty, and the layer adds nothing.

    A model must not be trained on the text that its table was counted from: what followed is there to be read, so it
    would learn to trust the table more than it may on other text. Training therefore reads :attr:`held_back`, a table
    without the text of the step, if there is one.

    Engram (arXiv:2601.07372) and BLT (arXiv:2412.09871) look up trained vectors by n-gram; infini-gram
    (arXiv:2401.17377) counts what follows.

    Attributes:
        entries: the table, (rows, 1 + S) int32; saved with the model.
        held_back: a table that replaces `entries` in training mode; not saved. None: none.
    """

    pieces: Pieces | None = None  # see Mixer
    entries: Tensor
    held_back: Tensor | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        memory = config.memory
        self.orders, self.vocab_size = memory.orders, config.vocab_size
        self.reach = max(self.orders) - 1  # number of tokens before a position that its n-grams have
        self.register_buffer("entries", torch.zeros(memory.rows, 1 + memory.successors, dtype=torch.int32))
        self.sum = NgramSum(config)

    def layout(self, x: Tensor) -> Tensor:
        """Return a state of sequences x (B, N, D), see :mod:`resnet_bk.layers.block`."""
        return torch.empty(len(x), self.reach, dtype=torch.int64, device=x.device)

    def table(self, ids: np.ndarray, counted: np.ndarray | None = None) -> Tensor:
        """Return the table of a text for this layer. Arguments as for :func:`resnet_bk.layers.ngrams.count`."""
        rows, columns = self.entries.shape
        return ngrams.count(ids, self.orders, rows, columns - 1, counted)

    def count(self, ids: np.ndarray) -> None:
        """Replace the table by that of a text, (T,) token ids, two or more.

        Raises:
            ValueError: an id is outside the vocabulary, or the text has less than two tokens.
        """
        if len(ids) < 2 or ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"ids: expected two or more from 0 to {self.vocab_size - 1}")
        self.entries.copy_(self.table(ids))

    def resize(self, vocab_size: int) -> None:
        """Change the number of token ids: new ones get new vectors; ids that are gone leave the table."""
        old, self.vocab_size = self.sum.table, vocab_size
        new = old.new_empty(vocab_size, old.shape[1]).normal_(std=0.02)
        kept = min(len(old), vocab_size)
        new[:kept] = old.detach()[:kept]
        self.sum.table = nn.Parameter(new, requires_grad=old.requires_grad)
        self.entries[:, 1:][self.entries[:, 1:] >> 8 >= vocab_size] = 0

    def fits(self) -> bool:
        """Return True if every token in the table is one of the vocabulary."""
        successors = self.entries[:, 1:]
        return bool(successors.min() >= 0 and successors.max() >> 8 < self.vocab_size)

    def forward(
        self, x: Tensor, tokens: Tokens, state: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Record]]:
        """Add what the table has.

        The state is the last max(orders) - 1 ids plus 1, (B, max(orders) - 1) int64; 0 before the start of a sequence.
        """
        ids = tokens.ids + 1
        if state is None:
            state = ids.new_zeros(len(ids), self.reach)
        if self.pieces is not None:
            state = self.pieces.inputs(ids, self.reach)
        window = torch.cat([state, ids], dim=1)
        entries = self.entries if self.held_back is None or not self.training else self.held_back
        found = ngrams.look_up(window, self.orders, entries)
        y = self.sum(found).to(x.dtype)
        if mask is not None:
            y = y.masked_fill(~mask.unsqueeze(-1), 0)
        return x + y, last_positions(window, self.reach, mask), []


class NgramSum(nn.Module):
    """Map what was found (B, N, O, S) to vectors (B, N, D), see :mod:`resnet_bk.ops.ngram_sum`.

    Attributes:
        table: (V, D), the vector of each token that followed.
        scale: (O, D), for each order, of the sum of these vectors.
        gain: (O LEVELS,), the same for each order and level, one number.
        vectors: (O LEVELS, D), added for each order and level.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        orders, width, levels = len(config.memory.orders), config.d_model, len(config.memory.orders) * ngrams.LEVELS
        self.flops = 2.0 * orders * config.memory.successors * width  # per position
        self.table = nn.Parameter(torch.empty(config.vocab_size, width).normal_(std=0.02))
        self.scale = nn.Parameter(torch.ones(orders, width))
        self.gain = nn.Parameter(torch.ones(levels))
        self.vectors = nn.Parameter(torch.zeros(levels, width))

    def forward(self, found: Found) -> Tensor:
        level = found.level + torch.arange(0, len(self.gain), ngrams.LEVELS, device=found.level.device)
        rows, shares = (level.flatten(0, 1), found.tokens.flatten(0, 1)), found.shares.flatten(0, 1)
        y = ngram_sum(*rows, shares.to(self.table.dtype), self.gain, self.vectors, self.table, self.scale)
        return y.unflatten(0, level.shape[:2])
