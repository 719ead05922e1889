"""Adaptive depth: how many blocks each position runs.

The blocks after a decision run on the packed sequence of the positions that continue, so their chains consist of those
positions only. A decision reads the features of its own position, never how many others continue. So predictions do not
depend on batch-mates, and in a causal model they stay causal. In decoding without a bound, a segment that no position
enters does not run and keeps its state. Except with early exit, the last blocks run on all positions again; through
their chains, positions that stopped early read what the deeper blocks computed for the others.

Dimensions: B batch, N positions, M packed length, D model width.
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

# Initial halting score, the same for all positions: a probability of 0.05 to stop. So before training all of them run
# the first 10 segments at threshold 0.5.
INITIAL_SCORE = -3.0
BAND = 0.1  # distance from the target share of blocks at which the price is 1


@dataclass(kw_only=True)
class DepthRecord(Record):
    """Decisions of adaptive depth.

    Attributes:
        blocks: (B, N) int64, number of blocks that each position ran; 0 for padding.
        computed: number of positions computed, summed over the blocks; padding and positions that fill up packed rows
            count too.
        available: number of blocks in the stack.
    """

    blocks: Tensor
    computed: int
    available: int

    @property
    def sums(self) -> tuple[int, int]:
        """Number of blocks, summed over the positions, and number of non-padding positions."""
        return int(self.blocks.sum()), int((self.blocks > 0).sum())

    @property
    def mean_blocks(self) -> float:
        """Mean number of blocks per non-padding position."""
        blocks, positions = self.sums
        return blocks / max(1, positions)


@dataclass
class Totals:
    """Running totals of one forward pass.

    Attributes:
        expected: scalar, the sum over positions of the number of blocks expected from the probabilities of the
            decisions; with skipping, from those without noise.
        blocks: (B, N) int64, number of blocks that each position ran.
        computed: see :class:`DepthRecord`.
        states: the new states of the first blocks, each segment, and the last blocks, in this order.
        records: what these report.
        task_loss: see :class:`resnet_bk.record.Record`.
    """

    expected: Tensor
    blocks: Tensor
    computed: int
    states: list[Any] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    task_loss: TaskLoss | None = None


class AdaptiveDepth(AdaptiveLayer):
    """First blocks for every position, segments with a decision before each, and last blocks for every position."""

    priced = True  # True if the loss contains a price on blocks

    def __init__(self, config: ModelConfig, stack: Stack):
        super().__init__()
        self.settings, self.threshold, self.available = config.depth, config.depth.stops_at, len(stack)
        begin, end, every = self.settings.first, len(stack) - self.settings.after, self.settings.every
        self.first = stack.part(0, begin)
        self.segments = nn.ModuleList(stack.part(i, min(i + every, end)) for i in range(begin, end, every))
        self.last = stack.part(end)

    def forward(
        self, x: Tensor, tokens: Tokens, state: Sequence[Any] | None, mask: Tensor | None
    ) -> tuple[Tensor, list[Any], list[Record]]:
        padded, mask = mask, torch.ones_like(tokens.ids, dtype=torch.bool) if mask is None else mask
        number = mask.sum()
        for_all = len(self.first) + len(self.last)
        totals = Totals(
            expected=for_all * number.to(torch.promote_types(x.dtype, torch.float32)),
            blocks=for_all * mask.long(),
            computed=for_all * tokens.ids.numel(),
        )
        past = [None] * (len(self.segments) + 2) if state is None else state
        x = self._run(self.first, x, tokens, past[0], padded, totals)
        x = self._run_segments(x, tokens, past[1:-1], mask, totals)
        x = self._run(self.last, x, tokens, past[-1], padded, totals)
        record = DepthRecord(
            losses={"ponder": Loss(self._ponder(totals, number), self.settings.penalty)} if self.priced else {},
            task_loss=totals.task_loss,
            blocks=totals.blocks,
            computed=totals.computed,
            available=self.available,
        )
        return x, totals.states, [record, *totals.records]

    def layout(self, x: Tensor) -> list[Any]:
        return [stack.layout(x) for stack in (self.first, *self.stacks, self.last)]

    @property
    def stacks(self) -> list[Stack]:
        """The segments, with a type that mypy can use."""
        return cast(list[Stack], list(self.segments))

    def _run(self, stack: Stack, x: Tensor, tokens: Tokens, state: Any, mask: Tensor | None, totals: Totals) -> Tensor:
        x, state, records = stack(x, tokens, state, mask)
        totals.states.append(state)
        totals.records += records
        return x

    def _run_segments(self, x: Tensor, tokens: Tokens, past: Sequence[Any], mask: Tensor, totals: Totals) -> Tensor:
        """Run each segment on the positions that enter it, (B, N, D) -> (B, N, D).

        mask: (B, N) bool, False for padding; here it is never None.
        """
        raise NotImplementedError

    def _run_packed(
        self, segment: Stack, x: Tensor, tokens: Tokens, state: Any, packing: Packing, totals: Totals
    ) -> Tensor:
        """Run a segment on packed positions x (B, M, D).

        A row without a selected position is skipped if it has a state and there is no bound.
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
        number_packings: number of packings made before the decision.
        x: (B, M, D), their features.
        present: (B, M) bool, True for running positions, False for padding and for the positions that fill up a row.
    """

    number_packings: int
    x: Tensor
    present: Tensor


class Stopping(AdaptiveDepth):
    """A position that stops before a segment runs none of the later segments.

    The output of a position is the mean of its features before each segment and after the last one, weighted by the
    probability to stop there. For a policy with hard decisions it is the features with which the position stopped.
    """

    def _draw(self, x: Tensor) -> Any:
        """Return what all decisions of a forward pass need in common, such as a random confidence.

        It is called once per forward pass. x: (B, N, D).
        """
        return None

    def _halt(self, i: int, x: Tensor, drawn: Any) -> Tensor:
        """Return (B, M) float32 or float64, the probability to stop before segment i.

        It is exactly 0 or 1 for a policy with hard decisions. drawn: from `_draw`.
        """
        raise NotImplementedError

    def _stops(self, halt: Tensor, left: Tensor) -> Tensor:
        """Return (B, M) bool, True where a position stops.

        left: (B, M), the probability of a position that earlier stops have not used; at first 1, and 0 for padding.
        """
        raise NotImplementedError

    def _task_loss(
        self, out: Tensor, snapshots: list[Snapshot], packings: list[Packing], drawn: Any
    ) -> TaskLoss | None:
        """Return a loss that replaces the cross-entropy in training (see `Record.task_loss`), or None.

        Args:
            out: (B, N, D), the output of the segments.
            snapshots: one entry for each decision.
            packings: all packings of the forward pass, in order.
            drawn: from `_draw`.
        """
        return None

    def _run_segments(self, x: Tensor, tokens: Tokens, past: Sequence[Any], mask: Tensor, totals: Totals) -> Tensor:
        drawn, present, left = self._draw(x), mask, mask.to(totals.expected.dtype)
        blocks, out = torch.zeros_like(tokens.ids), torch.zeros_like(x)
        packings: list[Packing] = []
        # `out` and `blocks` as they were before each packing. At the end, the packed ones are merged back into them.
        unpacked: list[tuple[Tensor, Tensor]] = []
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
                totals.states += past[i:]  # no position runs on: the remaining segments keep their states
                break
            packing = Packing(runs, TILE, bound)
            # Skip the packing if it would change nothing: all positions run, and the length is already whole tiles.
            if running is None or running < runs.numel() or runs.shape[1] % packing.tile:
                packings.append(packing)
                unpacked.append((out, blocks))
                x, out, blocks = (packing.pack(t) for t in (x, out, blocks))
                tokens, present = tokens.map(packing.pack), packing.mask
                left = packing.pack(left) * present
            x = self._run_packed(segment, x, tokens, past[i], packing, totals)
            totals.expected = totals.expected + len(segment) * left.sum()
            blocks = blocks + len(segment) * present
        else:  # not left by `break`: positions that still run stop after the last segment
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
    the threshold. The probability of the last stop is then raised by what is missing to a sum of 1. The output is the
    mean of the features, weighted by these probabilities, so the task loss trains the units. The expected number of
    blocks, whose share of all blocks the loss "ponder" puts a price on, is the number of first and last blocks plus the
    blocks of each segment times the probability that is left when a position enters it.
    """

    def __init__(self, config: ModelConfig, stack: Stack):
        super().__init__(config, stack)
        self.units = nn.ModuleList(Score(config.d_model, INITIAL_SCORE) for _ in self.segments)

    def _halt(self, i: int, x: Tensor, drawn: None) -> Tensor:
        return self.units[i](x).sigmoid()

    def _stops(self, halt: Tensor, left: Tensor) -> Tensor:
        return left - halt <= 1 - self.threshold


