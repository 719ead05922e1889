"""Where chunks end: at a fixed stride, after words, or where a trained router decides.

A rule reads position t and its past only. A chunk that ended because of the content of t + 1 would leak that content
to t. With every rule, no chunk is longer than :data:`LONGEST` times the factor.

Dimensions: B batch, N positions, D model width.
"""

import statistics
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resnet_bk.config import BYTE_OFFSET, END_OF_DOCUMENT, ModelConfig
from resnet_bk.layers.norm import Norm

LONGEST = 2  # longest chunk in multiples of the factor; bounds how old a chunk's result can get


def at_most(closes: Tensor, since: Tensor, longest: int) -> Tensor:
    """Close chunks also where they would get longer than `longest` positions.

    Args:
        closes: (B, N) bool, True where a chunk ends by its rule.
        since: (B,) int64, number of earlier positions since the last chunk closed.
        longest: positions of the longest chunk allowed.

    Returns:
        (B, N) bool, True where a chunk ends.
    """
    return closes | (since_last(closes, since) % longest == 0)


class Decision(NamedTuple):
    """Decision of a rule.

    closes: (B, N) bool, True where a chunk ends.
    probability: (B, N), above 1/2 where a chunk ends, with a gradient. None for rules that learn nothing.
    """

    closes: Tensor
    probability: Tensor | None = None


class FixedStride(nn.Module):
    """A chunk closes at every `factor`-th position."""

    by_content = False

    def __init__(self, config: ModelConfig, factor: int):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, ids: Tensor, since: Tensor, before: Tensor) -> Decision:
        """Decide where chunks close.

        Args:
            x: (B, N, D), features.
            ids: (B, N) int64, token ids.
            since: (B,) int64, number of earlier positions since the last chunk closed.
            before: (B,) int64, id of the token before the first position.
        """
        position = torch.arange(1, x.shape[1] + 1, device=x.device)
        return Decision((since.unsqueeze(1) + position) % self.factor == 0)


class AfterWords(nn.Module):
    """A chunk closes at the first separator after a word, at every line end and at every end of a document.

    Tokens are bytes. Letters, digits, "_" and the bytes of non-ASCII characters are parts of words; all other bytes are
    separators, as in SpaceByte (Slagle 2024, arXiv:2404.14408). The inner stack then runs where the model must predict
    a new word.
    """

    by_content = True

    def __init__(self, config: ModelConfig, factor: int):
        super().__init__()

    def forward(self, x: Tensor, ids: Tensor, since: Tensor, before: Tensor) -> Decision:
        """Decide where chunks close; arguments as in :meth:`FixedStride.forward`."""
        return Decision(ends_of_words(ids, before))


def ends_of_words(ids: Tensor, before: Tensor) -> Tensor:
    """Return (B, N) bool, True at the first separator after a word and at every end of a line or document.

    ids: (B, N), byte tokens. before: (B,), the token before the first position.
    """
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

    Two gradients train the score. The task's gradient says how much a boundary improved the result. It reaches only the
    positions where chunks closed, through the smoothing of their results
    (:func:`resnet_bk.adaptive.multiscale.smooth`), as in H-Net (Hwang et al. 2025, arXiv:2507.07955). The loss "ratio"
    covers all positions and holds the share of boundaries at one in `factor`.

    The decision is hard. If a score is within rounding error of the threshold, two ways to compute the same text (other
    batch shapes, decoding) may decide differently. In float64 this does not happen in practice.
    """

    by_content = True

    def __init__(self, config: ModelConfig, factor: int):
        super().__init__()
        self.norm = Norm(config.d_model)
        self.weight = nn.Parameter(torch.randn(config.d_model))
        # Scores start as N(0, 1 / D), the threshold at the quantile that one in `factor` exceeds.
        start = statistics.NormalDist().inv_cdf(1 - 1 / factor) * config.d_model**-0.5
        self.threshold = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor, ids: Tensor, since: Tensor, before: Tensor) -> Decision:
        """Decide where chunks close; arguments as in :meth:`FixedStride.forward`."""
        score = self.score(x, ids, before)
        return Decision(score > 0, score.sigmoid())

    def score(self, x: Tensor, ids: Tensor, before: Tensor) -> Tensor:
        """Return (B, N) float32 or float64, above 0 where chunks close."""
        # A mean, not a sum: Adam moves every weight by the learning rate, and a sum over D weights would move so far
        # that the share of closing positions jumps from one extreme to the other.
        exact = torch.promote_types(x.dtype, torch.float32)
        return (self.norm(x).to(exact) * self.weight).mean(-1) - self.threshold


class WordRouter(Router):
    """A router for bytes that starts as :class:`AfterWords` and is trained from there."""

    def __init__(self, config: ModelConfig, factor: int):
        super().__init__(config, factor)
        self.trust = nn.Parameter(torch.tensor(2.0))
        nn.init.zeros_(self.threshold)

    def score(self, x: Tensor, ids: Tensor, before: Tensor) -> Tensor:
        """Return (B, N): :meth:`Router.score`, raised by `trust` at ends of words and lowered by it elsewhere."""
        sign = 2 * ends_of_words(ids, before) - 1
        return super().score(x, ids, before) + self.trust * sign


BOUNDARIES: dict[str, type[nn.Module]] = {
    "fixed": FixedStride,
    "whitespace": AfterWords,
    "learned": Router,
    "learned-words": WordRouter,
}


def since_last(marks: Tensor, start: Tensor) -> Tensor:
    """Return (B, N) int64, the number of positions since the last mark; 0 at a mark.

    Args:
        marks: (B, N) bool.
        start: (B,) int64, number of earlier positions since the last mark. The count continues from it.
    """
    if marks.shape[1] == 1:
        return torch.where(marks, 0, start.unsqueeze(1) + 1)
    position = torch.arange(1, marks.shape[1] + 1, device=marks.device)
    last = torch.where(marks, position, 0).cummax(1).values
    return torch.where(last > 0, position - last, start.unsqueeze(1) + position)
