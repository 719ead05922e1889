"""The definitions: dense float64 inverses, nothing clever. Every other form in this package is tested against these.

Dimensions: B batch, N sites, H chains (heads), K key width, V value width.

Conventions, used by all of :mod:`resnet_bk.ops`:

* The chain is ``M = H - z``: a symmetric tridiagonal matrix with diagonal ``a_t - z`` and off-diagonal ``hop_t``
  between sites ``t - 1`` and ``t``. ``hop_0`` links the first site to whatever came before (the incoming state).
* A masked site is not part of the chain: its neighbours become neighbours of each other.
"""

import torch
from torch import Tensor


def dense_chain(a_N: Tensor, z: Tensor | complex, hop_N: Tensor) -> Tensor:
    """The matrix ``H - z`` of one chain. ``a_N``, ``hop_N``: (N,) real. Returns (N, N) float64 or complex128."""
    matrix = torch.diag_embed(a_N.double() - z)
    if len(a_N) > 1:
        matrix = matrix + torch.diag_embed(hop_N[1:].double(), 1) + torch.diag_embed(hop_N[1:].double(), -1)
    return matrix


def resolvent(a_N: Tensor, z: Tensor | complex, hop_N: Tensor) -> Tensor:
    """``G = (H - z)^-1`` of one chain, (N, N)."""
    return torch.linalg.inv(dense_chain(a_N, z, hop_N))


def left_green(a_N: Tensor, z: Tensor | complex, hop_N: Tensor) -> Tensor:
    """``g_t = [(H_{1..t} - z)^-1]_tt``: the last diagonal entry of the resolvent of the first t sites, (N,)."""
    return torch.stack([resolvent(a_N[:t], z, hop_N[:t])[-1, -1] for t in range(1, len(a_N) + 1)])


def resolvent_diagonal(a_N: Tensor, z: Tensor | complex, hop_N: Tensor) -> Tensor:
    """``G_tt`` of the whole chain, (N,)."""
    return resolvent(a_N, z, hop_N).diagonal()


def propagator(a_N: Tensor, z: Tensor | complex, hop_N: Tensor, causal: bool = True) -> Tensor:
    """``P``, (N, N). Causal: ``P_ts = [(H_{1..t} - z)^-1]_ts`` for s <= t, else 0. Otherwise the full resolvent."""
    if not causal:
        return resolvent(a_N, z, hop_N)
    rows = []
    for t in range(1, len(a_N) + 1):
        row = resolvent(a_N[:t], z, hop_N[:t])[-1]
        rows.append(torch.cat([row, row.new_zeros(len(a_N) - t)]))
    return torch.stack(rows)


def propagate(
    q_NK: Tensor, k_NK: Tensor, v_NV: Tensor, a_N: Tensor, z: Tensor | complex, hop_N: Tensor, causal: bool = True
) -> Tensor:
    """``y_t = Re sum_s P_ts <q_t, k_s> v_s``, (N, V).

    For a complex chain q and k are read as K/2 complex numbers, ``(q[2i], q[2i+1]) -> q[2i] + i q[2i+1]``, and
    ``<q, k> = sum_i conj(q_i) k_i``: the phase of the propagator then turns k against q, as a rotary embedding does.
    """
    p = propagator(a_N, z, hop_N, causal)
    q, k = q_NK.double(), k_NK.double()
    if p.is_complex():
        q, k = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k))
    return ((q.conj() @ k.mT) * p).real @ v_NV.double()


def sparse_propagate(
    q_NK: Tensor,
    k_NK: Tensor,
    v_NV: Tensor,
    a_N: Tensor,
    z: Tensor | complex,
    hop_N: Tensor,
    keep_N: Tensor,
    fill: Tensor,
    own: Tensor,
) -> Tensor:
    """:func:`propagate`, causal, reading from kept sites only, (N, V): the sum over s runs over those. fill, own:
    scalars.

    Sites left out do not read: what the last kept site reads, times fill and ``-hop g`` (its magnitude in a complex
    chain) of each site since, stands in for it, and own times ``g v`` (again its magnitude).
    """
    p = propagator(a_N, z, hop_N)
    q, k = q_NK.double(), k_NK.double()
    if p.is_complex():
        q, k = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k))
    read = (((q.conj() @ k.mT) * p).real * keep_N) @ v_NV.double()
    g = p.diagonal()
    fade, part = (x.abs() if p.is_complex() else x for x in (-hop_N * g, g))
    r, out = torch.zeros_like(read[0]), []
    for t, kept in enumerate(keep_N.tolist()):
        r = read[t] if kept else fill * fade[t] * r
        out.append(r if kept else r + own * part[t] * v_NV[t].double())
    return torch.stack(out)
