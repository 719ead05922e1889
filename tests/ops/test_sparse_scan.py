"""Tests of sparse chains: the definition, gradients, state, padding, FLOPs, backends.

Dimensions: B batch, N sites, H chains, K key width, V value width.
"""

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.ops import (
    Sparsity,
    available_backends,
    left_green,
    naive,
    propagate,
    resolvent_diagonal,
    use_backend,
)
from resnet_bk.ops.sparse import _by_steps, sparse_scan, sparse_scan_op

REGIMES = {"complex": 0.3 + 0.2j, "real": 0.1}


def chain(regime, n, batch=2, heads=2):
    hop = torch.rand(batch, n, heads, dtype=torch.float64) * 0.8 + 0.2
    a = -2 - torch.rand_like(hop) if regime == "real" else torch.rand_like(hop) * 6 - 3
    q, k = torch.randn(2, batch, n, heads, 4, dtype=torch.float64)
    return q, k, torch.randn(batch, n, heads, 3, dtype=torch.float64), a, hop


def sparsity(n, batch=2, heads=2):
    gate = (torch.rand(batch, n) < 0.5).double()
    return Sparsity(gate, *torch.rand(2, heads, dtype=torch.float64))


def scan_inputs(n=37, batch=2, heads=3, k=3, v=5):
    gate = sparsity(n, batch).gate
    kept = max(1, int(gate.sum(1).max()))
    q, key = torch.randn(2, batch, kept, heads, k, dtype=torch.float64)
    alpha, beta, fade, own = torch.rand(4, batch, n, heads, dtype=torch.float64)
    state = torch.randn(batch, heads, k, v, dtype=torch.float64), torch.randn(batch, heads, v, dtype=torch.float64)
    values = torch.randn(batch, n, heads, v, dtype=torch.float64)
    return tuple(x.requires_grad_() for x in (q, key, values, alpha, beta, fade, own, gate, *state))


def packed(q, k, kept):
    return kept.sites.pack(q), kept.sites.pack(k)


