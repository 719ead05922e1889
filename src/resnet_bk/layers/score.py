"""A score a position: what routers decide by."""

import math

import torch
from torch import Tensor, nn

from resnet_bk.layers.norm import Norm


class Score(nn.Module):
    """A linear score of normalised features, (B, N, D) -> (B, N) float32 or float64.

    Its scale is between a mean's and a sum's: Adam moves every weight by the learning rate, so a sum over D of them
    would throw the share of positions above a threshold from one extreme to the other, and a mean would hardly move.
    """

    def __init__(self, width: int, start: float = 0.0, spread: float = 0.0):
        """Scores start about `start`, with a standard deviation of `spread`."""
        super().__init__()
        self.scale = math.sqrt(width)
        self.norm = Norm(width)
        self.weight = nn.Parameter(spread * torch.randn(width))
        self.bias = nn.Parameter(torch.tensor(start / self.scale))

    def forward(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        return self.scale * ((self.norm(x).to(exact) * self.weight).mean(-1) + self.bias)
