"""Multi-scale processing: neighbouring positions become one chunk, a stack runs on the chunks, and its results return.

Causal by when things happen: a chunk is computed at the position where it closes, from what it holds up to there, and
its result reaches that position and later ones. For chunks of `factor` positions this is a shift by ``factor - 1``.
Broadcasting a chunk's result to the positions inside the chunk would tell them their future.

Dimensions: B batch, N positions, M chunks of the row that has most, D width outside, W width inside.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from resnet_bk.adaptive.boundaries import BOUNDARIES, since_last
from resnet_bk.adaptive.select import Packing
from resnet_bk.config import ModelConfig
from resnet_bk.layers.feedforward import TILE
from resnet_bk.ops.kernels import scan
from resnet_bk.record import Record


class Chunks:
    """A row's positions in consecutive groups, each ending where `closes` says; the last may still be open.

    closed: (B, N) int64, chunks closed up to and including each position.
    ends: Packing of the closing positions; ``ends.mask`` (B, M) and ``ends.counts`` (B,) say which chunks exist.
    """

    def __init__(self, closes: Tensor, tile: int = 1):
        self.closes, self.closed = closes, closes.cumsum(1)
        self.ends = Packing(closes, tile)
        self.width = self.ends.mask.shape[1]

    def sums(self, x: Tensor, weight: Tensor) -> Tensor:
        """Weighted sums (B, M + 1, D) of x (B, N, D) by weight (B, N); each row's open chunk follows its closed ones."""
        batch, length, _ = x.shape
        rows = torch.arange(batch, device=x.device).unsqueeze(1) * (self.width + 1)
        chunk = (rows + self.closed - self.closes.long()).flatten()
        sizes = chunk.bincount(minlength=batch * (self.width + 1))
        summed = F.embedding_bag(
            torch.arange(batch * length, device=x.device),
            x.flatten(0, 1),
            sizes.cumsum(0) - sizes,
            mode="sum",
            per_sample_weights=weight.flatten(),
        )
        return summed.view(batch, self.width + 1, -1)

    def spread(self, first: Tensor, y: Tensor) -> Tensor:
        """(B, N, D): the last of `y` (B, M, D) closed at or before each position; `first` (B, D) where none is."""
        table = torch.cat([first.unsqueeze(1), y], dim=1)
        rows = torch.arange(table.shape[0], device=y.device).unsqueeze(1) * table.shape[1]
        return table.flatten(0, 1).index_select(0, (rows + self.closed).flatten()).unflatten(0, self.closed.shape)


class OpenChunk(NamedTuple):
    """The chunk that has not closed yet: sums (B, D) of its weighted positions and (B, 1) of their weights."""

    positions: Tensor
    weights: Tensor


