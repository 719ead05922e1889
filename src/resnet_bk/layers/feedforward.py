"""Feed-forwards: SwiGLU, and a dropless mixture of SwiGLU experts.

Dimensions: B batch, N positions, D model width, F hidden width, E experts that compute, A number of all experts,
T = B N tokens (padding included), K largest number of experts per token, P = T K pairs of a token and an expert.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.config import ModelConfig
from resnet_bk.layers.matrices import Matrices
from resnet_bk.layers.price import price
from resnet_bk.ops.gates import swiglu
from resnet_bk.ops.packing import TILE
from resnet_bk.record import Loss, Record

BAND = 0.25  # distance from the target, in experts per token, at which the price is 1
grouped_mm = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm  # its name in torch 2.9


@dataclass(kw_only=True)
class ExpertsRecord(Record):
    """Decisions of the router.

    Attributes:
        used: (B, N) int64, number of computing experts that each position used; 0 for padding.
        load: (E,) int64, number of tokens of each computing expert.
        tokens: scalar int64, number of tokens, without padding.
    """

    used: Tensor
    load: Tensor
    tokens: Tensor

    @property
    def mean_used(self) -> float:
        """Mean number of computing experts per token."""
        return int(self.load.sum()) / max(1, int(self.tokens))


class SwiGLU(nn.Module):
    """``(silu(x W_g) * (x W_u)) W_d`` (Shazeer 2020, arXiv:2002.05202), (..., D) -> (..., D)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up = nn.Linear(config.d_model, 2 * config.d_hidden, bias=False)
        self.down = nn.Linear(config.d_hidden, config.d_model, bias=False)

    def matrices(self) -> list[Matrices]:
        """Return the matrices of gate and value, and of the output."""
        f = self.down.in_features
        return [Matrices(self.up.weight, (f, f)), Matrices(self.down.weight)]

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Record]]:
        return self.down(swiglu(self.up(x))), []


