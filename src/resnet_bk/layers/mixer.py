"""Token mixers on the BK core: two readouts of the same chain.

Dimensions: B batch, N positions, D model width, H heads, K = V = D / H head width, C channels and W width of a
convolution.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.config import ModelConfig
from resnet_bk.layers.matrices import Matrices
from resnet_bk.layers.norm import Norm
from resnet_bk.layers.sparse import SparseBKCore
from resnet_bk.ops import PropagatorState, SparseState, Sparsity, left_green, propagate, resolvent_diagonal
from resnet_bk.ops.conv import short_conv
from resnet_bk.ops.gates import gated_norm, mixer_inputs, soften
from resnet_bk.ops.sequence_parallel import Pieces
from resnet_bk.record import Record

PACE = 8  # factor of the bias of bonds: AdamW steps all parameters equally far, and memories have far to go


class ChainState(NamedTuple):
    """State of a mixer on a chain. Its size does not depend on the length of the past.

    In bidirectional models it has no meaning.

    conv: (B, W - 1, C), the last inputs of the short convolution.
    core: g of the last site (B, H) for the diagonal readout; a PropagatorState or SparseState for the propagator.

    Both are None before the first position.
    """

    conv: Tensor
    core: Tensor | PropagatorState | SparseState


class ShortConv(nn.Module):
    """Depthwise convolution over W positions, (B, N, C) -> (B, N, C).

    These are the position and, if causal, the W - 1 before it; if not, (W - 1) // 2 before it and W // 2 after it.
    """

    def __init__(self, channels: int, width: int, causal: bool):
        super().__init__()
        self.channels, self.width, self.causal = channels, width, causal
        self.weight = nn.Parameter(torch.empty(width, channels).uniform_(-1, 1) / math.sqrt(width))

    def forward(self, x: Tensor, state: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolve x.

        Args:
            x: (B, N, C).
            state: (B, W - 1, C), the inputs before x; None at the start.
            mask: (B, N) bool, False for padding, which comes last in each row; None without padding.

        Returns:
            The output, and the state (B, W - 1, C) after x: the last W - 1 inputs that are not padding. If not causal,
            the state is not used, and it is returned as it was (zeros for None).
        """
        past = x.new_zeros(x.shape[0], self.width - 1, x.shape[2]) if state is None else state
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
        if not self.causal:
            ahead = self.width // 2
            return self._convolve(F.pad(x, (0, 0, self.width - 1 - ahead, ahead))), past
        return self._convolve(torch.cat([past, x], dim=1)), last_positions(past, x, mask)

    def _convolve(self, window: Tensor) -> Tensor:
        exact = torch.promote_types(window.dtype, torch.float32)
        return short_conv(window.to(exact), self.weight.to(exact)).to(window.dtype)


def last_positions(past: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """Return the last positions of the past and of x that are not padding, as many as the past has.

    Args:
        past: (B, C, ...).
        x: (B, N, ...), what follows.
        mask: (B, N) bool, False for padding, which comes last in each row; None without padding.
    """
    count, length = past.shape[1], x.shape[1]
    if mask is None:
        if torch.compiler.is_exporting():  # for any N
            return torch.cat([past, x], dim=1)[:, length:].clone()
        if length >= count:
            return x[:, length - count :].clone()  # not a view, which would keep all of x in memory
        return torch.cat([past[:, length:], x], dim=1)
    index = mask.sum(1, keepdim=True) + torch.arange(-count, 0, device=x.device)  # in x; the past is below 0

    def at(x: Tensor, index: Tensor) -> Tensor:
        return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))

    recent = at(x, index.clamp(min=0))
    return torch.where(
        (index < 0).view(*index.shape, *[1] * (x.dim() - 2)), at(past, (index + count).clamp(max=count - 1)), recent
    )


