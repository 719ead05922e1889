"""Other token mixers, for the same block as ours: the references of the benchmarks.

Dimensions: B batch, N positions, D width, H heads.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.config import ModelConfig
from resnet_bk.layers.mixer import ShortConv
from resnet_bk.layers.norm import Norm
from resnet_bk.model import LanguageModel
from resnet_bk.ops.chunked import chunks
from resnet_bk.ops.delta import delta_scan
from resnet_bk.ops.kernels import scan
from resnet_bk.record import Record

Peer = Callable[[ModelConfig], nn.Module]


def build(fields: Mapping[str, Any], peer: Peer | None = None) -> LanguageModel:
    """Return a model of these fields of ModelConfig, with this mixer in every block in place of ours."""
    config = ModelConfig.from_dict(dict(fields))
    model = LanguageModel.from_config(config)
    if peer is not None:
        for block in model.blocks:
            block.mixer = peer(config)
    return model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def equal(
    reference: Mapping[str, Any], seed: int, fields: Mapping[str, Any], peer: Peer | None = None
) -> LanguageModel:
    """Return a model as :func:`build` does. Its feed-forward width makes it as large as that of `reference`."""
    model = build(fields, peer)
    spare, config = parameters(build(reference)) - parameters(model), model.config
    width = config.d_hidden + round(spare / (3 * config.d_model * len(model.blocks)))
    torch.manual_seed(seed)
    return build({**fields, "d_ff": width}, peer)


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


class GatedLinear(nn.Module):
    """Base of the peers with linear attention. Parallel form only.

    The projections are those of our propagator mixer. A short convolution and SiLU give q, k and v. The `rule` of the
    subclass mixes positions. RMSNorm per head and a SiLU gate follow.

    state_floats: size of the recurrent state of one sequence.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, self.heads = config.d_model, config.heads
        self.width = d // self.heads
        self.state_floats = self.heads * self.width**2
        self.in_proj = nn.Linear(d, 4 * d, bias=False)
        self.conv = ShortConv(3 * d, config.conv_width, True)
        self.norm: nn.Module = nn.RMSNorm(self.width, eps=1e-5)
        self.out_proj = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, state: None, mask: None) -> tuple[Tensor, None, list[Record]]:
        qkv, gate = self.in_proj(x).split([3 * x.shape[-1], x.shape[-1]], dim=-1)
        q, k, v = F.silu(self.conv(qkv, None, None)[0]).unflatten(-1, (3, self.heads, self.width)).unbind(2)
        return self.out_proj(self.norm(self.rule(x, q, k, v)).flatten(-2) * F.silu(gate)), None, []

    def rule(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return y (B, N, H, V) of the mixer's input x (B, N, D), and q, k, v (B, N, H, K) after the convolution."""
        raise NotImplementedError

    def start(self, q: Tensor) -> Tensor:
        """Return the state before the first position, (B, H, K, V)."""
        return q.new_zeros(len(q), self.heads, self.width, self.width)


class SigmoidGated(GatedLinear):
    """Our mixer with the decay ``sigmoid(linear)``, one per head, in place of the chain's: the norm is ours too."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.norm = Norm(self.width)
        self.decay = nn.Linear(config.d_model, self.heads)
        with torch.no_grad():
            self.decay.bias.copy_(torch.logit(torch.linspace(0.4, 0.87, self.heads)))

    def rule(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        alpha = self.decay(x).sigmoid()
        return scan(q / math.sqrt(self.width), k, v, alpha, torch.ones_like(alpha), self.start(q))[0]


class GatedDeltaNet(GatedLinear):
    """Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464), by the kernel of our mixer, with q and k of norm 1.

    ``S_t = alpha_t (1 - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T`` and ``y_t = q_t S_t``.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.decay = MambaDecay(config.d_model, self.heads, least=0)
        self.strength = nn.Linear(config.d_model, self.heads, bias=False)

    def rule(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (u * torch.rsqrt(u.square().sum(-1, keepdim=True) + 1e-6) for u in (q, k))
        log_alpha, _ = self.decay(x)
        write = self.strength(x).sigmoid()
        return delta_scan(q / math.sqrt(self.width), k, v, log_alpha.exp(), write, self.start(q))[0]


class MambaDecay(nn.Module):
    """Mamba-2's decay per head: ``log alpha = -exp(A_log) dt``, with the time step ``dt = softplus(w x + dt_bias)``.

    least: exp(A_log) starts uniform between it and 16: 1 in Mamba-2, 0 in Gated DeltaNet.
    """

    def __init__(self, d_model: int, heads: int, least: float = 1):
        super().__init__()
        self.step = nn.Linear(d_model, heads, bias=False)
        dt = torch.exp(torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)))
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(least, 16).log())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log alpha and dt, (B, N, H) each, of x (B, N, D)."""
        dt = F.softplus(self.step(x) + self.dt_bias)
        return -self.A_log.exp() * dt, dt


class Mamba2(GatedLinear):
    """Mamba-2 (Dao and Gu 2024, arXiv:2405.21060) of inner width D. Every head has its own q and k (C and B there).

    ``S_t = alpha_t S_{t-1} + dt_t k_t v_t^T`` and ``y_t = q_t S_t + skip v_t``, by the kernel of our mixer.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.decay = MambaDecay(config.d_model, self.heads)
        self.conv_bias = nn.Parameter(torch.zeros(self.conv.channels))
        self.skip = nn.Parameter(torch.ones(self.heads))  # a vector: AdamW does not decay it

    def forward(self, x: Tensor, state: None, mask: None) -> tuple[Tensor, None, list[Record]]:
        qkv, gate = self.in_proj(x).split([3 * x.shape[-1], x.shape[-1]], dim=-1)
        u = self.conv(qkv, None, None)[0] + self.conv_bias
        q, k, v = F.silu(u).unflatten(-1, (3, self.heads, self.width)).unbind(2)
        log_alpha, dt = self.decay(x)
        y = scan(q, k, v, log_alpha.exp(), dt, self.start(q))[0] + self.skip.unsqueeze(-1) * v
        y = y * F.silu(gate).unflatten(-1, (self.heads, self.width))
        return self.out_proj(self.norm(y).flatten(-2)), None, []


