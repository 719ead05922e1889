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

from resnet_bk.adaptive.select import Packing, rows_alike, run_rows
from resnet_bk.config import ModelConfig
from resnet_bk.layers.block import Stack
from resnet_bk.layers.feedforward import TILE
from resnet_bk.layers.score import Score
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
LEAST_SURE = 0.5  # of the confidences at which positions exit in training


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
        losses = {} if self.settings.policy == "exit" else {"ponder": self._ponder(spent, number)}
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
        state yet."""
        counts = packing.counts if state is not None else packing.counts.clamp(min=1)
        groups = rows_alike(counts, TILE)
        y, state, records = run_rows(segment, x, ids, state, packing, groups)
        spent.states.append(state)
        spent.records += records
        spent.computed += len(segment) * sum(len(rows) * packing.width(counts[rows]) for rows in groups)
        return y

    def _ponder(self, spent: Spent, number: Tensor) -> Tensor:
        """The expected share of the blocks, times the price: 1 where the share that ran, which is what costs time, is
        above the target by BAND or more, in proportion where it is closer, negative where it is below. A price that
        jumped between two values would drown in the units what one token is worth beside another."""
        scale = 1 / (self.available * number.clamp(min=1).to(spent.expected.dtype))
        above = spent.blocks.sum() * scale - self.settings.target
        return (above / BAND).clamp(-1, 1) * spent.expected * scale


class Halting(AdaptiveDepth):
    """Positions stop before a segment, for good.

    act: before each segment a unit gives the probability to stop there. A position stops where these add up to the
    threshold, the last probability being what is left of 1; it becomes the mean of its states under these
    probabilities (Graves 2016, arXiv:1603.08983, eqs. 5 to 13). So the task trains the units. The ponder cost is the
    expected number of blocks, a sum over segments of the probability to reach them.

    exit: a position stops where the model's head is confident about the next token. In training each exit is scored,
    and positions of a share of the sequences stop, at a confidence drawn for each sequence: the later blocks learn on
    chains from which others have left, few or many.
    """

    def __init__(self, config: ModelConfig, stack: Stack, read: Callable[[Tensor], Tensor]):
        """read: from features (..., D) to logits (..., V), the model's own."""
        super().__init__(config, stack)
        self.read, self.exits = read, config.depth.policy == "exit"
        self.units = (
            nn.ModuleList() if self.exits else nn.ModuleList(Score(config.d_model, STOP) for _ in self.segments)
        )

    def _decide(self, x: Tensor, ids: Tensor, past: Sequence[Any], real: Tensor, spent: Spent) -> Tensor:
        left = real.to(spent.expected.dtype)  # of each position's probability 1
        sure_from = self._sure_from(x)
        present, blocks, out = real, torch.zeros_like(ids), torch.zeros_like(x)
        packings: list[Packing] = []
        waiting: list[tuple[Tensor, Tensor]] = []  # out and blocks before each packing, to merge the later ones into
        exits: list[tuple[int, Tensor, Tensor]] = []
        for i, segment in enumerate(self.stacks):
            if self.exits and self.training:
                exits.append((len(packings), x, present))
            halt = self._halt(i, x, sure_from)
            stops = left - halt <= 1 - self.threshold if not self.exits else halt > 0
            weight = torch.where(stops, left, halt)
            out = torch.addcmul(out, weight.unsqueeze(-1).to(x.dtype), x)
            left, goes = left - weight, present & ~stops
            going = int(goes.sum())
            if going == 0 and past[i] is not None:  # most steps of decoding
                spent.states += past[i:]
                break
            whole = going == goes.numel() and (goes.shape[1] == 1 or goes.shape[1] % TILE == 0)
            packing = Packing(goes, TILE)
            if not whole:
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
        if exits:
            spent.task_loss = self._exit_loss(out, exits, packings)
        return out

    def _sure_from(self, x: Tensor) -> Tensor:
        """(B, 1) or (): the confidence from which positions exit; above 1 they never do."""
        if not (self.exits and self.training):
            return x.new_tensor(self.threshold if self.threshold < 1 else 2.0)
        everywhere, drawn = torch.rand(2, len(x), 1, device=x.device).unbind()
        return torch.where(everywhere < self.settings.full_depth, 2.0, LEAST_SURE + (1 - LEAST_SURE) * drawn)

    def _halt(self, i: int, x: Tensor, sure_from: Tensor) -> Tensor:
        """(B, M): the probability to stop before segment i."""
        if not self.exits:
            return self.units[i](x).sigmoid()
        with torch.no_grad():
            sure = confidence(self.read(x), self.settings.confidence) >= sure_from
        return sure.to(torch.promote_types(x.dtype, torch.float32))

    def _exit_loss(self, out: Tensor, exits: list[tuple[int, Tensor, Tensor]], packings: list[Packing]) -> TaskLoss:
        """The loss of the output, and the weighted mean of those of the exits, each over the positions it saw."""

        def loss(nats: Callable[[Tensor], Tensor], scored: Tensor) -> Tensor:
            total = nats(out)
            for level, x, present in exits:
                for packing in reversed(packings[:level]):
                    x, present = packing.merge(x), packing.merge(present)
                total = total + self.settings.exit_weight / len(exits) * nats(x) * present
            return total

        return loss


def confidence(logits: Tensor, kind: str) -> Tensor:
    """(..., V) -> (...), 0 to 1: the likeliest token's probability, or 1 - entropy / log V."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if kind == "probability":
        return (logits.amax(-1) - logits.logsumexp(-1)).exp()
    log_p = logits.log_softmax(-1)
    return 1 + (log_p.exp() * log_p).sum(-1) / math.log(logits.shape[-1])


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
        for router, segment, state in zip(self.routers, self.stacks, past, strict=True):
            score = router(x)
            probability, gate = score.sigmoid(), None
            if self.training:
                noise = torch.rand_like(score).logit(1e-6)
                gate = (0.5 + score + noise).clamp(0, 1)
            goes = real & (probability >= self.threshold if gate is None else gate > 0)
            spent.expected = spent.expected + len(segment) * (probability * real).sum()
            if state is not None and not bool(goes.any()):
                spent.states.append(state)
                continue
            packing = Packing(goes, TILE)
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

    rooms = [module for module in model.modules() if isinstance(module, AdaptiveDepth)]
    hooks = [room.register_forward_hook(count) for room in rooms]
    try:
        yield lambda: sum(b for b, _ in sums) / max(1, sum(n for _, n in sums)) if rooms else None
    finally:
        for hook in hooks:
            hook.remove()


def adaptive_depth(config: ModelConfig, stack: Stack, read: Callable[[Tensor], Tensor]) -> Stack:
    """The stack, or, where `config.depth` has a policy, the same blocks with adaptive depth."""
    if config.depth.policy == "none":
        return stack
    return Stack([Skipping(config, stack) if config.depth.policy == "skip" else Halting(config, stack, read)])
