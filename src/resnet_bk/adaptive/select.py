"""Group positions into chunks, and run a layer on selected positions, one group of rows at a time.

Dimensions: B batch, N positions, M packed length, D model width.
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
    """Consecutive groups of a row's positions. A chunk ends where `closes` is True; the last chunk may still be open.

    Attributes:
        closes: (B, N) bool, True where a chunk ends.
        closed: (B, N) int64, number of chunks closed up to and including each position.
        ends: the packing of the closing positions. ``ends.mask`` (B, M) is True for the chunks that exist, and
            ``ends.counts`` (B,) is their number.
        width: M.
    """

    def __init__(self, closes: Tensor, tile: int = 1, bound: int | None = None):
        """Group the positions. tile, bound: see :class:`resnet_bk.ops.packing.Packing`."""
        self.closes, self.closed = closes, closes.cumsum(1)
        self.ends = Packing(closes, tile, bound)
        self.width = self.ends.mask.shape[1]

    def sums(self, x: Tensor, weight: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sum x over each chunk.

        Args:
            x: (B, N, D).
            weight: (B, N), factor of each position.
            past: (B, D), the sum of the open chunk before x.

        Returns:
            The sums of the closed chunks (B, M, D), without meaning where ``ends.mask`` is False, and the sum of the
            open chunk (B, D).
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
        """Return (B, N, D): at each position, the result of the last chunk that has closed.

        Args:
            first: (B, D), the result for the positions before the first chunk closes.
            y: (B, M, D), the result of each chunk.
        """
        table = torch.cat([first.unsqueeze(1), y], dim=1)
        rows = torch.arange(table.shape[0], device=y.device).unsqueeze(1) * table.shape[1]
        return table.flatten(0, 1).index_select(0, (rows + self.closed).flatten()).unflatten(0, self.closed.shape)


def last_entry(x: Tensor, mask: Tensor | None, before: Tensor) -> Tensor:
    """Return each row's last entry where `mask` is True, (B, ...).

    Args:
        x: (B, N, ...).
        mask: (B, N) bool, in each row True first, then False; None for all True.
        before: (B, ...), the entry for rows where `mask` is nowhere True.
    """
    if mask is None:
        return x[:, -1].clone()  # not a view, which would keep all of x in memory
    if x.shape[1] == 1:
        return torch.where(mask.view(-1, *[1] * (x.dim() - 2)), x[:, 0], before)
    table = torch.cat([before.unsqueeze(1), x], dim=1)
    return table[torch.arange(len(x), device=x.device), mask.sum(1)]


def rows_by_length(counts: Tensor, tile: int) -> list[Tensor]:
    """Group rows of similar length.

    There are at most eight groups. Within a group, lengths differ by at most an eighth of the longest row, rounded up
    to a multiple of `tile`. Empty rows are in no group.

    Args:
        counts: (B,) int64, number of selected positions of each row.
        tile: packed lengths are multiples of it.

    Returns:
        The indices of the rows of each group, ascending.
    """
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
    """Run a layer on packed positions, one group of rows at a time, each at the length that its longest row needs.

    Args:
        layer: see :mod:`resnet_bk.layers.block`.
        x: (B, M, D), packed features.
        tokens: (B, M), packed with them.
        state: the layer's state, or None. Rows in no group keep theirs; without a state, every row must be in a group.
        packing: the packing of x.
        groups: at least one; disjoint ascending (R,) int64 indices of rows.

    Returns:
        The output (B, M, D), 0 for rows in no group; the new state; and the records. Those of a single group are the
        layer's own, so their tensors have only its rows. Those of several groups have only the losses, averaged over
        positions.
    """
    outputs, states, reports, sizes = [], [], [], []
    for rows in groups:
        width = packing.width(packing.counts[rows])
        whole = len(rows) == len(x)
        present = packing.mask[:, :width] if whole else packing.mask[rows, :width]
        mask = None if bool(present.all()) else present
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
    """Average the losses of several groups, weighted by their numbers of positions; one record per part of the layer.

    A group in which no chunk closed has no records of the stack on chunks. Then it is left out.

    Args:
        reports: the records of each group.
        sizes: (groups,) int64, number of positions of each group.
    """
    most = max(map(len, reports))
    complete = [i for i, group in enumerate(reports) if len(group) == most]
    reports, sizes = [reports[i] for i in complete], sizes[complete]
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
