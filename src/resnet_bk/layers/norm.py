"""Normalisation. LayerNorm without bias rather than RMSNorm: equal quality, and torch's CPU kernel is 4x faster."""

import torch
from torch import Tensor, nn


class Norm(nn.LayerNorm):
    """LayerNorm over the last dimension with a learned scale and no bias (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, width: int):
        super().__init__(width, eps=1e-5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, ..., width). A single position of a CPU by plain operations: torch's kernel wakes its threads for
        two rows, and a step of decoding would wait milliseconds for those that other programs keep from running."""
        if x.shape[1] > 1 or not x.is_cpu:
            return super().forward(x)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(exact, -1, correction=0, keepdim=True)
        return ((exact - mean) * (variance + self.eps).rsqrt()).to(x.dtype) * self.weight
