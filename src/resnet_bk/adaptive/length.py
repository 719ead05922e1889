"""Learned length: of each window of text, how many positions go through all blocks.

All positions go through the first blocks, the trunk. The deep blocks run on the packed sequence of those kept: the
first ones of each window (truncate), or about as many spread over it, each standing for those since the last one kept
(pool). The others take a cheap way out. The length is predicted from the window's prefix, as long as the shortest one.

Causal by what is known when: the length is chosen from the prefix, which is treated as the shortest one would have it,
and decides about the positions after it only. Nothing about a window depends on later ones, so sequences may go on
forever.

Dimensions: B batch, N positions, M positions kept by the fullest row, W windows, K lengths, D model width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.adaptive.boundaries import ends_of_words, since_last
from resnet_bk.adaptive.length_predictor import Lengths, SequenceLengthPredictor
from resnet_bk.adaptive.multiscale import LearnedUpsampling, MultiScale
from resnet_bk.adaptive.select import Chunks, last_real, rows_by_length, run_rows
from resnet_bk.config import ModelConfig
from resnet_bk.layers.block import Stack
from resnet_bk.layers.feedforward import TILE, Experts, SwiGLU
from resnet_bk.layers.norm import Norm
from resnet_bk.record import Record, TaskLoss

EXPLORATION = 0.2  # share of sampled lengths that are drawn evenly
DISTILLATION = 0.3  # weight of the distance between what the way out and the deep blocks return
REACH = 16  # distances from the last kept position that are told apart


class LengthState(NamedTuple):
    """trunk, deep: their states; offset: (B,) int64, positions of the current window so far; pooled: (B, D + 1), the
    weighted sum of its prefix and of the weights; length: (B,) int64, chosen once the prefix is complete; open:
    (B, D + 1), sum and number of positions since the last one kept; result: (B, D), what that one returned; since,
    word: (B,) int64, positions since it and since the last end of a word; before: (B,) int64, the last token."""

    trunk: Any
    deep: Any
    offset: Tensor
    pooled: Tensor
    length: Tensor
    open: Tensor
    result: Tensor
    since: Tensor
    word: Tensor
    before: Tensor


@dataclass(kw_only=True)
class LengthRecord(Record):
    """What was decided, and what it cost.

    predicted_lengths: (B, W) int64, of each window of the call; the shortest one where `decided` (B, W) is False, since
        the window's prefix is not complete. In training by samples, the samples.
    length_probs: (B, W, K).
    kept, real: (B, N) bool, the positions that went deep, and those that are no padding.
    deep_positions: those the deep blocks computed, what fills up their batches included.
    costs: FLOPs of one position in the trunk, the deep blocks and the way out: two for each weight it meets.
    """

    predicted_lengths: Tensor
    decided: Tensor
    length_probs: Tensor
    kept: Tensor
    real: Tensor
    deep_positions: int
    costs: tuple[int, int, int]

    @property
    def avg_predicted_length(self) -> float:
        """Over the windows that decided; over all where none did."""
        chosen = self.predicted_lengths[self.decided] if bool(self.decided.any()) else self.predicted_lengths
        return chosen.double().mean().item()

    @property
    def executed_flops(self) -> int:
        """Of evaluation: in training the way out is computed everywhere."""
        return self._flops(self.deep_positions)

    @property
    def speedup_estimate(self) -> float:
        """FLOPs of every position through every block, over those of what was chosen. The clock has the last word."""
        full = (self.costs[0] + self.costs[1]) * int(self.real.sum())
        return full / max(1, self._flops(int(self.kept.sum())))

    def _flops(self, deep_positions: int) -> int:
        trunk, deep, way_out = self.costs
        positions = int(self.real.sum())
        return trunk * positions + deep * deep_positions + way_out * (positions - int(self.kept.sum()))


class Windows(NamedTuple):
    """offset, window: (B, N) int64, each position's place in its window, and which one that is of the call's.
    choices: of (B, W). sample: (B, W, K) one-hot, where lengths are sampled. chosen: (B, W) int64. decided, new: (B, W)
    bool, whether there is a length, and whether it was chosen in this call."""

    offset: Tensor
    window: Tensor
    choices: Lengths
    sample: Tensor | None
    chosen: Tensor
    decided: Tensor
    new: Tensor

    def at(self, per_window: Tensor) -> Tensor:
        """(B, W, ...) -> (B, N, ...)."""
        rows = torch.arange(len(self.window), device=self.window.device).unsqueeze(1)
        return per_window[rows, self.window]

    def mean_of_others(self, x: Tensor, counted: Tensor) -> Tensor:
        """The mean of x (B, N) over `counted` positions of all windows but a position's own; 0 where there are none."""
        table = torch.stack([x * counted, counted.to(x.dtype)], dim=-1)
        sums = x.new_zeros(*self.chosen.shape, 2)
        sums = sums.scatter_add(1, self.window.unsqueeze(-1).expand(-1, -1, 2), table)
        total, number = (sums.sum((0, 1)) - self.at(sums)).unbind(-1)
        return total / number.clamp(min=1)


