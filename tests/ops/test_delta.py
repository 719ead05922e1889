"""Tests of the delta rule: the dense definition, the recurrence, gradients, state, padding, sparse chains, extremes.

Dimensions: B batch, N sites, H chains, K key width, V value width.
"""

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.ops import (
    PropagatorState,
    Sparsity,
    available_backends,
    chunked,
    left_green,
    naive,
    propagate,
    resolvent_diagonal,
    use_backend,
)
from resnet_bk.ops.delta import _by_steps, delta_scan, delta_scan_op
from resnet_bk.ops.sparse import _by_steps as _sparse_by_steps
from resnet_bk.ops.sparse import sparse_scan

LENGTHS = [1, 2, 31, 32, 33, 65, 100]


def chain(n, batch=2, heads=2, signs=False):
    """Return q, k, v, a, hop and write of a real chain; with `signs`, -hop g has both signs, and so has g."""
    hop = torch.rand(batch, n, heads, dtype=torch.float64) * 0.8 + 0.2
    a = -2.1 - torch.rand_like(hop)
    if signs:
        hop, a = hop * torch.randn_like(hop).sign(), a * torch.randn_like(a).sign()
    q, k = torch.randn(2, batch, n, heads, 4, dtype=torch.float64)
    v = torch.randn(batch, n, heads, 3, dtype=torch.float64)
    return q, torch.nn.functional.normalize(k, dim=-1), v, a, hop, 2 * torch.rand_like(a)


def scan_inputs(n, k=3, v=5, batch=2, heads=3, dtype=torch.float64):
    """Return random inputs of the scan; decays have both signs, and some are 0; ``beta |k|^2`` is between 0 and 2."""
    q, key = torch.randn(2, batch, n, heads, k, dtype=torch.float64)
    key = torch.nn.functional.normalize(key, dim=-1) * (0.5 + torch.rand(batch, n, heads, 1, dtype=torch.float64))
    alpha, beta = torch.rand(2, batch, n, heads, dtype=torch.float64) * 2
    alpha, beta = torch.where(torch.rand_like(alpha) < 0.1, 0, alpha - 1), beta / key.square().sum(-1)
    values = torch.randn(batch, n, heads, v, dtype=torch.float64)
    inputs = (q, key, values, alpha, beta, torch.randn(batch, heads, k, v, dtype=torch.float64))
    return tuple(x.to(dtype).requires_grad_() for x in inputs)


def with_gradients(function, inputs):
    """Return the outputs and all gradients for fixed random gradients of the outputs."""
    out = function(*inputs)
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in out]
    return [*out, *torch.autograd.grad(out, inputs, grads, materialize_grads=True)]


def scanned(*inputs):
    return delta_scan(*inputs)[:2]


def stepped(*inputs):
    return _by_steps(*inputs)[:2]


def assert_equal(got, expected, tolerance=1e-11):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("n", [*range(1, 8), *LENGTHS[2:]])
def test_the_propagator_and_its_gradients_equal_the_dense_definition(backend, n, signs):
    inputs = [x.requires_grad_() for x in chain(n, batch=1, heads=1, signs=signs)]

    def dense(q, k, v, a, hop, write):
        one = [x[0, :, 0] for x in (q, k, v, a, hop, write)]
        return (naive.propagate(*one[:4], 0.1, one[4], write_N=one[5]).view(1, n, 1, -1),)

    def fast(q, k, v, a, hop, write):
        return propagate(q, k, v, a, 0.1, hop, write=write)[:1]

    assert_equal(with_gradients(fast, inputs), with_gradients(dense, inputs), 1e-10)


def test_the_definition_is_the_rule_itself():
    """Sites in order: each reads the chain with its key, and writes what is missing."""
    q, k, v, a, hop, write = (x[0, :, 0] for x in chain(9, 1, 1, signs=True))
    p = naive.propagator(a, 0.1, hop)
    p = p * p.diagonal().sign()
    y, wrote = [], []
    for t in range(9):
        known = sum((p[t, s] * (k[t] @ k[s]) * wrote[s] for s in range(t)), torch.zeros_like(v[t]))
        wrote.append(write[t] * (v[t] - known))
        y.append(sum(p[t, s] * (q[t] @ k[s]) * wrote[s] for s in range(t + 1)))
    assert_equal([naive.propagate(q, k, v, a, 0.1, hop, write_N=write)], [torch.stack(y)], 1e-12)


