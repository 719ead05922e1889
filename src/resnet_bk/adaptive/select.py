"""Selected positions: grouped into chunks, and run row by row.

Dimensions: B batch, N positions, M positions kept by the fullest row.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from resnet_bk.layers.block import Tokens
from resnet_bk.ops.packing import Packing
from resnet_bk.record import Loss, Record


class Chunks:
    """A row's positions in consecutive groups, each ending where `closes` says; the last may still be open.

    closed: (B, N) int64, chunks closed up to and including each position.
    ends: Packing of the closing positions; ``ends.mask`` (B, M) and ``ends.counts`` (B,) say which chunks exist.
    """

    def __init__(self, closes: Tensor, tile: int = 1, bound: int | None = None):
        """tile, bound: of the packing."""
        self.closes, self.closed = closes, closes.cumsum(1)
        self.ends = Packing(closes, tile, bound)
        self.width = self.ends.mask.shape[1]

    def sums(self, x: Tensor, weight: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sums of x (B, N, D) weighted by (B, N): of each row's closed chunks (B, M, D), and of the open one (B, D).

        past: (B, D), what was open before x. Beyond a row's chunks sums have no meaning.
        """
        batch, length, _ = x.shape
        row = torch.arange(batch, device=x.device)
        chunk = (row.unsqueeze(1) * (self.width + 1) + self.closed - self.closes.long()).flatten()
        sizes = chunk.new_zeros(batch * (self.width + 1)).index_add(0, chunk, torch.ones_like(chunk))
        summed = F.embedding_bag(
            torch.arange(batch * length, device=x.device),
            x.flatten(0, 1),
            sizes.cumsum(0) - sizes,
            mode="sum",
            per_sample_weights=weight.flatten(),
        ).view(batch, self.width + 1, -1)
        if past is not None:
            summed = torch.cat([summed[:, :1] + past.unsqueeze(1), summed[:, 1:]], dim=1)
        return summed[:, :-1], summed[row, self.ends.counts]

    def spread(self, first: Tensor, y: Tensor) -> Tensor:
        """(B, N, D): the last of `y` (B, M, D) closed at or before each position; `first` (B, D) where none is."""
        table = torch.cat([first.unsqueeze(1), y], dim=1)
        rows = torch.arange(table.shape[0], device=y.device).unsqueeze(1) * table.shape[1]
        return table.flatten(0, 1).index_select(0, (rows + self.closed).flatten()).unflatten(0, self.closed.shape)


def last_token(x: Tensor, mask: Tensor | None, before: Tensor) -> Tensor:
    """The last real entry of each row of x (B, N, ...), or `before` (B, ...) in rows that have none."""
    if mask is None:
        return x[:, -1].clone()  # not a view, which would keep all of x
    if x.shape[1] == 1:
        return torch.where(mask.view(-1, *[1] * (x.dim() - 2)), x[:, 0], before)
    table = torch.cat([before.unsqueeze(1), x], dim=1)
    return table[torch.arange(len(x), device=x.device), mask.sum(1)]


def rows_by_length(counts: Tensor, tile: int) -> list[Tensor]:
    """Indices of the rows to run together, (B,) counts of positions: at most eight groups, in each of which no row is
    shorter than the longest by more than an eighth of the longest of all. Empty rows are in none."""
    rows = counts.nonzero().squeeze(1)
    if len(rows) < 2:
        return [rows] if len(rows) else []
    step = -(-int(counts.max()) // (8 * tile)) * tile
    groups = -(-counts[rows] // step)
    return [rows[groups == n] for n in groups.unique()]


def run_rows(
    layer: Callable[..., tuple[Tensor, Any, list[Record]]],
    x: Tensor,
    tokens: Tokens,
    state: Any,
    packing: Packing,
    groups: Sequence[Tensor],
) -> tuple[Tensor, Any, list[Record]]:
    """A layer on packed positions x (B, M, D), tokens (B, M), each group of rows by itself, no longer than it needs.

    groups: disjoint ascending (R,) int64 indices of rows, at least one. Rows in none of them keep their state, so
    without a state there must be none such. Of several groups' reports only the losses remain, averaged over positions.
    """
    outputs, states, reports, sizes = [], [], [], []
    for rows in groups:
        width = packing.width(packing.counts[rows])
        whole = len(rows) == len(x)
        taken = packing.mask[:, :width] if whole else packing.mask[rows, :width]
        mask = None if bool(taken.all()) else taken
        if whole:
            return layer(x, tokens, state, mask)
        select = functools.partial(_rows, rows=rows, width=width)
        past = None if state is None else pytree.tree_map(functools.partial(_rows, rows=rows), state)
        y, after, records = layer(select(x), tokens.map(select), past, mask)
        outputs.append(F.pad(y, (0, 0, 0, x.shape[1] - width)))
        states.append(after)
        reports.append(records)
        sizes.append(packing.counts[rows].sum())
    order = torch.cat(list(groups))
    y = torch.cat(outputs)
    if state is None:
        state = pytree.tree_map(lambda s: s.new_zeros(len(x), *s.shape[1:]), states[0])

    def merge(old: Tensor, *new: Tensor) -> Tensor:
        return old.index_copy(0, order, torch.cat(new).to(old.dtype))

    records = reports[0] if len(reports) == 1 else _average(reports, torch.stack(sizes))
    return merge(torch.zeros_like(x), y), pytree.tree_map(merge, state, *states), records


def _rows(x: Tensor, rows: Tensor, width: int | None = None) -> Tensor:
    """Select rows of x (B, ...), and their first `width` positions."""
    return x[rows] if width is None else x[rows, :width]


def _average(reports: Sequence[list[Record]], sizes: Tensor) -> list[Record]:
    """One record for each part of a layer, of the losses its groups report, each group with its number of positions."""
    shares = (sizes / sizes.sum().clamp(min=1)).unbind()
    return [
        Record(
            losses={
                name: Loss(sum(s * r.losses[name].value for s, r in zip(shares, group, strict=True)), loss.weight)
                for name, loss in group[0].losses.items()
            }
        )
        for group in zip(*reports, strict=True)
    ]