class Skipping(AdaptiveDepth):
    """A router before each segment decides whether a position runs it or skips it.

    A skipped position may still enter the next segment. This is mixture of depths (Raposo et al. 2024,
    arXiv:2404.02258) with a threshold instead of a top-k over the sequence, which would leak later positions into
    earlier decisions. Outside training there is no gate: a position enters if its probability reaches the threshold.

    In training, a gate scales what a segment adds. Noise moves the gate between 0, where the segment does not run, and
    1 (hard concrete, Louizos et al. 2018, arXiv:1712.01312). Averaged over the noise, the score's gradient is then
    about proportional to the difference in task loss between running and skipping the segment. With the gate always 1
    it would measure only the effect of a slightly larger gate, which training drives to zero even where the segment is
    useful.
    """

    def __init__(self, config: ModelConfig, stack: Stack):
        super().__init__(config, stack)
        in_segments = sum(map(len, self.stacks))  # number of blocks
        share = (self.settings.target * self.available - self.available + in_segments) / max(1, in_segments)
        # Initial probability to enter, at the mean score: as the target asks, but between 0.5 and 0.9.
        share = min(max(share, 0.5), 0.9)
        self.routers = nn.ModuleList(Score(config.d_model, math.log(share / (1 - share)), 1.0) for _ in self.segments)

    def _run_segments(self, x: Tensor, tokens: Tokens, past: Sequence[Any], mask: Tensor, totals: Totals) -> Tensor:
        bound = capacity(self.settings.bound, x.shape[1])
        for router, segment, state in zip(self.routers, self.stacks, past, strict=True):
            score = router(x)
            probability, gate = score.sigmoid(), None
            if self.training:
                noise = torch.rand_like(score).logit(1e-6)
                gate = (0.5 + score + noise).clamp(0, 1)
            runs = mask & (probability >= self.threshold if gate is None else gate > 0)
            totals.expected = totals.expected + len(segment) * (probability * mask).sum()
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
        A function that returns the mean number of blocks per non-padding position so far, with the first and last
        blocks of the adaptive layer; it returns None for a model without adaptive depth.
    """
    sums: list[tuple[int, int]] = []

    def count(module: nn.Module, arguments: Any, output: tuple[Tensor, Any, list[Any]]) -> None:
        sums.append(output[2][0].sums)

    layers = [module for module in model.modules() if isinstance(module, AdaptiveDepth)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        yield lambda: sum(b for b, _ in sums) / max(1, sum(n for _, n in sums)) if layers else None
    finally:
        for hook in hooks:
            hook.remove()