@pytest.mark.parametrize("n", [1, 2, 9, 40])
def test_a_chain_given_by_its_hopping_equals_its_dense_definition(backend, n):
    """To the left of its first site the chain goes on with g = -1, which adds ``hop_1^2`` to the first energy."""
    q, k, v, _, hop, write = (x.requires_grad_() for x in chain(n, batch=1, heads=1))

    def dense(q, k, v, hop, write):
        *qkv, hop, write = (x[0, :, 0] for x in (q, k, v, hop, write))
        return (naive.propagate(*qkv, naive.energies_of_hopping(hop), 0.0, hop, write_N=write).view(1, n, 1, -1),)

    def fast(q, k, v, hop, write):
        return propagate(q, k, v, None, 0.0, hop, write=write)[:1]

    inputs = [q, k, v, hop, write]
    assert_equal(with_gradients(fast, inputs), with_gradients(dense, inputs), 1e-10)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("delta", [False, True])
def test_without_energies_the_left_greens_function_is_minus_one(sparse, delta):
    """The same chain with its energies written out, for both rules, from any cut on."""
    n = 33
    q, k, v, _, hop, write = chain(n)
    mask = torch.arange(n) < torch.tensor([[n], [20]])
    write = write if delta else None
    sparsity = (
        Sparsity((mask & (torch.rand(2, n) < 0.5)).double(), *torch.rand(2, 2, dtype=torch.float64)) if sparse else None
    )
    q, k = (q, k) if sparsity is None else (sparsity.sites.pack(q), sparsity.sites.pack(k))
    options = {"write": write, "mask": mask, "sparsity": sparsity}
    y, state = propagate(q, k, v, None, 0.0, hop, **options)
    empty = {name: torch.zeros_like(x) for name, x in state._asdict().items()} | {"g": torch.full_like(state.g, -1)}
    expected = propagate(q, k, v, -1 - hop**2, 0.0, hop, state=type(state)(**empty), **options)
    assert_equal([y, *state], [expected[0], *expected[1]])
    assert (state.g == -1).all()


def test_a_chain_without_energies_needs_its_hopping_and_is_causal():
    q, k, v, _, hop, _ = chain(5)
    with pytest.raises(ValueError, match="hop: got None"):
        propagate(q, k, v, None, 0.0)
    with pytest.raises(ValueError, match="bidirectional"):
        propagate(q, k, v, None, 0.0, hop, causal=False)
    with pytest.raises(ValueError, match=r"state\.g: got 0\.5"):
        propagate(
            q, k, v, None, 0.0, hop, state=PropagatorState(torch.full((2, 2), 0.5).double(), q.new_zeros(2, 2, 4, 3))
        )
    for function in (left_green, resolvent_diagonal):
        with pytest.raises(ValueError, match="a: got None"):
            function(None, 0.0, hop)


@pytest.mark.parametrize("delta", [False, True])
def test_a_state_of_another_precision_continues(backend, delta):
    q, k, v, _, hop, write = (x.float() for x in chain(5))
    _, state = propagate(q, k, v, None, 0.0, hop, write=write if delta else None)
    rounded = state._replace(s=state.s.bfloat16())
    got = propagate(q, k, v, None, 0.0, hop, write=write if delta else None, state=rounded)
    expected = propagate(
        q, k, v, None, 0.0, hop, write=write if delta else None, state=rounded._replace(s=rounded.s.float())
    )
    assert torch.equal(got[0], expected[0])


def test_in_the_models_regime_weights_are_magnitudes_of_the_propagator():
    *_, v, a, hop, _ = (x[0, :, 0] for x in chain(9, 1, 1))
    p = naive.propagator(a, 0.1, hop)
    d, _ = naive.written(v, v, p, torch.ones_like(a))
    assert torch.equal(d, p.abs())


