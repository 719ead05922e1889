"""The BK core: left Green's function, resolvent diagonal and propagator of a chain, all in O(N).

:mod:`resnet_bk.ops.naive` defines them.

Dimensions: B batch, N sites, M packed length, H chains (heads), K key width, V value width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resnet_bk.ops.chain import Chain, PropagatorState, SparseState, Sparsity, check_chain, check_qkv
from resnet_bk.ops.delta import delta_scan
from resnet_bk.ops.kernels import green, scan
from resnet_bk.ops.sparse import sparse_scan


def left_green(
    a: Tensor,
    z: Tensor | complex,
    hop: Tensor | None = None,
    *,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    sparsity: Sparsity | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the left Green's function ``g_t = 1 / (a_t - z - hop_t^2 g_{t-1})``. Causal: g_t depends on sites <= t.

    Args:
        a: (B, N, H) float32 or float64, on-site energies.
        z: spectral shift, a number or a tensor that broadcasts against a. Complex with ``Im z > 0``, or real and
            outside the spectrum (``|a - z| > |hop_t| + |hop_{t+1}|``). With real z all arithmetic is real.
        hop: (B, N, H) like a, hopping between sites t - 1 and t; ``hop[:, 0]`` links to the state. Default: 1.
        state: (B, H), g of the site before the first, as returned by an earlier call. Default: no site before.
        mask: (B, N) bool, False at padding. Padding is not part of the chain: the state passes it unchanged.
        sparsity: sites to keep; they form a chain of their own. A site left out gets the g that it would have as the
            last site of that chain, over a link weakened by `fill`. Default: all sites are kept.

    Returns:
        g (B, N, H), and the state after the last site (B, H). Both are complex if z is.

    Raises:
        ValueError: a shape does not fit. Raised before the recurrence runs.
        TypeError: a dtype or a device does not fit. Raised before the recurrence runs.
    """
    chain = _with_energies(a, z, hop, state, mask, sparsity)
    g = green(chain.d, chain.w, chain.g, chain.kept)
    if sparsity is None:
        return g, g[:, -1]
    as_last_site = 1 / (chain.d - sparsity.fill * chain.w * _previous(g, chain.g))
    return _filled(g, as_last_site, sparsity), g[:, -1]


def resolvent_diagonal(
    a: Tensor,
    z: Tensor | complex,
    hop: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    sparsity: Sparsity | None = None,
) -> Tensor:
    """Return the diagonal of the resolvent ``G_tt = [(H - z)^-1]_tt``, (B, N, H). For bidirectional models only.

    Arguments and errors are those of :func:`left_green`. The value at padding is finite and has no meaning.
    """
    chain = _with_energies(a, z, hop, None, mask, sparsity)
    from_left, from_right = _self_energies(chain, chain.kept)
    diagonal = 1 / (chain.d - from_left - from_right)
    if sparsity is None:
        return diagonal
    return _filled(diagonal, 1 / (chain.d - sparsity.fill * (from_left + from_right)), sparsity)


