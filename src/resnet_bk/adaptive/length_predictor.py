"""How long should the sequence be? A distribution over lengths, from what its beginning holds.

Dimensions: ... any leading ones, D model width, K lengths to choose among.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.layers.norm import Norm


class Lengths(NamedTuple):
    """values: (..., K) or (K,) float, in positions; probabilities: (..., K)."""

    values: Tensor
    probabilities: Tensor

    @property
    def expected(self) -> Tensor:
        """(...) mean length; its gradient reaches the predictor."""
        return (self.values * self.probabilities).sum(-1)

    @property
    def entropy(self) -> Tensor:
        """(...) in nats."""
        return torch.special.entr(self.probabilities).sum(-1)


class SequenceLengthPredictor(nn.Module):
    """Pooled features -> a small MLP -> probabilities of `num_length_bins` lengths, the last one `max_seq_len`.

    ``SequenceLengthPredictor(d_model, num_length_bins=8, max_seq_len=128)``: 16, 32, ..., 128. The shortest length is
    also the prefix: what a causal model may look at before it decides, since every length computes it.

    The MLP runs once a window, so its cost per position is ``1 / max_seq_len`` of its size. Features come detached:
    the predictor learns to read them, it does not shape them.
    """

    lengths: Tensor

    def __init__(
        self,
        d_model: int,
        num_length_bins: int = 8,
        max_seq_len: int = 128,
        *,
        pooling: str = "prefix",
        placement: str = "even",
        groups: int = 1,
    ):
        """pooling, placement: see :class:`resnet_bk.config.LengthConfig`; groups: of two-level choices, else 1."""
        super().__init__()
        self.longest, self.bins, self.placement, self.groups = max_seq_len, num_length_bins, placement, groups
        self.shortest = max(1, max_seq_len // num_length_bins)
        self.prefix = max_seq_len if pooling == "global" else self.shortest
        outputs = 1 if placement == "continuous" else num_length_bins + (groups if groups > 1 else 0)
        hidden = max(8, d_model // 4)
        self.norm = Norm(d_model)
        self.hidden, self.out = nn.Linear(d_model, hidden), nn.Linear(hidden, outputs)
        self.attention = nn.Linear(d_model, 1) if pooling == "attention" else None
        if placement == "learned":
            self.gaps = nn.Parameter(torch.zeros(max(1, num_length_bins - 1)))
        ratio = torch.linspace(0, 1, num_length_bins).double()
        span = torch.tensor(self.longest / self.shortest).double()
        even = self.shortest + ratio * (self.longest - self.shortest)
        lengths = (self.shortest * span**ratio) if placement == "geometric" else even
        lengths = lengths.round() if num_length_bins > 1 else torch.tensor([float(max_seq_len)])
        self.register_buffer("lengths", lengths.float(), persistent=False)

    def weigh(self, x: Tensor) -> Tensor:
        """What each position (..., D) counts in the pooled mean, (...), positive."""
        exact = torch.promote_types(x.dtype, torch.float32)
        if self.attention is None:
            return torch.ones(x.shape[:-1], dtype=exact, device=x.device)
        return self.attention(x).squeeze(-1).to(exact).clamp(-30, 30).sigmoid()

    def forward(self, pooled: Tensor) -> Lengths:
        """pooled: (..., D), a weighted mean of features."""
        scores = self.out(F.silu(self.hidden(self.norm(pooled))))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.placement == "continuous":
            values = self.shortest + (self.longest - self.shortest) * scores.sigmoid()
            return Lengths(values, torch.ones_like(values))
        if self.groups > 1:
            coarse, fine = scores.split([self.groups, self.bins], dim=-1)
            fine = fine.unflatten(-1, (self.groups, -1)).log_softmax(-1)
            scores = (coarse.log_softmax(-1).unsqueeze(-1) + fine).flatten(-2)
        return Lengths(self.values().to(scores.dtype), scores.softmax(-1))

    def values(self) -> Tensor:
        """(K,) lengths to choose among."""
        if self.placement != "learned" or self.bins == 1:
            return self.lengths
        steps = self.gaps.softmax(0).cumsum(0) * (self.longest - self.shortest)
        return self.shortest + F.pad(steps, (1, 0))

    def choose(self, lengths: Lengths) -> Tensor:
        """(...) int64: the likeliest length; a predicted number rounded to a multiple of the shortest one."""
        if self.placement == "continuous":
            return self.whole(lengths.values.squeeze(-1), self.shortest)
        best = lengths.probabilities.argmax(-1)
        return self.whole(lengths.values.expand(lengths.probabilities.shape).gather(-1, best.unsqueeze(-1)).squeeze(-1))

    def whole(self, length: Tensor, multiple: int = 1) -> Tensor:
        """(...) int64, within what is allowed."""
        return (length.detach() / multiple).round().long().mul(multiple).clamp(self.shortest, self.longest)

    def reach(self, lengths: Lengths, offset: Tensor) -> Tensor:
        """The probability that position `offset` (...) of a window is within the length, (...); as a function of the
        lengths too where these are learned: they then end in a ramp as long as the shortest one."""
        offset = offset.unsqueeze(-1).to(lengths.values.dtype)
        if self.placement in ("learned", "continuous"):
            within = ((lengths.values - offset) / self.shortest + 0.5).clamp(0, 1)
        else:
            within = (offset < lengths.values).to(lengths.values.dtype)
        return (within * lengths.probabilities).sum(-1)