def test_a_second_write_at_a_key_replaces_the_first():
    """Without decay and with a write of 1 at a key of length 1, the state returns the last value written."""
    key, (first, second) = torch.tensor([0.6, 0.8], dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    keys, ones = key.expand(1, 2, 1, 2), torch.ones(1, 2, 1, dtype=torch.float64)
    empty = torch.zeros(1, 1, 2, 3, dtype=torch.float64)
    y, _, error = delta_scan(keys, keys, torch.stack([first, second]).view(1, 2, 1, 3), ones, ones, empty)
    assert_equal([y[0, 0, 0], y[0, 1, 0], error[0, 1, 0]], [first, second, second - first])


# ------------------------------------------------------------------------------------------------- the recurrence


@pytest.mark.parametrize("n", LENGTHS)
def test_the_scan_and_its_gradients_equal_the_recurrence(backend, n):
    inputs = scan_inputs(n)
    assert_equal(with_gradients(scanned, inputs), with_gradients(stepped, inputs), 1e-10)
    assert_equal([delta_scan(*inputs)[2]], [_by_steps(*inputs)[2]])


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_gradients_are_exact(backend, n):
    inputs = scan_inputs(n, k=2, v=2, batch=1, heads=2)
    assert gradcheck(scanned, inputs)
    assert gradgradcheck(scanned, inputs)


@pytest.mark.skipif("numba" not in available_backends(), reason="needs the extra cpu-fast")
@pytest.mark.parametrize("n", LENGTHS[1:])
def test_backends_agree_on_outputs_and_gradients(n):
    results = []
    for name in ("chunked", "numba"):
        torch.manual_seed(1)
        inputs = scan_inputs(n)
        with use_backend(name):
            results.append([*delta_scan_op(*inputs), *with_gradients(scanned, inputs)])
    assert_equal(*results, 1e-10)


def test_the_operator_passes_opcheck(every_backend):
    opcheck(delta_scan_op, scan_inputs(37))


def test_inputs_need_not_be_contiguous(every_backend):
    q, k, v, alpha, beta, s0 = (x.detach() for x in scan_inputs(37, 3, 3))
    together = torch.cat([q, k, v], dim=-1)
    strided = [*together.split(3, dim=-1), alpha.mT.contiguous().mT, beta.mT.contiguous().mT, s0.mT.contiguous().mT]
    assert not any(x.is_contiguous() for x in strided)
    results = [
        with_gradients(scanned, [x.requires_grad_() for x in xs]) for xs in (strided, (q, k, v, alpha, beta, s0))
    ]
    assert_equal(*results)


def test_registered_flops_count_the_steps():
    inputs = scan_inputs(10)
    with FlopCounterMode(display=False) as counter:
        y, _, _ = delta_scan(*inputs)
    state_entries = 2 * 3 * 3 * 5
    assert counter.get_total_flops() == 7 * 10 * state_entries
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 18 * 10 * state_entries


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_propagator_compiles():
    q, k, v, a, hop, write = chain(40)
    gate = (torch.rand(2, 40) < 0.5).double()
    kept = Sparsity(gate, *torch.rand(2, 2, dtype=torch.float64), bound=40)

    def run(q, k, v, a, hop, write):
        dense = propagate(q, k, v, a, 0.1, hop, write=write)[0]
        return dense + propagate(q, k, v, a, 0.1, hop, write=write, sparsity=kept)[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_() for x in (q, k, v, a, hop, write)]
    assert_equal(
        with_gradients(lambda *x: (compiled(*x),), inputs), with_gradients(lambda *x: (run(*x),), inputs), 1e-12
    )


# ------------------------------------------------------------------------------------------------- the chain


@pytest.mark.parametrize("cut", [1, 13, 32, 99])
def test_a_cut_chain_continues_from_its_state(backend, cut):
    q, k, v, a, hop, write = chain(100)
    whole, end = propagate(q, k, v, a, 0.1, hop, write=write)
    parts, state = [], None
    for part in (slice(cut), slice(cut, None)):
        here = [x[:, part] for x in (q, k, v, a)]
        y, state = propagate(*here, 0.1, hop[:, part], write=write[:, part], state=state)
        parts.append(y)
    assert_equal([torch.cat(parts, dim=1), *state], [whole, *end], 1e-12)


def test_steps_equal_the_parallel_form(backend):
    inputs = chain(70)
    whole, _ = propagate(*inputs[:4], 0.1, inputs[4], write=inputs[5])
    state, steps = None, []
    for t in range(70):
        q, k, v, a, hop, write = (x[:, t : t + 1] for x in inputs)
        y, state = propagate(q, k, v, a, 0.1, hop, write=write, state=state)
        steps.append(y)
    assert_equal([torch.cat(steps, dim=1)], [whole], 1e-12)


def test_padding_anywhere_changes_nothing(every_backend):
    q, k, v, a, hop, write = chain(40)
    keep = torch.rand(2, 40) < 0.7
    keep[0, :5], keep[1, -9:] = False, False
    # values at padding must not matter, not even NaN
    dirty = [
        torch.where(keep.view(2, 40, *[1] * (x.dim() - 2)), x, torch.nan).requires_grad_() for x in (q, k, v, write)
    ]
    y, state = propagate(*dirty[:3], a, 0.1, hop, write=dirty[3], mask=keep)
    assert (y[~keep] == 0).all()
    assert all((g[~keep] == 0).all() and g.isfinite().all() for g in torch.autograd.grad(y.sum(), dirty))
    for b in range(2):
        at = keep[b]
        qb, kb, vb, ab, hb, wb = (x[b : b + 1, at] for x in (q, k, v, a, hop, write))
        expected, end = propagate(qb, kb, vb, ab, 0.1, hb, write=wb)
        assert_equal([y[b, at], state.g[b], state.s[b]], [expected[0], end.g[0], end.s[0]], 1e-12)


def test_nothing_depends_on_the_future(every_backend):
    q, k, v, a, hop, write = (x.requires_grad_() for x in chain(80))
    y, _ = propagate(q, k, v, a, 0.1, hop, write=write)
    y[:, :33].square().sum().backward()
    for x in (q, k, v, a, hop, write):
        assert (x.grad[:, 33:] == 0).all()
    later = [torch.cat([x[:, :33], torch.randn_like(x[:, 33:])], dim=1) for x in (q, k, v)]
    assert torch.equal(propagate(*later, a, 0.1, hop, write=write)[0][:, :33], y[:, :33])


def test_a_zero_hopping_cuts_the_chain(every_backend):
    q, k, v, a, hop, write = chain(20)
    hop[:, 7] = 0
    y, _ = propagate(q, k, v, a, 0.0, hop, write=write)
    after, _ = propagate(*(x[:, 7:] for x in (q, k, v, a)), 0.0, hop[:, 7:], write=write[:, 7:])
    assert_equal([y[:, 7:]], [after], 1e-12)


def test_writes_of_zero_leave_the_state_as_it_decays(backend):
    q, k, v, a, hop, write = chain(40)
    _, state = propagate(q, k, v, a, 0.0, hop, write=write)
    y, after = propagate(q, k, v, a, 0.0, hop, write=torch.zeros_like(write), state=state)
    nothing, plain = propagate(q, k, torch.zeros_like(v), a, 0.0, hop, state=state)
    assert_equal([y, *after], [nothing, *plain], 1e-12)


def test_invalid_input_is_refused():
    q, k, v, a, hop, write = chain(5)
    with pytest.raises(ValueError, match=r"^write: got one for a complex chain, allowed in causal real chains"):
        propagate(q, k, v, a, 1j, hop, write=write)
    with pytest.raises(ValueError, match=r"^write: got one for a bidirectional chain, allowed in causal real chains"):
        propagate(q, k, v, a, 0.0, hop, write=write, causal=False)
    with pytest.raises(ValueError, match=r"^write: expected shape \(2, 5, 2\), got \(2, 4, 2\)"):
        propagate(q, k, v, a, 0.0, hop, write=write[:, :4])
    with pytest.raises(TypeError, match=r"^write: expected torch.float64 on cpu, got torch.float32"):
        propagate(q, k, v, a, 0.0, hop, write=write.float())


# ------------------------------------------------------------------------------------------------- sparse chains


def packed(q, k, kept):
    return kept.sites.pack(q), kept.sites.pack(k)


def sparsity(n, batch=2, heads=2):
    return Sparsity((torch.rand(batch, n) < 0.5).double(), *torch.rand(2, heads, dtype=torch.float64))


@pytest.mark.parametrize("signs", [False, True])
def test_sparse_chains_equal_the_definition(backend, signs):
    for n in [*range(1, 41), 65, 100]:
        q, k, v, a, hop, write = chain(n, 1, 1, signs)
        kept = sparsity(n, 1, 1)
        y, _ = propagate(*packed(q, k, kept), v, a, 0.1, hop, write=write, sparsity=kept)
        row = (q[0, :, 0], k[0, :, 0], v[0, :, 0], a[0, :, 0], 0.1, hop[0, :, 0])
        expected = naive.sparse_propagate(*row, kept.gate[0] > 0, kept.fill, kept.own, write[0, :, 0])
        torch.testing.assert_close(y[0, :, 0], expected, rtol=1e-10, atol=1e-12)


def test_a_sparse_chain_kept_everywhere_is_the_dense_chain(every_backend):
    q, k, v, a, hop, write = chain(45)
    for mask in (None, torch.rand(2, 45) < 0.7):
        gate = torch.ones(2, 45, dtype=torch.float64) if mask is None else mask.double()
        kept = Sparsity(gate, *torch.rand(2, 2, dtype=torch.float64))
        y, _ = propagate(*packed(q, k, kept), v, a, 0.1, hop, write=write, mask=mask, sparsity=kept)
        expected, _ = propagate(q, k, v, a, 0.1, hop, write=write, mask=mask)
        assert_equal([y], [expected], 1e-12)


def test_a_cut_sparse_chain_continues_from_its_state(backend):
    q, k, v, a, hop, write = chain(50)
    whole = sparsity(50)
    expected, end = propagate(*packed(q, k, whole), v, a, 0.1, hop, write=write, sparsity=whole)
    parts, state = [], None
    for part in (slice(21), slice(21, 22), slice(22, None)):
        kept = replace(whole, gate=whole.gate[:, part])
        here = (*packed(q[:, part], k[:, part], kept), v[:, part], a[:, part])
        y, state = propagate(*here, 0.1, hop[:, part], write=write[:, part], state=state, sparsity=kept)
        parts.append(y)
    assert_equal([torch.cat(parts, dim=1), *state], [expected, *end])


@pytest.mark.parametrize("kept", [0, 1, 31, 32, 33, 70])
def test_gradients_of_sparse_chains_equal_the_recurrence(backend, kept):
    """One row keeps `kept` sites, another none, a third all. Decays of 0. A gate of 0 has no gradient."""
    gate = torch.zeros(3, 70, dtype=torch.float64)
    gate[0, torch.randperm(70)[:kept]] = 1
    gate[2] = 1
    q, k, v, alpha, beta, s0 = (x.detach() for x in scan_inputs(70, batch=3))
    fade, own = torch.rand(2, *alpha.shape, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, alpha, beta, fade, own, gate, s0, torch.randn_like(v[:, 0]))]
    got = with_gradients(lambda *x: sparse_scan(*x, delta=True), inputs)
    assert_equal(got, with_gradients(lambda *x: _sparse_by_steps(*x, delta=True), inputs), 1e-9)
    assert (got[-3][gate == 0] == 0).all()