class Experts(nn.Module):
    """A mixture of SwiGLU experts in which no token is dropped, (B, N, D) -> (B, N, D).

    A token uses its `top_k` most likely experts, or the fewest of its most likely experts whose probabilities sum to
    `top_p` or more, within `least` and `most` (Huang et al. 2024, arXiv:2403.07652). Identity and zero experts compute
    nothing: they return the token, or zero (Jin et al. 2024, arXiv:2410.07348). Outputs are scaled by the router's
    probabilities, so the task loss trains the router. The router reads one token at a time, without a capacity
    or a top-k over the sequence. Routing is therefore causal and does not depend on batch-mates.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        # `experts` and `all` are numbers, E and A.
        d, f, self.experts, self.settings = config.d_model, config.d_hidden, config.num_experts, config.experts
        self.balance_weight = config.balance_weight
        self.all = self.experts + self.settings.identity + self.settings.zero
        self.most = config.top_k if self.settings.policy == "top_k" else min(self.settings.most, self.all)
        self.router = nn.Linear(d, self.all, bias=False)
        self.up = nn.Parameter(torch.empty(self.experts, d, 2 * f).uniform_(-1, 1) / math.sqrt(d))
        self.down = nn.Parameter(torch.empty(self.experts, f, d).uniform_(-1, 1) / math.sqrt(f))
        # A bias of each computing expert on the choice. The task does not train it: it falls while that expert has more
        # than 1 / E of the load, and rises while it has less.
        self.load_bias = nn.Parameter(torch.zeros(self.experts)) if self.settings.balance == "bias" else None

    def matrices(self) -> list[Matrices]:
        """Return the matrices of gate and value, and of the output, of each expert."""
        f = self.down.shape[1]
        return [Matrices(self.up, (f, f), dim=-1), Matrices(self.down)]

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Record]]:
        tokens = x.flatten(0, 1)
        mask = tokens.new_ones(tokens.shape[0], dtype=torch.bool) if mask is None else mask.flatten()
        exact = torch.promote_types(x.dtype, torch.float32)
        logits = self.router(_whole_tiles(tokens))[: tokens.shape[0]].to(exact)
        probabilities = logits.softmax(-1)  # (T, A)
        chosen, used = self._choose(logits, probabilities)  # (T, K)
        used = used & mask.unsqueeze(-1)
        adds = used & (chosen < self.experts + self.settings.identity)  # zero experts add nothing
        # Sort the pairs by expert: computing experts, then identity experts. Pairs that add nothing come last, as A.
        expert, order = torch.where(adds, chosen, self.all).flatten().sort(stable=True)
        source = order // self.most
        counts = expert.new_zeros(self.all + 1).index_add(0, expert, torch.ones_like(expert))
        # _run_each reads the group sizes, a host-device sync. Grouped products in bfloat16 leave them on the device.
        grouped = computed_in(tokens) == torch.bfloat16 and (tokens.is_cuda or torch.compiler.is_compiling())
        results = (self._run_grouped if grouped else self._run_each)(tokens, source, counts)
        source, expert = source[: results.shape[0]], expert[: results.shape[0]]
        gates = F.pad(probabilities, (0, 1))[source, expert].unsqueeze(-1).to(x.dtype)
        y = torch.zeros_like(tokens).index_add(0, source, results * gates)
        number_used, load = (used & (chosen < self.experts)).sum(-1), counts[: self.experts]
        losses = self._losses(probabilities, load, number_used, mask)
        record = ExpertsRecord(losses=losses, used=number_used.view(x.shape[:2]), load=load, tokens=mask.sum())
        return y.view_as(x), [record]

    def _choose(self, logits: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's K most likely experts (T, K) int64, and (T, K) bool, True for those that it uses."""
        likely = probabilities
        if self.load_bias is not None:
            likely = (logits + F.pad(self.load_bias, (0, self.all - self.experts))).softmax(-1)
        likely, chosen = likely.topk(self.most, dim=-1)
        if self.settings.policy == "top_k":
            return chosen, torch.ones_like(chosen, dtype=torch.bool)
        used = likely.cumsum(-1) - likely < self.settings.top_p
        used[:, : self.settings.least] = True
        return chosen, used

    def _losses(self, probabilities: Tensor, load: Tensor, used: Tensor, mask: Tensor) -> dict[str, Loss]:
        """Return "balance" and, with policy top_p, "cost" (see :class:`resnet_bk.config.ExpertsConfig`).

        "balance" is E sum_e f_e p_e over computing experts (Fedus et al. 2021, arXiv:2101.03961, eq. 4): f_e is expert
        e's share of the load, p_e its share of the probability of all computing experts. It is 1 if all have the same
        load. With a load bias it keeps this value, but only the bias gets a gradient (Wang et al. 2024,
        arXiv:2408.15664).

        Args:
            probabilities: (T, A).
            load: (E,) int64, number of tokens of each computing expert.
            used: (T,) int64, number of computing experts that each token uses.
            mask: (T,) bool, False for padding.
        """
        number = mask.sum().clamp(min=1)
        share = load / load.sum().clamp(min=1)
        computing = probabilities[:, : self.experts] * mask.unsqueeze(-1)
        balance = self.experts * (share * computing.sum(0)).sum() / computing.sum().clamp(min=1e-9)
        if self.load_bias is not None:
            moved = (self.load_bias * (share - 1 / self.experts).sign()).sum()
            balance = balance.detach() + moved - moved.detach()
        losses = {"balance": Loss(balance, self.balance_weight)}
        if self.settings.policy == "top_p":
            factor = price(used.sum() / number, self.settings.target, BAND) if self.settings.target else 1.0
            entropy = (torch.special.entr(probabilities).sum(-1) * mask).sum() / math.log(max(2, self.all))
            losses["cost"] = Loss(factor * (entropy + computing.sum()) / number, self.settings.cost_weight)
        return losses

    def _run_each(self, tokens: Tensor, source: Tensor, counts: Tensor) -> Tensor:
        """Run one expert after the other on its tokens.

        Each expert computes only the rows of its own tokens, filled up to whole tiles. Reading the counts is a
        host-device sync.

        Args:
            tokens: (T, D).
            source: (P,) int64, the token of each pair, sorted by expert.
            counts: (A + 1,) int64, number of pairs of each expert. The last entry counts the pairs that add nothing.

        Returns:
            The results of the pairs that add something, in the order of `source`: (R, D) with R <= P.
        """
        sizes = counts.tolist()
        *groups, same, _ = source.split([*sizes[: self.experts], sum(sizes[self.experts : -1]), sizes[-1]])
        return torch.cat([*(self._expert(e, tokens, group) for e, group in enumerate(groups)), tokens[same]])

    def _run_grouped(self, tokens: Tensor, source: Tensor, counts: Tensor) -> Tensor:
        """Run all experts with grouped matrix products of bfloat16, without a host-device sync.

        Arguments as for :meth:`_run_each`. Returns (P, D); the results of pairs that add nothing have no meaning, and
        their gate is 0.
        """
        ends = counts[: self.experts].cumsum(0).int()
        computes = (torch.arange(source.shape[0], device=tokens.device) < ends[-1]).unsqueeze(-1)
        x, dtype = tokens[source], torch.bfloat16
        # grouped_mm does not write rows beyond the last group, forward or backward, so both `where` leave them out.
        rows = torch.where(computes, x, 0).to(dtype)
        y = grouped_mm(swiglu(grouped_mm(rows, self.up.to(dtype), offs=ends)), self.down.to(dtype), offs=ends)
        return torch.where(computes, y.to(x.dtype), x)

    def _expert(self, e: int, tokens: Tensor, own: Tensor) -> Tensor:
        """Run expert e on its own tokens: rows `own` (R,) of tokens (T, D), -> (R, D)."""
        x = tokens[_whole_tiles(own)]  # filled up with token 0; cut off below
        return (swiglu(x @ self.up[e].to(tokens.dtype)) @ self.down[e].to(tokens.dtype))[: own.shape[0]]


def computed_in(x: Tensor) -> torch.dtype:
    """Return the dtype in which matrix products with x are computed: that of autocast if it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _whole_tiles(rows: Tensor) -> Tensor:
    """Append rows of zeros to rows (R, ...) until R is a multiple of TILE.

    A matrix product rounds the rows of its last, partial tile differently, and a token's bits must not depend on how
    many other tokens there are.
    """
    missing = -rows.shape[0] % TILE
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)) if torch.compiler.is_exporting() or missing else rows


def feed_forward(config: ModelConfig) -> SwiGLU | Experts:
    """Return the feed-forward of a block."""
    return SwiGLU(config) if config.num_experts == 1 else Experts(config)
