"""N-gram memory: what followed the last few tokens, looked up in counts of the training text and in the text so far.

Dimensions: B batch, N positions, D model width, V vocabulary, O orders, S successors of an entry.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from resnet_bk.checkpoint import CheckpointError
from resnet_bk.config import ModelConfig
from resnet_bk.layers import ngrams
from resnet_bk.layers.block import AdaptiveLayer, Tokens
from resnet_bk.layers.mixer import last_positions
from resnet_bk.ngram_format import LEVELS, TAG_BITS
from resnet_bk.ops.ngram_look_up import find_ngrams, recent_ngrams
from resnet_bk.ops.ngram_sum import ngram_sum
from resnet_bk.ops.sequence_parallel import Pieces
from resnet_bk.record import Record


class NgramMemory(AdaptiveLayer):
    """Add to each position a vector of what followed its last n tokens in a text, (B, N, D) -> (B, N, D).

    For each order n, the entry of the last n tokens in a table (see :mod:`resnet_bk.layers.ngrams`) has the tokens that
    followed and their shares. The layer adds a vector made of these. The table is counted, not trained: by
    :meth:`count`, in seconds for a whole corpus. Before, it is empty.

    A model must not be trained on the text that its table was counted from: what follows could be read there, so the
    model would learn to trust the table more than it may on other text. Training therefore reads ``held_back``, a
    table without the text of the step, if there is one.

    Engram (arXiv:2601.07372) and BLT (arXiv:2412.09871) look up trained vectors by n-gram; infini-gram
    (arXiv:2401.17377) counts what follows.

    Attributes:
        entries: the table, (rows, 1 + S) int32; saved with the model.
        held_back: a table that replaces `entries` in training mode, or None; not saved.
    """

    pieces: Pieces | None = None  # see Mixer
    entries: Tensor
    held_back: Tensor | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        memory = config.memory
        self.orders, self.vocab_size = memory.orders, config.vocab_size
        self.reach = max(self.orders) - 1  # tokens that an n-gram has before its last one
        self.register_buffer("entries", torch.zeros(memory.rows, 1 + memory.successors, dtype=torch.int32))
        self.vectors = NgramVectors(config, len(memory.orders), memory.successors)

    def layout(self, x: Tensor) -> Tensor:
        """Return a state of sequences x (B, N, D), see :mod:`resnet_bk.layers.block`."""
        return torch.empty(len(x), self.reach, dtype=torch.int64, device=x.device)

    def counted(self, ids: np.ndarray, chosen: np.ndarray | None = None) -> Tensor:
        """Return the table of a text for this layer, on its device.

        Arguments as for :func:`resnet_bk.layers.ngrams.count`.

        Raises:
            ValueError: an id is outside the vocabulary, or the text has less than two tokens.
        """
        if len(ids) < 2 or ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"ids: expected two or more from 0 to {self.vocab_size - 1}")
        rows, columns = self.entries.shape
        return ngrams.count(ids, self.orders, rows, columns - 1, chosen).to(self.entries.device)

    def count(self, ids: np.ndarray) -> None:
        """Replace the table by that of a text, (T,) token ids. Training mode reads it too, until one is held back.

        Raises:
            ValueError: an id is outside the vocabulary, or the text has less than two tokens.
        """
        self.entries.copy_(self.counted(ids))
        self.held_back = None

    def resize(self, vocab_size: int) -> None:
        """Change the number of token ids: new ones get new vectors; ids that are gone leave the table."""
        self.vocab_size = vocab_size
        self.vectors.resize(vocab_size)
        self.entries[:, 1:][self.entries[:, 1:] >> 8 >= vocab_size] = 0

    def check_entries(self, where: str) -> None:
        """Raise CheckpointError unless the table, read from the file `where`, is one that :meth:`count` can make."""
        if self.entries.is_meta:
            return
        header, successors = self.entries[:, 0], self.entries[:, 1:]
        whole = self.entries.min() >= 0 and header.max() >> 8 < 2**TAG_BITS
        if not whole or (header & 255).max() >= LEVELS or successors.max() >> 8 >= self.vocab_size:
            raise CheckpointError(
                f"{where}: has entries that no text with a vocabulary of {self.vocab_size} has; it is damaged"
            )

    def forward(
        self, x: Tensor, tokens: Tokens, state: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Record]]:
        """Add what the table has.

        The state is the last max(orders) - 1 ids, each plus 1, (B, max(orders) - 1) int64; 0 before the start of a
        sequence.
        """
        ids = tokens.ids + 1
        if state is None:
            state = ids.new_zeros(len(ids), self.reach)
        if self.pieces is not None:
            state = self.pieces.inputs(ids, self.reach)
        window = torch.cat([state, ids], dim=1)
        entries = self.entries if self.held_back is None or not self.training else self.held_back
        y = self.vectors(find_ngrams(window, entries, self.orders)).to(x.dtype)
        if mask is not None:
            y = y.masked_fill(~mask.unsqueeze(-1), 0)
        return x + y, last_positions(state, ids, mask), []


class RecentState(NamedTuple):
    """State of recent n-grams.

    Attributes:
        ids: (B, max(orders)) int64, the last ids, each plus 1; 0 before the start of a sequence.
        entries: (B, R) int64, the table of each sequence, see :mod:`resnet_bk.ngram_format`.
    """

    ids: Tensor
    entries: Tensor


class RecentNgrams(AdaptiveLayer):
    """Add to each position a vector of what followed its last n tokens last time, (B, N, D) -> (B, N, D).

    For each order n, a table of the sequence so far has the token that followed the last time, and how many times in a
    row it was this one. The layer adds a vector made of these. An attention head that finds earlier occurrences of the
    last tokens and copies what followed, an induction head, has to be learned; this one does not (Akyurek et al. 2024,
    arXiv:2401.12973, hard-wire such heads into Transformers and recurrent models).
    """

    pieces: Pieces | None = None  # see Mixer

    def __init__(self, config: ModelConfig):
        super().__init__()
        memory = config.memory
        self.orders, self.rows = memory.recent, memory.recent_rows
        self.vectors = NgramVectors(config, len(memory.recent), 1)

    def layout(self, x: Tensor) -> RecentState:
        """Return a state of sequences x (B, N, D), see :mod:`resnet_bk.layers.block`."""
        sizes = max(self.orders), self.rows
        return RecentState(*(torch.zeros(len(x), n, dtype=torch.int64, device=x.device) for n in sizes))

    def resize(self, vocab_size: int) -> None:
        """Change the number of token ids: new ones get new vectors."""
        self.vectors.resize(vocab_size)

    def forward(
        self, x: Tensor, tokens: Tokens, state: RecentState | None, mask: Tensor | None
    ) -> tuple[Tensor, RecentState, list[Record]]:
        """Enter each token in the table, and add what the contexts that end with it find there."""
        ids = tokens.ids.long()
        past = self.layout(x) if state is None else state
        earlier = ids[:, :0] if self.pieces is None else self.pieces.before(ids)
        if earlier.shape[1]:
            _, past = self._look_up(earlier, past, None)
        found, state = self._look_up(ids, past, mask)
        y = self.vectors(found).to(x.dtype)
        if mask is not None:
            y = y.masked_fill(~mask.unsqueeze(-1), 0)
        return x + y, state, []

    def _look_up(self, ids: Tensor, past: RecentState, mask: Tensor | None) -> tuple[Tensor, RecentState]:
        """Return what each token finds, and the state after all of them."""
        window = torch.cat([past.ids, ids + 1], dim=1)
        lengths = torch.full_like(ids[:, 0], ids.shape[1]) if mask is None else mask.sum(1)
        found, entries = recent_ngrams(window, lengths, past.entries, self.orders)
        # A state may come from elsewhere: as in the engine, nothing beyond the vectors counts as found.
        level, token = found[..., :1], found[..., 1:] >> 8
        known = (level < LEVELS) & (token >= 0) & (token < len(self.vectors.token_vectors))
        found = torch.where(known, found, 0)
        return found, RecentState(last_positions(past.ids, ids + 1, mask), entries)


class NgramVectors(nn.Module):
    """Map what was found at (B, N) positions to vectors (B, N, D), see :mod:`resnet_bk.ops.ngram_sum`.

    Attributes:
        token_vectors: (V, D), of each token that followed; they are summed, weighted by shares and gains.
        gain: (O LEVELS,), for each order and level.
        scale: (O, D), a factor for each channel of the sum of each order.
        level_vectors: (O LEVELS, D), added for each order and level.
    """

    def __init__(self, config: ModelConfig, orders: int, successors: int):
        """Create the vectors. orders: O. successors: S."""
        super().__init__()
        width = config.d_model
        self.flops = 2.0 * orders * successors * width  # per position
        self.token_vectors = nn.Parameter(torch.empty(config.vocab_size, width).normal_(std=0.02))
        self.gain = nn.Parameter(torch.ones(orders * LEVELS))
        self.scale = nn.Parameter(torch.ones(orders, width))
        self.level_vectors = nn.Parameter(torch.zeros(orders * LEVELS, width))

    def resize(self, vocab_size: int) -> None:
        """Change the number of token ids: new ones get new vectors."""
        old = self.token_vectors
        if vocab_size == len(old):
            return
        new = old.new_empty(vocab_size, old.shape[1]).normal_(std=0.02)
        kept = min(len(old), vocab_size)
        new[:kept] = old.detach()[:kept]
        self.token_vectors = nn.Parameter(new, requires_grad=old.requires_grad)

    def forward(self, found: Tensor) -> Tensor:
        """Return the vectors. found: (B, N, O, 1 + S) int32, see :mod:`resnet_bk.ngram_format`."""
        y = ngram_sum(found.flatten(0, 1), self.gain, self.level_vectors, self.token_vectors, self.scale)
        return y.unflatten(0, found.shape[:2])