@pytest.mark.parametrize("pattern", [[1, 1], [1, 0, 1, 1], [0, 0, 1], [0, 0]])
def test_second_derivatives_of_sparse_chains_equal_those_of_the_recurrence(backend, pattern):
    gate = torch.tensor([pattern], dtype=torch.float64)
    n, kept = len(pattern), max(1, sum(pattern))
    q, k = torch.randn(2, 1, kept, 1, 2, dtype=torch.float64)
    alpha, beta, fade, own = torch.rand(4, 1, n, 1, dtype=torch.float64)
    states = torch.randn(1, 1, 2, 2, dtype=torch.float64), torch.randn(1, 1, 2, dtype=torch.float64)
    v = torch.randn(1, n, 1, 2, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v, alpha, beta, fade, own, gate, *states)]

    def twice(scanned):
        loss = sum(x.square().sum() for x in scanned(*inputs, delta=True))
        first = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), inputs, materialize_grads=True)

    assert_equal(twice(sparse_scan), twice(_sparse_by_steps), 1e-9)


# ------------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [0.0, 1e-38, -1e-38, 1.0, -1.0])
@pytest.mark.parametrize("written", [0.0, 1.0, 2.0])
def test_extreme_decays_and_writes(backend, dtype, decay, written):
    """`written` is ``beta |k|^2``. At 2 a write turns the state around at its key, as a reflection."""
    inputs = [x.detach() for x in scan_inputs(70, dtype=dtype)]
    inputs[1] = torch.nn.functional.normalize(inputs[1], dim=-1)
    inputs[3], inputs[4] = torch.full_like(inputs[3], decay), torch.full_like(inputs[4], written)
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    for got, expected in zip(with_gradients(scanned, inputs), with_gradients(stepped, exact), strict=True):
        assert got.isfinite().all()
        error = (got.double() - expected).norm() / max(1, expected.norm())
        assert error <= (1e-4 if dtype == torch.float32 else 1e-12)


