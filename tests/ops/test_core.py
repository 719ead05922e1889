"""Tests of the core's functions: the dense float64 definitions, state, padding, precision, invalid input.

Dimensions: B batch, N sites, H chains, K key width, V value width.
"""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from resnet_bk.ops import PropagatorState, left_green, naive, propagate, resolvent_diagonal

REGIMES = {"complex": 0.3 + 0.2j, "real": 0.1}


def chain(regime, n, batch=2, heads=2, dtype=torch.float64):
    """Return random energies, hoppings, q, k and v; diagonally dominant in the real regime."""
    if regime == "real":
        hop = torch.rand(batch, n, heads, dtype=dtype) * 0.8 + 0.2
        a = -2 - torch.rand(batch, n, heads, dtype=dtype)
    else:
        hop = torch.rand(batch, n, heads, dtype=dtype) * 2
        a = torch.rand(batch, n, heads, dtype=dtype) * 6 - 3
    q, k = torch.randn(2, batch, n, heads, 4, dtype=dtype)
    return a, hop, q, k, torch.randn(batch, n, heads, 3, dtype=dtype)


def relative(x, y):
    return ((x - y).abs().square().mean().sqrt() / y.abs().square().mean().sqrt()).item()


def test_every_length_to_257_equals_the_dense_definition(backend):
    for n in range(1, 258):
        for regime, z in REGIMES.items():
            a, hop, q, k, v = (x[:1, :, :1] for x in chain(regime, n, batch=1, heads=1))
            one = a[0, :, 0], z, hop[0, :, 0]
            rows = q[0, :, 0], k[0, :, 0], v[0, :, 0]
            # the last row of the inverse depends on the whole chain, and it is N times cheaper to check than all rows
            dense = naive.resolvent(*one)
            assert relative(left_green(a, z, hop)[0][0, -1, 0], dense[-1, -1]) <= 1e-12
            assert relative(resolvent_diagonal(a, z, hop)[0, :, 0], dense.diagonal()) <= 1e-12
            y = propagate(q, k, v, a, z, hop)[0][0, :, 0]
            full = propagate(q, k, v, a, z, hop, causal=False)[0][0, :, 0]
            assert relative(full, naive.propagate(*rows, *one, causal=False)) <= 1e-12
            if n <= 40:
                assert relative(y, naive.propagate(*rows, *one)) <= 1e-12
            else:
                last = naive.propagate(*rows, *one, causal=False)[-1]  # P and the full resolvent share the last row
                assert relative(y[-1], last) <= 1e-12


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_every_input_are_exact(backend, regime, n, causal):
    a, hop, q, k, v = (x[:1, :, :1] for x in chain(regime, n))
    kind = torch.complex128 if regime == "complex" else torch.float64
    z = torch.tensor([REGIMES[regime]], dtype=kind)
    inputs = [
        x[..., :2].clone().requires_grad_() if x.dim() == 4 else x.clone().requires_grad_()
        for x in (q, k, v, a, z, hop)
    ]

    def outputs(q, k, v, a, z, hop):
        y, state = propagate(q, k, v, a, z, hop, causal=causal)
        return (y, state.s) if causal else y

    assert gradcheck(outputs, inputs)
    if n <= 5:
        assert gradgradcheck(outputs, inputs)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 16])
def test_gradients_of_the_green_functions_are_exact(backend, regime, n):
    a, hop, *_ = (x[:1] for x in chain(regime, n))
    kind = torch.complex128 if regime == "complex" else torch.float64
    z = torch.tensor(REGIMES[regime], dtype=kind)
    inputs = [x.clone().requires_grad_() for x in (a, z, hop)]
    for function in (lambda a, z, hop: left_green(a, z, hop)[0], resolvent_diagonal):
        assert gradcheck(function, inputs)
        if n <= 5:
            assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("n", [63, 129, 257])
def test_float32_gradients_are_within_1e_4_of_float64(backend, regime, n):
    exact = [x.requires_grad_() for x in chain(regime, n)]
    single = [x.detach().float().requires_grad_() for x in exact]
    grads = []
    for a, hop, q, k, v in (exact, single):
        y, state = propagate(q, k, v, a, REGIMES[regime], hop)
        (y.square().mean() + state.s.square().mean()).backward()
        grads.append([x.grad for x in (a, hop, q, k, v)])
    for expected, got in zip(*grads, strict=True):
        assert relative(got.double(), expected) <= 1e-4


