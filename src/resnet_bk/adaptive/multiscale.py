"""Multi-scale: neighbouring positions are merged into chunks, and a stack runs on the chunks.

Its results are added back to the positions.

Causality: a chunk is computed where it closes, from its own positions and from earlier chunks. Its result reaches that
position and later ones. With a fixed stride, this delays a chunk's result by ``factor - 1`` positions from its first
position. Broadcasting a chunk's result to all of its positions would leak later positions into earlier ones.

Dimensions: B batch, N positions, M packed length (number of chunks in the row with most, or the capacity; where content
decides about chunks, it is rounded up to whole tiles), D outer width, W inner width.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.adaptive.boundaries import BOUNDARIES, LONGEST, at_most, since_last
from resnet_bk.adaptive.select import Chunks, last_entry, run_rows
from resnet_bk.config import ModelConfig
from resnet_bk.layers.block import AdaptiveLayer, Tokens
from resnet_bk.layers.matrices import Matrices
from resnet_bk.layers.norm import Norm
from resnet_bk.ops.kernels import scan
from resnet_bk.ops.packing import TILE, capacity
from resnet_bk.record import Loss, Record


class LearnedDownsampling(nn.Module):
    """One vector per chunk: its last position and the content-weighted mean of its positions, mapped to width W.

    The two are concatenated before the map.

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

    def matrices(self) -> list[Matrices]:
        return [Matrices(self.refine.weight)]

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
            open, (B, D + 1) float32 or float64: the sum of the weighted positions and, in the last column, of the
            weights.
        """
        sums, still_open = chunks.sums(*self._weighted(x, mask), past)
        positions, total = sums.split([x.shape[2], 1], dim=-1)
        mean = (positions / torch.where(chunks.ends.mask.unsqueeze(-1), total, 1.0)).to(x.dtype)
        return self.refine(torch.cat([chunks.ends.pack(x), mean], dim=-1)).to(x.dtype), still_open

    def extend(self, x: Tensor, past: Tensor, mask: Tensor | None) -> Tensor:
        """Add x, in which no chunk closes, to the sums of the open chunk and return them. Arguments as for `pool`."""
        with_one, weight = self._weighted(x, mask)
        return past + (with_one * weight.unsqueeze(-1)).sum(1)

    def _weighted(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return x with a column of ones (B, N, D + 1), and each position's weight (B, N) float32 or float64."""
        exact = torch.promote_types(x.dtype, torch.float32)
        # Clamped so that no weight is 0: the mean divides by the sum of a chunk's weights.
        weight = self.weigh(x).to(exact).clamp(-30, 30).sigmoid()
        weight = weight if mask is None else weight * mask.unsqueeze(-1)
        return torch.cat([x, torch.ones_like(weight)], dim=-1), weight.squeeze(-1)


class LearnedUpsampling(nn.Module):
    """The result of a chunk at every position from its end until the next chunk closes.

    It is multiplied by a learned factor per channel that depends on the distance from the end of the chunk.
    ``LearnedUpsampling(d_model)(y, n)`` is (B, M, D) -> (B, n, D). The first ``factor - 1`` positions, before any chunk
    has closed, get zeros.
    """

    def __init__(self, d_model: int, factor: int = 2, width: int | None = None, reach: int | None = None):
        """Create the layer.

        Args:
            d_model: D, the outer width.
            factor: positions per chunk, 2 or more.
            width: W, the inner width. Default: d_model.
            reach: number of distances with factors of their own; longer distances share the last ones. Default:
                `factor`.

        Raises:
            ValueError: the factor is below 2.
        """
        super().__init__()
        self.factor, self.reach = _at_least_2(factor), reach or factor
        self.expand = nn.Linear(width or d_model, d_model, bias=False)
        self.gain = nn.Parameter(torch.zeros(self.reach, d_model))

    def matrices(self) -> list[Matrices]:
        return [Matrices(self.expand.weight)]

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
        return self.scale(chunks.spread(nothing, y), since_last(chunks.closes, since))

    def scale(self, y: Tensor, since: Tensor) -> Tensor:
        """Multiply the result at each position by the learned factors of its distance.

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
    # A scan with key and query 1 is s = decay s + (1 - decay) y.
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
        since: (B,) int64, positions since the last chunk closed, or since the start.
        last_id: (B,) int64, id of the last token; 0 at the start.
    """

    open: Tensor
    inner: Any
    result: Tensor
    since: Tensor
    last_id: Tensor


@dataclass(kw_only=True)
class ChunkRecord(Record):
    """Decisions of multi-scale.

    Attributes:
        closes: (B, N) bool, True where a chunk ends.
        probability: (B, N), the router's probability of a boundary, before the limit on the length of a chunk. None for
            boundaries that are not learned.
    """

    closes: Tensor
    probability: Tensor | None = None


