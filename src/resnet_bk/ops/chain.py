"""Inputs of the core's functions: their types, and the checks that run before the recurrence.

Dimensions: B batch, N sites, M packed length, H chains (heads), K key width, V value width.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_bk.ops.packing import Packing


class PropagatorState(NamedTuple):
    """State of a dense chain after its last site: all that later sites need of it.

    Attributes:
        g: (B, H) left Green's function of the last site, complex if the chain is.
        s: (B, H, K, V) float, ``sum_s P_ts k_s v_s^T``, or of D and ``write e`` in place of P and v with the delta
            rule. In a complex chain rows 2i and 2i + 1 are the real and the imaginary part of one row.
    """

    g: Tensor
    s: Tensor


class SparseState(NamedTuple):
    """State of a sparse chain after its last site.

    Attributes:
        g: as in :class:`PropagatorState`.
        s: as in :class:`PropagatorState`.
        r: (B, H, V) float, the output of the last kept site, faded by the sites left out since.
    """

    g: Tensor
    s: Tensor
    r: Tensor


@dataclass(frozen=True)
class Sparsity:
    """Sites of a chain that are kept, and what replaces the output of the others.

    A site left out is eliminated exactly (a Schur complement): it neither writes to the state of the chain nor reads
    from it, and the state decays there as it does at a kept site. Its output is that of the last kept site, faded, plus
    a part of its own value.

    Attributes:
        gate: (B, N) float, exactly 1 at kept sites and 0 elsewhere; must be 0 at padding. The gradient of a 1 is what
            keeping the site is worth; a 0 gets no gradient.
        fill: (H,) float, factor by which the output of the last kept site fades at each site left out, on top of the
            decay of the chain there.
        own: (H,) float, weight of ``g_t v_t`` in the output of a site left out, or of ``|g_t| write_t v_t`` with the
            delta rule. Diagonals, which have no v, ignore it.
        tile: packed lengths are rounded up to a multiple of it.
        bound: number of kept sites of a row that packed tensors hold; more raise an error. Default: that of the row
            with most kept sites.
    """

    gate: Tensor
    fill: Tensor
    own: Tensor
    tile: int = 1
    bound: int | None = None
    _sites: list[Packing] = field(default_factory=list, init=False)

    @property
    def sites(self) -> Packing:
        """Packing of the kept sites; q and k have these sites only."""
        if not self._sites:  # not a cached_property, which does not compile
            self._sites.append(Packing(self.gate > 0, self.tile, self.bound))
        return self._sites[0]

    def reversed(self) -> "Sparsity":
        """Return the sparsity of the same chain read from its end."""
        return Sparsity(self.gate.flip(1), self.fill, self.own, self.tile, self.bound)


@dataclass(frozen=True)
class Chain:
    """A chain whose inputs :func:`check_chain` has checked.

    Attributes:
        d: (B, N, H) real or complex, the diagonal ``a - z``.
        links: (B, N, H) float, hopping between sites t - 1 and t.
        w: (B, N, H) float, squared hopping.
        g: (B, H) like d, left Green's function of the site before the first; 0 where the chain begins, -1 if
            the chain is given by its hopping.
        mask: (B, N) bool, False at padding; None if there is no padding.
        sparsity: sites to keep; None for all.
        by_hopping: True: the chain is given by its hopping, and its left Green's function is -1 at all sites.
    """

    d: Tensor
    links: Tensor
    w: Tensor
    g: Tensor
    mask: Tensor | None
    sparsity: Sparsity | None
    by_hopping: bool = False

    @property
    def kept(self) -> Tensor | None:
        """Mask of the kept sites, (B, N) bool, which is False at padding too; None if all positions are kept."""
        return self.mask if self.sparsity is None else self.sparsity.gate > 0


_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}  # dtype.to_complex() does not compile


def check_chain(
    a: Tensor | None,
    z: Tensor | complex,
    hop: Tensor | None = None,
    g: Tensor | None = None,
    mask: Tensor | None = None,
    sparsity: Sparsity | None = None,
) -> Chain:
    """Return the chain, or raise if inputs do not fit.

    g is the incoming state. The rest is as in :func:`left_green`, and a may be None as in :func:`propagate`.

    Raises:
        ValueError: a shape does not fit, or a gate is neither 0 nor 1, or it is 1 at padding.
        TypeError: a dtype or a device does not fit.
    """
    name, by_hopping = ("hop", True) if a is None else ("a", False)
    a = hop if a is None else a
    if a is None:
        raise ValueError("hop: got None for a chain without a, expected shape (B, N, H)")
    if a.dim() != 3:
        raise ValueError(f"{name}: expected shape (B, N, H), got {tuple(a.shape)}")
    if a.shape[1] == 0:
        raise ValueError(f"{name}: the chain is empty (N = 0); at least one site is needed")
    if a.dtype not in _COMPLEX:
        raise TypeError(f"{name}: expected float32 or float64 (the recurrence needs that precision), got {a.dtype}")
    d = -1 - a * a if by_hopping else a - z
    if d.dtype not in (a.dtype, _COMPLEX[a.dtype]):
        raise TypeError(f"z: expected {a.dtype} or {_COMPLEX[a.dtype]} to go with a, got {z.dtype}")  # type: ignore[union-attr]
    if hop is not None:
        _expect("hop", hop, a.shape, a)
    if mask is not None:
        _expect("mask", mask, a.shape[:2], a, torch.bool)
    if sparsity is not None:
        _expect("sparsity.gate", sparsity.gate, a.shape[:2], a)
        _expect("sparsity.fill", sparsity.fill, a.shape[2:], a)
        _expect("sparsity.own", sparsity.own, a.shape[2:], a)
        _check_gate(sparsity.gate, mask)
    if g is None:
        g = d.new_full((d.shape[0], d.shape[2]), -1.0 if by_hopping else 0.0)
    else:
        _expect("state", g, (d.shape[0], d.shape[2]), d)
        if by_hopping and can_read_values(g) and (g != -1).any():
            raise ValueError(
                f"state.g: got {g[g != -1][0].item():g} in a chain given by its hopping, expected -1; a chain with "
                "energies has another state"
            )
    links = torch.ones_like(a) if hop is None else hop
    return Chain(d, links, links if hop is None else hop * hop, g, mask, sparsity, by_hopping)


def check_qkv(
    chain: Chain,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    write: Tensor | None,
    state: PropagatorState | SparseState | None,
    causal: bool,
) -> None:
    """Raise if the other inputs of :func:`propagate` do not fit the chain.

    Raises:
        ValueError: a shape or the kind of state does not fit.
        TypeError: a dtype or a device does not fit.
    """
    sparsity, (batch, length, heads) = chain.sparsity, chain.links.shape
    rows = (batch, length if sparsity is None else sparsity.sites.mask.shape[1], heads, *q.shape[-1:])
    _expect("q", q, rows, chain.links)
    _expect("k", k, rows, chain.links)
    _expect("v", v, (batch, length, heads, *v.shape[-1:]), chain.links)
    keys, values = q.shape[-1], v.shape[-1]
    if chain.d.is_complex() and keys % 2:
        raise ValueError(f"q: a complex chain pairs key channels, so K must be even, got {keys}")
    if chain.by_hopping and not causal:
        raise ValueError("a: got None for a bidirectional chain, expected shape (B, N, H)")
    if write is not None:
        _expect("write", write, chain.links.shape, chain.links)
        if chain.d.is_complex() or not causal:
            kind = "complex" if chain.d.is_complex() else "bidirectional"
            raise ValueError(f"write: got one for a {kind} chain, allowed in causal real chains; leave it out")
    if state is None:
        return
    if not causal:
        raise ValueError("state: a bidirectional propagator has none; pass causal=True or no state")
    if isinstance(state, SparseState) != (sparsity is not None):
        raise ValueError(
            f"state: got a {type(state).__name__}, expected that of a {'dense' if sparsity is None else 'sparse'} "
            "chain; a sequence is dense or sparse from its start to its end"
        )
    _expect("state.s", state.s, (batch, heads, keys, values), state.s)  # of any dtype
    if isinstance(state, SparseState):
        _expect("state.r", state.r, (batch, heads, values), state.r)


def _expect(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise unless x has this shape and the dtype (by default) and device of `like`."""
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
    dtype = dtype or like.dtype
    if x.dtype != dtype or x.device != like.device:
        raise TypeError(f"{name}: expected {dtype} on {like.device}, got {x.dtype} on {x.device}")


def can_read_values(x: Tensor) -> bool:
    """Return True if reading values of x is cheap: on a GPU it is a host-device sync."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_gate(gate: Tensor, mask: Tensor | None) -> None:
    if not can_read_values(gate):
        return
    invalid = (gate != 0) & (gate != 1)
    if invalid.any():
        raise ValueError(f"sparsity.gate: expected 0 or 1 everywhere, got {gate[invalid][0].item():g}")
    if mask is not None and (gate[~mask] != 0).any():
        raise ValueError("sparsity.gate: got 1 where mask is False, expected 0; padding cannot be kept")
