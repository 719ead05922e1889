"""The score of a position by which routers decide."""

import math

import torch
from torch import Tensor, nn

from resnet_bk.layers.norm import Norm


class Score(nn.Module):
    """A linear score of normalized features, (B, N, D) -> (B, N) float32 or float64.

    It is sqrt(D) times a mean, so its scale is between a mean and a sum. Adam moves every weight by the learning rate.
    A sum over D weights would move so far that the share of positions above a threshold jumps from one extreme to the
    other; a mean would hardly move.
    """

    def __init__(self, width: int, start: float = 0.0, spread: float = 0.0):
        """Create the score of features of a width. At first it has mean `start` and standard deviation `spread`."""
        super().__init__()
        self.scale = math.sqrt(width)
        self.norm = Norm(width)
        self.weight = nn.Parameter(spread * torch.randn(width))
        self.bias = nn.Parameter(torch.tensor(start / self.scale))

    def forward(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        return self.scale * ((self.norm(x).to(exact) * self.weight).mean(-1) + self.bias)