@pytest.mark.parametrize("eta", [1.0, 0.1, 0.01])
def test_complex64_error_is_small_and_g_stays_in_its_bounds(backend, eta):
    a = torch.rand(4, 4097, 8, dtype=torch.float64) * 6 - 3
    hop = torch.rand(4, 4097, 8, dtype=torch.float64) * 2
    g, _ = left_green(a.float(), eta * 1j, hop.float())
    assert relative(g, left_green(a, eta * 1j, hop)[0]) <= 1e-6 * max(1, 0.1 / eta)
    assert (g.imag > 0).all()
    assert (g.abs() <= 1 / eta * (1 + 1e-5)).all()


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("causal", [True, False])
def test_padding_anywhere_changes_nothing(every_backend, regime, causal):
    z = REGIMES[regime]
    a, hop, q, k, v = chain(regime, 40)
    keep = torch.rand(2, 40) < 0.7
    keep[0, :5], keep[1, -9:] = False, False
    # values at padding must not matter, not even NaN
    dirty = [torch.where(keep.view(2, 40, *[1] * (x.dim() - 2)), x, torch.nan).requires_grad_() for x in (q, k, v)]
    y, state = propagate(*dirty, a, z, hop, mask=keep, causal=causal)
    assert all((g[~keep] == 0).all() and g.isfinite().all() for g in torch.autograd.grad(y.sum(), dirty))
    g, last = left_green(a, z, hop, mask=keep)
    diagonal = resolvent_diagonal(a, z, hop, mask=keep)
    assert (y[~keep] == 0).all()
    for b in range(2):
        at = keep[b]
        qb, kb, vb, ab, hb = (x[b : b + 1, at] for x in (q, k, v, a, hop))
        expected, end = propagate(qb, kb, vb, ab, z, hb, causal=causal)
        assert relative(y[b, at], expected[0]) <= 1e-12
        assert relative(g[b, at], left_green(ab, z, hb)[0][0]) <= 1e-12
        assert relative(diagonal[b, at], resolvent_diagonal(ab, z, hb)[0]) <= 1e-12
        if causal:
            assert relative(state.s[b], end.s[0]) <= 1e-12
            assert relative(last[b], end.g[0]) <= 1e-12


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("cut", [1, 13, 32, 99])
def test_a_cut_chain_continues_from_its_state(backend, regime, cut):
    z = REGIMES[regime]
    a, hop, q, k, v = chain(regime, 100)
    whole, end = propagate(q, k, v, a, z, hop)
    first, state = propagate(*(x[:, :cut] for x in (q, k, v, a)), z, hop[:, :cut])
    second, last = propagate(*(x[:, cut:] for x in (q, k, v, a)), z, hop[:, cut:], state=state)
    assert relative(torch.cat([first, second], dim=1), whole) <= 1e-12
    assert relative(last.s, end.s) <= 1e-12
    assert relative(last.g, end.g) <= 1e-12


@pytest.mark.parametrize("regime", REGIMES)
def test_steps_equal_the_parallel_form(backend, regime):
    z = REGIMES[regime]
    a, hop, q, k, v = chain(regime, 70)
    whole, _ = propagate(q, k, v, a, z, hop)
    state, steps = None, []
    for t in range(70):
        y, state = propagate(*(x[:, t : t + 1] for x in (q, k, v, a)), z, hop[:, t : t + 1], state=state)
        steps.append(y)
    assert relative(torch.cat(steps, dim=1), whole) <= 1e-12


@pytest.mark.parametrize("regime", REGIMES)
def test_nothing_depends_on_the_future(every_backend, regime):
    z = REGIMES[regime]
    inputs = chain(regime, 80)
    for x in inputs:
        x.requires_grad_()
    a, hop, q, k, v = inputs
    y, _ = propagate(q, k, v, a, z, hop)
    y[:, :33].square().sum().backward()
    for x in inputs:
        assert (x.grad[:, 33:] == 0).all()
    changed = [torch.cat([x[:, :33], torch.randn_like(x[:, 33:])], dim=1) for x in (q, k, v)]
    assert torch.equal(propagate(*changed, a, z, hop)[0][:, :33], y[:, :33])


