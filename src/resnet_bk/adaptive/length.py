"""Learned length: how many positions of each window of text run all blocks.

All positions run the first blocks, the trunk. The deep blocks run on the packed sequence of the kept positions. In mode
truncate, these are the first positions of each window. In mode pool they are spread over it, and each also reads the
mean of the positions since the last kept one. The other positions take a cheap bypass. The length is predicted from the
window's prefix, which is as long as the shortest length; :mod:`resnet_bk.adaptive.windows` has the arithmetic and a
worked example.

Causality: the length is chosen from the prefix and only decides about the positions after it. Which positions of the
prefix are kept does not depend on the choice. In causal models, nothing about a window depends on later windows; an
incomplete last window is allowed. Pooling 'global' reads the whole window, so only bidirectional models have it.

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
from resnet_bk.adaptive.select import Chunks, last_entry, rows_by_length, run_rows
from resnet_bk.adaptive.windows import Windows, WindowState, explored, read_windows, with_one
from resnet_bk.checkpoint import current_name
from resnet_bk.config import ModelConfig
from resnet_bk.layers.block import AdaptiveLayer, Stack, Tokens
from resnet_bk.layers.feedforward import SwiGLU
from resnet_bk.layers.matrices import Matrices
from resnet_bk.layers.norm import Norm
from resnet_bk.ops.packing import TILE, capacity
from resnet_bk.record import Loss, Record, TaskLoss

DISTILLATION = 0.3  # weight of the distance between what the bypass and the deep blocks return
REACH = 16  # number of distances from the last kept position with a scale of their own


class LengthState(NamedTuple):
    """State of learned length.

    Attributes:
        trunk: state of the trunk.
        deep: state of the deep blocks.
        window: the window that the sequence is in.
        open: (B, D + 1), sum of the trunk's outputs after the last kept position, and in the last column their number;
            0 in mode truncate.
        result: (B, D), output of the deep blocks at the last kept position.
        since: (B,) int64, number of positions after the last kept one; 0 if the last position was kept.
        after_word: (B,) int64, number of positions after the last end of a word. (Not `since_word`: torch.export
            mistakes a field for another whose name begins with its own.)
        last_id: (B,) int64, the last token.
    """

    trunk: Any
    deep: Any
    window: WindowState
    open: Tensor
    result: Tensor
    since: Tensor
    after_word: Tensor
    last_id: Tensor


@dataclass(kw_only=True)
class LengthRecord(Record):
    """Decisions of learned length, and their cost.

    Attributes:
        predicted_lengths: (B, W) int64, length of each window of the call; the shortest one where `decided` is False.
            Where training draws the lengths (LengthConfig.sampled), the drawn ones.
        decided: (B, W) bool, True where the window has chosen its length.
        length_probs: (B, W, K), probabilities of the lengths.
        kept: (B, N) bool, True for the positions that the chosen lengths keep. In training with 'expected' or 'gumbel'
            the deep blocks run on all tokens.
        mask: (B, N) bool, False for padding.
        deep_positions: number of positions that the deep blocks computed, including those that fill up rows.
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
        """Mean over the windows that have decided; over all windows if none has."""
        chosen = self.predicted_lengths[self.decided] if bool(self.decided.any()) else self.predicted_lengths
        return chosen.double().mean().item()

    @property
    def executed_flops(self) -> float:
        """FLOPs executed by trunk, deep blocks and bypass. Valid for records of evaluation only.

        In training the bypass is computed at every position. The FLOPs of the predictor and of `down` are not counted.
        """
        return self._flops(self.deep_positions)

    @property
    def speedup_estimate(self) -> float:
        """FLOPs without learned length, divided by those with only the kept positions in the deep blocks.

        This is an estimate from FLOPs; only a clock measures a speedup.
        """
        full = (self.costs[0] + self.costs[1]) * int(self.mask.sum())
        return full / max(1.0, self._flops(int(self.kept.sum())))

    def _flops(self, deep_positions: int) -> float:
        trunk, deep, bypass = self.costs
        positions = int(self.mask.sum())
        return trunk * positions + deep * deep_positions + bypass * (positions - int(self.kept.sum()))


class DeepResult(NamedTuple):
    """Result of the deep blocks.

    Attributes:
        at: (B, N, D), at each position the output of the deep blocks at the last position that they read.
        state: their state.
        open, result: see :class:`LengthState`.
        computed: number of positions computed, including those that fill up rows.
        records: their records.
    """

    at: Tensor
    state: Any
    open: Tensor
    result: Tensor
    computed: int
    records: list[Record]


