"""One long sequence in consecutive pieces, one a process: what enters each piece from those before it.

The past of a chain reaches its future through very little: g of the last site, the state S, and the last inputs of the
short convolution. A piece changes what enters it by a map of the same size - a Moebius map of g, a decay of S - so
each process computes the map of its own piece, all maps are gathered, and every process composes those of the pieces
before its own. No process waits for another one's piece to be done (README, section 7).

Dimensions: B batch, N sites of this process's piece, H chains, K key width, V value width, P processes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from resnet_bk.ops.core import PropagatorState, chain
from resnet_bk.ops.kernels import green


class _Gather(torch.autograd.Function):
    """x of every process, (P, ...). Backward sums what every process does with x of this one."""

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
    """The processes of `group`, in the order of their ranks, hold consecutive pieces of the same B sequences.

    The pieces may differ in length. All processes have to make the same calls in the same order, and all have to run
    backward, for the gradient of a piece is a sum over the processes that come after it.
    """

    group: dist.ProcessGroup

    def inputs(self, x: Tensor, count: int) -> Tensor:
        """The last `count` positions before this piece of x (B, N, C), (B, count, C); zeros before the first piece.

        Raises:
            ValueError: the piece is shorter than that.
        """
        if x.shape[1] < count:
            raise ValueError(f"piece: got {x.shape[1]} positions, allowed {count} or more; use fewer processes")
        if count == 0:
            return x[:, :0]
        ends = self._gather(x[:, -count:])
        return self._mine([torch.zeros_like(ends[0]), *ends[:-1]])

    def green(self, a: Tensor, z: Tensor | complex, hop: Tensor | None = None) -> Tensor:
        """g of the site before this piece's first one, (B, H); arguments as of :func:`resnet_bk.ops.left_green`."""
        d, w, nothing = chain(a, z, hop, None, None)
        return self._green(d, w, nothing)

    def _green(self, d: Tensor, w: Tensor, nothing: Tensor) -> Tensor:
        """A piece answers to the g that enters it as ``x -> r + x t / (1 - x l)`` (README, section 2)."""
        g = green(d, w, nothing, None)
        wg = w * g
        passed = (wg * g).cumprod(1)
        response = (torch.cat([torch.ones_like(passed[:, :1]), passed[:, :-1]], dim=1) * wg).sum(1)
        entering = [nothing]
        for r, t, left in self._gather(torch.stack([g[:, -1], passed[:, -1], response]))[:-1]:
            entering.append(r + entering[-1] * t / (1 - entering[-1] * left))
        return self._mine(entering)

    def state(self, k: Tensor, v: Tensor, a: Tensor, z: Tensor | complex, hop: Tensor | None = None) -> PropagatorState:
        """What :func:`resnet_bk.ops.propagate` needs as the state of this piece; arguments as there, no padding."""
        d, w, nothing = chain(a, z, hop, None, None)
        g0 = self._green(d, w, nothing)
        g = green(d, w, g0, None)
        alpha = -g if hop is None else -hop * g
        until = alpha.flip(1).cumprod(1).flip(1)  # prod_{j>=t} alpha_j
        after = torch.cat([until[:, 1:], torch.ones_like(until[:, :1])], dim=1)
        s = torch.einsum("bnhk,bnhv->bhkv", _times(k, after * g), v)
        decays, states = self._gather(until[:, 0]), self._gather(s)
        entering = [torch.zeros_like(s)]
        for decay, s in zip(decays[:-1], states[:-1], strict=True):
            entering.append(_times(entering[-1].mT, decay.unsqueeze(-1)).mT + s)
        return PropagatorState(g0, self._mine(entering))

    def _gather(self, x: Tensor) -> Tensor:
        """(P, ...), of real or complex x."""
        if x.is_complex():
            return torch.view_as_complex(self._gather(torch.view_as_real(x)))
        return _Gather.apply(x.contiguous(), self.group)

    def _mine(self, entering: list[Tensor]) -> Tensor:
        """Of what enters each piece, what enters this one. All of it stays in the graph, also on the first process,
        which nothing enters: backward is a sum over all processes, so none may leave it out."""
        return torch.stack(entering)[dist.get_rank(self.group)]


def _times(x: Tensor, c: Tensor) -> Tensor:
    """x (..., K) times c (...); a complex c multiplies the complex numbers in pairs of the last dimension."""
    if not c.is_complex():
        return x * c.unsqueeze(-1)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * c.unsqueeze(-1)).flatten(-2)
