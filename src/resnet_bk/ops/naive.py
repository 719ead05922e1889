"""The definitions, by dense float64 inverses. Every other form in this package is tested against them.

Each function takes one chain. Dimensions: N sites, K key width, V value width.

Conventions in all of :mod:`resnet_bk.ops`:

* The chain is ``M = H - z``, a symmetric tridiagonal matrix with the diagonal ``a_t - z``. Its off-diagonal ``hop_t``
  links the sites ``t - 1`` and ``t``; ``hop_0`` links the first site to the incoming state.
* A masked site (padding) is not part of the chain: its neighbours become neighbours of each other.
"""

import torch
from torch import Tensor


def dense_chain(a_N: Tensor, z: Tensor | complex, hop_N: Tensor) -> Tensor:
    """Return the matrix ``H - z``, (N, N) float64 or complex128. ``a_N`` and ``hop_N`` are real."""
    matrix = torch.diag_embed(a_N.double() - z)
    if len(a_N) > 1:
        matrix = matrix + torch.diag_embed(hop_N[1:].double(), 1) + torch.diag_embed(hop_N[1:].double(), -1)
    return matrix


def energies_of_hopping(hop_N: Tensor) -> Tensor:
    """Return the energies of a chain that is given by its hopping, (N,) float64, for z = 0.

    They are ``a_t = -(1 + hop_t^2)``, except that no site is before the first one: its energy takes up the site with
    g = -1 to its left, ``a_1 - hop_1^2 (-1) = -1``. So the left Green's function is -1 at all sites.
    """
    a = -1 - hop_N.double().square()
    return torch.cat([-torch.ones_like(a[:1]), a[1:]])


def resolvent(a_N: Tensor, z: Tensor | complex, hop_N: Tensor) -> Tensor:
    """Return ``G = (H - z)^-1``, (N, N)."""
    return torch.linalg.inv(dense_chain(a_N, z, hop_N))


def left_green(a_N: Tensor, z: Tensor | complex, hop_N: Tensor) -> Tensor:
    """Return ``g_t = [(H_{1..t} - z)^-1]_tt``, (N,): the last diagonal entry of the resolvent of the first t sites."""
    return torch.stack([resolvent(a_N[:t], z, hop_N[:t])[-1, -1] for t in range(1, len(a_N) + 1)])


def resolvent_diagonal(a_N: Tensor, z: Tensor | complex, hop_N: Tensor) -> Tensor:
    """Return ``G_tt`` of the whole chain, (N,)."""
    return resolvent(a_N, z, hop_N).diagonal()


def propagator(a_N: Tensor, z: Tensor | complex, hop_N: Tensor, causal: bool = True) -> Tensor:
    """Return ``P``, (N, N): the full resolvent, or if causal ``P_ts = [(H_{1..t} - z)^-1]_ts`` for s <= t, else 0."""
    if not causal:
        return resolvent(a_N, z, hop_N)
    rows = []
    for t in range(1, len(a_N) + 1):
        row = resolvent(a_N[:t], z, hop_N[:t])[-1]
        rows.append(torch.cat([row, row.new_zeros(len(a_N) - t)]))
    return torch.stack(rows)


def written(k_NK: Tensor, v_NV: Tensor, p: Tensor, write_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``D`` (N, N) and what the sites of a real causal chain write with the delta rule, ``write_t e_t`` (N, V).

    ``D_ts = P_ts sign(g_s)`` has a positive diagonal, and ``e_t = v_t - sum_{s<t} D_ts <k_t, k_s> write_s e_s`` is the
    part of v_t that the chain does not return for k_t yet.
    """
    d = p * p.diagonal().sign()
    returned = ((k_NK.double() @ k_NK.double().mT) * d).tril(-1) * write_N.double()
    e = torch.linalg.solve_triangular(returned, v_NV.double(), upper=False, unitriangular=True)
    return d, write_N.double().unsqueeze(-1) * e


def propagate(
    q_NK: Tensor,
    k_NK: Tensor,
    v_NV: Tensor,
    a_N: Tensor,
    z: Tensor | complex,
    hop_N: Tensor,
    causal: bool = True,
    write_N: Tensor | None = None,
) -> Tensor:
    """Return ``y_t = Re sum_s P_ts <q_t, k_s> v_s``, (N, V).

    With `write_N`, the strength of the delta rule, D and ``write_s e_s`` of :func:`written` replace P and v_s.

    In a complex chain the K channels of q and k are K/2 complex numbers, ``(q[2i], q[2i+1]) -> q[2i] + i q[2i+1]``, and
    ``<q, k> = sum_i conj(q_i) k_i``. The phase of the propagator then rotates k against q, like a rotary embedding.
    """
    p, v = propagator(a_N, z, hop_N, causal), v_NV.double()
    if write_N is not None:
        p, v = written(k_NK, v_NV, p, write_N)
    return _scores(q_NK, k_NK, p) @ v


def _scores(q_NK: Tensor, k_NK: Tensor, p: Tensor) -> Tensor:
    """Return ``Re P_ts <q_t, k_s>``, (N, N)."""
    q, k = q_NK.double(), k_NK.double()
    if p.is_complex():
        q, k = (torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) for x in (q, k))
    return ((q.conj() @ k.mT) * p).real


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
    write_N: Tensor | None = None,
) -> Tensor:
    """Return y of a causal chain with sites left out, (N, V). The sums of :func:`propagate` run over kept sites only.

    The output of a site left out is that of the last kept site, multiplied by ``fill (-hop g)`` of each site since,
    plus ``own g v``, or ``own |g| write v`` with the delta rule. A complex chain takes the magnitudes of ``-hop g`` and
    g.

    Args:
        q_NK: (N, K).
        k_NK: (N, K).
        v_NV: (N, V).
        a_N: (N,) on-site energies.
        z: spectral shift.
        hop_N: (N,) hopping.
        keep_N: (N,) bool, True at kept sites.
        fill: scalar.
        own: scalar.
        write_N: (N,), strength of the delta rule; None without it.
    """
    p, v = propagator(a_N, z, hop_N), v_NV.double()
    g = p.diagonal()
    fade, part = (x.abs() if p.is_complex() else x for x in (-hop_N * g, g))
    own_v = own * part.unsqueeze(-1) * v
    if write_N is not None:
        own_v = own * (g.abs() * write_N).unsqueeze(-1) * v
        p, v = written(k_NK, v, p, write_N * keep_N)
    read = (_scores(q_NK, k_NK, p) * keep_N) @ v
    r, out = torch.zeros_like(read[0]), []
    for t, kept in enumerate(keep_N.tolist()):
        r = read[t] if kept else fill * fade[t] * r
        out.append(r if kept else r + own_v[t])
    return torch.stack(out)
