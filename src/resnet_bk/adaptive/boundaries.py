"""Where chunks end: at a fixed stride, after words, or where a trained router says.

A rule looks at position t and what came before it, never beyond: a chunk that ended because of what the next
position holds would tell t about t + 1.

Dimensions: B batch, N positions, D model width.
"""

import statistics

import torch
from torch import Tensor, nn

from resnet_bk.config import BYTE_OFFSET, ModelConfig
from resnet_bk.layers.norm import Norm


class FixedStride(nn.Module):
    """A chunk closes at every `factor`-th position."""

    by_content = False

    def __init__(self, config: ModelConfig, factor: int):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, ids: Tensor | None, since: Tensor, before: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where chunks close and how sure the rule is.

        Args:
            x: (B, N, D).
            ids: (B, N), the token at each position.
            since: (B,) int64, positions since the last chunk closed.
            before: (B,) int64, the token before the first position.

        Returns:
            closes: (B, N) bool.
            probability: (B, N) of closing, with a gradient; None for rules that learn nothing.
        """
        position = torch.arange(1, x.shape[1] + 1, device=x.device)
        return (since.unsqueeze(1) + position) % self.factor == 0, None


class AfterWords(nn.Module):
    """A chunk closes at the first separator after a word, at every line end, and after `2 * factor` positions.

    Of bytes: letters, digits, "_" and all parts of non-ASCII characters are words, all else separates (as in
    SpaceByte, Slagle 2024, arXiv:2404.14408). The model then computes deeply where a new word is to be guessed.
    """

    by_content = True

    def __init__(self, config: ModelConfig, factor: int):
        super().__init__()
        self.longest = 2 * factor

    def forward(self, x: Tensor, ids: Tensor | None, since: Tensor, before: Tensor) -> tuple[Tensor, Tensor | None]:
        """As :meth:`FixedStride.forward`."""
        assert ids is not None
        word = _in_word(torch.cat([before.unsqueeze(1), ids], dim=1))
        line_end = (ids == ord("\n") + BYTE_OFFSET) | (ids < BYTE_OFFSET)
        ends = (word[:, :-1] & ~word[:, 1:]) | line_end
        length = since_last(ends, since)
        return ends | (length % self.longest == 0), None


def _in_word(ids: Tensor) -> Tensor:
    byte = ids - BYTE_OFFSET
    lower = byte | 32
    letter = (lower >= ord("a")) & (lower <= ord("z"))
    digit = (byte >= ord("0")) & (byte <= ord("9"))
    return letter | digit | (byte == ord("_")) | (byte >= 128)


class Router(nn.Module):
    """A chunk closes where a linear classifier of the position's features says so.

    Whether a boundary was worth it reaches the classifier through the smoothing of what chunks return
    (:class:`resnet_bk.adaptive.multiscale.LearnedUpsampling`), as in H-Net (Hwang et al. 2025, arXiv:2507.07955).
    """

    by_content = True

    def __init__(self, config: ModelConfig, factor: int):
        super().__init__()
        self.norm = Norm(config.d_model)
        self.score = nn.Linear(config.d_model, 1)
        # scores start as N(bias, 1), so that about one position in `factor` closes
        nn.init.normal_(self.score.weight, std=config.d_model**-0.5)
        nn.init.constant_(self.score.bias, statistics.NormalDist().inv_cdf(1 / factor))

    def forward(self, x: Tensor, ids: Tensor | None, since: Tensor, before: Tensor) -> tuple[Tensor, Tensor | None]:
        """As :meth:`FixedStride.forward`."""
        score = self.score(self.norm(x)).squeeze(-1)
        return score > 0, score.sigmoid()


BOUNDARIES = {"fixed": FixedStride, "whitespace": AfterWords, "learned": Router}


def since_last(marks: Tensor, start: Tensor) -> Tensor:
    """Positions since the last mark at or before each one, (B, N); before the first mark counted on from start (B,)."""
    position = torch.arange(1, marks.shape[1] + 1, device=marks.device)
    last = torch.where(marks, position, 0).cummax(1).values
    return torch.where(last > 0, position - last, start.unsqueeze(1) + position)