class LearnedDownsampling(nn.Module):
    """Each chunk's weighted average, weights chosen by content, and its last position, mapped to the inner width.

    ``LearnedDownsampling(d_model)(x)`` is (B, N, D) -> (B, N // 2, D): chunks of `factor` positions. Positions after
    the last full chunk wait for the rest of theirs.
    """

    def __init__(self, d_model: int, factor: int = 2, width: int | None = None):
        super().__init__()
        self.factor = factor
        self.weigh = nn.Linear(d_model, 1)
        self.refine = nn.Linear(2 * d_model, width or d_model, bias=False)

    def forward(self, x: Tensor, chunks: Chunks | None = None) -> Tensor:
        """x: (B, N, D); chunks: default every `factor` positions. Returns (B, M, W)."""
        if chunks is not None:
            return self.pool(x, chunks, None, None)[0]
        return self.pool(x, _strided(x, self.factor), None, None)[0][:, : x.shape[1] // self.factor]

    def pool(
        self, x: Tensor, chunks: Chunks, past: OpenChunk | None, mask: Tensor | None
    ) -> tuple[Tensor, OpenChunk]:
        """The chunks (B, M, W) that close here, and what is in the one still open. past: what was open before x."""
        weight = self.weigh(x).squeeze(-1).sigmoid()
        if mask is not None:
            weight = weight * mask
        positions = chunks.sums(x, weight)
        weights = chunks.sums(torch.ones_like(weight).unsqueeze(-1), weight)
        if past is not None:
            positions = torch.cat([positions[:, :1] + past.positions.unsqueeze(1), positions[:, 1:]], dim=1)
            weights = torch.cat([weights[:, :1] + past.weights.unsqueeze(1), weights[:, 1:]], dim=1)
        last = chunks.ends.counts.view(-1, 1, 1)
        rest = OpenChunk(*(s.gather(1, last.expand(-1, 1, s.shape[2])).squeeze(1) for s in (positions, weights)))
        exists = chunks.ends.mask.unsqueeze(-1)
        mean = positions[:, :-1] / torch.where(exists, weights[:, :-1], 1.0)
        return self.refine(torch.cat([chunks.ends.pack(x), mean], dim=-1)), rest


class LearnedUpsampling(nn.Module):
    """A chunk's result at every position from its end to the next chunk's, changed by how far that is.

    ``LearnedUpsampling(d_model)(y, n)`` is (B, M, D) -> (B, N, D), N = n. The first ``factor - 1`` positions, before
    any chunk has closed, get zeros.
    """

    def __init__(self, d_model: int, factor: int = 2, width: int | None = None, reach: int | None = None):
        """reach: distances told apart; beyond it they count as the last."""
        super().__init__()
        self.factor, self.reach = factor, reach or factor
        self.expand = nn.Linear(width or d_model, d_model, bias=False)
        self.scale = nn.Parameter(torch.ones(self.reach, d_model))

    def forward(self, y: Tensor, n: int) -> Tensor:
        """y: (B, M, W) with M >= n // factor."""
        if y.shape[1] < n // self.factor:
            raise ValueError(f"y: {y.shape[1]} chunks of {self.factor} do not fill n = {n} positions")
        chunks = _strided(y.new_empty(y.shape[0], n, 0), self.factor)
        since = torch.zeros(y.shape[0], dtype=torch.int64, device=y.device)
        y = self.expand(y)
        return self.place(y, chunks, torch.zeros_like(y[:, 0]) , since_last(chunks.closes, since))

    def place(self, y: Tensor, chunks: Chunks, first: Tensor, since: Tensor) -> Tensor:
        """y: (B, M, D) after `expand`; first: (B, D), the last one before them; since: (B, N) positions since a chunk
        closed."""
        return chunks.spread(first, y) * F.embedding(since.clamp(max=self.reach - 1), self.scale)


def smooth(y: Tensor, probability: Tensor, mask: Tensor, first: Tensor) -> Tensor:
    """``s_j = p_j y_j + (1 - p_j) s_{j-1}``, (B, M, D): a doubtful boundary keeps some of what was there before.

    With it the task decides about boundaries: the gradient of p is how much better the new result is than the old one.
    """
    kept = torch.where(mask, 1 - probability, 1.0).unsqueeze(-1)
    ones = torch.ones_like(kept).unsqueeze(-1)
    return scan(ones, ones, y.unsqueeze(2), kept, 1 - kept, first[:, None, None])[0].squeeze(2)


def _strided(x: Tensor, factor: int) -> Chunks:
    position = torch.arange(1, x.shape[1] + 1, device=x.device)
    return Chunks((position % factor == 0).expand(x.shape[0], -1))


class MultiScaleState(NamedTuple):
    """open: the chunk that has not closed; inner: the inner stack's state; result: (B, D), what the last closed chunk
    returned; since: (B,) int64 positions since it closed; before: (B,) int64, the last token."""

    open: OpenChunk
    inner: Any
    result: Tensor
    since: Tensor
    before: Tensor


@dataclass
class ChunkRecord(Record):
    """closes: (B, N) bool, where chunks ended; probability: (B, N), the router's, or None."""

    closes: Tensor | None = None
    probability: Tensor | None = None


class MultiScale(nn.Module):
    """``scale_full_res * x + scale_low_res * up(inner(down(x)))``: a layer whose inner stack runs once a chunk."""

    def __init__(self, config: ModelConfig, inner: nn.Module):
        super().__init__()
        settings = config.multiscale
        self.target, width = settings.factors[0], config.inside.d_model
        self.boundaries = BOUNDARIES[settings.boundaries](config, self.target)
        reach = self.target if settings.boundaries == "fixed" else 2 * self.target
        self.down = LearnedDownsampling(config.d_model, self.target, width)
        self.inner = inner
        self.up = LearnedUpsampling(config.d_model, self.target, width, reach)
        self.scale_full_res = nn.Parameter(torch.ones(()))
        self.scale_low_res = nn.Parameter(torch.ones(()))

    def forward(
        self, x: Tensor, ids: Tensor, state: MultiScaleState | None, mask: Tensor | None
    ) -> tuple[Tensor, MultiScaleState, list[Record]]:
        zero = torch.zeros_like(ids[:, 0])
        since, before = (zero, zero) if state is None else (state.since, state.before)
        result = x.new_zeros(x.shape[0], x.shape[2]) if state is None else state.result
        closes, probability = self.boundaries(x, ids, since, before)
        if mask is not None:
            closes = closes & mask
        chunks = Chunks(closes, TILE if self.boundaries.by_content else 1)
        coarse, open_chunk = self.down.pool(x, chunks, None if state is None else state.open, mask)
        y, inner, records = self._inside(coarse, chunks, ids, None if state is None else state.inner)
        y = self.up.expand(y)
        if probability is not None:
            y = smooth(y, chunks.ends.pack(probability), chunks.ends.mask, result)
        distance = since_last(closes, since)
        out = self.scale_full_res * x + self.scale_low_res * self.up.place(y, chunks, result, distance)
        after = MultiScaleState(
            open_chunk,
            inner,
            _at(chunks.ends.counts, result, y),
            *(_at(_lengths(ids, mask), first, rest) for first, rest in ((since, distance), (before, ids))),
        )
        return out, after, [self._record(closes, probability, mask), *records]

    def _inside(self, coarse: Tensor, chunks: Chunks, ids: Tensor, state: Any) -> tuple[Tensor, Any, list[Record]]:
        """The inner stack on the chunks; rows in which none closes do not run, and where none does, nothing runs."""
        ids, mask = chunks.ends.pack(ids), chunks.ends.mask
        rows = chunks.ends.counts.nonzero().squeeze(1)
        if state is None or len(rows) == len(ids):
            return self.inner(coarse, ids, state, None if bool(mask.all()) else mask)
        if len(rows) == 0:
            return coarse.new_zeros(*coarse.shape), state, []
        y, after, records = self.inner(
            coarse[rows], ids[rows], pytree.tree_map(lambda s: s[rows], state), mask[rows]
        )
        state = pytree.tree_map(lambda old, new: old.index_copy(0, rows, new), state, after)
        return torch.zeros_like(coarse).index_copy(0, rows, y), state, records

    def _record(self, closes: Tensor, probability: Tensor | None, mask: Tensor | None) -> ChunkRecord:
        """With the loss "ratio", 1 where one position in `target` closes a chunk (H-Net, eq. 10), of learned rules."""
        if probability is None:
            return ChunkRecord(closes=closes)
        real = torch.ones_like(closes) if mask is None else mask
        share, mean, k = closes[real].to(probability.dtype).mean(), probability[real].mean(), self.target
        ratio = k / (k - 1) * ((k - 1) * share * mean + (1 - share) * (1 - mean))
        return ChunkRecord({"ratio": ratio}, closes, probability)


def _lengths(ids: Tensor, mask: Tensor | None) -> Tensor:
    return torch.full_like(ids[:, 0], ids.shape[1]) if mask is None else mask.sum(1)


def _at(count: Tensor, first: Tensor, rest: Tensor) -> Tensor:
    """The last of `count` (B,) entries of rest (B, N, ...); first (B, ...) where that is none."""
    rows = torch.arange(len(count), device=count.device)
    last = rest[rows, (count - 1).clamp(min=0)]
    return torch.where((count > 0).view(-1, *[1] * (last.dim() - 1)), last, first)