@pytest.mark.parametrize("regime", REGIMES)
def test_every_length_equals_the_definition(backend, regime):
    for n in [*range(1, 41), 65, 100]:
        q, k, v, a, hop = (x[:1, :, :1] for x in chain(regime, n))
        kept = sparsity(n, 1, 1)
        y, _ = propagate(*packed(q, k, kept), v, a, REGIMES[regime], hop, sparsity=kept)
        row = (q[0, :, 0], k[0, :, 0], v[0, :, 0], a[0, :, 0], REGIMES[regime], hop[0, :, 0])
        expected = naive.sparse_propagate(*row, kept.gate[0] > 0, kept.fill, kept.own)
        torch.testing.assert_close(y[0, :, 0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("causal", [True, False])
def test_kept_everywhere_is_the_dense_chain(backend, regime, causal):
    inputs = chain(regime, 45)
    z = REGIMES[regime]
    everywhere = kept = Sparsity(torch.ones(2, 45, dtype=torch.float64), *torch.rand(2, 2, dtype=torch.float64))
    q, k, v, a, hop = inputs
    for options in ({}, {"mask": torch.rand(2, 45) < 0.7}):
        if options:
            kept = replace(everywhere, gate=options["mask"].double())
        y, _ = propagate(*packed(q, k, kept), v, a, z, hop, causal=causal, sparsity=kept, **options)
        expected, _ = propagate(q, k, v, a, z, hop, causal=causal, **options)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(left_green(a, z, hop, sparsity=everywhere), left_green(a, z, hop))
    torch.testing.assert_close(resolvent_diagonal(a, z, hop, sparsity=everywhere), resolvent_diagonal(a, z, hop))


@pytest.mark.parametrize("regime", REGIMES)
def test_kept_sites_of_a_bidirectional_chain_read_the_whole_resolvent(backend, regime):
    n = 23
    q, k, v, a, hop = (x[:1, :, :1] for x in chain(regime, n))
    kept = sparsity(n, 1, 1)
    y, _ = propagate(*packed(q, k, kept), v, a, REGIMES[regime], hop, causal=False, sparsity=kept)
    keep = kept.gate[0] > 0
    silent = torch.where(keep[None, :, None, None], v, 0)  # sites left out contribute nothing
    row = (q[0, :, 0], k[0, :, 0], silent[0, :, 0], a[0, :, 0], REGIMES[regime], hop[0, :, 0])
    expected = naive.propagate(*row, causal=False)
    torch.testing.assert_close(y[0, keep, 0], expected[keep], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("regime", REGIMES)
def test_sites_left_out_of_a_diagonal_link_to_the_kept_chain(regime):
    n = 17
    *_, a, hop = (x[:1, :, :1] for x in chain(regime, n))
    hop = torch.ones_like(hop)
    a = a if regime == "complex" else a - 0.1
    gate = torch.ones(1, n, dtype=torch.float64)
    gate[0, 5] = gate[0, 6] = 0
    whole = Sparsity(gate, *torch.ones(2, 1, dtype=torch.float64))
    keep = gate[0] > 0
    z = REGIMES[regime]
    g, _ = left_green(a, z, hop, sparsity=whole)
    torch.testing.assert_close(g[:, keep], left_green(a[:, keep], z)[0], rtol=1e-12, atol=1e-12)
    alone = torch.cat([a[:, :5], a[:, 6:7]], dim=1)  # site 6 in the place of site 5
    torch.testing.assert_close(g[:, 6], left_green(alone, z)[0][:, -1], rtol=1e-12, atol=1e-12)
    both = resolvent_diagonal(a, z, hop, sparsity=whole)
    torch.testing.assert_close(both[:, keep], resolvent_diagonal(a[:, keep], z), rtol=1e-12, atol=1e-12)
    between = torch.cat([a[:, :5], a[:, 6:]], dim=1)
    torch.testing.assert_close(both[:, 6], resolvent_diagonal(between, z)[:, 5], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_gradients_are_exact(backend, n):
    *edges, gate, s0, r0 = (x.detach() for x in scan_inputs(n, batch=1, heads=2, k=2, v=2))

    def fixed(*inputs):
        *edges, s0, r0 = inputs
        return sparse_scan(*edges, gate, s0, r0)

    inputs = [x.requires_grad_() for x in (*edges, s0, r0)]
    assert gradcheck(fixed, inputs)
    if n <= 2:
        assert gradgradcheck(fixed, inputs)


def test_the_gradient_of_a_gate_is_what_its_site_is_worth(backend):
    """The gradient is that of the formula, which is linear in a gate except for effects on other sites.

    A gate of 0 has no gradient.
    """
    inputs = scan_inputs(41)
    loss = lambda y, s, r: y.square().sum() + s.square().sum() + r.square().sum()  # noqa: E731
    (grad,) = torch.autograd.grad(loss(*sparse_scan(*inputs)), inputs[7])
    (expected,) = torch.autograd.grad(loss(*_by_steps(*inputs)), inputs[7])
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)
    gate = inputs[7].detach()
    assert (grad[gate == 0] == 0).all()
    assert (grad[gate == 1] != 0).all()
    # no site follows the last one, so its output is linear in its gate: the gradient is the difference between 1 and 0
    gate[:, -1] = 1
    q = torch.randn(2, int(gate.sum(1).max()), 3, 3, dtype=torch.float64)
    with_it = [q, q, *(x.detach() for x in inputs[2:7]), gate.requires_grad_(), *(x.detach() for x in inputs[8:])]
    y = sparse_scan(*with_it)[0]
    (grad,) = torch.autograd.grad(y[:, -1].sum(), gate)
    with_it[7] = torch.cat([gate.detach()[:, :-1], torch.zeros(2, 1, dtype=torch.float64)], dim=1)
    without = sparse_scan(*with_it)[0]
    torch.testing.assert_close(grad[:, -1], (y - without)[:, -1].sum((1, 2)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kept", [0, 1, 31, 32, 33, 64, 70])
def test_rows_keep_different_numbers_of_sites(backend, kept):
    """One row keeps `kept` sites, another none, a third all. Decays of 0. What follows the kept sites is ignored."""
    gate = torch.zeros(3, 70, dtype=torch.float64)
    gate[0, torch.randperm(70)[:kept]] = 1
    gate[2] = 1
    *_, values, alpha, beta, fade, own, _, s0, r0 = (x.detach() for x in scan_inputs(70, batch=3))
    alpha[:, [0, 9, 40, 69]] = 0
    q, k = torch.randn(2, 3, 80, 3, 3, dtype=torch.float64)
    for row, count in enumerate((kept, 0, 70)):
        q[row, count:], k[row, count:] = torch.nan, torch.nan
    results = []
    for run in (sparse_scan, _by_steps):
        inputs = [x.clone().requires_grad_() for x in (q, k, values, alpha, beta, fade, own, gate, s0, r0)]
        out = run(*inputs)
        results.append([*out, *torch.autograd.grad(sum(x.square().sum() for x in out), inputs)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


def test_a_single_site_left_out_ignores_queries_and_keys(backend):
    *_, values, alpha, beta, fade, own, gate, s0, r0 = (x.detach() for x in scan_inputs(1))
    nothing = torch.full((2, 1, 3, 3), torch.nan, dtype=torch.float64)
    out = sparse_scan(nothing, nothing, values, alpha, beta, fade, own, torch.zeros_like(gate), s0, r0)
    assert all(x.isfinite().all() for x in out)


def test_fewer_queries_than_kept_sites_are_refused(backend):
    q, k, *rest = scan_inputs(37)
    with pytest.raises(ValueError, match=rf"expected at least {q.shape[1]} sites .*of the fullest row.*, got 3"):
        sparse_scan(q[:, :3], k[:, :3], *rest)
    with pytest.raises(ValueError, match=r"k: expected the shape of q, .*, got \(2, 1, 3, 3\)"):
        sparse_scan(q, k[:, :1], *rest)
    rest[5] = torch.zeros_like(rest[5])
    with pytest.raises(ValueError, match=r"expected at least 1 sites .*, got 0"):
        sparse_scan(q[:, :0], k[:, :0], *rest)


@pytest.mark.skipif("numba" not in available_backends(), reason="needs the extra cpu-fast")
@pytest.mark.parametrize("n", [2, 31, 32, 33, 100])
def test_backends_agree_on_outputs_and_gradients(n):
    results = []
    for name in ("chunked", "numba"):
        torch.manual_seed(1)
        inputs = scan_inputs(n)
        inputs[7].data[0, 5:70] = 0  # whole chunks without a kept site
        with use_backend(name):
            out = sparse_scan(*inputs)
            results.append([*out, *torch.autograd.grad(sum(x.square().sum() for x in out), inputs)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif("numba" not in available_backends(), reason="needs the extra cpu-fast")
def test_the_operator_passes_opcheck():
    for delta in (False, True):
        opcheck(sparse_scan_op, (*scan_inputs(), delta))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("readout", ["propagator", "diagonal"])
def test_state_and_padding(every_backend, regime, readout):
    """Two pieces, the second with padding, equal one whole."""
    q, k, v, a, hop = chain(regime, 50)
    whole = sparsity(50)
    z = REGIMES[regime]

    def run(rows, state, kept, mask=None):
        q, k, v, a, hop = rows
        if readout == "diagonal":
            return left_green(a, z, hop, state=state, mask=mask, sparsity=kept)
        return propagate(*packed(q, k, kept), v, a, z, hop, state=state, mask=mask, sparsity=kept)

    expected, last = run((q, k, v, a, hop), None, whole)
    first, state = run([x[:, :21] for x in (q, k, v, a, hop)], None, replace(whole, gate=whole.gate[:, :21]))
    mask = torch.ones(2, 34, dtype=torch.bool)
    mask[:, [0, 7, 8, 9, 33]] = False
    place = mask[0].nonzero().squeeze(1)

    def padded(x):
        out = torch.randn(2, 34, *x.shape[2:], dtype=x.dtype)
        out[:, place] = x[:, 21:]
        return out

    kept = replace(whole, gate=padded(whole.gate).where(mask, 0))
    rows = [padded(x) for x in (q, k, v, a, hop)]
    for x in rows[:3]:
        x[:, [0, 7]] = torch.nan  # must not spread
    second, after = run(rows, state, kept, mask)
    torch.testing.assert_close(torch.cat([first, second[:, place]], dim=1), expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(tuple(after), tuple(last), rtol=1e-10, atol=1e-11)


@pytest.mark.skipif("numba" not in available_backends(), reason="needs the extra cpu-fast")
@pytest.mark.parametrize(("delta", "each"), [(False, 19), (True, 25)])
def test_flops_count_kept_sites(delta, each):
    inputs = scan_inputs(n=10)
    kept = int((inputs[7] > 0).sum())
    with FlopCounterMode(display=False) as counter:
        y, _, _ = sparse_scan(*inputs, delta=delta)
        y.sum().backward()
    heads, keys, values = 3, 3, 5
    assert counter.get_total_flops() == heads * (each * keys * values * kept + 11 * values * (20 - kept))


def test_invalid_input_is_refused():
    q, k, v, a, hop = chain("real", 5)
    gate, one = torch.ones(2, 5, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3] = False
    whole = Sparsity(gate, one, one)
    for run in (
        lambda s, mask=None: propagate(q, k, v, a, 0.1, hop, sparsity=s, mask=mask),
        lambda s, mask=None: left_green(a, 0.1, hop, sparsity=s, mask=mask),
        lambda s, mask=None: resolvent_diagonal(a, 0.1, hop, sparsity=s, mask=mask),
    ):
        with pytest.raises(ValueError, match=r"sparsity\.gate: expected shape \(2, 5\), got \(2,\)"):
            run(replace(whole, gate=one))
        for name in ("fill", "own"):
            with pytest.raises(ValueError, match=rf"sparsity\.{name}: expected shape \(2,\), got \(2, 5\)"):
                run(replace(whole, **{name: gate}))
        with pytest.raises(TypeError, match=r"sparsity\.gate: expected torch.float64 on cpu, got torch.bool"):
            run(replace(whole, gate=gate > 0))
        with pytest.raises(ValueError, match=r"sparsity\.gate: expected 0 or 1 everywhere, got 0\.5"):
            run(replace(whole, gate=gate * 0.5))
        with pytest.raises(ValueError, match=r"sparsity\.gate: got 1 where mask is False"):
            run(whole, mask)
    with pytest.raises(ValueError, match=r"q: expected shape \(2, 2, 2, 4\), got \(2, 5, 2, 4\)"):
        propagate(q, k, v, a, 0.1, hop, sparsity=replace(whole, gate=gate * torch.tensor([1.0, 0, 0, 1, 0])))
    _, dense = propagate(q, k, v, a, 0.1, hop)
    _, sparse = propagate(q, k, v, a, 0.1, hop, sparsity=whole)
    with pytest.raises(ValueError, match="state: got a PropagatorState, expected that of a sparse chain"):
        propagate(q, k, v, a, 0.1, hop, state=dense, sparsity=whole)
    with pytest.raises(ValueError, match="state: got a SparseState, expected that of a dense chain"):
        propagate(q, k, v, a, 0.1, hop, state=sparse)
    with pytest.raises(ValueError, match=r"state\.r: expected shape \(2, 2, 3\), got \(2, 2, 1\)"):
        propagate(q, k, v, a, 0.1, hop, state=sparse._replace(r=sparse.r[..., :1]), sparsity=whole)


def test_float32_stays_near_float64(backend):
    torch.manual_seed(0)
    exact = tuple(x.detach() for x in scan_inputs(512, k=8, v=8))
    single = [x.float().requires_grad_() for x in exact]
    double = [x.float().double().requires_grad_() for x in exact]
    found = []
    for inputs in (single, double):
        out = sparse_scan(*inputs)
        found.append([*out, *torch.autograd.grad(sum(x.square().sum() for x in out), inputs)])
    for got, expected in zip(*found, strict=True):
        assert (got.double() - expected).norm() <= 1e-5 * expected.norm()
