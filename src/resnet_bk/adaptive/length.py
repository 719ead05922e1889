"""Learned length: how many positions of each window of text run all blocks.

All positions run the first blocks, the trunk. The deep blocks run on the packed sequence of the kept positions: the
first ones of each window (mode truncate), or about as many spread over it, each standing for those since the last kept
one (mode pool). The other positions take a cheap bypass. The length is predicted from the window's prefix, which is as
long as the shortest length; :mod:`resnet_bk.adaptive.windows` has the arithmetic and a worked example.

Causality: the length is chosen from the prefix and only decides about the positions after it. The prefix itself is
always treated as the shortest length would have it. Nothing about a window depends on later ones, so sequences may be
of any length.

Dimensions: B batch, N positions, M positions kept by the fullest row, W windows, K lengths, D model width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.adaptive.boundaries import ends_of_words, since_last
from resnet_bk.adaptive.flops import flops_per_position
from resnet_bk.adaptive.length_predictor import SequenceLengthPredictor
from resnet_bk.adaptive.multiscale import LearnedUpsampling
from resnet_bk.adaptive.select import Chunks, last_token, rows_by_length, run_rows
from resnet_bk.adaptive.windows import Windows, WindowState, explored, read_windows, with_one
from resnet_bk.checkpoint import current_name
from resnet_bk.config import ModelConfig
from resnet_bk.layers.block import AdaptiveLayer, Stack, Tokens
from resnet_bk.layers.feedforward import SwiGLU
from resnet_bk.layers.norm import Norm
from resnet_bk.ops.packing import TILE
from resnet_bk.record import Loss, Record, TaskLoss

DISTILLATION = 0.3  # weight of the distance between what the bypass and the deep blocks return
REACH = 16  # number of distances from the last kept position with a scale of their own


class LengthState(NamedTuple):
    """State of learned length.

    Attributes:
        trunk: state of the trunk.
        deep: state of the deep blocks.
        window: the window that the sequence is in.
        open: (B, D + 1), sum and number of the positions since the last kept one.
        result: (B, D), what the deep blocks returned at the last kept position.
        since: (B,) int64, positions since the last kept one.
        since_word: (B,) int64, positions since the last end of a word.
        last_id: (B,) int64, the last token.
    """

    trunk: Any
    deep: Any
    window: WindowState
    open: Tensor
    result: Tensor
    since: Tensor
    since_word: Tensor
    last_id: Tensor


@dataclass(kw_only=True)
class LengthRecord(Record):
    """Decisions of learned length, and their cost.

    Attributes:
        predicted_lengths: (B, W) int64, length of each window of the call; the shortest one where `decided` is False.
            In training by samples, the drawn lengths.
        decided: (B, W) bool, True where the window's prefix is complete and its length chosen.
        length_probs: (B, W, K), probabilities of the lengths.
        kept: (B, N) bool, True for positions that ran the deep blocks.
        mask: (B, N) bool, False for padding.
        deep_positions: positions that the deep blocks computed, those that fill up their batches included.
        costs: FLOPs per position of the trunk, the deep blocks and the bypass.
    """

    predicted_lengths: Tensor
    decided: Tensor
    length_probs: Tensor
    kept: Tensor
    mask: Tensor
    deep_positions: int
    costs: tuple[float, float, float]

    @property
    def avg_predicted_length(self) -> float:
        """Mean over the windows that decided; over all windows where none did."""
        chosen = self.predicted_lengths[self.decided] if bool(self.decided.any()) else self.predicted_lengths
        return chosen.double().mean().item()

    @property
    def executed_flops(self) -> float:
        """FLOPs executed in evaluation. In training the bypass is computed at every position."""
        return self._flops(self.deep_positions)

    @property
    def speedup_estimate(self) -> float:
        """FLOPs without learned length, divided by those with only the kept positions in the deep blocks.

        This is an estimate: only the clock measures a speedup.
        """
        full = (self.costs[0] + self.costs[1]) * int(self.mask.sum())
        return full / max(1.0, self._flops(int(self.kept.sum())))

    def _flops(self, deep_positions: int) -> float:
        trunk, deep, bypass = self.costs
        positions = int(self.mask.sum())
        return trunk * positions + deep * deep_positions + bypass * (positions - int(self.kept.sum()))


class Deep(NamedTuple):
    """Result of the deep blocks.

    Attributes:
        at: (B, N, D), at each position the result of the last kept position.
        state: their state.
        open, result: see :class:`LengthState`.
        computed: positions computed, padding included.
        records: what they report.
    """

    at: Tensor
    state: Any
    open: Tensor
    result: Tensor
    computed: int
    records: list[Record]


class LearnedLength(AdaptiveLayer):
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
        self.norm, self.bypass = Norm(d), SwiGLU(replace(config, d_ff=d))
        self.pools = self.settings.mode == "pool"
        if self.pools:
            self.down = nn.Linear(d, d, bias=False)
            self.up = LearnedUpsampling(d, reach=REACH)
            self.gate_norm, self.gate = Norm(d), nn.Linear(d, d)
            # At first a kept position enters as it is; training adds a part of the mean since the last kept one.
            nn.init.zeros_(self.down.weight)
        bypass = [self.bypass, *([self.up, self.gate] if self.pools else [])]
        self.costs = flops_per_position(trunk), flops_per_position(deep), sum(map(flops_per_position, bypass))

        self.register_load_state_dict_pre_hook(_rename)

    def forward(
        self, x: Tensor, tokens: Tokens, state: LengthState | None, mask: Tensor | None
    ) -> tuple[Tensor, LengthState, list[Record]]:
        past = self._start(x) if state is None else state
        x, trunk, records = self.trunk(x, tokens, past.trunk, mask)
        padded, mask = mask, torch.ones_like(tokens.ids, dtype=torch.bool) if mask is None else mask
        sampled = self.training and self.settings.sampled
        windows, window = read_windows(self.predictor, self.window, x, mask, past.window, sampled)
        words = self._ends_of_words(tokens.ids, past)
        kept = mask & self._kept(windows, words, past.since_word)
        everything = self.training and not sampled
        deep = self._run_deep(x, tokens, mask if everything else kept, mask, past, state is None)
        since = since_last(kept, past.since)
        record = self._record(windows, kept, mask, deep.computed, first=state is None)
        if not self.training:
            out = self._merge(x, deep.at, kept, mask, since)
        else:
            shallow = self._bypass(x, deep.at if self.pools else None, since)
            out = torch.where(kept.unsqueeze(-1), deep.at, shallow)
            if everything:
                record.task_loss = self._expected_loss(windows, deep.at, shallow)
            else:
                plain = self._bypass(x, None, since) if self.pools else shallow
                record.task_loss = self._sampled_loss(windows, mask, out, plain)
        after = LengthState(
            trunk=trunk,
            deep=deep.state,
            window=window,
            open=deep.open,
            result=deep.result,
            since=last_token(since, padded, past.since),
            since_word=last_token(since_last(words, past.since_word), padded, past.since_word),
            last_id=last_token(tokens.ids, padded, past.last_id),
        )
        return out, after, [record, *records, *deep.records]

    def _start(self, x: Tensor) -> LengthState:
        """Return the state before the first position."""
        batch, width = x.shape[0], x.shape[2]
        none = torch.zeros(batch, dtype=torch.int64, device=x.device)
        sums = x.new_zeros(batch, width + 1, dtype=torch.promote_types(x.dtype, torch.float32))
        return LengthState(
            trunk=None,
            deep=None,
            window=WindowState(none, sums, none),
            open=sums,
            result=x.new_zeros(batch, width),
            since=none,
            since_word=none,
            last_id=none,
        )

    def _ends_of_words(self, ids: Tensor, past: LengthState) -> Tensor:
        """Return (B, N) bool, True where a word ends; nowhere where spacing is even."""
        if self.settings.spacing == "even":
            return torch.zeros_like(ids, dtype=torch.bool)
        return ends_of_words(ids, past.last_id)

    def _kept(self, windows: Windows, words: Tensor, since_word: Tensor) -> Tensor:
        """Return (B, N) bool, True where a window keeps the position."""
        if self.pools:
            return windows.spread_positions(self.predictor.shortest, self.window, words, since_word)
        return windows.first_positions(self.predictor.shortest)

    def _record(self, windows: Windows, kept: Tensor, mask: Tensor, computed: int, first: bool) -> LengthRecord:
        """first: the call is at the start of its sequences, so it begins with a whole window."""
        touched = (kept.shape[1] - 1 + (0 if first else self.window - 1)) // self.window + 1
        return LengthRecord(
            losses=self._losses(windows),
            predicted_lengths=windows.chosen[:, :touched],
            decided=windows.decided[:, :touched],
            length_probs=windows.choices.probabilities[:, :touched],
            kept=kept,
            mask=mask,
            deep_positions=computed,
            costs=self.costs,
        )

    # ------------------------------------------------------------------------------------- deep blocks, or bypass

    def _run_deep(self, x: Tensor, tokens: Tokens, kept: Tensor, mask: Tensor, past: LengthState, first: bool) -> Deep:
        """Run the deep blocks on the kept positions (B, N) of x (B, N, D)."""
        if not first and not bool(kept.any()):  # many steps of decoding
            still_open = past.open + (with_one(x) * mask.unsqueeze(-1)).sum(1) if self.pools else past.open
            return Deep(past.result.unsqueeze(1).expand_as(x), past.deep, still_open, past.result, 0, [])
        chunks = Chunks(kept, TILE)
        ends, still_open = chunks.ends, past.open
        packed = ends.pack(x)
        if self.pools:
            sums, still_open = chunks.sums(with_one(x), mask.to(past.open.dtype), past.open)
            total, number = sums.split([x.shape[2], 1], dim=-1)
            packed = packed + self.down((total / number.clamp(min=1)).to(x.dtype) - packed)
        groups = self._groups(ends.counts if not first else ends.counts.clamp(min=1))
        y, deep, records = run_rows(self.deep, packed, tokens.map(ends.pack), past.deep, ends, groups)
        computed = sum(len(rows) * ends.width(ends.counts[rows]) for rows in groups)
        y = y.to(x.dtype)
        result = last_token(y, ends.mask, past.result)
        return Deep(chunks.spread(past.result, y), deep, still_open, result, computed, records)

    def _groups(self, counts: Tensor) -> list[Tensor]:
        """Return the indices of rows that run together: rows of similar length, or all rows that run."""
        if self.settings.execution == "batch_max":
            return [counts.nonzero().squeeze(1)]
        return rows_by_length(counts, TILE)

    def _bypass(self, x: Tensor, carried: Tensor | None, since: Tensor) -> Tensor:
        """Return what positions (..., D) that are not kept give to the head.

        carried: (..., D), the result of the last kept position, which was `since` (...) positions ago.
        """
        if carried is not None:
            x = x + 2 * self.up.scale(self.up.expand(carried), since) * self.gate(self.gate_norm(x)).sigmoid()
        return x + self.bypass(self.norm(x), None)[0]

    def _merge(self, x: Tensor, y: Tensor, kept: Tensor, mask: Tensor, since: Tensor) -> Tensor:
        """Return y (B, N, D) at kept positions and the bypass at the others. The bypass is computed only there."""
        rest = (mask & ~kept).flatten().nonzero().squeeze(1)
        if not len(rest):
            return y
        count, (x, flat) = len(rest), (t.flatten(0, 1) for t in (x, y))
        rest = F.pad(rest, (0, -count % TILE), value=int(rest[0])) if x.shape[0] > 1 else rest
        carried = flat[rest] if self.pools else None
        shallow = self._bypass(x[rest], carried, since.flatten()[rest])[:count]
        return flat.index_copy(0, rest[:count], shallow.to(y.dtype)).view_as(y)

    # ------------------------------------------------------------------------------------------------- losses

    def _losses(self, windows: Windows) -> dict[str, Loss]:
        """Return "length", the mean expected share of a window, and "certainty", minus the choice's mean entropy."""
        number = windows.new.sum().clamp(min=1)
        expected, entropy = windows.choices.expected / self.window, windows.choices.entropy
        return {
            "length": Loss((expected * windows.new).sum() / number, self.settings.penalty),
            "certainty": Loss(-(entropy * windows.new).sum() / number, self.settings.entropy_weight),
        }

    def _expected_loss(self, windows: Windows, deep: Tensor, shallow: Tensor) -> TaskLoss:
        """Return the loss expected over lengths.

        At each position it is the deep loss, weighted by the probability that the length reaches the position, plus the
        bypass loss with the remaining weight. It is exact for one window of a causal model. Where several windows
        follow each other, the deep blocks have seen all of the earlier windows here, and in bidirectional models the
        later positions too; "sampled" trains what will run.

        With "gumbel" it is the loss of one hard sample, with the gradient of its relaxation (Jang et al. 2017,
        arXiv:1611.01144). Both paths learn from every position in full, however seldom they are chosen, so a choice can
        be undone. The bypass also learns what the deep blocks return at its position.
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

    def _sampled_loss(self, windows: Windows, mask: Tensor, out: Tensor, shallow: Tensor) -> TaskLoss:
        """Return the loss of `out`, in which only the drawn lengths are computed.

        The gradient to the predictor is the gain of an event over the bypass, times the gradient of its probability,
        divided by the chance to see it. The event is that the position is reached (truncate), or that the length was
        drawn, compared with the other windows (pool). The estimate is unbiased for what the event changed in its own
        window; its effect on later windows is not counted.
        """
        assert windows.sample is not None
        probabilities = windows.at(windows.choices.probabilities)
        if self.pools:
            event, counted = windows.at(windows.sample), mask & (windows.offset >= self.predictor.shortest)
        else:
            event, counted = windows.offset.unsqueeze(-1) < windows.choices.values, mask
        counted = counted & windows.at(windows.new)
        chance = (probabilities * event).sum(-1)
        weight = (chance - chance.detach()) / (explored(probabilities) * event).sum(-1).detach()

        def loss(nats: Callable[[Tensor], Tensor], scored: Tensor) -> Tensor:
            a, b = nats(out), nats(shallow)
            cost, taught = (a - b).detach(), b
            if self.pools:
                cost = cost - windows.mean_of_others(cost, counted & scored)
            else:
                taught = b + DISTILLATION * scored * _distance(shallow, out.detach())
            return a + weight.to(a.dtype) * cost * (counted & scored) + (taught - taught.detach())

        return loss


def _rename(layer: nn.Module, state_dict: dict[str, Any], *others: Any) -> None:
    """Give the parameters of a state dict, perhaps of an earlier version, their current names."""
    for name in list(state_dict):
        state_dict[current_name(name)] = state_dict.pop(name)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared distance of x and y (B, N, D) after normalisation, (B, N)."""
    x, y = (F.rms_norm(z, z.shape[-1:]) for z in (x, y))
    return (x - y).square().mean(-1)