class MultiScale(AdaptiveLayer):
    """``scale_full_res * x + scale_low_res * 2 sigmoid(gate(norm(x))) * up(inner(down(x)))``.

    The inner stack has one position per chunk. Several positions share the result of a chunk; the gate lets each of
    them scale it, channel by channel.
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

    def matrices(self) -> list[Matrices]:
        return [Matrices(self.gate.weight)]

    def forward(
        self, x: Tensor, tokens: Tokens, state: MultiScaleState | None, mask: Tensor | None
    ) -> tuple[Tensor, MultiScaleState, list[Record]]:
        ids = tokens.ids
        past = self._start(x) if state is None else state
        decision = self.boundaries(x, ids, past.since, past.last_id)
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
        bound = self._capacity(x.shape[1], fresh)
        if fresh or bound is not None or bool(closes.any()):
            chunks = Chunks(closes, TILE if self._rounds_up else 1, bound)
            coarse, still_open = self.down.pool(x, chunks, past.open, mask)
            y, inner, records = self._inside(coarse, chunks, tokens, past.inner, fresh and mask is None)
            y = self.up.expand(y).to(x.dtype)
            if decision.probability is not None:
                # A chunk that closed only because it reached the longest length counts as certain.
                sure = torch.where(decision.closes, decision.probability, 1.0)
                y = smooth(y, chunks.ends.pack(sure), chunks.ends.mask, past.result)
            low_res, result = chunks.spread(past.result, y), last_entry(y, chunks.ends.mask, past.result)
        else:  # most steps of decoding: no chunk closes, so the inner stack does not run
            still_open, inner, records = self.down.extend(x, past.open, mask), past.inner, []
            low_res, result = past.result.unsqueeze(1), past.result  # (B, 1, D), broadcast over N
        low_res = self.up.scale(low_res, since) * self.gate(self.norm(x)).sigmoid()
        out = (self.scale_full_res * x + 2 * self.scale_low_res * low_res).to(x.dtype)
        after = MultiScaleState(
            still_open, inner, result, last_entry(since, mask, past.since), last_entry(ids, mask, past.last_id)
        )
        return out, after, [record, *records]

    def layout(self, x: Tensor) -> MultiScaleState:
        inner = self.inner.layout(x.new_empty(len(x), 1, self.up.expand.in_features))  # type: ignore[operator]
        return self._start(x)._replace(inner=inner)

    def _start(self, x: Tensor) -> MultiScaleState:
        """Return the state before the first position."""
        batch, width = x.shape[0], x.shape[2]
        still_open = x.new_zeros(batch, width + 1, dtype=torch.promote_types(x.dtype, torch.float32))
        none = torch.zeros(batch, dtype=torch.int64, device=x.device)
        return MultiScaleState(still_open, None, x.new_zeros(batch, width), none, none)

    @property
    def _rounds_up(self) -> bool:
        """True if the packed length is whole tiles. A program that torch exports for any N must not have a length 1."""
        return bool(self.boundaries.by_content) or torch.compiler.is_exporting()

    def _capacity(self, positions: int, fresh: bool) -> int | None:
        """Return how many chunks per row the packed tensors hold.

        None stands for as many as the fullest row closes, a number that must be read from the device (a host-device
        sync). fresh: True if the positions are the first ones of their sequences.
        """
        if self.boundaries.by_content:
            return capacity(self.bound, positions)
        if fresh:
            return positions // self.factor
        return None if capacity(self.bound, positions) is None else -(-positions // self.factor)

    def _inside(
        self, coarse: Tensor, chunks: Chunks, tokens: Tokens, state: Any, unpadded_start: bool
    ) -> tuple[Tensor, Any, list[Record]]:
        """Run the inner stack on the chunks.

        Rows without a closing chunk are skipped, if there is a state and no capacity.

        Args:
            coarse: (B, M, W), the downsampled chunks.
            chunks: the chunks.
            tokens: (B, N).
            state: the inner stack's state, or None.
            unpadded_start: True if the positions are the first ones of their sequences, without padding.
        """
        ends = chunks.ends
        if ends.bound is not None:
            # With a fixed stride, every row then has exactly M chunks, so no mask is needed. With bound 0, M is still
            # 1, and the chunk does not exist.
            regular = unpadded_start and not self._rounds_up and ends.bound > 0
            return self.inner(coarse, tokens.map(ends.pack), state, None if regular else ends.mask)
        rows = torch.arange(len(coarse), device=coarse.device) if state is None else ends.counts.nonzero().squeeze(1)
        return run_rows(self.inner, coarse, tokens.map(ends.pack), state, ends, [rows])

    def _losses(self, closes: Tensor, probability: Tensor | None, mask: Tensor | None) -> dict[str, Loss]:
        """Return the loss "ratio" of learned boundaries (H-Net, arXiv:2507.07955, eq. 10); no loss for other ones.

        Its value is 1 when one position in `factor` closes a chunk.
        """
        if probability is None:
            return {}
        mask = torch.ones_like(closes) if mask is None else mask
        share, mean = ((p * mask).sum() / mask.sum().clamp(min=1) for p in (closes.to(probability.dtype), probability))
        k = self.factor
        ratio = k / (k - 1) * ((k - 1) * share * mean + (1 - share) * (1 - mean))
        return {"ratio": Loss(ratio, self.ratio_weight)}
