"""The BK core: what a chain of sites is asked for, in O(N). Definitions in :mod:`resnet_bk.ops.naive`.

Dimensions: B batch, N sites, H chains (heads), K key width, V value width.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_bk.ops.kernels import green, scan
from resnet_bk.ops.packing import Packing
from resnet_bk.ops.sparse import sparse_scan


class PropagatorState(NamedTuple):
    """Everything the past of a chain can still do to its future.

    g: (B, H) left Green's function of the last site, real or complex as the chain is.
    s: (B, H, K, V) float, ``sum_s P_ts k_s v_s^T``; in a complex chain rows 2i, 2i+1 are its real and imaginary parts.
    """

    g: Tensor
    s: Tensor


class SparseState(NamedTuple):
    """As :class:`PropagatorState`, and r (B, H, V) float: what the last kept site passes on to those left out after
    it."""

    g: Tensor
    s: Tensor
    r: Tensor


@dataclass(frozen=True)
class Sparsity:
    """Which sites of a chain :func:`propagate` computes, and what stands in for the others.

    gate: (B, N), exactly 0 or 1. Where it is 0 (as it must be at padding) nothing is written to the chain's state and
      nothing is read from it: what the last kept site read, faded, stands in, with a part of the site's own value. What
      passes the site decays there as ever: it is eliminated exactly (a Schur complement). Its gradient is what keeping
      the site is worth; a gate of 0 gets none.
    fill: (H,), fading at each site left out in turn, beside the chain's own decay there.
    own: (H,), how much of ``g_t v_t`` is read where a site is left out. The diagonal, which has no v, ignores it.
    tile: the number of kept sites is rounded up to a multiple of it in packed tensors.
    bound: how many kept sites packed tensors have room for; more are an error. Default: as many as the fullest row has.
    """

    gate: Tensor
    fill: Tensor
    own: Tensor
    tile: int = 1
    bound: int | None = None
    _sites: list[Packing] = field(default_factory=list, init=False)

    @property
    def sites(self) -> Packing:
        """Kept sites, packed: q and k are those of these alone."""
        if not self._sites:  # not a cached_property, which does not compile
            self._sites.append(Packing(self.gate > 0, self.tile, self.bound))
        return self._sites[0]

    def reversed(self) -> "Sparsity":
        """Of the chain read from its end."""
        return Sparsity(self.gate.flip(1), self.fill, self.own, self.tile, self.bound)


_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}  # dtype.to_complex() does not compile


def chain(
    a: Tensor, z: Tensor | complex, hop: Tensor | None, state: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the inputs; the diagonal ``d = a - z``, the squared hoppings and the incoming g."""
    if a.dim() != 3:
        raise ValueError(f"a: expected shape (B, N, H), got {tuple(a.shape)}")
    if a.shape[1] == 0:
        raise ValueError("a: the chain is empty (N = 0); at least one site is needed")
    if a.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"a: expected float32 or float64 (the recurrence is not run in less), got {a.dtype}")
    for name, x, shape in (("hop", hop, a.shape), ("mask", mask, a.shape[:2])):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
        if x is not None and x.device != a.device:
            raise ValueError(f"{name}: expected device {a.device} as a, got {x.device}")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool (True = a site of the chain), got {mask.dtype}")
    if hop is not None and hop.dtype != a.dtype:
        raise TypeError(f"hop: expected {a.dtype} as a, got {hop.dtype}")
    d = a - z
    if d.dtype not in (a.dtype, _COMPLEX[a.dtype]):
        raise TypeError(f"z: expected {a.dtype} or {_COMPLEX[a.dtype]} beside a, got {z.dtype}")  # type: ignore[union-attr]
    w = torch.ones_like(a) if hop is None else hop * hop
    if state is None:
        state = d.new_zeros(d.shape[0], d.shape[2])
    elif state.shape != (d.shape[0], d.shape[2]) or state.dtype != d.dtype:
        expected = f"({d.shape[0]}, {d.shape[2]}) {d.dtype}"
        raise ValueError(f"state: expected {expected}, got {tuple(state.shape)} {state.dtype}")
    return d, w, state


