"""Feed-forwards: SwiGLU, and a dropless mixture of them.

Dimensions: B batch, N positions, D model width, F hidden width, E experts that compute, A all experts, T = B N tokens,
padding among them, K the most experts a token may use, P = T K pairs of a token and an expert.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.config import ModelConfig
from resnet_bk.layers.price import price
from resnet_bk.ops.packing import TILE
from resnet_bk.record import Loss, Record

BAND = 0.25  # experts a token around the target in which the price rises from -1 to 1


@dataclass(kw_only=True)
class ExpertsRecord(Record):
    """used: (B, N) int64, computing experts each position went through; 0 for padding. load: (E,) int64, tokens that
    each of them had. tokens: how many there were, without padding."""

    used: Tensor
    load: Tensor
    tokens: Tensor

    @property
    def mean_used(self) -> float:
        """Computing experts a token."""
        return int(self.load.sum()) / max(1, int(self.tokens))


class SwiGLU(nn.Module):
    """``(silu(x W_g) * (x W_u)) W_d`` (Shazeer 2020, arXiv:2002.05202), (..., D) -> (..., D)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, 2 * config.d_hidden, bias=False)
        self.down = nn.Linear(config.d_hidden, config.d_model, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Record]]:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value), []


class Experts(nn.Module):
    """Some SwiGLU experts for each token, and none is dropped, (B, N, D) -> (B, N, D).

    A token uses its `top_k` likeliest experts, or as many of the likeliest as make up a probability of `top_p` (Huang
    et al. 2024, arXiv:2403.07652): one where the router is sure, several where it is not. Some experts may compute
    nothing: they return the token or zero (Jin et al. 2024, arXiv:2410.07348). Outputs are scaled by the router's
    probabilities, so the task loss trains the router. Routing looks at one token at a time: no capacity, no top-k over
    the sequence, hence causal and indifferent to batch-mates.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, f, self.experts, self.settings = config.d_model, config.d_hidden, config.num_experts, config.experts
        self.balance_weight = config.balance_weight
        self.all = self.experts + self.settings.identity + self.settings.zero
        self.most = config.top_k if self.settings.policy == "top_k" else min(self.settings.most, self.all)
        self.router = nn.Linear(d, self.all, bias=False)
        self.up = nn.Parameter(torch.empty(self.experts, d, 2 * f).uniform_(-1, 1) / math.sqrt(d))
        self.down = nn.Parameter(torch.empty(self.experts, f, d).uniform_(-1, 1) / math.sqrt(f))
        # Not trained by the task: it falls while an expert has more than its share of tokens, and rises otherwise.
        self.load_bias = nn.Parameter(torch.zeros(self.experts)) if self.settings.balance == "bias" else None

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Record]]:
        tokens = x.flatten(0, 1)
        real = tokens.new_ones(len(tokens), dtype=torch.bool) if mask is None else mask.flatten()
        exact = torch.promote_types(x.dtype, torch.float32)
        logits = self.router(_whole_tiles(tokens))[: len(tokens)].to(exact)
        probabilities = logits.softmax(-1)  # (T, A)
        chosen, takes = self._choose(logits, probabilities)  # (T, K)
        takes = takes & real.unsqueeze(-1)
        works = takes & (chosen < self.experts + self.settings.identity)  # the others return zero
        # Pairs by expert: those that compute, those that return the token, and last, of no expert, all others.
        expert, order = torch.where(works, chosen, self.all).flatten().sort(stable=True)
        source = order // self.most
        counts = expert.new_zeros(self.all + 1).index_add(0, expert, torch.ones_like(expert))
        grouped = computed_in(tokens) == torch.bfloat16 and (tokens.is_cuda or torch.compiler.is_compiling())
        results = (self._all_at_once if grouped else self._one_by_one)(tokens, source, counts)
        source, expert = source[: len(results)], expert[: len(results)]
        gates = F.pad(probabilities, (0, 1))[source, expert].unsqueeze(-1).to(x.dtype)
        y = torch.zeros_like(tokens).index_add(0, source, results * gates)
        used, load = (takes & (chosen < self.experts)).sum(-1), counts[: self.experts]
        losses = self._losses(probabilities, load, used, real)
        return y.view_as(x), [
            ExpertsRecord(losses=losses, used=used.view(x.shape[:2]), load=load, tokens=real.sum()),
        ]

    def _choose(self, logits: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """The K likeliest experts of each token (T, K), and which of them it uses, (T, K) bool."""
        likely = probabilities
        if self.load_bias is not None:
            likely = (logits + F.pad(self.load_bias, (0, self.all - self.experts))).softmax(-1)
        likely, chosen = likely.topk(self.most, dim=-1)
        if self.settings.policy == "top_k":
            return chosen, torch.ones_like(chosen, dtype=torch.bool)
        takes = likely.cumsum(-1) - likely < self.settings.top_p
        takes[:, : self.settings.least] = True
        return chosen, takes

    def _losses(self, probabilities: Tensor, counts: Tensor, used: Tensor, real: Tensor) -> dict[str, Loss]:
        """Of computing experts "balance", E sum_e f_e p_e (Fedus et al. 2021, arXiv:2101.03961, eq. 4), 1 where all are
        equally busy; balanced by bias, that value with the gradient of the bias alone (Wang et al. 2024,
        arXiv:2408.15664). And "cost", of top_p: see :class:`resnet_bk.config.ExpertsConfig`."""
        number = real.sum().clamp(min=1)
        share = counts / counts.sum().clamp(min=1)
        computing = probabilities[:, : self.experts] * real.unsqueeze(-1)
        balance = self.experts * (share * computing.sum(0)).sum() / computing.sum().clamp(min=1e-9)
        if self.load_bias is not None:
            moved = (self.load_bias * (share - 1 / self.experts).sign()).sum()
            balance = balance.detach() + moved - moved.detach()
        losses = {"balance": Loss(balance, self.balance_weight)}
        if self.settings.policy == "top_p":
            factor = price(used.sum() / number, self.settings.target, BAND) if self.settings.target else 1.0
            entropy = (torch.special.entr(probabilities).sum(-1) * real).sum() / math.log(max(2, self.all))
            losses["cost"] = Loss(factor * (entropy + computing.sum()) / number, self.settings.cost_weight)
        return losses

    def _one_by_one(self, tokens: Tensor, source: Tensor, counts: Tensor) -> Tensor:
        """What experts return of the tokens (T, D) of each pair, `source` (P,), in groups of `counts` (A + 1,): (W, D),
        without the pairs of no expert. No row is computed for nothing, but the host waits for the counts."""
        sizes = counts.tolist()
        *groups, same, _ = source.split([*sizes[: self.experts], sum(sizes[self.experts : -1]), sizes[-1]])
        return torch.cat([*(self._expert(e, tokens, group) for e, group in enumerate(groups)), tokens[same]])

    def _all_at_once(self, tokens: Tensor, source: Tensor, counts: Tensor) -> Tensor:
        """The same by grouped matrix products of bfloat16, whose sizes stay on the device: (P, D)."""
        ends = counts[: self.experts].cumsum(0).int()
        computes = (torch.arange(len(source), device=tokens.device) < ends[-1]).unsqueeze(-1)
        mine, dtype = tokens[source], torch.bfloat16
        # Rows beyond the last group are not written, forward or backward: they are kept out on both sides.
        rows = torch.where(computes, mine, 0).to(dtype)
        gate, value = F.grouped_mm(rows, self.up.to(dtype), offs=ends).chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * value, self.down.to(dtype), offs=ends)
        return torch.where(computes, y.to(mine.dtype), mine)

    def _expert(self, e: int, tokens: Tensor, own: Tensor) -> Tensor:
        """One expert on the tokens (T, D) that are its own, (P,) indices -> (P, D)."""
        mine = tokens[_whole_tiles(own)]
        gate, value = (mine @ self.up[e].to(tokens.dtype)).chunk(2, dim=-1)
        return ((F.silu(gate) * value) @ self.down[e].to(tokens.dtype))[: len(own)]


def computed_in(x: Tensor) -> torch.dtype:
    """Of matrix products with x here: autocast's dtype, or x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _whole_tiles(rows: Tensor) -> Tensor:
    """Rows (T, ...), zeros added where T is no multiple of TILE. A matrix product rounds the rows of its last, partial
    tile differently, and a token's bits must not depend on how many others there are beside it."""
    missing = -len(rows) % TILE
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if missing else rows


def feed_forward(config: ModelConfig) -> SwiGLU | Experts:
    return SwiGLU(config) if config.num_experts == 1 else Experts(config)
