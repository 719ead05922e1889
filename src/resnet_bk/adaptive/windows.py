"""Windows of learned length: which window a position belongs to, how many positions it keeps, and which ones.

'size' is the number of positions of a window, 'length' the number of them that it keeps. Every sequence is cut into
windows, end to end. A call may begin and end in the middle of a window. The length of a window is chosen from its
prefix, the positions that even the shortest length covers. Only pooling 'global' (of bidirectional models) reads the
whole window; its length is decided as soon as the window has one token.

Worked example: size 8, lengths 2, 4, 6 or 8 (so the prefix is 2 positions), one row, 13 positions after 6 earlier ones.

    position in the call    0 1   2 3 4 5 6 7 8 9   10 11 12
    offset in its window    6 7   0 1 2 3 4 5 6 7    0  1  2
    window of the call      0 0   1 1 1 1 1 1 1 1    2  2  2

    window                     0     1     2
    positions read so far     19    11     3     6 + 13 = 19, minus 8 for each earlier window
    decided: prefix read     yes   yes   yes     2 positions or more
    new: decided in the call  no   yes   yes     of window 0, 6 positions had been read before the call
    chosen, for example        8     4     6     0 from the state, 1 and 2 predicted now

Mode truncate keeps both positions of window 0, the first four of window 1, and all three of window 2 so far. The state
afterwards is that of window 19 // 8 = 2: offset 19 % 8 = 3, its pooled prefix, its length 6. The tables have
13 // 8 + 2 = 3 columns: a call of n positions touches at most n // size + 2 windows, counting the one that would follow
its last position.

Dimensions: B batch, N positions, W windows of the call, K lengths to choose from, D model width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.adaptive.boundaries import since_last
from resnet_bk.adaptive.length_predictor import Lengths, SequenceLengthPredictor

EXPLORATION = 0.2  # share of the sampled lengths that are drawn uniformly


class WindowState(NamedTuple):
    """The window that a sequence is in.

    Attributes:
        offset: (B,) int64, positions of the window read so far.
        pooled: (B, D + 1) float, the weighted sum of its prefix (with pooling 'global': of its positions), and in the
            last column the sum of the weights.
        length: (B,) int64, its length; without meaning until it is decided.
    """

    offset: Tensor
    pooled: Tensor
    length: Tensor


class Windows(NamedTuple):
    """The windows of one call.

    Attributes:
        offset: (B, N) int64, the place of each position in its window.
        window: (B, N) int64, the window of each position, counted from the first one of the call.
        choices: distribution over lengths, of each window (B, W).
        sample: (B, W, K) one-hot, the drawn lengths where training draws them (LengthConfig.sampled); else None.
        chosen: (B, W) int64, the length of each window, the shortest one until it is decided. Where training draws the
            lengths, the drawn ones.
        decided: (B, W) bool, True where the window has chosen its length.
        new: (B, W) bool, True where it did so in this call.
    """

    offset: Tensor
    window: Tensor
    choices: Lengths
    sample: Tensor | None
    chosen: Tensor
    decided: Tensor
    new: Tensor

    def at(self, per_window: Tensor) -> Tensor:
        """Give each position the entry of its window, (B, W, ...) -> (B, N, ...)."""
        rows = torch.arange(len(self.window), device=self.window.device).unsqueeze(1)
        return per_window[rows, self.window]

    def mean_of_others(self, x: Tensor, counted: Tensor) -> Tensor:
        """Return, for each position, the mean of x (B, N) over the `counted` positions of all other windows.

        The result is 0 where there are none.
        """
        table = torch.stack([x * counted, counted.to(x.dtype)], dim=-1)
        sums = x.new_zeros(*self.chosen.shape, 2)
        sums = sums.scatter_add(1, self.window.unsqueeze(-1).expand(-1, -1, 2), table)
        total, number = (sums.sum((0, 1)) - self.at(sums)).unbind(-1)
        return total / number.clamp(min=1)

    def first_positions(self, shortest: int) -> Tensor:
        """Return (B, N) bool, True for the first positions of each window, as many as its length says."""
        return (self.offset < shortest) | (self.offset < self.at(self.chosen))

    def spread_positions(self, shortest: int, size: int, words: Tensor, since_word: Tensor) -> Tensor:
        """Return (B, N) bool, True for the positions that each window keeps, spread over it.

        The prefix keeps the share shortest / size of its positions, and the rest of the window keeps the share
        length / size of its own; both numbers are rounded down, but at least 1. Together these are fewer positions than
        a long length says: 114 for size and length 128 and shortest 16. To keep `cells` positions, a part is cut into
        `cells` stretches. Each keeps one position: the first at which a word ends, or the last if no word ends in it.

        Args:
            shortest: positions of the prefix. Its kept positions do not depend on the chosen length, as the prefix is
                read before the choice.
            size: positions of a window.
            words: (B, N) bool, True where a word ends; nowhere for even spacing.
            since_word: (B,) int64, positions since the last end of a word before the call.
        """
        prefix = self.offset < shortest
        length = torch.where(prefix, shortest, self.at(self.chosen))
        span = torch.where(prefix, shortest, size - shortest)
        place = torch.where(prefix, self.offset, self.offset - shortest)
        cells = (span * length // size).clamp(min=1)
        cell = place * cells // span
        start = -(-cell * span // cells)
        is_last = (place + 1) * cells // span > cell
        since = torch.cat([since_word.unsqueeze(1), since_last(words, since_word)], dim=1)[:, :-1] + 1
        return (since > place - start) & (words | is_last)


def read_windows(
    predictor: SequenceLengthPredictor, size: int, x: Tensor, mask: Tensor, past: WindowState, sampled: bool
) -> tuple[Windows, WindowState]:
    """Choose the length of every window that has enough positions after x.

    Enough is a whole prefix; or one position where the choice reads the whole window (pooling 'global', single length).

    Args:
        size: positions of a window.
        x: (B, N, D) features. No gradient flows back into them: the predictor must not shape what it reads.
        mask: (B, N) bool, False for padding, which comes last in each row.
        past: the state before x.
        sampled: draw the lengths instead of taking the most likely ones.

    Returns:
        The windows of this call, and the state after the last position.
    """
    batch, n, width = x.shape
    place = past.offset.unsqueeze(1) + torch.arange(n, device=x.device)
    offset, window = place % size, place // size
    count = n // size + 2

    # The weighted sum of each window's prefix, continued from the state for the first window.
    x = x.detach()
    weight = predictor.weigh(x) * (mask & (offset < predictor.prefix))
    pooled = F.pad(past.pooled.unsqueeze(1), (0, 0, 0, count - 1)).flatten(0, 1)
    row = torch.arange(batch, device=x.device)
    index = (row.unsqueeze(1) * count + window).flatten()
    pooled = pooled.index_add(0, index, (with_one(x) * weight.unsqueeze(-1)).flatten(0, 1)).unflatten(0, (batch, count))
    total, weights = pooled.split([width, 1], dim=-1)
    choices = predictor(total / torch.where(weights > 0, weights, 1.0))
    sample = F.gumbel_softmax(explored(choices.probabilities).detach().log(), hard=True) if sampled else None

    # Which windows may choose now, which had chosen before.
    end = past.offset + mask.sum(1)
    read = end.unsqueeze(1) - size * torch.arange(count, device=x.device)
    needed = predictor.shortest if predictor.prefix < size else 1
    decided, before = read >= needed, torch.zeros_like(read, dtype=torch.bool)
    before[:, 0] = past.offset >= needed
    chosen = predictor.choose(choices.values, choices.log_probabilities if sample is None else sample)
    chosen = torch.where(decided, chosen, predictor.shortest)
    chosen = torch.where(before, past.length.unsqueeze(1), chosen)

    current = end // size
    windows = Windows(offset, window, choices, sample, chosen, decided, decided & ~before)
    return windows, WindowState(end % size, pooled[row, current], chosen[row, current])


def with_one(x: Tensor) -> Tensor:
    """Append a column of ones, (B, N, D) -> (B, N, D + 1) float32 or float64, so that sums count their terms too."""
    exact = torch.promote_types(x.dtype, torch.float32)
    return torch.cat([x.to(exact), torch.ones_like(x[..., :1], dtype=exact)], dim=-1)


def explored(probabilities: Tensor) -> Tensor:
    """Mix in a uniform share, so that training keeps drawing every length."""
    even = torch.full_like(probabilities, 1 / probabilities.shape[-1])
    return torch.lerp(probabilities, even, EXPLORATION)
