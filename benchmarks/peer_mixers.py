"""Other token mixers, for the same block as ours: the references of the benchmarks.

Dimensions: B batch, N positions, D width, H heads.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.config import ModelConfig
from resnet_bk.layers.mixer import MixerState, ShortConv
from resnet_bk.layers.norm import Norm
from resnet_bk.ops.kernels import scan
from resnet_bk.record import Record


class SoftmaxAttention(nn.Module):
    """Causal softmax attention with RoPE (Su et al. 2021, arXiv:2104.09864), by torch's SDPA. Parallel form only."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, state: None, mask: None) -> tuple[Tensor, None, list[Record]]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(q), rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(-2)), None, []


def rotate(x: Tensor) -> Tensor:
    """Apply rotary position embedding to x (B, H, N, K)."""
    half = x.shape[-1] // 2
    frequency = 10000 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[-2], device=x.device).unsqueeze(-1) * frequency
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1).to(x.dtype)


class SigmoidGatedAttention(nn.Module):
    """Our propagator mixer with the decay ``sigmoid(linear)``, as in gated linear attention and Mamba-2.

    Everything else is the same, the kernel included.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, self.heads = config.d_model, config.heads
        self.width = d // self.heads
        self.decay = nn.Linear(d, self.heads)
        with torch.no_grad():
            self.decay.bias.copy_(torch.logit(torch.linspace(0.4, 0.87, self.heads)))
        self.in_proj = nn.Linear(d, 4 * d, bias=False)
        self.conv = ShortConv(3 * d, config.conv_width, True)
        self.norm = Norm(self.width)
        self.out_proj = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, state: MixerState | None, mask: Tensor | None) -> tuple[Tensor, None, list[Record]]:
        alpha = self.decay(x).sigmoid()
        qkv, gate = self.in_proj(x).split([3 * x.shape[-1], x.shape[-1]], dim=-1)
        qkv, _ = self.conv(qkv, None, mask)
        q, k, v = F.silu(qkv).unflatten(-1, (3, self.heads, self.width)).unbind(2)
        start = q.new_zeros(q.shape[0], self.heads, self.width, self.width)
        y, _ = scan(q / math.sqrt(self.width), k, v, alpha, torch.ones_like(alpha), start)
        return self.out_proj(self.norm(y).flatten(-2) * F.silu(gate)), None, []
