"""Sequence parallelism: each process holds one piece of a long sequence and computes what enters it from earlier ones.

What passes from a piece to the next: g of its last site, the state S, and the last inputs of the short convolution, of
attention within a window and of n-gram memory. A piece changes g by a Möbius map, and S by a decay (a matrix with the
delta rule) and a sum; these maps do not grow with its length. So each process computes the map of its own piece, all
maps are gathered, and each process composes the maps of the pieces before its own. No process waits until another one
has computed its piece (README, section 8). Recent n-grams alone need all earlier tokens, see :meth:`Pieces.before`.

Dimensions: B batch, N sites of this process's piece, M sites of all earlier pieces, H chains, K key width, V value
width, P processes.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from resnet_bk.ops.chain import Chain, PropagatorState, check_chain, check_qkv
from resnet_bk.ops.core import left
from resnet_bk.ops.delta import delta_scan
from resnet_bk.ops.kernels import green


class _Gather(torch.autograd.Function):
    """Gather x of all processes, (P, ...). Backward sums over processes the gradients for x of this process."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x, group=group)
        return torch.stack(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total[dist.get_rank(ctx.group)], None


@dataclass(frozen=True)
class Pieces:
    """Consecutive pieces of the same B sequences, held by the processes of `group` in the order of their ranks.

    Pieces may differ in length. All processes must make the same calls in the same order, and all must run backward,
    because the gradient of a piece is a sum over the later processes.
    """

    group: dist.ProcessGroup

    def inputs(self, x: Tensor, count: int) -> Tensor:
        """Return the `count` positions of x (B, N, C) before this piece, (B, count, C); zeros before the first piece.

        Raises:
            ValueError: this piece is shorter than `count`.
        """
        if x.shape[1] < count:
            raise ValueError(f"piece: got {x.shape[1]} positions, allowed {count} or more; use fewer processes")
        if count == 0:
            return x[:, :0]
        ends = self._gather(x[:, -count:])
        return self._mine([torch.zeros_like(ends[0]), *ends[:-1]])

    def before(self, ids: Tensor) -> Tensor:
        """Return the tokens of all earlier pieces, (B, M) int64. ids: (B, N) int64, those of this piece."""
        lengths = self._gather(torch.tensor(ids.shape[1], device=ids.device)).tolist()
        gathered = self._gather(F.pad(ids, (0, max(lengths) - ids.shape[1])))
        earlier = list(zip(gathered, lengths, strict=True))[: dist.get_rank(self.group)]
        return torch.cat([ids[:, :0], *(piece[:, :length] for piece, length in earlier)], dim=1)

    def green(self, a: Tensor, z: Tensor | complex, hop: Tensor | None = None) -> Tensor:
        """Return g of the site before this piece, (B, H). Arguments as in :func:`resnet_bk.ops.left_green`."""
        return self._green(check_chain(a, z, hop))

    def _green(self, chain: Chain) -> Tensor:
        """Compose the maps ``x -> r + x t / (1 - x l)`` of the earlier pieces, x the entering g (README, section 2)."""
        g = green(chain.d, chain.w, chain.g, None)
        wg = chain.w * g
        passed = (wg * g).cumprod(1)
        response = (torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1]], dim=1) * wg).sum(1)
        entering = [chain.g]
        for r, t, back in self._gather(torch.stack([g[:, -1], passed[:, -1], response]))[:-1]:
            entering.append(r + entering[-1] * t / (1 - entering[-1] * back))
        return self._mine(entering)

    def state(
        self,
        k: Tensor,
        v: Tensor,
        a: Tensor | None,
        z: Tensor | complex,
        hop: Tensor | None = None,
        *,
        write: Tensor | None = None,
    ) -> PropagatorState:
        """Return the state that enters this piece. Arguments as in :func:`resnet_bk.ops.propagate`, without padding."""
        chain = check_chain(a, z, hop)
        check_qkv(chain, k, k, v, write, None, causal=True)
        g0 = chain.g if chain.by_hopping else self._green(chain)
        g = left(dataclasses.replace(chain, g=g0))
        alpha = -chain.links * g
        own = _decay_and_sum(k, v, alpha, g) if write is None else _matrix_and_sum(k, v, alpha, g.abs() * write)
        decays, sums = (self._gather(x) for x in own)
        entering = [torch.zeros_like(sums[0])]
        for decay, added in zip(decays[:-1], sums[:-1], strict=True):
            old = entering[-1]
            kept = _times(old.mT, decay.unsqueeze(-1)).mT if write is None else decay @ old
            entering.append(kept + added)
        return PropagatorState(g0, self._mine(entering))

    def _gather(self, x: Tensor) -> Tensor:
        """Gather real or complex x, (P, ...)."""
        if x.is_complex():
            return torch.view_as_complex(self._gather(torch.view_as_real(x)))
        return _Gather.apply(x.contiguous(), self.group)

    def _mine(self, entering: list[Tensor]) -> Tensor:
        """Select what enters this process's piece from what enters each piece.

        Stacking keeps all of it in the graph, also on the first process, whose piece nothing enters: backward is a sum
        over all processes, so each must take part.
        """
        return torch.stack(entering)[dist.get_rank(self.group)]


def _decay_and_sum(k: Tensor, v: Tensor, alpha: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the decay of S over a piece, (B, H), and what its sites add to S, (B, H, K, V)."""
    until = alpha.flip(1).cumprod(1).flip(1)  # prod_{j>=t} alpha_j
    after = torch.cat([until[:, 1:], torch.ones_like(until[:, :1])], dim=1)
    return until[:, 0], torch.einsum("bnhk,bnhv->bhkv", _times(k, after * weight), v)


def _matrix_and_sum(k: Tensor, v: Tensor, alpha: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same of a piece with the delta rule, which multiplies S by a matrix, (B, H, K, K).

    One scan gives both: S enters as ``[1 0]``, K + V columns, and values are ``[0 v]``.
    """
    keys = k.shape[-1]
    identity = torch.eye(keys, dtype=v.dtype, device=v.device).expand(v.shape[0], v.shape[2], keys, keys)
    entering = F.pad(identity, (0, v.shape[-1]))
    _, leaving, _ = delta_scan(k, k, F.pad(v, (keys, 0)), alpha, weight, entering)
    matrix, s = leaving.split([keys, v.shape[-1]], dim=-1)
    return matrix, s


def _times(x: Tensor, c: Tensor) -> Tensor:
    """Return x (..., K) times c (...). A complex c multiplies the complex numbers in pairs of the last dimension."""
    if not c.is_complex():
        return x * c.unsqueeze(-1)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * c.unsqueeze(-1)).flatten(-2)