def propagate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor | None,
    z: Tensor | complex,
    hop: Tensor | None = None,
    *,
    write: Tensor | None = None,
    state: PropagatorState | SparseState | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    sparsity: Sparsity | None = None,
) -> tuple[Tensor, PropagatorState | SparseState]:
    """Apply the propagator to q, k and v: ``y_t = Re sum_s P_ts <q_t, k_s> v_s``.

    Args:
        q: (B, N, H, K) like a in dtype. In complex chains K is even, and pairs of channels are complex numbers (see
            ``naive.py``). In sparse chains (B, M, H, K): the kept sites only, packed by ``sparsity.sites``.
        k: as q.
        v: (B, N, H, V) like a in dtype.
        a: as in :func:`left_green`. None in causal chains that are given by their hopping. Then
            ``a_t - z = -(1 + hop_t^2)``, and the chain goes on to the left of its first site with g = -1. So g is -1 at
            all sites, without a recurrence, and ``P_ts = -prod_{s<j<=t} hop_j``.
        z: as in :func:`left_green`; ignored without a.
        hop: as in :func:`left_green`; needed without a.
        write: (B, N, H) like a, strength of the delta rule, in causal real chains. Sites then write ``write_t e_t`` in
            place of v_t, where ``e_t = v_t - sum_{s<t} D_ts <k_t, k_s> write_s e_s`` is the part of v_t that the chain
            does not return for k_t yet, and ``y_t = sum_s D_ts <q_t, k_s> write_s e_s``. The weights are
            ``D_ts = P_ts sign(g_s)``, which is ``|P_ts|`` where ``-hop_t g_t`` is positive everywhere. The state does
            not grow where ``|hop_t g_t| <= 1`` and ``0 <= |g_t| write_t |k_t|^2 <= 2``. Default: sites write v_t.
        state: state before the first site, as returned by an earlier call. Default: no site before.
        mask: as in :func:`left_green`.
        causal: True: ``P_ts = [(H_{1..t} - z)^-1]_ts`` for s <= t. This matrix is 1-semiseparable,
            ``P_ts = g_s prod_{j=s+1..t} (-hop_j g_j)``: ``|hop g|`` is a decay, and for complex z ``arg g`` is a rotary
            angle. False: the full resolvent, for all s; it accepts no state, and the state it returns has no meaning.
        sparsity: sites to keep, and what replaces the output of the others. Default: all sites are kept.

    Returns:
        y (B, N, H, V), 0 at padding, and the state after the last site, a SparseState if the chain is sparse.

    Raises:
        ValueError: a shape or the state does not fit. Raised before the recurrence runs.
        TypeError: a dtype or a device does not fit. Raised before the recurrence runs.
    """
    chain = check_chain(a, z, hop, None if state is None else state.g, mask, sparsity)
    check_qkv(chain, q, k, v, write, state, causal)
    before = _no_past(q, v, sparsity) if state is None else tuple(x.to(v.dtype) for x in state[1:])
    if mask is not None:  # 0 times a NaN in padding would be NaN
        site = mask[:, :, None, None]
        v = torch.where(site, v, 0.0)
        if sparsity is None:
            q, k = torch.where(site, q, 0.0), torch.where(site, k, 0.0)
    y, after = _causal(q, k, v, write, chain, before) if causal else _bidirectional(q, k, v, chain, before)
    if mask is not None:
        y = y.masked_fill(~site, 0)
    return y, after


def _with_energies(a: Tensor, *others: Any) -> Chain:
    """Return the chain with energies a, or raise as :func:`check_chain` does."""
    if a is None:
        raise ValueError("a: got None, expected shape (B, N, H); only propagate takes a chain given by its hopping")
    return check_chain(a, *others)


def _no_past(q: Tensor, v: Tensor, sparsity: Sparsity | None) -> tuple[Tensor, ...]:
    """Return S, and r of sparse chains, before the first site: zeros."""
    batch, _, heads, values = v.shape
    s = q.new_zeros(batch, heads, q.shape[3], values)
    return (s,) if sparsity is None else (s, v.new_zeros(batch, heads, values))


def left(chain: Chain) -> Tensor:
    """Return the left Green's function of a chain, (B, N, H)."""
    return torch.full_like(chain.d, -1) if chain.by_hopping else green(chain.d, chain.w, chain.g, chain.mask)


def _causal(
    q: Tensor, k: Tensor, v: Tensor, write: Tensor | None, chain: Chain, before: tuple[Tensor, ...]
) -> tuple[Tensor, PropagatorState | SparseState]:
    if chain.by_hopping:
        last, alpha = chain.g, chain.links
        weight = -torch.ones_like(alpha) if write is None else write
    else:
        g = left(chain)
        last, alpha = g[:, -1], -chain.links * g
        # What the chain returns for a key is subtracted from v, so the weight of a site's own key must be positive.
        weight = g if write is None else g.abs() * write
    matrix = _Semiseparable(alpha, weight, None, chain.mask, chain.sparsity, delta=write is not None)
    y, after = matrix.apply(q, k, v, before)
    return y, PropagatorState(last, *after) if chain.sparsity is None else SparseState(last, *after)


