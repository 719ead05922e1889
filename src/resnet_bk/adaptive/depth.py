"""Adaptive depth: how many blocks each position runs.

The blocks after a decision run on the packed sequence of the positions that continue, so their chains consist of those
positions only. A decision reads a position and its past, never how many others continue: predictions stay causal and
do not depend on batch-mates. In decoding, when no position continues, the remaining blocks do not run and keep their
state. The last blocks run on all positions again: through their chains, positions that stopped early learn what the
deeper blocks found for the others.

Dimensions: B batch, N positions, M positions of the fullest row that are still running, D model width.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from resnet_bk.adaptive.select import rows_by_length, run_rows
from resnet_bk.config import ModelConfig
from resnet_bk.layers.block import AdaptiveLayer, Stack, Tokens
from resnet_bk.layers.price import price
from resnet_bk.layers.score import Score
from resnet_bk.ops.packing import TILE, Packing, capacity
from resnet_bk.record import Loss, Record, TaskLoss

STOP = -3.0  # initial halting score: before training, nearly every position reaches the last segment
BAND = 0.1  # distance from the target share of blocks at which the price is 1


@dataclass(kw_only=True)
class DepthRecord(Record):
    """Decisions of adaptive depth.

    Attributes:
        blocks: (B, N) int64, number of blocks that each position ran; 0 for padding.
        computed: sum over the blocks of the positions that each computed, including those that fill up a batch.
        available: number of blocks in the stack.
    """

    blocks: Tensor
    computed: int
    available: int

    @property
    def mean_blocks(self) -> float:
        """Mean number of blocks per non-padding position."""
        return int(self.blocks.sum()) / max(1, int((self.blocks > 0).sum()))


@dataclass
class Totals:
    """Running totals of one forward pass.

    Attributes:
        expected: scalar, the sum over positions of the expected number of blocks under their probabilities.
        blocks: (B, N) int64, number of blocks that each position ran.
        computed: see :class:`DepthRecord`.
        states: the new state of each part, in the order in which the parts run.
        records: what the parts report.
        task_loss: see :class:`resnet_bk.record.Record`.
    """

    expected: Tensor
    blocks: Tensor
    computed: int
    states: list[Any] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    task_loss: TaskLoss | None = None


class AdaptiveDepth(AdaptiveLayer):
    """Blocks that every position runs, segments of blocks with a decision before each, then blocks for all again."""

    priced = True  # True where the loss contains a price on blocks

    def __init__(self, config: ModelConfig, stack: Stack):
        super().__init__()
        self.settings, self.threshold, self.available = config.depth, config.depth.stops_at, len(stack)
        begin, end, every = self.settings.first, len(stack) - self.settings.after, self.settings.every
        self.first, self.last = stack.part(0, begin), stack.part(end)
        self.segments = nn.ModuleList(stack.part(i, min(i + every, end)) for i in range(begin, end, every))

    def forward(
        self, x: Tensor, tokens: Tokens, state: Sequence[Any] | None, mask: Tensor | None
    ) -> tuple[Tensor, list[Any], list[Record]]:
        present = torch.ones_like(tokens.ids, dtype=torch.bool) if mask is None else mask
        number = present.sum()
        for_all = len(self.first) + len(self.last)
        totals = Totals(
            expected=for_all * number.to(torch.promote_types(x.dtype, torch.float32)),
            blocks=for_all * present.long(),
            computed=for_all * tokens.ids.numel(),
        )
        past = [None] * (len(self.segments) + 2) if state is None else state
        x = self._run(self.first, x, tokens, past[0], mask, totals)
        x = self._run_segments(x, tokens, past[1:-1], present, totals)
        x = self._run(self.last, x, tokens, past[-1], mask, totals)
        record = DepthRecord(
            losses={"ponder": Loss(self._ponder(totals, number), self.settings.penalty)} if self.priced else {},
            task_loss=totals.task_loss,
            blocks=totals.blocks,
            computed=totals.computed,
            available=self.available,
        )
        return x, totals.states, [record, *totals.records]

    @property
    def stacks(self) -> list[Stack]:
        """The segments, typed."""
        return cast(list[Stack], list(self.segments))

    def _run(self, stack: Stack, x: Tensor, tokens: Tokens, state: Any, mask: Tensor | None, totals: Totals) -> Tensor:
        x, state, records = stack(x, tokens, state, mask)
        totals.states.append(state)
        totals.records += records
        return x

    def _run_segments(self, x: Tensor, tokens: Tokens, past: Sequence[Any], present: Tensor, totals: Totals) -> Tensor:
        """Run each segment on the positions that enter it, (B, N, D) -> (B, N, D). present: (B, N), not padding."""
        raise NotImplementedError

    def _run_packed(
        self, segment: Stack, x: Tensor, tokens: Tokens, state: Any, packing: Packing, totals: Totals
    ) -> Tensor:
        """Run a segment on packed positions x (B, M, D).

        Rows without a selected position are skipped, except where they have no state yet, or where there is a bound.
        """
        if packing.bound is not None:
            totals.computed += len(segment) * packing.mask.numel()
            return self._run(segment, x, tokens, state, packing.mask, totals)
        counts = packing.counts if state is not None else packing.counts.clamp(min=1)
        groups = rows_by_length(counts, TILE)
        y, state, records = run_rows(segment, x, tokens, state, packing, groups)
        totals.states.append(state)
        totals.records += records
        totals.computed += len(segment) * sum(len(rows) * packing.width(counts[rows]) for rows in groups)
        return y

    def _ponder(self, totals: Totals, number: Tensor) -> Tensor:
        """Return the expected share of the blocks times its price.

        The price follows the share of blocks that ran, because that is what costs time.
        """
        scale = 1 / (self.available * number.clamp(min=1).to(totals.expected.dtype))
        return price(totals.blocks.sum() * scale, self.settings.target, BAND) * totals.expected * scale


@dataclass
class Snapshot:
    """The running positions just before a segment's decision.

    Attributes:
        packings: how many packings had been made by then.
        x: (B, M, D) their features.
        present: (B, M) bool, True for running positions, False for rows that fill up the packing.
    """

    packings: int
    x: Tensor
    present: Tensor


class Stopping(AdaptiveDepth):
    """Positions stop before a segment and do not return.

    The output of a position is the mean of its features before each segment, weighted by the probability to stop
    there. Under a policy without probabilities it is the features at which the position stops.
    """

    def _draw(self, x: Tensor) -> Any:
        """Return what one forward pass draws at random, once for all of its decisions about x (B, N, D)."""
        return None

    def _halt(self, i: int, x: Tensor, drawn: Any) -> Tensor:
        """Return (B, M) float32 or float64, the probability to stop before segment i; 0 or 1 without probabilities."""
        raise NotImplementedError

    def _stops(self, halt: Tensor, left: Tensor) -> Tensor:
        """Return (B, M) bool, True where a position stops. left: (B, M), what remains of its probability 1."""
        raise NotImplementedError

    def _task_loss(
        self, out: Tensor, snapshots: list[Snapshot], packings: list[Packing], drawn: Any
    ) -> TaskLoss | None:
        """See :class:`resnet_bk.record.Record`. out: (B, N, D). snapshots: one entry for each decision."""
        return None

    def _run_segments(self, x: Tensor, tokens: Tokens, past: Sequence[Any], present: Tensor, totals: Totals) -> Tensor:
        drawn, left = self._draw(x), present.to(totals.expected.dtype)
        blocks, out = torch.zeros_like(tokens.ids), torch.zeros_like(x)
        packings: list[Packing] = []
        unpacked: list[tuple[Tensor, Tensor]] = []  # out and blocks before each packing, to merge later ones into
        snapshots: list[Snapshot] = []
        bound = capacity(self.settings.bound, x.shape[1])
        for i, segment in enumerate(self.stacks):
            if self.training:
                snapshots.append(Snapshot(len(packings), x, present))
            halt = self._halt(i, x, drawn)
            stops = self._stops(halt, left)
            weight = torch.where(stops, left, halt)
            out = torch.addcmul(out, weight.unsqueeze(-1).to(x.dtype), x)
            left, runs = left - weight, present & ~stops
            running = None if bound is not None else int(runs.sum())
            if running == 0 and past[i] is not None:  # most steps of decoding
                totals.states += past[i:]
                break
            packing = Packing(runs, TILE, bound)
            if running is None or running < runs.numel() or runs.shape[1] % packing.tile:
                packings.append(packing)
                unpacked.append((out, blocks))
                x, out, blocks = (packing.pack(t) for t in (x, out, blocks))
                tokens, present = tokens.map(packing.pack), packing.mask
                left = packing.pack(left) * present
            x = self._run_packed(segment, x, tokens, past[i], packing, totals)
            totals.expected = totals.expected + len(segment) * left.sum()
            blocks = blocks + len(segment) * present
        else:
            out = torch.addcmul(out, left.unsqueeze(-1).to(x.dtype), x)
        for packing, (wide, counts) in zip(reversed(packings), reversed(unpacked), strict=True):
            out, blocks = packing.merge(out, wide), packing.merge(blocks, counts)
        totals.blocks = totals.blocks + blocks
        if self.training:
            totals.task_loss = self._task_loss(out, snapshots, packings, drawn)
        return out


class Halting(Stopping):
    """Adaptive computation time (Graves 2016, arXiv:1603.08983, eqs. 5 to 13).

    A unit before each segment gives the probability to stop there. A position stops where these probabilities add up to
    the threshold; the last one is what remains of 1. Its output is the mean of its features under them, so the task
    loss trains the units. The ponder cost is the expected number of blocks: the sum over segments of the probability to
    reach them.
    """

    def __init__(self, config: ModelConfig, stack: Stack):
        super().__init__(config, stack)
        self.units = nn.ModuleList(Score(config.d_model, STOP) for _ in self.segments)

    def _halt(self, i: int, x: Tensor, drawn: None) -> Tensor:
        return self.units[i](x).sigmoid()

    def _stops(self, halt: Tensor, left: Tensor) -> Tensor:
        return left - halt <= 1 - self.threshold


class Skipping(AdaptiveDepth):
    """A router before each segment lets a position in or past; a position that is skipped may enter the next segment.

    This is mixture of depths (Raposo et al. 2024, arXiv:2404.02258) with a threshold instead of a top-k over the
    sequence, which would leak later positions into earlier decisions. In training, a gate scales what a segment adds.
    Noise moves the gate between 0, where the segment does not run, and 1 (hard concrete, Louizos et al. 2018,
    arXiv:1712.01312). Summed over the noise, the gradient of the gate is then the full value of the segment for the
    task. At a gate of 1 only, it would be the value of slightly more of the segment, which training brings to zero.
    """

    def __init__(self, config: ModelConfig, stack: Stack):
        super().__init__(config, stack)
        decided = sum(map(len, self.stacks))
        share = (self.settings.target * self.available - self.available + decided) / max(1, decided)
        share = min(max(share, 0.5), 0.9)  # initial share of positions that enter: meets the target, at least half
        self.routers = nn.ModuleList(Score(config.d_model, math.log(share / (1 - share)), 1.0) for _ in self.segments)

    def _run_segments(self, x: Tensor, tokens: Tokens, past: Sequence[Any], present: Tensor, totals: Totals) -> Tensor:
        bound = capacity(self.settings.bound, x.shape[1])
        for router, segment, state in zip(self.routers, self.stacks, past, strict=True):
            score = router(x)
            probability, gate = score.sigmoid(), None
            if self.training:
                noise = torch.rand_like(score).logit(1e-6)
                gate = (0.5 + score + noise).clamp(0, 1)
            runs = present & (probability >= self.threshold if gate is None else gate > 0)
            totals.expected = totals.expected + len(segment) * (probability * present).sum()
            if bound is None and state is not None and not bool(runs.any()):
                totals.states.append(state)
                continue
            packing = Packing(runs, TILE, bound)
            packed = packing.pack(x)
            y = self._run_packed(segment, packed, tokens.map(packing.pack), state, packing, totals)
            if gate is not None:
                y = torch.lerp(packed, y, packing.pack(gate).unsqueeze(-1).to(x.dtype))
            x = packing.merge(y, x)
            totals.blocks = totals.blocks + len(segment) * runs
        return x


@contextlib.contextmanager
def measured_depth(model: nn.Module) -> Iterator[Callable[[], float | None]]:
    """Count the blocks that positions run while the context is open.

    Yields:
        A function that returns the mean number of blocks per position so far, among the blocks that adaptive depth
        decides about; None for a model without adaptive depth.
    """
    sums: list[tuple[int, int]] = []

    def count(module: nn.Module, arguments: Any, output: tuple[Tensor, Any, list[Record]]) -> None:
        record = output[2][0]
        assert isinstance(record, DepthRecord)
        sums.append((int(record.blocks.sum()), int((record.blocks > 0).sum())))

    layers = [module for module in model.modules() if isinstance(module, AdaptiveDepth)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        yield lambda: sum(b for b, _ in sums) / max(1, sum(n for _, n in sums)) if layers else None
    finally:
        for hook in hooks:
            hook.remove()
