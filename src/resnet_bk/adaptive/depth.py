"""Adaptive depth: how many blocks each position goes through.

The blocks after a decision run on the packed sequence of the positions that go on: their chains consist of those alone.
A decision reads the position and its past, never how many others go on, so predictions stay causal and do not depend
on batch-mates. Where nothing goes on in decoding, the blocks do not run at all and keep their state.

Dimensions: B batch, N positions, M positions of the fullest row that are still going, D model width.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resnet_bk.adaptive.select import Packing, rows_alike, run_rows
from resnet_bk.config import DepthConfig, ModelConfig
from resnet_bk.layers.block import Stack
from resnet_bk.layers.feedforward import TILE
from resnet_bk.layers.score import Score
from resnet_bk.record import Record, TaskLoss


@dataclass(kw_only=True)
class DepthRecord(Record):
    """blocks: (B, N) int64, those that each position went through; 0 for padding. computed: blocks times positions, what
    fills up batches included. available: blocks there are."""

    blocks: Tensor
    computed: int
    available: int

    @property
    def mean_blocks(self) -> float:
        """Of a position that is no padding."""
        return float(self.blocks.sum() / (self.blocks > 0).sum().clamp(min=1))


class Decided(nn.Module):
    """Blocks in segments, with a decision between each and the next."""

    def __init__(self, settings: DepthConfig, segments: Sequence[Stack]):
        super().__init__()
        self.settings, self.threshold = settings, settings.stops_at
        self.segments = nn.ModuleList(segments)
        self.sizes = [len(segment) for segment in segments]
        self.available = sum(self.sizes)

    def ponder(self, expected: Tensor, executed: Tensor, real: int) -> dict[str, Tensor]:
        """ "ponder": how far the expected share of the blocks that a position goes through is from the target, from
        sums over `real` positions. Which way it pulls follows the share executed, which is what costs time."""
        scale = 1 / (self.available * max(1, real))
        target = self.settings.target
        return {"ponder": torch.where(executed * scale > target, 1, -1) * (expected * scale - target)}


@contextlib.contextmanager
def measured_depth(model: nn.Module) -> Iterator[Callable[[], float | None]]:
    """Inside, counts what every position goes through; call what it yields for the mean number of blocks among those
    that depth decides about, None where a model has no adaptive depth."""
    sums: list[tuple[int, int]] = []

    def count(module: nn.Module, arguments: Any, output: tuple[Tensor, Any, list[Record]]) -> None:
        record = output[2][0]
        assert isinstance(record, DepthRecord)
        sums.append((int(record.blocks.sum()), int((record.blocks > 0).sum())))

    rooms = [module for module in model.modules() if isinstance(module, Decided)]
    hooks = [room.register_forward_hook(count) for room in rooms]
    try:
        yield lambda: sum(b for b, _ in sums) / max(1, sum(n for _, n in sums)) if rooms else None
    finally:
        for hook in hooks:
            hook.remove()


def run_packed(
    segment: Stack, x: Tensor, ids: Tensor, state: Any, packing: Packing
) -> tuple[Tensor, Any, list[Record], int]:
    """A segment on packed positions x (B, M, D), ids (B, M); also how many it computed. Rows without any do not run,
    except where there is no state yet."""
    counts = packing.counts if state is not None else packing.counts.clamp(min=1)
    groups = rows_alike(counts, TILE)
    y, state, records = run_rows(segment, x, ids, state, packing, groups)
    return y, state, records, sum(len(rows) * packing.width(counts[rows]) for rows in groups)


class Halting(Decided):
    """Positions stop after a segment, for good, and what they have become is their output.

    act: after each segment a unit gives the probability to stop there. A position stops where these add up to the
    threshold, the last probability being what is left of 1; its output is the mean of its states under these
    probabilities (Graves 2016, arXiv:1603.08983, eqs. 5 to 13). So the task trains the units. The ponder cost is the
    expected number of blocks, sum over segments of the probability to reach them.

    exit: a position stops where the model's head is confident about the next token. In training each exit is scored,
    and a share of the sequences runs as in evaluation: the later blocks learn on chains from which others have left.
    """

    def __init__(self, config: ModelConfig, stack: Stack, read: Callable[[Tensor], Tensor]):
        """read: from features (..., D) to logits (..., V), the model's own."""
        settings = config.depth
        end = len(stack) - (settings.last if settings.policy == "act" else 0)
        starts = [0, *range(settings.first, end, settings.every), end]
        super().__init__(settings, [stack[a:b] for a, b in zip(starts, starts[1:], strict=False) if a < b])
        self.read, self.rest = read, stack[end:]
        self.available = len(stack)
        if settings.policy == "act":
            self.units = nn.ModuleList(Score(config.d_model, START) for _ in self.segments[1:])

    def forward(
        self, x: Tensor, ids: Tensor, state: Sequence[Any] | None, mask: Tensor | None
    ) -> tuple[Tensor, list[Any], list[Record]]:
        ids_all = ids
        present = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        real = int(present.sum())
        left = present.to(torch.promote_types(x.dtype, torch.float32))  # of each position's probability 1
        leavers = self._leavers(x) if self.training and not hasattr(self, "units") else None
        out, blocks = torch.zeros_like(x), torch.zeros_like(ids)
        packing: Packing | None = None
        levels: list[tuple[Packing, Tensor, Tensor]] = []  # what to merge the later positions into
        exits: list[tuple[int, Tensor, Tensor]] = []
        after, records, computed = [], [], 0
        expected: Tensor = left.new_zeros(())
        for i, segment in enumerate(self.segments):
            past = None if state is None else state[i]
            if packing is None:
                x, segment_state, reports = segment(x, ids, past, mask)
                count = ids.numel()
            else:
                x, segment_state, reports, count = run_packed(segment, x, ids, past, packing)
            after.append(segment_state)
            records += reports
            computed += count * self.sizes[i]
            expected = expected + self.sizes[i] * left.sum()
            blocks = blocks + self.sizes[i] * present
            if i == len(self.segments) - 1:
                out = torch.addcmul(out, left.unsqueeze(-1).to(x.dtype), x)
                break
            halt = self._halt(i, x, leavers)
            stops = left - halt <= 1 - self.threshold if leavers is None and hasattr(self, "units") else halt > 0
            weight = torch.where(stops, left, halt)
            out = torch.addcmul(out, weight.unsqueeze(-1).to(x.dtype), x)
            left, goes = left - weight, present & ~stops
            if self.training and not hasattr(self, "units"):
                exits.append((len(levels), x, present))
            going = int(goes.sum())
            if going == 0 and state is not None:  # most steps of decoding
                after += state[i + 1 : len(self.segments)]
                break
            if going == goes.numel() and goes.shape[1] % (TILE if goes.shape[1] > 1 else 1) == 0:
                continue
            packing = Packing(goes, TILE)
            levels.append((packing, out, blocks))
            x, ids, out, blocks = (packing.pack(t) for t in (x, ids, out, blocks))
            present = packing.mask
            left = packing.pack(left) * present
        for level, (outer, wide, counts) in reversed(list(enumerate(levels))):
            out, blocks = outer.merge(out, wide), outer.merge(blocks, counts)
        if self.rest:
            out, rest_state, reports = self.rest(out, ids_all, None if state is None else state[-1], mask)
            after.append(rest_state)
            records += reports
            computed += len(self.rest) * ids_all.numel()
            blocks = blocks + len(self.rest) * (blocks > 0)
            expected = expected + len(self.rest) * real
        record = DepthRecord(blocks=blocks, computed=computed, available=sum(self.sizes) + len(self.rest))
        if hasattr(self, "units"):
            record.losses = self.ponder(expected, blocks.sum(), real)
        elif self.training:
            record.task_loss = self._exit_loss(out, exits, [packing for packing, _, _ in levels])
        return out, after, [record, *records]

    def _leavers(self, x: Tensor) -> Tensor:
        """(B, 1) bool: the sequences of which positions may stop early in training."""
        return torch.rand(len(x), 1, device=x.device) >= self.settings.full_depth

    def _halt(self, i: int, x: Tensor, leavers: Tensor | None) -> Tensor:
        """(B, M): the probability to stop after segment i."""
        if hasattr(self, "units"):
            return self.units[i](x).sigmoid()
        with torch.no_grad():
            sure = confidence(self.read(x), self.settings.confidence) >= self.threshold
        if self.threshold >= 1:
            sure = torch.zeros_like(sure)
        return (sure if leavers is None else sure & leavers).to(torch.promote_types(x.dtype, torch.float32))

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