def _check_sparsity(sparsity: Sparsity | None, a: Tensor, mask: Tensor | None) -> None:
    if sparsity is None:
        return
    for name, shape in (("gate", a.shape[:2]), ("fill", a.shape[2:]), ("own", a.shape[2:])):
        x = getattr(sparsity, name)
        if x.shape != shape:
            raise ValueError(f"sparsity.{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
        if x.dtype != a.dtype or x.device != a.device:
            raise TypeError(f"sparsity.{name}: expected {a.dtype} on {a.device} as a, got {x.dtype} on {x.device}")
    if a.device.type != "cpu" or torch.compiler.is_compiling():
        return  # values are looked at where that costs no waiting
    odd = (sparsity.gate != 0) & (sparsity.gate != 1)
    if odd.any():
        raise ValueError(f"sparsity.gate: expected 0 or 1 everywhere, got {sparsity.gate[odd][0].item():g}")
    if mask is not None and (sparsity.gate[~mask] != 0).any():
        raise ValueError("sparsity.gate: 1 where mask is False; padding cannot be kept, so its gate must be 0")


def left_green(
    a: Tensor,
    z: Tensor | complex,
    hop: Tensor | None = None,
    *,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    sparsity: Sparsity | None = None,
) -> tuple[Tensor, Tensor]:
    """Left Green's function ``g_t = 1 / (a_t - z - hop_t^2 g_{t-1})``. Causal: g_t depends on sites <= t only.

    Args:
        a: on-site energies, (B, N, H) float32 or float64.
        z: spectral shift, a number or a tensor that broadcasts against a. Complex with ``Im z > 0``, or real and
            outside the spectrum (``|a - z| > |hop_t| + |hop_{t+1}|``); then everything is real arithmetic.
        hop: hopping between sites t - 1 and t, (B, N, H) like a; ``hop[:, 0]`` links to the state. Default 1.
        state: g of the site before the first, (B, H), as returned; default: nothing before.
        mask: (B, N) bool, False for padding: such a site is not part of the chain, the state passes it unchanged.
        sparsity: kept sites are a chain of their own; one left out takes the value it would have as its last site,
            `fill` weakening the link. Default: all are kept.

    Returns:
        g (B, N, H) and the state after the last site (B, H); complex if z is.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, before anything is computed.
    """
    d, w, state = chain(a, z, hop, state, mask)
    _check_sparsity(sparsity, a, mask)
    g = green(d, w, state, mask if sparsity is None else sparsity.gate > 0)
    if sparsity is None:
        return g, g[:, -1]
    before = torch.cat([state.unsqueeze(1), g[:, :-1]], dim=1)
    return _filled(g, 1 / (d - sparsity.fill * w * before), sparsity), g[:, -1]


def _filled(kept: Tensor, stand_in: Tensor, sparsity: Sparsity) -> Tensor:
    """The values of kept sites mixed with those that stand in for sites left out, (B, N, H)."""
    gate = sparsity.gate.unsqueeze(-1)
    return torch.where(gate == 0, stand_in, gate * kept + (1 - gate) * stand_in)


def resolvent_diagonal(
    a: Tensor,
    z: Tensor | complex,
    hop: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    sparsity: Sparsity | None = None,
) -> Tensor:
    """Diagonal of the resolvent ``G_tt = [(H - z)^-1]_tt``, (B, N, H). Sees the future: for bidirectional models only.

    Arguments as in :func:`left_green`. Masked positions hold a finite value without meaning.
    """
    d, w, nothing = chain(a, z, hop, None, mask)
    _check_sparsity(sparsity, a, mask)
    from_left, from_right = _both_sides(d, w, nothing, mask if sparsity is None else sparsity.gate > 0)
    diagonal = 1 / (d - from_left - from_right)
    if sparsity is None:
        return diagonal
    return _filled(diagonal, 1 / (d - sparsity.fill * (from_left + from_right)), sparsity)


def _both_sides(d: Tensor, w: Tensor, nothing: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Self-energies ``w_t gL_{t-1}``, ``w_{t+1} gR_{t+1}``: what the two halves beside a site do to it, (B, N, H)."""
    left = green(d, w, nothing, mask)
    left = w * torch.cat([nothing.unsqueeze(1), left[:, :-1]], dim=1)
    back_w, back_mask = _links_from_the_right(w, mask), None if mask is None else mask.flip(1)
    right = green(d.flip(1), back_w, nothing, back_mask)
    right = (back_w * torch.cat([nothing.unsqueeze(1), right[:, :-1]], dim=1)).flip(1)
    return left, right


def _links_from_the_right(hop: Tensor, mask: Tensor | None) -> Tensor:
    """Reversed in time, each site is entered over the link that its right neighbour owns. Returns it reversed."""
    hop = hop.flip(1)
    if mask is None:
        return torch.cat([torch.zeros_like(hop[:, :1]), hop[:, :-1]], dim=1)
    # The right neighbour is the next real site: the last one passed in reversed order, padding skipped.
    position = torch.arange(hop.shape[1], device=hop.device).expand(mask.shape)
    last_real = torch.where(mask.flip(1), position, -1).cummax(1).values
    before = torch.cat([torch.full_like(last_real[:, :1], -1), last_real[:, :-1]], dim=1).unsqueeze(-1)
    gathered = hop.gather(1, before.clamp(min=0).expand(hop.shape))
    return torch.where(before < 0, torch.zeros_like(gathered), gathered)


def propagate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    z: Tensor | complex,
    hop: Tensor | None = None,
    *,
    state: PropagatorState | SparseState | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    sparsity: Sparsity | None = None,
) -> tuple[Tensor, PropagatorState | SparseState]:
    """The propagator applied to q, k, v: ``y_t = Re sum_s P_ts <q_t, k_s> v_s``.

    Causal (default): ``P_ts = [(H_{1..t} - z)^-1]_ts`` for s <= t, which is 1-semiseparable:
    ``P_ts = g_s prod_{j=s+1..t} (-hop_j g_j)``. So ``|hop g|`` is a decay and, for complex z, ``arg g`` a rotary angle.
    ``causal=False``: the full resolvent, all s; takes and returns no useful state.

    Args:
        q, k: (B, N, H, K), like a in dtype; for complex z, K is even and pairs are complex numbers (see naive.py). Of
            sparse chains those of the kept sites, packed as by ``sparsity.sites``.
        v: (B, N, H, V).
        a, z, hop, mask: as in :func:`left_green`.
        state: of the sites before the first, as returned; default: nothing before.
        sparsity: which sites are left out, and how the others stand in for them. Default: none.

    Returns:
        y (B, N, H, V), zero at masked positions, and the state after the last site, a SparseState of sparse chains.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, before anything is computed.
    """
    d, w, g0 = chain(a, z, hop, None if state is None else state.g, mask)
    _check_sparsity(sparsity, a, mask)
    sites = a.shape if sparsity is None else (len(a), sparsity.sites.mask.shape[1], a.shape[2])
    for name, x, shape in (("q", q, sites), ("k", k, sites), ("v", v, a.shape)):
        if x.dim() != 4 or x.shape[:3] != shape:
            raise ValueError(f"{name}: expected shape {(*shape, 'width')}, got {tuple(x.shape)}")
        if x.dtype != a.dtype or x.device != a.device:
            raise TypeError(f"{name}: expected {a.dtype} on {a.device} as a, got {x.dtype} on {x.device}")
    if q.shape != k.shape:
        raise ValueError(f"k: expected shape {tuple(q.shape)} as q, got {tuple(k.shape)}")
    if d.is_complex() and q.shape[-1] % 2:
        raise ValueError(f"q: a complex chain pairs key channels, so K must be even, got {q.shape[-1]}")
    if causal and state is not None and isinstance(state, SparseState) != (sparsity is not None):
        raise ValueError(
            f"state: got a {type(state).__name__}, expected that of a {'dense' if sparsity is None else 'sparse'} "
            "chain: a sequence is one or the other throughout"
        )
    if isinstance(state, SparseState) and state.r.shape != (q.shape[0], *v.shape[2:]):
        raise ValueError(f"state.r: expected shape {(q.shape[0], *v.shape[2:])}, got {tuple(state.r.shape)}")
    if state is not None and state.s.shape != (q.shape[0], q.shape[2], q.shape[3], v.shape[3]):
        expected = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        raise ValueError(f"state.s: expected shape {expected}, got {tuple(state.s.shape)}")
    s0 = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[3]) if state is None else state.s
    links = torch.ones_like(a) if hop is None else hop
    if causal:
        r0 = state.r if isinstance(state, SparseState) else v.new_zeros(v.shape[0], *v.shape[2:])
        g = green(d, w, g0, mask)
        y, s, r = _semiseparable(q, k, v, -links * g, g, s0, mask, sparsity=sparsity, r0=r0)
        if mask is not None:
            y = y.masked_fill(~mask[:, :, None, None], 0)
        return y, PropagatorState(g[:, -1], s) if sparsity is None else SparseState(g[:, -1], s, r)
    if state is not None:
        raise ValueError("state: a bidirectional propagator has none; pass causal=True or no state")
    # G_ts = G_tt prod (-hop_{j+1} gL_j) over s <= j < t, and its mirror image: one sweep from each side, with the
    # diagonal, in both, taken off once.
    from_left, from_right = _both_sides(d, w, g0, mask)
    diagonal = 1 / (d - from_left - from_right)
    back_mask = None if mask is None else mask.flip(1)
    back_ratio = _ratio(from_right.flip(1), _links_from_the_right(links, mask))
    back_v, back_diagonal = v.flip(1), diagonal.flip(1)
    if sparsity is None:
        back, phase, back_q, back_k = None, diagonal.angle(), q.flip(1), k.flip(1)
    else:
        back, phase = sparsity.reversed(), sparsity.sites.pack(diagonal.angle())
        back_q, back_k = (back.sites.pack(sparsity.sites.merge(x).flip(1)) for x in (q, k))
    left = _semiseparable(q, k, v, _ratio(from_left, links), None, s0, mask, diagonal, sparsity)[0]
    right = _semiseparable(back_q, back_k, back_v, back_ratio, None, s0, back_mask, back_diagonal, back)[0].flip(1)
    own = (q * _turn(k, phase) if d.is_complex() else q * k).sum(-1)
    if sparsity is not None:
        own = _filled(sparsity.sites.merge(own), sparsity.own, sparsity)
    y = left + right - (_magnitude(diagonal) * own).unsqueeze(-1) * v
    if mask is not None:
        y = y.masked_fill(~mask[:, :, None, None], 0)
    return y, PropagatorState(g0, s0)


def _ratio(self_energy: Tensor, links: Tensor) -> Tensor:
    """``-hop g`` from ``hop^2 g``; 0 where there is no link."""
    return torch.where(links == 0, 0.0, -self_energy / torch.where(links == 0, 1.0, links))


def _semiseparable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
    s0: Tensor,
    mask: Tensor | None,
    scale: Tensor | None = None,
    sparsity: Sparsity | None = None,
    r0: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y_t = Re scale_t sum_{s<=t} (prod_{s<j<=t} alpha_j) beta_s <q_t, k_s> v_s``, the last state, and the last r.

    A complex chain becomes a real one by turning q and k by the cumulated angle (double precision, modulo a turn, so
    that a million sites lose nothing); the state is turned back, so that it does not depend on where the chain began.
    """
    beta = torch.ones_like(alpha) if beta is None else beta
    if mask is not None:
        site = mask.unsqueeze(-1)
        alpha = torch.where(site, alpha, 1.0)
        beta = torch.where(site, beta, 0.0)
        v = torch.where(site.unsqueeze(-1), v, 0.0)  # so that a NaN in padding stays there
        if sparsity is None:
            k = torch.where(site.unsqueeze(-1), k, 0.0)
    r0 = v.new_zeros(v.shape[0], *v.shape[2:]) if r0 is None else r0
    if not alpha.is_complex():
        y, s, r = _scan(q, k, v, alpha, beta, s0, mask, sparsity, r0)
        return (y if scale is None else y * scale.unsqueeze(-1)), s, r
    alpha, decay = _without_zeros(alpha)
    theta = torch.remainder(alpha.angle().double().cumsum(1), 2 * torch.pi).to(q.dtype)
    beta, weight = _without_zeros(beta)
    turn_q, turn_k = -theta if scale is None else -theta - scale.angle(), beta.angle() - theta
    if sparsity is not None:
        turn_q, turn_k = sparsity.sites.pack(turn_q), sparsity.sites.pack(turn_k)
    y, s, r = _scan(_turn(q, turn_q), _turn(k, turn_k), v, decay, weight, s0, mask, sparsity, r0)
    s = _turn(s.mT, theta[:, -1].unsqueeze(-1)).mT
    return (y if scale is None else y * scale.abs().unsqueeze(-1)), s, r


def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    s0: Tensor,
    mask: Tensor | None,
    sparsity: Sparsity | None,
    r0: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The scan, dense or sparse: y, the last S, the last r."""
    if sparsity is None:
        return *scan(q, k, v, alpha, beta, s0), r0
    fill = sparsity.fill if mask is None else torch.where(mask.unsqueeze(-1), sparsity.fill, 1.0)
    return sparse_scan(q, k, v, alpha, beta, fill * alpha, sparsity.own * beta, sparsity.gate, s0, r0)


def _without_zeros(x: Tensor) -> tuple[Tensor, Tensor]:
    """x with its exact zeros (absent links, padding) moved to 1, where the angle has derivatives; and ``|x|``."""
    zero = x == 0
    x = torch.where(zero, 1.0, x)
    return x, torch.where(zero, 0.0, x.abs())


def _turn(x: Tensor, angle: Tensor) -> Tensor:
    """Multiply the complex numbers held in pairs of the last dimension by ``e^{i angle}``."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle).unsqueeze(-1)).flatten(-2)


def _magnitude(x: Tensor) -> Tensor:
    return x.abs() if x.is_complex() else x