class GatedLinearAttention(GatedLinear):
    """Gated linear attention (Yang et al. 2023, arXiv:2312.06635), with the short convolution of the other peers."""

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        d = config.d_model
        self.decay = nn.Sequential(nn.Linear(d, 16, bias=False), nn.Linear(16, d))

    def rule(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        log_alpha = F.logsigmoid(self.decay(x)).unflatten(-1, (self.heads, self.width)) / 16
        return gated_linear_attention(q / math.sqrt(self.width), k, v, log_alpha)


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, size: int = 16) -> Tensor:
    """Compute ``S_t = diag(alpha_t) S_{t-1} + k_t v_t^T``, ``y_t = q_t S_t``, in chunks.

    Args:
        q, k, v: (B, N, H, K).
        log_alpha: (B, N, H, K); values below -5 count as -5, so that no factor within a chunk overflows.
        size: positions per chunk, at most 16.
    """
    length = q.shape[1]
    q, k, v, log_alpha = (chunks(x, size).movedim(3, 1) for x in (q, k, v, log_alpha.clamp(min=-5)))
    total = log_alpha.cumsum(-2)
    end = total[..., -1:, :]
    q = q * total.exp()
    scores = (q @ (k * (-total).exp()).mT).tril()
    k, end = (k * (end - total).exp()).mT, end.exp().mT
    inside, written = scores @ v, k @ v
    state, ys = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), []
    for m in range(q.shape[2]):
        ys.append(inside[:, :, m] + q[:, :, m] @ state)
        state = end[:, :, m] * state + written[:, :, m]
    return torch.stack(ys, 2).flatten(2, 3).transpose(1, 2)[:, :length]