START = -3.0  # halting scores: nearly every position reaches the last block before learning


class Skipping(Decided):
    """Positions go past a segment, and may go into the next one: a router before each lets them in or not.

    Mixture of depths (Raposo et al. 2024, arXiv:2404.02258) with a threshold in place of its top-k over the sequence,
    which would tell a position about later ones.
    """

    variant = "sampled"

    def __init__(self, config: ModelConfig, stack: Stack):
        settings = config.depth
        end = len(stack) - settings.last
        starts = [0, *range(settings.first, end, settings.every), end, len(stack)]
        super().__init__(settings, [stack[a:b] for a, b in zip(starts, starts[1:], strict=False)])
        self.routers = nn.ModuleList(Score(config.d_model, 2.0, 0.3) for _ in self.segments[1:-1])

    def forward(
        self, x: Tensor, ids: Tensor, state: Sequence[Any] | None, mask: Tensor | None
    ) -> tuple[Tensor, list[Any], list[Record]]:
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        number = int(real.sum())
        blocks, after, records, computed = torch.zeros_like(ids), [], [], 0
        expected: Tensor = x.new_zeros(())
        for i, (segment, size) in enumerate(zip(self.segments, self.sizes, strict=True)):
            past = None if state is None else state[i]
            if i in (0, len(self.segments) - 1):
                x, segment_state, reports = segment(x, ids, past, mask)
                goes, count = real, ids.numel()
                expected = expected + size * number
            else:
                score = self.routers[i - 1](x)
                p = gates = score.sigmoid()
                if self.training and self.variant == "sampled":
                    goes = torch.rand_like(p) < p.detach()
                elif self.training and self.variant == "concrete":
                    u = torch.rand_like(p)
                    gates = (0.5 + score + (u / (1 - u)).log()).clamp(0, 1)
                    goes = gates > 0
                else:
                    goes = p >= self.threshold
                goes = goes & real
                expected = expected + size * (p * real).sum()
                if state is not None and not bool(goes.any()):
                    after.append(past)
                    continue
                packing = Packing(goes, TILE)
                packed, gate = packing.pack(x), packing.pack(gates).unsqueeze(-1).to(x.dtype)
                y, segment_state, reports, count = run_packed(segment, packed, packing.pack(ids), past, packing)
                if self.variant == "soft" or (self.variant == "concrete" and self.training):
                    y = torch.lerp(packed, y, gate)
                elif self.training and self.variant == "sampled":
                    y = torch.addcmul(y, gate / gate.detach() - 1, y - packed)
                x = packing.merge(y, x)
            after.append(segment_state)
            records += reports
            computed += count * size
            blocks = blocks + size * goes
        record = DepthRecord(
            losses=self.ponder(expected, blocks.sum(), number),
            blocks=blocks,
            computed=computed,
            available=sum(self.sizes),
        )
        return x, after, [record, *records]


def adaptive_depth(config: ModelConfig, stack: Stack, read: Callable[[Tensor], Tensor]) -> Stack:
    """The stack, or, where `config.depth` has a policy, the same blocks with adaptive depth."""
    if config.depth.policy == "none":
        return stack
    return Stack([Skipping(config, stack) if config.depth.policy == "skip" else Halting(config, stack, read)])
