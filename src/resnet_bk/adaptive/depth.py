"""Adaptive depth: how many blocks each position goes through.

The blocks after a decision run on the packed sequence of the positions that go on: their chains consist of those alone.
A decision reads the position and its past, never how many others go on, so predictions stay causal and do not depend
on batch-mates. Where nothing goes on in decoding, the blocks do not run at all and keep their state. The last blocks
run on all positions again: their chains tell those that stopped what became of the others.

Dimensions: B batch, N positions, M positions of the fullest row that are still going, D model width.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from resnet_bk.adaptive.select import rows_by_length, run_rows
from resnet_bk.config import ModelConfig
from resnet_bk.layers.block import Stack
from resnet_bk.layers.feedforward import TILE
from resnet_bk.layers.score import Score
from resnet_bk.ops.packing import Packing, capacity
from resnet_bk.record import Record, TaskLoss


@dataclass(kw_only=True)
class DepthRecord(Record):
    """blocks: (B, N) int64, those that each position went through; 0 for padding. computed: blocks times positions,
    what fills up batches included. available: blocks there are."""

    blocks: Tensor
    computed: int
    available: int

    @property
    def mean_blocks(self) -> float:
        """Of a position that is no padding."""
        return int(self.blocks.sum()) / max(1, int((self.blocks > 0).sum()))


STOP = -3.0  # halting scores before learning: nearly every position reaches the last segment
BAND = 0.1  # shares of blocks around the target in which the price rises from -1 to 1


@dataclass
class Spent:
    """What a call has computed so far. expected: the sum over positions of the number of blocks that their
    probabilities make; blocks: (B, N) int64, those that ran; computed: see :class:`DepthRecord`."""

    expected: Tensor
    blocks: Tensor
    computed: int
    states: list[Any]
    records: list[Record]
    task_loss: TaskLoss | None = None


class AdaptiveDepth(nn.Module):
    """Blocks that all positions go through, segments of blocks with a decision before each, blocks for all again."""

    priced = True  # whether the loss has a price on blocks

    def __init__(self, config: ModelConfig, stack: Stack):
        super().__init__()
        self.settings, self.threshold, self.available = config.depth, config.depth.stops_at, len(stack)
        begin, end, every = self.settings.first, len(stack) - self.settings.after, self.settings.every
        self.first, self.last = stack.part(0, begin), stack.part(end)
        self.segments = nn.ModuleList(stack.part(i, min(i + every, end)) for i in range(begin, end, every))

    def forward(
        self, x: Tensor, ids: Tensor, state: Sequence[Any] | None, mask: Tensor | None
    ) -> tuple[Tensor, list[Any], list[Record]]:
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        number = real.sum()
        for_all = len(self.first) + len(self.last)
        spent = Spent(
            for_all * number.to(torch.promote_types(x.dtype, torch.float32)),
            for_all * real.long(),
            for_all * ids.numel(),
            [],
            [],
        )
        past = [None] * (len(self.segments) + 2) if state is None else state
        x = self._run(self.first, x, ids, past[0], mask, spent)
        x = self._decide(x, ids, past[1:-1], real, spent)
        x = self._run(self.last, x, ids, past[-1], mask, spent)
        losses = {"ponder": self._ponder(spent, number)} if self.priced else {}
        record = DepthRecord(
            losses=losses,
            task_loss=spent.task_loss,
            blocks=spent.blocks,
            computed=spent.computed,
            available=self.available,
        )
        return x, spent.states, [record, *spent.records]

    @property
    def stacks(self) -> list[Stack]:
        """The segments."""
        return cast(list[Stack], list(self.segments))

    def _run(self, stack: Stack, x: Tensor, ids: Tensor, state: Any, mask: Tensor | None, spent: Spent) -> Tensor:
        x, state, records = stack(x, ids, state, mask)
        spent.states.append(state)
        spent.records += records
        return x

    def _decide(self, x: Tensor, ids: Tensor, past: Sequence[Any], real: Tensor, spent: Spent) -> Tensor:
        """The segments, each on the positions that go into it. x: (B, N, D) -> (B, N, D)."""
        raise NotImplementedError

    def _run_packed(self, segment: Stack, x: Tensor, ids: Tensor, state: Any, packing: Packing, spent: Spent) -> Tensor:
        """A segment on packed positions x (B, M, D), ids (B, M). Rows without any do not run, except where there is no
        state yet, or a bound."""
        if packing.bound is not None:
            spent.computed += len(segment) * packing.mask.numel()
            return self._run(segment, x, ids, state, packing.mask, spent)
        counts = packing.counts if state is not None else packing.counts.clamp(min=1)
        groups = rows_by_length(counts, TILE)
        y, state, records = run_rows(segment, x, ids, state, packing, groups)
        spent.states.append(state)
        spent.records += records
        spent.computed += len(segment) * sum(len(rows) * packing.width(counts[rows]) for rows in groups)
        return y

    def _ponder(self, spent: Spent, number: Tensor) -> Tensor:
        """The expected share of the blocks, times the price: 1 where the share that ran, which is what costs time, is
        above the target by BAND or more, in proportion where it is closer, negative where it is below: it settles at
        what holds the target."""
        scale = 1 / (self.available * number.clamp(min=1).to(spent.expected.dtype))
        above = spent.blocks.sum() * scale - self.settings.target
        return (above / BAND).clamp(-1, 1) * spent.expected * scale


@dataclass
class Seen:
    """Before a segment: how many packings there were, the states x (B, M, D), which of them exist (B, M)."""

    packings: int
    x: Tensor
    present: Tensor


class Stopping(AdaptiveDepth):
    """Positions stop before a segment, for good, and become the mean of their states under the probabilities to stop at
    each; of a policy that is certain, the state at which they stop."""

    def _draw(self, x: Tensor) -> Any:
        """What a call draws once, for all decisions about x (B, N, D)."""
        return None

    def _halt(self, i: int, x: Tensor, drawn: Any) -> Tensor:
        """(B, M) float32 or float64: the probability to stop before segment i; 0 or 1 of a policy that is certain."""
        raise NotImplementedError

    def _stops(self, halt: Tensor, left: Tensor) -> Tensor:
        """(B, M) bool: who stops. left: of each position's probability 1, before this decision."""
        raise NotImplementedError

    def _task_loss(self, out: Tensor, seen: list[Seen], packings: list[Packing], drawn: Any) -> TaskLoss | None:
        """See :class:`resnet_bk.record.Record`. out: (B, N, D). seen: one entry for each decision."""
        return None

    def _decide(self, x: Tensor, ids: Tensor, past: Sequence[Any], real: Tensor, spent: Spent) -> Tensor:
        drawn, left = self._draw(x), real.to(spent.expected.dtype)
        present, blocks, out = real, torch.zeros_like(ids), torch.zeros_like(x)
        packings: list[Packing] = []
        waiting: list[tuple[Tensor, Tensor]] = []  # out and blocks before each packing, to merge the later ones into
        seen: list[Seen] = []
        bound = capacity(self.settings.bound, x.shape[1])
        for i, segment in enumerate(self.stacks):
            if self.training:
                seen.append(Seen(len(packings), x, present))
            halt = self._halt(i, x, drawn)
            stops = self._stops(halt, left)
            weight = torch.where(stops, left, halt)
            out = torch.addcmul(out, weight.unsqueeze(-1).to(x.dtype), x)
            left, goes = left - weight, present & ~stops
            going = None if bound is not None else int(goes.sum())
            if going == 0 and past[i] is not None:  # most steps of decoding
                spent.states += past[i:]
                break
            packing = Packing(goes, TILE, bound)
            if going is None or going < goes.numel() or goes.shape[1] % packing.tile:
                packings.append(packing)
                waiting.append((out, blocks))
                x, ids, out, blocks = (packing.pack(t) for t in (x, ids, out, blocks))
                present = packing.mask
                left = packing.pack(left) * present
            x = self._run_packed(segment, x, ids, past[i], packing, spent)
            spent.expected = spent.expected + len(segment) * left.sum()
            blocks = blocks + len(segment) * present
        else:
            out = torch.addcmul(out, left.unsqueeze(-1).to(x.dtype), x)
        for packing, (wide, counts) in zip(reversed(packings), reversed(waiting), strict=True):
            out, blocks = packing.merge(out, wide), packing.merge(blocks, counts)
        spent.blocks = spent.blocks + blocks
        if self.training:
            spent.task_loss = self._task_loss(out, seen, packings, drawn)
        return out


