"""Multi-scale: neighbouring positions are merged into one chunk, a stack runs on the chunks, and its results return.

Causality: a chunk is computed at the position where it closes, from its positions up to there. Its result reaches that
position and later ones. For chunks of `factor` positions this is a shift by ``factor - 1``. Broadcasting a chunk's
result to all of its positions would leak later positions into earlier ones.

Dimensions: B batch, N positions, M packed length (chunks of the row that has most), D outer width, W inner width.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.adaptive.boundaries import BOUNDARIES, LONGEST, at_most, since_last
from resnet_bk.adaptive.select import Chunks, last_token, run_rows
from resnet_bk.config import ModelConfig
from resnet_bk.layers.block import AdaptiveLayer, Tokens
from resnet_bk.layers.norm import Norm
from resnet_bk.ops.kernels import scan
from resnet_bk.ops.packing import TILE, capacity
from resnet_bk.record import Loss, Record


class LearnedDownsampling(nn.Module):
    """One vector per chunk: the content-weighted mean of its positions and its last position, mapped to width W.

    ``LearnedDownsampling(d_model)(x)`` is (B, N, D) -> (B, N // 2, D). It leaves out the positions after the last full
    chunk.
    """

    def __init__(self, d_model: int, factor: int = 2, width: int | None = None):
        """Create the layer.

        Args:
            d_model: D, the outer width.
            factor: positions per chunk, 2 or more; :meth:`pool` takes chunks of any length.
            width: W, the inner width. Default: d_model.

        Raises:
            ValueError: the factor is below 2.
        """
        super().__init__()
        self.factor = _at_least_2(factor)
        self.weigh = nn.Linear(d_model, 1)
        self.refine = nn.Linear(2 * d_model, width or d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Downsample at a fixed stride, (B, N, D) -> (B, N // factor, W)."""
        chunks = _strided(x.shape[0], x.shape[1], self.factor, x.device)
        return self.pool(x, chunks, None, None)[0][:, : x.shape[1] // self.factor]

    def pool(self, x: Tensor, chunks: Chunks, past: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Downsample the chunks that close in x.

        Args:
            x: (B, N, D), features.
            chunks: the chunks of x.
            past: (B, D + 1), the sums of the chunk that was open before x; None at the start.
            mask: (B, N) bool, False for padding; None without padding.

        Returns:
            The chunks (B, M, W), without meaning where ``chunks.ends.mask`` is False, and the sums of the chunk still
            open, (B, D + 1) float32 or float64: the weighted positions and, in the last column, their weights.
        """
        sums, still_open = chunks.sums(*self._weighted(x, mask), past)
        positions, total = sums.split([x.shape[2], 1], dim=-1)
        mean = (positions / torch.where(chunks.ends.mask.unsqueeze(-1), total, 1.0)).to(x.dtype)
        return self.refine(torch.cat([chunks.ends.pack(x), mean], dim=-1)).to(x.dtype), still_open

    def keep(self, x: Tensor, past: Tensor, mask: Tensor | None) -> Tensor:
        """Return the sums of the open chunk after x, if no chunk closes in x. Arguments as for :meth:`pool`."""
        with_one, weight = self._weighted(x, mask)
        return past + (with_one * weight.unsqueeze(-1)).sum(1)

    def _weighted(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x with a column of ones (B, N, D + 1), and each position's weight (B, N) float32 or float64."""
        exact = torch.promote_types(x.dtype, torch.float32)
        weight = self.weigh(x).to(exact).clamp(-30, 30).sigmoid()  # not 0: the mean divides by the sum over a chunk
        weight = weight if mask is None else weight * mask.unsqueeze(-1)
        return torch.cat([x, torch.ones_like(weight)], dim=-1), weight.squeeze(-1)


class LearnedUpsampling(nn.Module):
    """The result of a chunk at every position from its end until the next chunk closes, scaled by the distance.

    ``LearnedUpsampling(d_model)(y, n)`` is (B, M, D) -> (B, n, D). The first ``factor - 1`` positions, before any chunk
    has closed, get zeros.
    """

    def __init__(self, d_model: int, factor: int = 2, width: int | None = None, reach: int | None = None):
        """Create the layer.

        Args:
            d_model: D, the outer width.
            factor: positions per chunk, 2 or more.
            width: W, the inner width. Default: d_model.
            reach: number of distances with a scale of their own; longer distances share the last one. Default: factor.

        Raises:
            ValueError: the factor is below 2.
        """
        super().__init__()
        self.factor, self.reach = _at_least_2(factor), reach or factor
        self.expand = nn.Linear(width or d_model, d_model, bias=False)
        self.gain = nn.Parameter(torch.zeros(self.reach, d_model))

    def forward(self, y: Tensor, n: int) -> Tensor:
        """Upsample at a fixed stride.

        Args:
            y: (B, M, W), results of the chunks, M >= n // factor.
            n: number of positions.

        Returns:
            (B, n, D).

        Raises:
            ValueError: y has fewer than n // factor chunks.
        """
        if y.shape[1] < n // self.factor:
            raise ValueError(f"y: got {y.shape[1]} chunks for n = {n} positions, allowed {n // self.factor} or more")
        chunks = _strided(y.shape[0], n, self.factor, y.device)
        y = self.expand(y)
        since = torch.zeros(y.shape[0], dtype=torch.int64, device=y.device)
        nothing = y.new_zeros(y.shape[0], y.shape[2])
        return self.place(chunks.spread(nothing, y), since_last(chunks.closes, since))

    def place(self, y: Tensor, since: Tensor) -> Tensor:
        """Scale the result at each position by the distance.

        y: (B, N, D), the result of the last closed chunk. since: (B, N) int64, positions since it closed.
        """
        return y * (1 + F.embedding(since.clamp(max=self.reach - 1), self.gain))


def smooth(y: Tensor, probability: Tensor, mask: Tensor, first: Tensor) -> Tensor:
    """Return ``s_j = p_j y_j + (1 - p_j) s_{j-1}``, (B, M, D): an uncertain boundary keeps part of the old result.

    This lets the task train the boundaries: the gradient of p is how much better the new result is than the old one.

    Args:
        y: (B, M, D), results of the chunks.
        probability: (B, M), p.
        mask: (B, M) bool, True for chunks that exist; the others repeat the last result.
        first: (B, D), the result before the first chunk.
    """
    exact = torch.promote_types(y.dtype, torch.float32)
    decay = torch.where(mask, 1 - probability.to(exact), 1.0).unsqueeze(-1)
    ones = torch.ones_like(decay).unsqueeze(-1)
    s, _ = scan(ones, ones, y.to(exact).unsqueeze(2), decay, 1 - decay, first.to(exact)[:, None, None])
    return s.squeeze(2).to(y.dtype)


def _strided(batch: int, n: int, factor: int, device: torch.device) -> Chunks:
    """Return chunks of `factor` positions in rows of n positions."""
    return Chunks((torch.arange(1, n + 1, device=device) % factor == 0).expand(batch, -1), bound=n // factor)


def _at_least_2(factor: int) -> int:
    if factor < 2:
        raise ValueError(f"factor: got {factor}, allowed 2 or more positions per chunk")
    return factor


class MultiScaleState(NamedTuple):
    """State of multi-scale.

    Attributes:
        open: (B, D + 1) float32 or float64, the sums of the open chunk, see :meth:`LearnedDownsampling.pool`.
        inner: state of the inner stack.
        result: (B, D), the result of the last closed chunk; 0 before the first.
        since: (B,) int64, positions since it closed.
        before: (B,) int64, id of the last token.
    """

    open: Tensor
    inner: Any
    result: Tensor
    since: Tensor
    before: Tensor


@dataclass(kw_only=True)
class ChunkRecord(Record):
    """Decisions of multi-scale.

    closes: (B, N) bool, True where a chunk ended.
    probability: (B, N), the router's probability of a boundary; None for boundaries that are not learned.
    """

    closes: Tensor | None = None
    probability: Tensor | None = None


class MultiScale(AdaptiveLayer):
    """``scale_full_res * x + scale_low_res * gate(x) * up(inner(down(x)))``; the inner stack runs once per chunk.

    Several positions share the result of a chunk. The gate, 2 sigmoid(W norm x), lets each position take its part
    of it.
    """

    def __init__(self, config: ModelConfig, inner: nn.Module):
        super().__init__()
        settings = config.multiscale
        self.factor, self.bound, width = settings.factors[0], settings.bound, config.inside.d_model
        self.ratio_weight = settings.ratio_weight
        self.boundaries = BOUNDARIES[settings.boundaries](config, self.factor)
        reach = LONGEST * self.factor if self.boundaries.by_content else self.factor
        self.down = LearnedDownsampling(config.d_model, self.factor, width)
        self.inner = inner
        self.up = LearnedUpsampling(config.d_model, self.factor, width, reach)
        self.norm, self.gate = Norm(config.d_model), nn.Linear(config.d_model, config.d_model)
        self.scale_full_res = nn.Parameter(torch.ones(()))
        self.scale_low_res = nn.Parameter(torch.ones(()))

    def forward(
        self, x: Tensor, tokens: Tokens, state: MultiScaleState | None, mask: Tensor | None
    ) -> tuple[Tensor, MultiScaleState, list[Record]]:
        ids = tokens.ids
        past = self._start(x, ids) if state is None else state
        decision = self.boundaries(x, ids, past.since, past.before)
        closes = decision.closes
        if self.boundaries.by_content:
            closes = at_most(closes, past.since, LONGEST * self.factor)
        if mask is not None:
            closes = closes & mask
        record = ChunkRecord(
            losses=self._losses(closes, decision.probability, mask),
            closes=closes,
            probability=decision.probability,
        )
        since = since_last(closes, past.since)
        fresh = state is None
        if fresh or self.bound is not None or bool(closes.any()):
            chunks = Chunks(closes, TILE if self.boundaries.by_content else 1, self._capacity(x.shape[1], fresh))
            coarse, still_open = self.down.pool(x, chunks, past.open, mask)
            y, inner, records = self._inside(coarse, chunks, tokens, past.inner, fresh and mask is None)
            y = self.up.expand(y).to(x.dtype)
            if decision.probability is not None:
                sure = torch.where(decision.closes, decision.probability, 1.0)  # 1: closed by its length, not by choice
                y = smooth(y, chunks.ends.pack(sure), chunks.ends.mask, past.result)
            low_res, result = chunks.spread(past.result, y), last_token(y, chunks.ends.mask, past.result)
        else:  # most steps of decoding: no chunk closes, so the inner stack does not run
            still_open, inner, records = self.down.keep(x, past.open, mask), past.inner, []
            low_res, result = past.result.unsqueeze(1), past.result
        low_res = self.up.place(low_res, since) * self.gate(self.norm(x)).sigmoid()
        out = (self.scale_full_res * x + 2 * self.scale_low_res * low_res).to(x.dtype)
        after = MultiScaleState(
            still_open, inner, result, last_token(since, mask, past.since), last_token(ids, mask, past.before)
        )
        return out, after, [record, *records]

    def _start(self, x: Tensor, ids: Tensor) -> MultiScaleState:
        """Return the state before the first position."""
        batch, width = x.shape[0], x.shape[2]
        still_open = x.new_zeros(batch, width + 1, dtype=torch.promote_types(x.dtype, torch.float32))
        since = torch.zeros(batch, dtype=torch.int64, device=x.device)
        return MultiScaleState(still_open, None, x.new_zeros(batch, width), since, torch.zeros_like(ids[:, 0]))

    def _capacity(self, positions: int, fresh: bool) -> int | None:
        """Return the capacity in chunks; None, which costs a host-device sync, for as many as close.

        fresh: the positions are the first ones of their sequences.
        """
        if self.boundaries.by_content:
            return capacity(self.bound, positions)
        if fresh:
            return positions // self.factor
        return None if self.bound is None else -(-positions // self.factor)

    def _inside(
        self, coarse: Tensor, chunks: Chunks, tokens: Tokens, state: Any, whole: bool
    ) -> tuple[Tensor, Any, list[Record]]:
        """Run the inner stack on the chunks. Rows without a closing chunk do not run, unless there is a capacity.

        Args:
            coarse: (B, M, W), the downsampled chunks.
            chunks: the chunks.
            tokens: (B, N).
            state: the inner stack's state, or None.
            whole: the positions are the first ones of their sequences, without padding.
        """
        ends = chunks.ends
        if ends.bound is not None:
            regular = whole and not self.boundaries.by_content and ends.bound > 0  # all rows have M chunks
            return self.inner(coarse, tokens.map(ends.pack), state, None if regular else ends.mask)
        rows = torch.arange(len(coarse), device=coarse.device) if state is None else ends.counts.nonzero().squeeze(1)
        return run_rows(self.inner, coarse, tokens.map(ends.pack), state, ends, [rows])

    def _losses(self, closes: Tensor, probability: Tensor | None, mask: Tensor | None) -> dict[str, Loss]:
        """Return "ratio" for learned boundaries: 1 if one position in `factor` closes a chunk (H-Net, eq. 10)."""
        if probability is None:
            return {}
        mask = torch.ones_like(closes) if mask is None else mask
        share, mean = ((p * mask).sum() / mask.sum().clamp(min=1) for p in (closes.to(probability.dtype), probability))
        k = self.factor
        ratio = k / (k - 1) * ((k - 1) * share * mean + (1 - share) * (1 - mean))
        return {"ratio": Loss(ratio, self.ratio_weight)}
