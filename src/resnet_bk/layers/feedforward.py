"""Feed-forwards: SwiGLU, and a dropless mixture of them.

Dimensions: B batch, N positions, D model width, F hidden width, E experts, T tokens (real positions of the batch).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.config import ModelConfig

TILE = 16  # rows of a matrix product that are rounded alike


class SwiGLU(nn.Module):
    """``(silu(x W_g) * (x W_u)) W_d`` (Shazeer 2020, arXiv:2002.05202), (..., D) -> (..., D)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, 2 * config.d_hidden, bias=False)
        self.down = nn.Linear(config.d_hidden, config.d_model, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value), {}


class Experts(nn.Module):
    """E SwiGLU experts; every token goes to its `top_k` likeliest ones and none is dropped, (B, N, D) -> (B, N, D).

    Outputs are scaled by the router's probabilities, so the task loss trains the router. Routing looks at one token at
    a time: no capacity, no top-k over the sequence, hence causal and indifferent to batch-mates.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, f, self.experts, self.top_k = config.d_model, config.d_hidden, config.num_experts, config.top_k
        self.router = nn.Linear(d, self.experts, bias=False)
        self.up = nn.Parameter(torch.empty(self.experts, d, 2 * f).uniform_(-1, 1) / math.sqrt(d))
        self.down = nn.Parameter(torch.empty(self.experts, f, d).uniform_(-1, 1) / math.sqrt(f))

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the output and the loss "balance": E sum_e f_e p_e (Fedus et al. 2021, arXiv:2101.03961, eq. 4)."""
        tokens = x.flatten(0, 1) if mask is None else x[mask]
        exact = torch.promote_types(x.dtype, torch.float32)
        probabilities = self.router(_whole_tiles(tokens))[: len(tokens)].softmax(-1, dtype=exact)  # (T, E)
        gates, chosen = probabilities.topk(self.top_k, dim=-1)  # (T, k)
        order = chosen.flatten().argsort(stable=True)  # pairs (token, choice) sorted by expert
        counts = chosen.flatten().bincount(minlength=self.experts)
        source = order // self.top_k
        groups = tokens[source].split(counts.tolist())
        results = [self._expert(e, group) for e, group in enumerate(groups)]
        scaled = torch.cat(results) * gates.flatten()[order].unsqueeze(-1).to(x.dtype)
        y = torch.zeros_like(tokens).index_add(0, source, scaled)
        share = counts.to(probabilities.dtype) / max(1, chosen.numel())
        balance = self.experts * (share * probabilities.sum(0)).sum() / max(1, len(tokens))
        if mask is None:
            return y.view_as(x), {"balance": balance}
        return torch.zeros_like(x).masked_scatter(mask.unsqueeze(-1), y), {"balance": balance}

    def _expert(self, e: int, tokens: Tensor) -> Tensor:
        """One expert on its tokens, (T, D) -> (T, D)."""
        gate, value = (_whole_tiles(tokens) @ self.up[e].to(tokens.dtype)).chunk(2, dim=-1)
        return ((F.silu(gate) * value) @ self.down[e].to(tokens.dtype))[: len(tokens)]


def _whole_tiles(tokens: Tensor) -> Tensor:
    """(T, D) with T rounded up. A matrix product rounds the rows of its last, partial tile differently, and a token's
    bits must not depend on how many others there are beside it."""
    return F.pad(tokens, (0, 0, 0, -len(tokens) % TILE))


def feed_forward(config: ModelConfig) -> SwiGLU | Experts:
    return SwiGLU(config) if config.num_experts == 1 else Experts(config)