class LearnedLength(AdaptiveLayer):
    """A stack whose later layers, the deep blocks, run only on the positions that each window keeps."""

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
            # At first the deep blocks read a kept position unchanged. Training blends in the mean since the last one.
            nn.init.zeros_(self.down.weight)
        bypass = [self.bypass, *([self.up, self.gate] if self.pools else [])]
        self.costs = flops_per_position(trunk), flops_per_position(deep), sum(map(flops_per_position, bypass))

        self.register_load_state_dict_pre_hook(_rename)

    def matrices(self) -> list[Matrices]:
        return [Matrices(self.down.weight), Matrices(self.gate.weight)] if self.pools else []

    def forward(
        self, x: Tensor, tokens: Tokens, state: LengthState | None, mask: Tensor | None
    ) -> tuple[Tensor, LengthState, list[Record]]:
        past = self._start(x) if state is None else state
        x, trunk, records = self.trunk(x, tokens, past.trunk, mask)
        padded, mask = mask, torch.ones_like(tokens.ids, dtype=torch.bool) if mask is None else mask
        sampled = self.training and self.settings.sampled
        windows, window = read_windows(self.predictor, self.window, x, mask, past.window, sampled)
        words = self._ends_of_words(tokens.ids, past)
        kept = mask & self._kept(windows, words, past.after_word)
        everything = self.training and not sampled
        deep = self._run_deep(x, tokens, mask if everything else kept, mask, past)
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
            since=last_entry(since, padded, past.since),
            after_word=last_entry(since_last(words, past.after_word), padded, past.after_word),
            last_id=last_entry(tokens.ids, padded, past.last_id),
        )
        return out, after, [record, *records, *deep.records]

    def layout(self, x: Tensor) -> LengthState:
        return self._start(x)._replace(trunk=self.trunk.layout(x), deep=self.deep.layout(x))

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
            after_word=none,
            last_id=none,
        )

    def _ends_of_words(self, ids: Tensor, past: LengthState) -> Tensor:
        """Return (B, N) bool, True where a word ends; with even spacing, nowhere True."""
        if self.settings.spacing == "even":
            return torch.zeros_like(ids, dtype=torch.bool)
        return ends_of_words(ids, past.last_id)

    def _kept(self, windows: Windows, words: Tensor, since_word: Tensor) -> Tensor:
        """Return (B, N) bool, True where a window keeps the position."""
        if self.pools:
            return windows.spread_positions(self.predictor.shortest, self.window, words, since_word)
        return windows.first_positions(self.predictor.shortest)

    def _record(self, windows: Windows, kept: Tensor, mask: Tensor, computed: int, first: bool) -> LengthRecord:
        """Return the record of a call, with the windows that the call's positions can lie in.

        first: the call is at the start of its sequences, so at the start of a window.
        """
        touched = (kept.shape[1] - 1 + (0 if first else self.window - 1)) // self.window + 1
        if torch.compiler.is_exporting():  # a program returns no records, and for any N no size may be 1
            touched = windows.chosen.shape[1]
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

    def _run_deep(self, x: Tensor, tokens: Tokens, selected: Tensor, mask: Tensor, past: LengthState) -> DeepResult:
        """Run the deep blocks on selected positions of x (B, N, D).

        selected: (B, N) bool, the kept positions, or all tokens in training with the expected loss.
        """
        bound = capacity(None, x.shape[1])
        if bound is None and past.deep is not None and not bool(selected.any()):  # many steps of decoding
            still_open = past.open + (with_one(x) * mask.unsqueeze(-1)).sum(1) if self.pools else past.open
            return DeepResult(past.result.unsqueeze(1).expand_as(x), past.deep, still_open, past.result, 0, [])
        chunks = Chunks(selected, TILE, bound)
        ends, still_open = chunks.ends, past.open
        packed = ends.pack(x)
        if self.pools:
            sums, still_open = chunks.sums(with_one(x), mask.to(past.open.dtype), past.open)
            total, number = sums.split([x.shape[2], 1], dim=-1)
            packed = packed + self.down((total / number.clamp(min=1)).to(x.dtype) - packed)
        tokens = tokens.map(ends.pack)
        if bound is not None:
            y, deep_state, records = self.deep(packed, tokens, past.deep, ends.mask)
            computed = ends.mask.numel()
        else:
            groups = self._groups(ends.counts.clamp(min=1) if past.deep is None else ends.counts)
            y, deep_state, records = run_rows(self.deep, packed, tokens, past.deep, ends, groups)
            computed = sum(len(rows) * ends.width(ends.counts[rows]) for rows in groups)
        y = y.to(x.dtype)
        result = last_entry(y, ends.mask, past.result)
        return DeepResult(chunks.spread(past.result, y), deep_state, still_open, result, computed, records)

    def _groups(self, counts: Tensor) -> list[Tensor]:
        """Return the indices of rows that run together. Rows without a position to compute are in no group."""
        if self.settings.execution == "batch_max":
            return [counts.nonzero().squeeze(1)]
        return rows_by_length(counts, TILE)

    def _bypass(self, x: Tensor, carried: Tensor | None, since: Tensor) -> Tensor:
        """Return the output of the cheap path, (..., D), which positions that are not kept take.

        Args:
            x: (..., D), outputs of the trunk.
            carried: (..., D), the deep blocks' output at the last kept position; None to read x only.
            since: (...) int64, number of positions after that one.
        """
        if carried is not None:
            x = x + 2 * self.up.scale(self.up.expand(carried), since) * self.gate(self.gate_norm(x)).sigmoid()
        return x + self.bypass(self.norm(x), None)[0]

    def _merge(self, x: Tensor, y: Tensor, kept: Tensor, mask: Tensor, since: Tensor) -> Tensor:
        """Return y (B, N, D) at kept positions and the bypass at the others.

        The bypass is computed only there, but everywhere in a program that torch exports.
        """
        if torch.compiler.is_exporting():
            shallow = self._bypass(x, y if self.pools else None, since)
            return torch.where(kept.unsqueeze(-1), y, shallow.to(y.dtype))
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
        """Return the auxiliary losses, means over the windows that decided in this call.

        "length" is the expected length as a share of the window, "certainty" is minus the entropy of the choice.
        """
        number = windows.new.sum().clamp(min=1)
        expected, entropy = windows.choices.expected / self.window, windows.choices.entropy
        return {
            "length": Loss((expected * windows.new).sum() / number, self.settings.penalty),
            "certainty": Loss(-(entropy * windows.new).sum() / number, self.settings.entropy_weight),
        }

    def _expected_loss(self, windows: Windows, deep_out: Tensor, shallow: Tensor) -> TaskLoss:
        """Return the loss expected over lengths, with mode truncate.

        Its value at each position is the deep loss, weighted by the probability that the length reaches the position,
        plus the bypass loss with the remaining weight. The predictor gets the gradient of this value. The two paths do
        not get theirs weighted: each learns from every position in full, even if it is seldom chosen, so a choice can
        be undone. The bypass also learns to return what the deep blocks return at its position.

        The value is the expected loss exactly for one window of a causal model, except on the ramps that learned and
        continuous lengths end in. Where several windows follow each other, the deep blocks have read all of the earlier
        windows here, and in bidirectional models the later positions too. "sampled" has no such gap: its deep blocks
        read only the kept positions, as in evaluation.

        With "gumbel", the value is the loss of one hard sample of the length, with the gradient of its relaxation (Jang
        et al. 2017, arXiv:1611.01144).
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
            a, b = nats(deep_out), nats(shallow)
            taught = a + b + DISTILLATION * scored * _distance(shallow, deep_out.detach())
            return torch.lerp(b.detach(), a.detach(), reach.to(a.dtype)) + (taught - taught.detach())

        return loss

    def _sampled_loss(self, windows: Windows, mask: Tensor, out: Tensor, shallow: Tensor) -> TaskLoss:
        """Return the loss of `out`, for which the deep blocks ran only on the positions that the drawn lengths keep.

        The gradient to the predictor is a score-function estimate. At each position it is the cost of an event, times
        the gradient of the event's predicted probability, divided by the probability with which it is drawn (see
        :func:`explored`).

        - Cost: the loss of `out` minus that of the bypass, `shallow`. With mode pool, `shallow` reads x only, and the
          mean cost in all other windows is subtracted, as a baseline.
        - Event: with mode truncate, the length reaches the position (where it does not, the cost is 0). With mode pool,
          the drawn length; the prefix does not count, as it is the same for all lengths.

        The estimate is unbiased for what the event changes in its own window. Its effect on later windows is not
        counted. The bypass learns from every position.
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
    """Give the parameters of a state dict, which an earlier version may have written, their current names."""
    for name in list(state_dict):
        state_dict[current_name(name)] = state_dict.pop(name)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared distance of x and y (B, N, D) after normalisation, (B, N)."""
    x, y = (F.rms_norm(z, z.shape[-1:]) for z in (x, y))
    return (x - y).square().mean(-1)