class Deep(NamedTuple):
    """at: (B, N, D), what the last position that went deep returned, at each position. computed: positions, padding
    included."""

    at: Tensor
    state: Any
    still_open: Tensor
    result: Tensor
    computed: int
    records: list[Record]


class LearnedLength(nn.Module):
    """A stack whose later layers run on as many positions of each window as the predictor says."""

    def __init__(self, config: ModelConfig, trunk: Stack, deep: Stack):
        super().__init__()
        self.settings, self.window, d = config.length, config.window, config.d_model
        self.trunk, self.deep = trunk, deep
        self.predictor = SequenceLengthPredictor(
            d,
            self.settings.bins,
            self.window,
            pooling=self.settings.pooling,
            placement=self.settings.placement,
            levels=self.settings.levels,
        )
        self.norm, self.way_out = Norm(d), SwiGLU(replace(config, d_ff=d))
        self.pools = self.settings.mode == "pool"
        if self.pools:
            self.down = nn.Linear(d, d, bias=False)
            self.up = LearnedUpsampling(d, reach=REACH)
            self.gate_norm, self.gate = Norm(d), nn.Linear(d, d)
            nn.init.zeros_(self.down.weight)  # a position by itself goes deep as it is, several start as the last one
        way_out = nn.ModuleList([self.way_out, *([self.up, self.gate] if self.pools else [])])
        self.costs = _flops(self.trunk), _flops(self.deep), _flops(way_out)

    def forward(
        self, x: Tensor, ids: Tensor, state: LengthState | None, mask: Tensor | None
    ) -> tuple[Tensor, LengthState, list[Record]]:
        past = self._start(x, ids) if state is None else state
        x, trunk, records = self.trunk(x, ids, past.trunk, mask)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        windows, offset, pooled, length = self._decide(x, real, past)
        words = self._ends_of_words(ids, past)
        keep = real & self._keep(windows, words, past.word)
        everything = self.training and not self.settings.sampled
        deep = self._go_deep(x, ids, real if everything else keep, real, past, state is None)
        y = deep.at
        since = since_last(keep, past.since)
        touched = (x.shape[1] - 1 + (0 if state is None else self.window - 1)) // self.window + 1
        record = LengthRecord(
            losses=self._losses(windows),
            predicted_lengths=windows.chosen[:, :touched],
            decided=windows.decided[:, :touched],
            length_probs=windows.choices.probabilities[:, :touched],
            kept=keep,
            real=real,
            deep_positions=deep.computed,
            costs=self.costs,
        )
        if self.training:
            shallow = self._leave(x, y if self.pools else None, since)
            out = torch.where(keep.unsqueeze(-1), y, shallow)
            if everything:
                record.task_loss = self._expected_loss(windows, y, shallow)
            else:
                plain = self._leave(x, None, since) if self.pools else shallow
                record.task_loss = self._sampled_loss(windows, real, out, plain)
        else:
            out = self._merge(x, y, keep, real, since)
        after = LengthState(
            trunk,
            deep.state,
            offset,
            pooled,
            length,
            deep.still_open,
            deep.result,
            last_real(since, mask, past.since),
            last_real(since_last(words, past.word), mask, past.word),
            last_real(ids, mask, past.before),
        )
        return out, after, [record, *records, *deep.records]

    # ------------------------------------------------------------------------------------- which positions

    def _decide(self, x: Tensor, real: Tensor, past: LengthState) -> tuple[Windows, Tensor, Tensor, Tensor]:
        """The windows of this call, and of the one that follows its last position: offset (B,), pooled prefix so far
        (B, D + 1), length (B,)."""
        batch, n, width = x.shape
        place = past.offset.unsqueeze(1) + torch.arange(n, device=x.device)
        offset, window = place % self.window, place // self.window
        count = n // self.window + 2
        x = x.detach()
        weight = self.predictor.weigh(x) * (real & (offset < self.predictor.prefix))
        row = torch.arange(batch, device=x.device)
        table = F.pad(past.pooled.unsqueeze(1), (0, 0, 0, count - 1)).flatten(0, 1)
        where = (row.unsqueeze(1) * count + window).flatten()
        table = table.index_add(0, where, (self._with_one(x) * weight.unsqueeze(-1)).flatten(0, 1)).unflatten(
            0, (batch, count)
        )
        total, weights = table.split([width, 1], dim=-1)
        choices = self.predictor(total / torch.where(weights > 0, weights, 1.0))
        sample = self._sample(choices) if self.training and self.settings.sampled else None
        end = past.offset + real.sum(1)
        reached = end.unsqueeze(1) - self.window * torch.arange(count, device=x.device)  # positions of each window
        needed = self.predictor.shortest if self.predictor.prefix < self.window else 1
        decided, before = reached >= needed, torch.zeros_like(reached, dtype=torch.bool)
        before[:, 0] = past.offset >= needed
        chosen = self.predictor.choose(choices.values, choices.log_probabilities if sample is None else sample)
        chosen = torch.where(decided, chosen, self.predictor.shortest)
        chosen = torch.where(before, past.length.unsqueeze(1), chosen)
        following = end // self.window
        windows = Windows(offset, window, choices, sample, chosen, decided, decided & ~before)
        return windows, end % self.window, table[row, following], chosen[row, following]

    def _sample(self, choices: Lengths) -> Tensor:
        """(B, W, K) one-hot samples, by the Gumbel-max trick."""
        return F.gumbel_softmax(_explored(choices.probabilities).detach().log(), hard=True)

    def _ends_of_words(self, ids: Tensor, past: LengthState) -> Tensor:
        """(B, N) bool; nowhere where spacing is even."""
        if self.settings.spacing == "even":
            return torch.zeros_like(ids, dtype=torch.bool)
        return ends_of_words(ids, past.before)

    def _keep(self, windows: Windows, words: Tensor, since_word: Tensor) -> Tensor:
        """(B, N) bool. words: (B, N), where words end; since_word: (B,), positions since the last end before."""
        shortest, length = self.predictor.shortest, windows.at(windows.chosen)
        prefix = windows.offset < shortest
        if not self.pools:
            return prefix | (windows.offset < length)
        # Prefix and rest are cut into `cells` stretches. Of each, the first end of a word is kept, or its end.
        length = torch.where(prefix, shortest, length)
        span = torch.where(prefix, shortest, self.window - shortest)
        place = torch.where(prefix, windows.offset, windows.offset - shortest)
        cells = (span * length // self.window).clamp(min=1)
        cell = place * cells // span
        start = -(-cell * span // cells)
        is_last = (place + 1) * cells // span > cell
        since = torch.cat([since_word.unsqueeze(1), since_last(words, since_word)[:, :-1]], dim=1) + 1
        return (since > place - start) & (words | is_last)

    # ------------------------------------------------------------------------------------- deep, or the way out

    def _go_deep(self, x: Tensor, ids: Tensor, run: Tensor, real: Tensor, past: LengthState, first: bool) -> Deep:
        """The deep blocks on the positions `run` (B, N)."""
        if not first and not bool(run.any()):  # many steps of decoding
            still_open = past.open + (self._with_one(x) * real.unsqueeze(-1)).sum(1) if self.pools else past.open
            return Deep(past.result.unsqueeze(1).expand_as(x), past.deep, still_open, past.result, 0, [])
        chunks = Chunks(run, TILE)
        ends, still_open = chunks.ends, past.open
        packed = ends.pack(x)
        if self.pools:
            sums, still_open = chunks.sums(self._with_one(x), real.to(past.open.dtype), past.open)
            total, number = sums.split([x.shape[2], 1], dim=-1)
            packed = packed + self.down((total / number.clamp(min=1)).to(x.dtype) - packed)
        groups = self._groups(ends.counts if not first else ends.counts.clamp(min=1))
        y, deep, records = run_rows(self.deep, packed, ends.pack(ids), past.deep, ends, groups)
        computed = sum(len(rows) * ends.width(ends.counts[rows]) for rows in groups)
        y = y.to(x.dtype)
        result = last_real(y, ends.mask, past.result)
        return Deep(chunks.spread(past.result, y), deep, still_open, result, computed, records)

    def _with_one(self, x: Tensor) -> Tensor:
        """x with a column of ones, (B, N, D + 1), float32 or float64."""
        exact = torch.promote_types(x.dtype, torch.float32)
        return torch.cat([x.to(exact), torch.ones_like(x[..., :1], dtype=exact)], dim=-1)

    def _groups(self, counts: Tensor) -> list[Tensor]:
        """Rows that run together: those of about the same number, or all that have anything to run."""
        if self.settings.execution == "batch_max":
            return [counts.nonzero().squeeze(1)]
        return rows_by_length(counts, TILE)

    def _leave(self, x: Tensor, carried: Tensor | None, since: Tensor) -> Tensor:
        """What positions (..., D) that do not go deep give to the head. carried: (..., D), what the last one that did
        returned, `since` (...) positions ago."""
        if carried is not None:
            x = x + 2 * self.up.place(self.up.expand(carried), since) * self.gate(self.gate_norm(x)).sigmoid()
        return x + self.way_out(self.norm(x), None)[0]

    def _merge(self, x: Tensor, y: Tensor, keep: Tensor, real: Tensor, since: Tensor) -> Tensor:
        """y (B, N, D) where it was kept, the way out elsewhere, computed only there."""
        rest = (real & ~keep).flatten().nonzero().squeeze(1)
        if not len(rest):
            return y
        count, (x, flat) = len(rest), (t.flatten(0, 1) for t in (x, y))
        rest = F.pad(rest, (0, -count % TILE), value=int(rest[0])) if x.shape[0] > 1 else rest
        carried = flat[rest] if self.pools else None
        shallow = self._leave(x[rest], carried, since.flatten()[rest])[:count]
        return flat.index_copy(0, rest[:count], shallow.to(y.dtype)).view_as(y)

    # ------------------------------------------------------------------------------------------------- losses

    def _losses(self, windows: Windows) -> dict[str, Tensor]:
        """ "length": the mean expected share of a window; "certainty": minus the mean entropy of its choice."""
        number = windows.new.sum().clamp(min=1)
        expected, entropy = windows.choices.expected / self.window, windows.choices.entropy
        return {"length": (expected * windows.new).sum() / number, "certainty": -(entropy * windows.new).sum() / number}

    def _expected_loss(self, windows: Windows, deep: Tensor, shallow: Tensor) -> TaskLoss:
        """Expected over lengths: at each position, the deep loss as often as it is reached, else that of the way out.

        Exact for one window of a causal model. Where several windows follow each other, the deep blocks have here seen
        all of the earlier ones, and of bidirectional models' the later positions: "sampled" computes what will run.

        With "gumbel", of one hard sample, with the gradient of its relaxation (Jang et al. 2017, arXiv:1611.01144).
        Both ways learn from every position in full, however seldom they are chosen, so that a choice can be undone; the
        way out learns from what the deep blocks return there, too.
        """
        values, scores = windows.choices
        if self.settings.training == "gumbel":
            probabilities = F.gumbel_softmax(scores, tau=self.settings.temperature, hard=True)
        else:
            probabilities = windows.choices.probabilities
        values = values if values.dim() == 1 else windows.at(values)
        reach = self.predictor.reach(values, windows.at(probabilities), windows.offset)
        reach = torch.where(windows.offset < self.predictor.shortest, 1.0, reach)

        def loss(nats: Callable[[Tensor], Tensor], scored: Tensor) -> Tensor:
            a, b = nats(deep), nats(shallow)
            taught = a + b + DISTILLATION * scored * _distance(shallow, deep.detach())
            return torch.lerp(b.detach(), a.detach(), reach.to(a.dtype)) + (taught - taught.detach())

        return loss

    def _sampled_loss(self, windows: Windows, real: Tensor, out: Tensor, shallow: Tensor) -> TaskLoss:
        """Of the lengths that were drawn, and computed: the loss is that of `out`.

        Its gradient to the predictor is what the event gained over the way out (truncate: that a position is reached;
        pool: that a length was drawn, against the other windows), times the gradient of its probability, over the
        chance to see it. Unbiased for what the event changed in its own window; later windows do not count.
        """
        assert windows.sample is not None
        probabilities = windows.at(windows.choices.probabilities)
        if self.pools:
            event, counted = windows.at(windows.sample), real & (windows.offset >= self.predictor.shortest)
        else:
            event, counted = windows.offset.unsqueeze(-1) < windows.choices.values, real
        counted = counted & windows.at(windows.new)
        chance = (probabilities * event).sum(-1)
        weight = (chance - chance.detach()) / (_explored(probabilities) * event).sum(-1).detach()

        def loss(nats: Callable[[Tensor], Tensor], scored: Tensor) -> Tensor:
            a, b = nats(out), nats(shallow)
            cost, taught = (a - b).detach(), b
            if self.pools:
                cost = cost - windows.mean_of_others(cost, counted & scored)
            else:
                taught = b + DISTILLATION * scored * _distance(shallow, out.detach())
            return a + weight.to(a.dtype) * cost * (counted & scored) + (taught - taught.detach())

        return loss

    def _start(self, x: Tensor, ids: Tensor) -> LengthState:
        """Nothing read yet."""
        batch, width = x.shape[0], x.shape[2]
        none = torch.zeros(batch, dtype=torch.int64, device=x.device)
        sums = x.new_zeros(batch, width + 1, dtype=torch.promote_types(x.dtype, torch.float32))
        return LengthState(None, None, none, sums, none, sums, x.new_zeros(batch, width), none, none, none)


def _explored(probabilities: Tensor) -> Tensor:
    """What lengths are drawn from in training: with a share drawn evenly, every one of them stays in practice."""
    even = torch.full_like(probabilities, 1 / probabilities.shape[-1])
    return torch.lerp(probabilities, even, EXPLORATION)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """(B, N) mean squared distance of x and y (B, N, D) once normalised."""
    x, y = (F.rms_norm(z, z.shape[-1:]) for z in (x, y))
    return (x - y).square().mean(-1)


def _flops(part: nn.Module) -> int:
    """Of one position: two for each weight of the matrices it meets, all the experts it may use."""
    if isinstance(part, Experts):
        return _flops(part.router) + 2 * part.most * (part.up[0].numel() + part.down[0].numel())
    if isinstance(part, MultiScale):
        outside = sum(_flops(child) for child in part.children() if child is not part.inner)
        return outside + _flops(part.inner) // part.factor
    own = 2 * part.weight.numel() if isinstance(part, nn.Linear) else 0
    return own + sum(_flops(child) for child in part.children())
