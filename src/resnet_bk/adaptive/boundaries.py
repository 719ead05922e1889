"""Where chunks end: at a fixed stride, after words, or where a trained router says.

A rule looks at position t and what came before it, never beyond: a chunk that ended because of what the next
position holds would tell t about t + 1. Whatever the rule, no chunk is longer than :data:`LONGEST` times the factor.

Dimensions: B batch, N positions, D model width.
"""

import statistics
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_bk.config import BYTE_OFFSET, END_OF_DOCUMENT, ModelConfig
from resnet_bk.layers.norm import Norm

LONGEST = 2  # times the factor is as old as a chunk's result may get


def at_most(closes: Tensor, since: Tensor, longest: int) -> Tensor:
    """(B, N) bool: where `closes` says, and wherever else a chunk would get longer than `longest` positions."""
    return closes | (since_last(closes, since) % longest == 0)


class Decision(NamedTuple):
    """closes: (B, N) bool, where chunks end; probability: (B, N), above 1/2 where they do, with a gradient; None for
    rules that learn nothing."""

    closes: Tensor
    probability: Tensor | None = None


class FixedStride(nn.Module):
    """A chunk closes at every `factor`-th position."""

    by_content = False

    def __init__(self, config: ModelConfig, factor: int):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, ids: Tensor, since: Tensor, before: Tensor) -> Decision:
        """Where chunks close.

        Args:
            x: (B, N, D).
            ids: (B, N), the token at each position.
            since: (B,) int64, positions since the last chunk closed.
            before: (B,) int64, the token before the first position.
        """
        position = torch.arange(1, x.shape[1] + 1, device=x.device)
        return Decision((since.unsqueeze(1) + position) % self.factor == 0)


class AfterWords(nn.Module):
    """A chunk closes at the first separator after a word and at every line end.

    Of bytes: letters, digits, "_" and all parts of non-ASCII characters are words, all else separates (as in
    SpaceByte, Slagle 2024, arXiv:2404.14408). The model then computes deeply where a new word is to be guessed.
    """

    by_content = True

    def __init__(self, config: ModelConfig, factor: int):
        super().__init__()

    def forward(self, x: Tensor, ids: Tensor, since: Tensor, before: Tensor) -> Decision:
        """As :meth:`FixedStride.forward`."""
        return Decision(ends_of_words(ids, before))


def ends_of_words(ids: Tensor, before: Tensor) -> Tensor:
    """(B, N) bool: the first separator after a word, every end of a line or document, of byte tokens ids (B, N)."""
    word = _in_word(torch.cat([before.unsqueeze(1), ids], dim=1))
    return (word[:, :-1] & ~word[:, 1:]) | (ids == ord("\n") + BYTE_OFFSET) | (ids == END_OF_DOCUMENT)


def _in_word(ids: Tensor) -> Tensor:
    byte = ids - BYTE_OFFSET
    lower = byte | 32
    letter = (lower >= ord("a")) & (lower <= ord("z"))
    digit = (byte >= ord("0")) & (byte <= ord("9"))
    return letter | digit | (byte == ord("_")) | (byte >= 128)


class Router(nn.Module):
    """A chunk closes where a linear score of the position's features exceeds a threshold.

    Whether a boundary was worth it reaches the score of the positions where chunks closed through the smoothing of what
    they return (:func:`resnet_bk.adaptive.multiscale.smooth`), as in H-Net (Hwang et al. 2025, arXiv:2507.07955); the
    loss "ratio", over all positions, holds it to one boundary in `factor`.

    The decision is hard. Where a score comes within rounding of the threshold, two ways to compute the same text
    (batch shapes, decoding) may decide differently; in float64 that does not happen in practice.
    """

    by_content = True

    def __init__(self, config: ModelConfig, factor: int):
        super().__init__()
        self.norm = Norm(config.d_model)
        self.weight = nn.Parameter(torch.randn(config.d_model))
        # scores start as N(0, 1 / D), the threshold where one in `factor` exceeds it
        start = statistics.NormalDist().inv_cdf(1 - 1 / factor) * config.d_model**-0.5
        self.threshold = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor, ids: Tensor, since: Tensor, before: Tensor) -> Decision:
        """As :meth:`FixedStride.forward`."""
        score = self.score(x, ids, before)
        return Decision(score > 0, score.sigmoid())

    def score(self, x: Tensor, ids: Tensor, before: Tensor) -> Tensor:
        """(B, N) float32 or float64, above 0 where chunks close."""
        # A mean, not a sum: Adam moves every weight by the learning rate, and all D together would throw the share of
        # closing positions from one extreme to the other.
        exact = torch.promote_types(x.dtype, torch.float32)
        return (self.norm(x).to(exact) * self.weight).mean(-1) - self.threshold


class WordRouter(Router):
    """A router of bytes that starts from :class:`AfterWords` and leaves it where the task says so."""

    def __init__(self, config: ModelConfig, factor: int):
        super().__init__(config, factor)
        self.trust = nn.Parameter(torch.tensor(2.0))
        nn.init.zeros_(self.threshold)

    def score(self, x: Tensor, ids: Tensor, before: Tensor) -> Tensor:
        """As :meth:`Router.score`."""
        sign = 2 * ends_of_words(ids, before) - 1
        return super().score(x, ids, before) + self.trust * sign


BOUNDARIES: dict[str, type[nn.Module]] = {
    "fixed": FixedStride,
    "whitespace": AfterWords,
    "learned": Router,
    "learned-words": WordRouter,
}


def since_last(marks: Tensor, start: Tensor) -> Tensor:
    """Positions since the last mark at or before each one, (B, N); before the first mark counted on from start (B,)."""
    if marks.shape[1] == 1:
        return torch.where(marks, 0, start.unsqueeze(1) + 1)
    position = torch.arange(1, marks.shape[1] + 1, device=marks.device)
    last = torch.where(marks, position, 0).cummax(1).values
    return torch.where(last > 0, position - last, start.unsqueeze(1) + position)