def _bidirectional(
    q: Tensor, k: Tensor, v: Tensor, chain: Chain, before: tuple[Tensor, ...]
) -> tuple[Tensor, PropagatorState]:
    """Sweep from each side: ``G_ts = G_tt prod_{s<=j<t} (-hop_{j+1} gL_j)`` for s < t, and its mirror image for s > t.

    Both sweeps contain the diagonal, so it is subtracted once.
    """
    mask, sparsity = chain.mask, chain.sparsity
    from_left, from_right = _self_energies(chain, mask)
    diagonal = 1 / (chain.d - from_left - from_right)
    ratio = _ratio(from_left, chain.links)
    back_ratio = _ratio(from_right.flip(1), _links_from_the_right(chain.links, mask))
    back_v, back_diagonal, back_mask = v.flip(1), diagonal.flip(1), None if mask is None else mask.flip(1)
    if sparsity is None:
        back, phase, back_q, back_k = None, diagonal.angle(), q.flip(1), k.flip(1)
    else:
        back, phase = sparsity.reversed(), sparsity.sites.pack(diagonal.angle())
        back_q, back_k = (back.sites.pack(sparsity.sites.merge(x).flip(1)) for x in (q, k))
    ones = torch.ones_like(ratio)
    left, _ = _Semiseparable(ratio, ones, diagonal, mask, sparsity).apply(q, k, v, before)
    right, _ = _Semiseparable(back_ratio, ones, back_diagonal, back_mask, back).apply(back_q, back_k, back_v, before)
    own = (q * _rotate(k, phase) if diagonal.is_complex() else q * k).sum(-1)
    if sparsity is not None:
        own = _filled(sparsity.sites.merge(own), sparsity.own, sparsity)
    y = left + right.flip(1) - (_magnitude(diagonal) * own).unsqueeze(-1) * v
    return y, PropagatorState(chain.g, before[0])