class Energies(nn.Module):
    """Energies a_t, spectral shift z and hopping of each head's chain, from a linear map of x.

    - bonds: the map decides the hopping, ``hop_t = sigmoid(-map)``, and the energies follow from it (see
      :func:`resnet_bk.ops.propagate`). The memory is about ``1 / softplus(map)`` positions. Its bias counts PACE times.
    - real: ``a_t = -2 - softplus(map)``, z > 0 and the hopping is 1. Then ``|a - z| > 2``, outside the spectrum, and
      the memory is about ``1 / sqrt(|a - z| - 2)`` positions.
    - complex: ``a_t = -2 + map``, the hopping is 1, and ``Im z = eta > 0`` keeps ``|g| <= 1 / eta``.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d_model, heads, kind = config.d_model, config.heads, config.energy_kind
        self.kind = kind
        self.potential = nn.Linear(d_model, heads)
        # The complex potential starts near zero, because |dg/da| reaches 1 / eta^2. In a chain that starts disordered,
        # the first gradients are tens of times as large as those of the rest of the model.
        spread = {"bonds": 0.3 / math.sqrt(d_model), "real": 1 / math.sqrt(d_model), "complex": 0.02}
        nn.init.normal_(self.potential.weight, std=spread[kind])
        if kind == "complex":
            # Re z is spread over the heads from -3.5 to -0.5, inside the band -4 .. 0, so that their phases differ.
            nn.init.constant_(self.potential.bias, 0.0)
            self.real_shift = nn.Parameter(torch.linspace(-1.5, 1.5, heads) if heads > 1 else torch.zeros(1))
            self.shift = nn.Parameter(_inverse_softplus(torch.linspace(0.2, 1.0, heads)))
            return
        # With real energies, margins |a - z| - 2 from 1 down to 1/50 give memories of 1 to 7 positions.
        first, last = (1 / config.shortest_memory, 1 / config.longest_memory) if kind == "bonds" else (1, 0.02)
        start = torch.logspace(math.log10(first), math.log10(last), heads)
        with torch.no_grad():
            self.potential.bias.copy_(_inverse_softplus(start) / (PACE if kind == "bonds" else 1))
        if kind == "real":
            self.shift = nn.Parameter(_inverse_softplus(torch.full((heads,), 1e-3)))

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor | float, Tensor | None]:
        """Return the chain of x (B, N, D), float32 or float64: a (B, N, H), z (H,) and hop (B, N, H).

        a is None, and z 0, if the hopping decides. hop is None if it is 1.
        """
        v = self.potential(x)
        v = v if v.dtype == torch.float64 else v.float()
        if self.kind == "bonds":
            return None, 0.0, torch.sigmoid(-v - (PACE - 1) * self.potential.bias.to(v.dtype))
        shift = F.softplus(self.shift.to(v.dtype))
        if self.kind == "real":
            return -2 - F.softplus(v), shift, None
        return -2 + v, torch.complex(self.real_shift.to(v.dtype) - 2, shift), None


def _inverse_softplus(y: Tensor) -> Tensor:
    return y + torch.log(-torch.expm1(-y))


class Mixer(nn.Module):
    """Base of the mixers.

    The sequences may be split over processes, see :func:`resnet_bk.training.sharded.split_sequences`. `pieces` then
    computes what enters this process's piece from all earlier pieces.
    """

    pieces: Pieces | None = None

    def _check_split(self, state: Any, mask: Tensor | None) -> None:
        """Raise ValueError if a sequence that is split over processes has a state or padding."""
        if self.pieces is not None and not (state is None and mask is None):
            raise ValueError(
                f"{'mask' if state is None else 'state'}: got one for a sequence that is split over processes, allowed "
                "None: a split sequence starts at its first token and has no padding"
            )


class ChainMixer(Mixer):
    """Base of the mixers on a chain."""

    conv: ShortConv
    energies: Energies

    def layout(self, x: Tensor) -> ChainState:
        """Return a state of sequences x (B, N, D), see :mod:`resnet_bk.layers.block`."""
        return ChainState(x.new_empty(len(x), self.conv.width - 1, self.conv.channels), self._core_layout(x))

    def _core_layout(self, x: Tensor) -> Any:
        """Return g of the last site, (B, H)."""
        real = torch.promote_types(x.dtype, torch.float32)
        g = x.new_empty(len(x), self.energies.potential.out_features, dtype=real)
        return torch.complex(g, g) if self.energies.kind == "complex" else g

    def _past(self, state: ChainState | None, mask: Tensor | None) -> ChainState:
        self._check_split(state, mask)
        return state or ChainState(None, None)  # type: ignore[arg-type]


class PropagatorMixer(ChainMixer):
    """Linear attention weighted by the chain's propagator P: ``y = ((Q K^T) o P) V``, (B, N, D) -> (B, N, D).

    With the delta rule, a site writes what the chain does not return for its key yet, see
    :func:`resnet_bk.ops.propagate`. With learned sparsity, q and k are computed at kept sites only, and they are not
    convolved.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, self.heads, self.causal = config.d_model, config.heads, config.causal
        self.delta = config.energy_kind == "bonds"
        self.width = d // self.heads
        self.energies = Energies(config)
        dense = not config.sparsity.target
        self.in_proj = nn.Linear(d, (4 if dense else 2) * d + (self.heads if self.delta else 0), bias=False)
        self.conv = ShortConv((3 if dense else 1) * d, config.conv_width, config.causal)
        self.sparse = None if dense else SparseBKCore(config, self.heads)
        self.qk_proj = None if dense else nn.Linear(d, 2 * d, bias=False)  # at kept sites only
        self.norm = Norm(self.width)
        self.out_proj = nn.Linear(d, d, bias=False)

    def matrices(self) -> list[Matrices]:
        """Return the matrices of q, k, v, the gate and the write strengths, and of the output."""
        d = self.out_proj.in_features
        projected, strengths = divmod(self.in_proj.out_features, d)
        sizes = (d,) * projected + ((strengths,) if strengths else ())
        found = [Matrices(self.in_proj.weight, sizes), Matrices(self.out_proj.weight)]
        return found if self.qk_proj is None else [*found, Matrices(self.qk_proj.weight, (d, d))]

    @property
    def convolves(self) -> bool:
        """True if the convolution runs in the operator that computes all inputs of the mixer, not as a module."""
        return self.causal and self.qk_proj is None

    def _core_layout(self, x: Tensor) -> PropagatorState | SparseState:
        g = super()._core_layout(x)
        r = g.real.new_empty(len(x), self.heads, self.width)
        s = r.new_empty(*r.shape, self.width)
        return PropagatorState(g, s) if self.sparse is None else SparseState(g, s, r)

    def forward(
        self, x: Tensor, state: ChainState | None, mask: Tensor | None
    ) -> tuple[Tensor, ChainState, list[Record]]:
        past = self._past(state, mask)
        sparsity, records = _decide(self.sparse, x, mask)
        chain, channels = self.energies(x), self.conv.channels
        p = self.in_proj(x)
        before = past.conv if self.pieces is None else self.pieces.inputs(p[..., :channels], self.conv.width - 1)
        if self.convolves:
            p = p if mask is None else p.masked_fill(~mask.unsqueeze(-1), 0)
            before = p.new_zeros(len(p), self.conv.width - 1, channels) if before is None else before
            q, k, v, gate, write = mixer_inputs(p, before, self.conv.weight, self.heads, self.delta)
            conv = last_positions(before, p[..., :channels], mask)
        else:
            u, conv = self.conv(p[..., :channels], before, mask)
            q, k, v = self._heads(u, x if sparsity is None else sparsity.sites.pack(x))
            gate, strength = p[..., channels:].tensor_split([x.shape[-1]], dim=-1)
            gate, write = F.silu(gate), strength.to(v.dtype).sigmoid()
        strengths = write if self.delta else None
        entering = past.core if self.pieces is None else self.pieces.state(k, v, *chain, write=strengths)
        y, core = propagate(
            q,
            k,
            v,
            *chain,
            write=strengths,
            state=entering,  # type: ignore[arg-type]
            mask=mask,
            causal=self.causal,
            sparsity=sparsity,
        )
        y = gated_norm(y, self.norm.weight, gate, self.norm.eps)
        return self.out_proj(y), ChainState(conv, core), records

    def _heads(self, u: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v of the convolution's output u and, with learned sparsity, of the features of kept sites."""
        exact = torch.promote_types(u.dtype, torch.float32)
        qk, v = u.tensor_split([2 * kept.shape[-1]], dim=-1) if self.qk_proj is None else (self.qk_proj(kept), u)
        q, k = F.silu(qk.to(exact)).unflatten(-1, (2, self.heads, self.width)).unbind(-3)
        v = F.silu(v.to(exact)).unflatten(-1, (self.heads, self.width))
        return q / math.sqrt(self.width), soften(k) if self.delta else k, v


class DiagonalMixer(ChainMixer):
    """Green's functions of many chains as features: g, or [Re g, Im g] with complex energies. (B, N, D) -> (B, N, D).

    Causal models read the left Green's function, bidirectional models the diagonal of the resolvent.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, heads, self.causal = config.d_model, config.heads, config.causal
        self.energies = Energies(config)
        features = heads * (2 if config.energy_kind == "complex" else 1)
        self.in_proj = nn.Linear(d, 2 * d, bias=False)
        self.conv = ShortConv(d, config.conv_width, config.causal)
        self.norm = Norm(features)
        self.read = nn.Linear(features, d, bias=False)
        self.out_proj = nn.Linear(d, d, bias=False)
        self.sparse = SparseBKCore(config, heads) if config.sparsity.target else None

    def matrices(self) -> list[Matrices]:
        """Return the matrices of the input and the gate, of the features that are read, and of the output."""
        d = self.out_proj.in_features
        return [
            Matrices(self.in_proj.weight, (d, d)),
            Matrices(self.read.weight),
            Matrices(self.out_proj.weight),
        ]

    def forward(
        self, x: Tensor, state: ChainState | None, mask: Tensor | None
    ) -> tuple[Tensor, ChainState, list[Record]]:
        past = self._past(state, mask)
        sparsity, records = _decide(self.sparse, x, mask)
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        before = past.conv if self.pieces is None else self.pieces.inputs(u, self.conv.width - 1)
        u, conv = self.conv(u, before, mask)
        u = F.silu(u)
        a, z, _ = self.energies(u)
        assert a is not None  # bonds have no Green's function to read
        if self.causal:
            entering = past.core if self.pieces is None else self.pieces.green(a, z)
            g, core = left_green(a, z, state=entering, mask=mask, sparsity=sparsity)  # type: ignore[arg-type]
        else:
            g = resolvent_diagonal(a, z, mask=mask, sparsity=sparsity)
            core = g[:, -1]
        features = torch.view_as_real(g).flatten(-2) if g.is_complex() else g
        y = self.read(self.norm(features.to(x.dtype))) + u
        return self.out_proj(y * F.silu(gate)), ChainState(conv, core), records


def _decide(sparse: SparseBKCore | None, x: Tensor, mask: Tensor | None) -> tuple[Sparsity | None, list[Record]]:
    if sparse is None:
        return None, []
    sparsity, record = sparse(x, mask)
    return sparsity, [record]


MIXERS = {"propagator": PropagatorMixer, "diagonal": DiagonalMixer}
