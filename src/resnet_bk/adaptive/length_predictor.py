"""The predictor of learned length: a distribution over lengths, from the pooled features of a window's prefix.

Dimensions: ... any leading dimensions, D model width, K lengths to choose from.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.config import LengthConfig, check_integer
from resnet_bk.layers.norm import Norm


class Lengths(NamedTuple):
    """A distribution over lengths.

    values: (K,) or (..., K) float, the lengths in positions.
    log_probabilities: (..., K) float.
    """

    values: Tensor
    log_probabilities: Tensor

    @property
    def probabilities(self) -> Tensor:
        return self.log_probabilities.exp()

    @property
    def expected(self) -> Tensor:
        """Mean length (...) in positions, with a gradient to the predictor."""
        return (self.values * self.probabilities).sum(-1)

    @property
    def entropy(self) -> Tensor:
        """Entropy (...) in nats."""
        return -(self.probabilities * self.log_probabilities).sum(-1)


class SequenceLengthPredictor(nn.Module):
    """A small MLP that maps pooled features to the probabilities of lengths.

    ``SequenceLengthPredictor(d_model, num_length_bins=8, max_seq_len=128)`` chooses from 16, 32, ..., 128. The shortest
    length is also the prefix: every length computes these positions, so a causal model may read them before it decides.

    The MLP runs once per window, not once per position, so its cost is negligible. The choice is hard: if the scores of
    two lengths are within rounding error, two ways to compute the same text (other batch shapes, devices) may choose
    differently.

    Attributes:
        longest: `max_seq_len`.
        shortest: the shortest length, ``max_seq_len // num_length_bins``.
        prefix: number of positions that the choice reads: `shortest`, or the whole window with pooling "global".
        bins: K.
        groups: number of groups of lengths; 1 with one level.
        fixed: the K lengths in positions, if they are neither learned nor predicted.
    """

    def __init__(
        self,
        d_model: int,
        num_length_bins: int = 8,
        max_seq_len: int = 128,
        *,
        pooling: Literal["prefix", "attention", "global"] = "prefix",
        placement: Literal["even", "geometric", "learned", "continuous"] = "even",
        levels: Literal[1, 2] = 1,
    ):
        """Create the predictor.

        Args:
            d_model: D.
            num_length_bins: K, the number of lengths.
            max_seq_len: positions of a window, and the longest length.
            pooling, placement, levels: see :class:`resnet_bk.config.LengthConfig`.

        Raises:
            ConfigError: a setting that :class:`resnet_bk.config.LengthConfig` does not allow.
        """
        super().__init__()
        check_integer("predictor", 1, max_seq_len, num_length_bins=num_length_bins)
        settings = LengthConfig(num_length_bins, max_seq_len, pooling=pooling, placement=placement, levels=levels)
        self.longest, self.bins, self.placement = max_seq_len, num_length_bins, placement
        self.groups = settings.groups if levels == 2 else 1
        self.shortest = max_seq_len // num_length_bins
        self.prefix = max_seq_len if pooling == "global" else self.shortest
        outputs = 1 if placement == "continuous" else num_length_bins + (self.groups if levels == 2 else 0)
        hidden = max(8, d_model // 4)
        self.norm = Norm(d_model)
        self.hidden, self.out = nn.Linear(d_model, hidden), nn.Linear(hidden, outputs)
        self.attention = nn.Linear(d_model, 1) if pooling == "attention" else None
        self.gaps = nn.Parameter(torch.zeros(self.bins - 1)) if placement == "learned" and self.bins > 2 else None
        along = [k / max(1, self.bins - 1) for k in range(self.bins)]
        if placement == "geometric":
            between = [round(self.shortest * (self.longest / self.shortest) ** x) for x in along]
        else:
            between = [round(self.shortest + x * (self.longest - self.shortest)) for x in along]
        self.fixed = between if self.bins > 1 else [self.longest]

    def weigh(self, x: Tensor) -> Tensor:
        """Return the positive weight of each position in the pooled mean, (..., D) -> (...) float32 or float64."""
        exact = torch.promote_types(x.dtype, torch.float32)
        if self.attention is None:
            return torch.ones(x.shape[:-1], dtype=exact, device=x.device)
        return self.attention(x).squeeze(-1).to(exact).clamp(-30, 30).sigmoid()

    def forward(self, pooled: Tensor) -> Lengths:
        """Predict the distribution over lengths from pooled (..., D), a weighted mean of features."""
        with torch.autocast(pooled.device.type, enabled=False):
            x = self.hidden(self.norm(pooled.to(self.hidden.weight.dtype)))
            scores = self.out(F.silu(x))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.placement == "continuous":
            values = self.shortest + (self.longest - self.shortest) * scores.sigmoid()
            return Lengths(values, torch.zeros_like(values))
        if self.groups > 1:
            coarse, fine = scores.split([self.groups, self.bins], dim=-1)
            fine = fine.unflatten(-1, (self.groups, -1)).log_softmax(-1)
            return Lengths(self.values(scores), (coarse.log_softmax(-1).unsqueeze(-1) + fine).flatten(-2))
        return Lengths(self.values(scores), scores.log_softmax(-1))

    def values(self, like: Tensor) -> Tensor:
        """Return the lengths to choose from, (K,), with the dtype and device of `like`."""
        if self.gaps is None:
            return torch.tensor(self.fixed, dtype=like.dtype, device=like.device)
        steps = self.gaps.to(like.dtype).softmax(0).cumsum(0) * (self.longest - self.shortest)
        return self.shortest + F.pad(steps, (1, 0))

    def choose(self, values: Tensor, scores: Tensor) -> Tensor:
        """Choose the length with the highest score. With placement "continuous", round the predicted length instead.

        Args:
            values: (K,) or (..., K) float, the lengths.
            scores: (..., K).

        Returns:
            (...) int64, the length in positions. A predicted length is rounded to a multiple of the shortest one, or to
            the longest one.
        """
        if self.placement == "continuous":
            length = values.detach().squeeze(-1)
            steps = (length / self.shortest).round().long() * self.shortest
            return torch.where(length > self.longest - self.shortest / 2, self.longest, steps)
        best = scores.argmax(-1, keepdim=True)
        return values.detach().expand(scores.shape).gather(-1, best).squeeze(-1).round().long()

    def reach(self, values: Tensor, probabilities: Tensor, offset: Tensor) -> Tensor:
        """Return the probability that the length reaches a position, (...).

        With placement "learned" or "continuous", a length ends in a ramp as long as the shortest length. This
        relaxation gives the length its gradient.

        Args:
            values: (K,) or (..., K), the lengths.
            probabilities: (..., K).
            offset: (...) int64, index of the position in its window.
        """
        offset = offset.unsqueeze(-1).to(values.dtype)
        if self.placement in ("learned", "continuous"):
            within = ((values - offset) / self.shortest + 0.5).clamp(0, 1)
        else:
            within = (offset < values).to(values.dtype)
        return (within * probabilities).sum(-1)