def test_a_zero_hopping_cuts_the_chain_and_its_gradient_is_finite(every_backend):
    a, hop, q, k, v = chain("real", 20)
    hop[:, 7] = 0
    hop.requires_grad_()
    y, _ = propagate(q, k, v, a, 0.0, hop)
    after, _ = propagate(*(x[:, 7:] for x in (q, k, v, a)), 0.0, hop[:, 7:])
    assert relative(y[:, 7:], after) <= 1e-12
    y.sum().backward()
    with torch.no_grad():
        for eps in (1e-6,):
            plus, minus = hop.clone(), hop.clone()
            plus[:, 7] += eps
            minus[:, 7] -= eps
            slope = (propagate(q, k, v, a, 0.0, plus)[0] - propagate(q, k, v, a, 0.0, minus)[0]).sum((1, 3)) / (2 * eps)
    assert torch.allclose(hop.grad[:, 7], slope, atol=1e-6)


@pytest.mark.parametrize("n", [1023, 4097, 65537])
@pytest.mark.parametrize("regime", REGIMES)
def test_long_chains_stay_accurate_forward_and_backward(backend, regime, n):
    long_chain(regime, n)


@pytest.mark.parametrize("regime", REGIMES)
def test_131072_sites(regime):
    long_chain(regime, 131_072)


@pytest.mark.soak
@pytest.mark.parametrize("n", [1_048_576, 1_048_575])
@pytest.mark.parametrize("regime", REGIMES)
def test_a_million_sites(backend, regime, n):
    long_chain(regime, n)


def long_chain(regime, n):
    exact = [x[:1, :, :1].clone().requires_grad_() for x in chain(regime, n, batch=1, heads=1)]
    single = [x.detach().float().requires_grad_() for x in exact]
    outputs = []
    for a, hop, q, k, v in (exact, single):
        y, _ = propagate(q, k, v, a, REGIMES[regime], hop)
        y.square().mean().backward()
        outputs.append([y.detach(), *(x.grad for x in (a, hop, q, k, v))])
    for expected, got in zip(*outputs, strict=True):
        assert torch.isfinite(got).all()
        assert relative(got.double(), expected) <= 1e-4


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"a": torch.zeros(2, 3)}, ValueError, "expected shape"),
        ({"a": torch.zeros(2, 0, 1)}, ValueError, "empty"),
        ({"a": torch.zeros(2, 3, 1, dtype=torch.bfloat16)}, TypeError, "float32 or float64"),
        ({"hop": torch.ones(2, 4, 1)}, ValueError, "hop: expected shape"),
        ({"hop": torch.ones(2, 3, 1, dtype=torch.float64)}, TypeError, "hop: expected"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask: expected torch.bool"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "mask: expected shape"),
        ({"state": torch.zeros(2, 2)}, ValueError, "state: expected"),
    ],
)
def test_invalid_input_is_refused(change, error, words):
    inputs = {"a": torch.zeros(2, 3, 1) - 3, "z": 0.0, "hop": None, "state": None, "mask": None} | change
    with pytest.raises(error, match=words):
        left_green(inputs.pop("a"), inputs.pop("z"), inputs.pop("hop"), **inputs)


def test_invalid_propagator_input_is_refused():
    a, q, v = torch.zeros(1, 3, 1) - 3, torch.zeros(1, 3, 1, 3), torch.zeros(1, 3, 1, 2)
    with pytest.raises(ValueError, match="K must be even"):
        propagate(q, q, v, a, 1j)
    with pytest.raises(ValueError, match="v: expected shape"):
        propagate(q, q, v[:, :2], a, 0.0)
    with pytest.raises(TypeError, match="q: expected"):
        propagate(q.double(), q, v, a, 0.0)
    with pytest.raises(ValueError, match="has none"):
        propagate(q, q, v, a, 0.0, state=PropagatorState(a[:, 0], torch.zeros(1, 1, 3, 2)), causal=False)