def _self_energies(chain: Chain, sites: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ``w_t gL_{t-1}`` and ``w_{t+1} gR_{t+1}``, (B, N, H): how the two sides of the chain act on site t.

    sites: (B, N) bool, the positions that form the chain; None for all.
    """
    left = chain.w * _previous(green(chain.d, chain.w, chain.g, sites), chain.g)
    back_w, back_sites = _links_from_the_right(chain.w, sites), None if sites is None else sites.flip(1)
    right = green(chain.d.flip(1), back_w, chain.g, back_sites)
    return left, (back_w * _previous(right, chain.g)).flip(1)


def _previous(g: Tensor, before: Tensor) -> Tensor:
    """Return ``g_{t-1}`` at each site t, (B, N, H); before the first site is `before`, (B, H)."""
    return torch.cat([before.unsqueeze(1), g[:, :-1]], dim=1)


def _links_from_the_right(links: Tensor, mask: Tensor | None) -> Tensor:
    """Return the links of the chain read from its end, (B, N, H) in reversed order.

    Read from the end, a site is entered over the link that belongs to its right neighbour; the first one over none.
    """
    links = links.flip(1)
    if mask is None:
        return torch.cat([torch.zeros_like(links[:, :1]), links[:, :-1]], dim=1)
    # The right neighbour is the next site that is not padding: in reversed order, the last one before.
    position = torch.arange(links.shape[1], device=links.device).expand(mask.shape)
    last_site = torch.where(mask.flip(1), position, -1).cummax(1).values
    before = torch.cat([torch.full_like(last_site[:, :1], -1), last_site[:, :-1]], dim=1).unsqueeze(-1)
    gathered = links.gather(1, before.clamp(min=0).expand(links.shape))
    return torch.where(before < 0, torch.zeros_like(gathered), gathered)


def _ratio(self_energy: Tensor, links: Tensor) -> Tensor:
    """Return ``-hop g`` from ``hop^2 g``; 0 where hop is 0."""
    return torch.where(links == 0, 0.0, -self_energy / torch.where(links == 0, 1.0, links))


def _filled(kept: Tensor, left_out: Tensor, sparsity: Sparsity) -> Tensor:
    """Return `kept` at kept sites and `left_out` at the others, (B, N, H). The gate gets a gradient at kept sites."""
    gate = sparsity.gate.unsqueeze(-1)
    return torch.where(gate == 0, left_out, gate * kept + (1 - gate) * left_out)


@dataclass(frozen=True)
class _Semiseparable:
    """The matrix ``P_ts = scale_t (prod_{s<j<=t} alpha_j) beta_s`` for s <= t, 0 for s > t, of each chain.

    Attributes:
        alpha: (B, N, H), real or complex.
        beta: (B, N, H), real or complex as alpha.
        scale: (B, N, H), real or complex as alpha; None for 1.
        mask: (B, N) bool, False at padding; None if there is no padding.
        sparsity: sites to keep; None for all.
        delta: sites write errors in place of values, see :func:`resnet_bk.ops.delta.delta_scan`; real chains only.
    """

    alpha: Tensor
    beta: Tensor
    scale: Tensor | None
    mask: Tensor | None
    sparsity: Sparsity | None
    delta: bool = False

    def apply(self, q: Tensor, k: Tensor, v: Tensor, before: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return ``y_t = Re sum_s P_ts <q_t, k_s> v_s``, and S (and r of sparse chains) after the last site.

        A complex chain becomes a real one: q and k are rotated by the cumulated angle, which is summed in float64
        modulo a turn so that it stays precise over a million sites. The state is rotated back, so that it does not
        depend on where the chain began.
        """
        alpha, beta = self.alpha, self.beta
        if self.mask is not None:
            site = self.mask.unsqueeze(-1)
            alpha, beta = torch.where(site, alpha, 1.0), torch.where(site, beta, 0.0)
        if alpha.is_complex():
            alpha, decay = _without_zeros(alpha)
            theta = torch.remainder(alpha.angle().double().cumsum(1), 2 * torch.pi).to(q.dtype)
            beta, weight = _without_zeros(beta)
            angle_q = -theta if self.scale is None else -theta - self.scale.angle()
            angle_k = beta.angle() - theta
            if self.sparsity is not None:
                angle_q, angle_k = self.sparsity.sites.pack(angle_q), self.sparsity.sites.pack(angle_k)
            y, s, *r = self._scan(_rotate(q, angle_q), _rotate(k, angle_k), v, decay, weight, before)
            s = _rotate(s.mT, theta[:, -1].unsqueeze(-1)).mT
        else:
            y, s, *r = self._scan(q, k, v, alpha, beta, before)
        if self.scale is not None:
            y = y * _magnitude(self.scale).unsqueeze(-1)
        return y, (s, *r)

    def _scan(
        self, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, before: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Run the dense or the sparse scan, all real: y, S, and r of sparse chains."""
        if self.sparsity is None:
            return delta_scan(q, k, v, alpha, beta, *before)[:2] if self.delta else scan(q, k, v, alpha, beta, *before)
        fill, own, gate = self.sparsity.fill, self.sparsity.own, self.sparsity.gate
        if self.mask is not None:
            fill = torch.where(self.mask.unsqueeze(-1), fill, 1.0)
        return sparse_scan(q, k, v, alpha, beta, fill * alpha, own * beta, gate, *before, delta=self.delta)


def _without_zeros(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x with its exact zeros (absent links, padding) replaced by 1, which has an angle, and ``|x|``."""
    zero = x == 0
    x = torch.where(zero, 1.0, x)
    return x, torch.where(zero, 0.0, x.abs())


def _rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Multiply the complex numbers held in pairs of the last dimension by ``e^{i angle}``."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle).unsqueeze(-1)).flatten(-2)


def _magnitude(x: Tensor) -> Tensor:
    return x.abs() if x.is_complex() else x