def test_ten_thousand_sites_stay_accurate(backend):
    """Decays near 1, so that the memory is long; writes up to reflections."""
    exact = [x.detach() for x in scan_inputs(10_000, k=8, v=8, batch=1, heads=1)]
    exact[3] = 1 - 1e-3 * torch.rand_like(exact[3])
    exact = [x.requires_grad_() for x in exact]
    single = [x.detach().float().requires_grad_() for x in exact]
    found = []
    for inputs in (single, exact):
        out = scanned(*inputs)
        found.append([*out, *torch.autograd.grad(sum(x.square().mean() for x in out), inputs)])
    for got, expected in zip(*found, strict=True):
        assert got.isfinite().all()
        assert (got.double() - expected).norm() <= 1e-4 * expected.norm()


def test_a_write_that_forgets_what_the_state_returns_is_caught(monkeypatch):
    """Planted bug: the triangular system of a chunk is the identity."""
    inputs = scan_inputs(40)
    expected = stepped(*inputs)
    with use_backend("chunked"):
        assert_equal(scanned(*inputs), expected)
        monkeypatch.setattr(chunked._ScanChunks, "overlaps", lambda c: torch.eye(32, dtype=torch.float64))
        with pytest.raises(AssertionError):
            assert_equal(scanned(*inputs), expected, 1e-3)