class Halting(Stopping):
    """Adaptive computation time (Graves 2016, arXiv:1603.08983, eqs. 5 to 13).

    Before each segment a unit gives the probability to stop. A position stops where these add up to the threshold, the
    last one being what is left of 1; it becomes the mean of its states, so the task trains the units. The ponder cost
    is the expected number of blocks, a sum over segments of the probability to reach them.
    """

    def __init__(self, config: ModelConfig, stack: Stack):
        super().__init__(config, stack)
        self.units = nn.ModuleList(Score(config.d_model, STOP) for _ in self.segments)

    def _halt(self, i: int, x: Tensor, drawn: None) -> Tensor:
        return self.units[i](x).sigmoid()

    def _stops(self, halt: Tensor, left: Tensor) -> Tensor:
        return left - halt <= 1 - self.threshold


class Skipping(AdaptiveDepth):
    """Positions go past a segment, and may go into the next one: a router before each lets them in or not.

    Mixture of depths (Raposo et al. 2024, arXiv:2404.02258) with a threshold in place of its top-k over the sequence,
    which would tell a position about later ones. In training what a segment adds is scaled by a gate that noise moves
    between 0, where it does not run, and 1 (hard concrete, Louizos et al. 2018, arXiv:1712.01312): over the noise its
    gradient adds up to all that the segment is worth to the task. At 1 alone it would be what a little more of the
    segment is worth, which training brings to nothing.
    """

    def __init__(self, config: ModelConfig, stack: Stack):
        super().__init__(config, stack)
        decided = sum(map(len, self.stacks))
        share = (self.settings.target * self.available - self.available + decided) / max(1, decided)
        share = min(max(share, 0.5), 0.9)  # of positions that go in at first: what meets the target, at least half
        self.routers = nn.ModuleList(Score(config.d_model, math.log(share / (1 - share)), 1.0) for _ in self.segments)

    def _decide(self, x: Tensor, ids: Tensor, past: Sequence[Any], real: Tensor, spent: Spent) -> Tensor:
        bound = capacity(self.settings.bound, x.shape[1])
        for router, segment, state in zip(self.routers, self.stacks, past, strict=True):
            score = router(x)
            probability, gate = score.sigmoid(), None
            if self.training:
                noise = torch.rand_like(score).logit(1e-6)
                gate = (0.5 + score + noise).clamp(0, 1)
            goes = real & (probability >= self.threshold if gate is None else gate > 0)
            spent.expected = spent.expected + len(segment) * (probability * real).sum()
            if bound is None and state is not None and not bool(goes.any()):
                spent.states.append(state)
                continue
            packing = Packing(goes, TILE, bound)
            packed = packing.pack(x)
            y = self._run_packed(segment, packed, packing.pack(ids), state, packing, spent)
            if gate is not None:
                y = torch.lerp(packed, y, packing.pack(gate).unsqueeze(-1).to(x.dtype))
            x = packing.merge(y, x)
            spent.blocks = spent.blocks + len(segment) * goes
        return x


@contextlib.contextmanager
def measured_depth(model: nn.Module) -> Iterator[Callable[[], float | None]]:
    """Inside, counts what every position goes through; call what it yields for the mean number of blocks among those
    that depth decides about, None where a model has no adaptive depth."""
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
