"""Properties of the core over random chains: 500 examples each in CI.

Dimensions: N sites, B = H = 1.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st

from resnet_bk.ops import left_green, propagate, resolvent_diagonal, use_backend

EPS = 1e-10


@st.composite
def chains(draw, regime=None, least=1):
    regime = regime or draw(st.sampled_from(["real", "complex"]))
    n = draw(st.integers(least, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def uniform(low, high, *shape):
        return torch.rand(1, n, 1, *shape, generator=generator, dtype=torch.float64) * (high - low) + low

    if regime == "real":
        margin = draw(st.floats(1e-3, 10))
        hop, z = uniform(0.01, 1), 0.0
        a = -(2 + margin) - uniform(0, 3)
    else:
        hop, z = uniform(-2, 2), complex(draw(st.floats(-3, 3)), draw(st.floats(0.01, 3)))
        a = uniform(-3, 3)
    q, k, v = uniform(-1, 1, 2), uniform(-1, 1, 2), uniform(-1, 1, 3)
    return a, z, hop, q, k, v


def close(x, y, scale=1.0):
    return (x - y).abs().max().item() <= EPS * max(1.0, scale, y.abs().max().item())


@given(chains())
def test_g_solves_its_recursion(c):
    a, z, hop, *_ = c
    g = left_green(a, z, hop)[0][0, :, 0]
    before = torch.cat([torch.zeros_like(g[:1]), g[:-1]])
    assert close(g * (a[0, :, 0] - z - hop[0, :, 0] ** 2 * before), torch.ones_like(g))


@given(chains("complex"))
def test_complex_g_stays_in_the_upper_half_plane(c):
    a, z, hop, *_ = c
    g, _ = left_green(a, z, hop)
    assert (g.imag > 0).all()
    assert (g.abs() <= (1 + 1e-9) / z.imag).all()


@given(chains("real"))
def test_real_decay_is_between_0_and_1(c):
    a, z, hop, *_ = c
    decay = -hop * left_green(a, z, hop)[0]
    assert ((decay > 0) & (decay < 1)).all()


@given(chains(least=2), st.data())
def test_any_cut_gives_the_same(c, data):
    a, z, hop, q, k, v = c
    cut = data.draw(st.integers(1, a.shape[1] - 1))
    whole, end = propagate(q, k, v, a, z, hop)
    first, state = propagate(*(x[:, :cut] for x in (q, k, v, a)), z, hop[:, :cut])
    second, last = propagate(*(x[:, cut:] for x in (q, k, v, a)), z, hop[:, cut:], state=state)
    assert close(torch.cat([first, second], 1), whole)
    assert close(last.s, end.s)


@given(chains(least=2), st.data())
def test_later_sites_change_no_bit(c, data):
    a, z, hop, q, k, v = c
    t = data.draw(st.integers(1, a.shape[1] - 1))
    y, _ = propagate(q, k, v, a, z, hop)
    later = [torch.cat([x[:, :t], x[:, t:] * 0.5], dim=1) for x in (q, k, v)]
    assert torch.equal(propagate(*later, a, z, hop)[0][:, :t], y[:, :t])


@given(chains(), st.data())
def test_padding_is_neutral(c, data):
    a, z, hop, q, k, v = c
    n = a.shape[1]
    extra = data.draw(st.integers(1, 9))
    places = sorted(data.draw(st.permutations(range(n + extra)))[:n])
    mask = torch.zeros(1, n + extra, dtype=torch.bool)
    mask[0, places] = True
    padded = []
    for x in (q, k, v, a, hop):
        wide = torch.full((1, n + extra, *x.shape[2:]), 3.0, dtype=x.dtype)
        wide[:, places] = x
        padded.append(wide)
    y, state = propagate(*padded[:4], z, padded[4], mask=mask)
    expected, end = propagate(q, k, v, a, z, hop)
    assert close(y[:, places], expected)
    assert close(state.s, end.s)


@given(chains())
def test_the_diagonal_is_the_same_read_from_the_end(c):
    a, z, hop, *_ = c
    mirrored = torch.cat([hop[:, :1], hop[:, 1:].flip(1)], dim=1)  # hop[0] links to nothing
    assert close(resolvent_diagonal(a.flip(1), z, mirrored).flip(1), resolvent_diagonal(a, z, hop))


@given(chains())
def test_the_last_left_green_is_the_last_diagonal(c):
    a, z, hop, *_ = c
    assert close(left_green(a, z, hop)[0][:, -1], resolvent_diagonal(a, z, hop)[:, -1])


@given(chains(), st.floats(-3, 3))
def test_shifting_energies_and_z_together_changes_nothing(c, shift):
    a, z, hop, *_ = c
    assert close(left_green(a + shift, z + shift, hop)[0], left_green(a, z, hop)[0], 10)


@given(chains())
def test_the_sign_of_a_hopping_is_a_gauge_for_g(c):
    a, z, hop, *_ = c
    assert torch.equal(left_green(a, z, -hop)[0], left_green(a, z, hop)[0])


@given(chains(), st.floats(-5, 5))
def test_propagate_is_linear_in_v(c, factor):
    a, z, hop, q, k, v = c
    y = propagate(q, k, v, a, z, hop)[0]
    other = propagate(q, k, v.flip(-1), a, z, hop)[0]
    assert close(propagate(q, k, v + factor * v.flip(-1), a, z, hop)[0], y + factor * other, y.abs().max().item())


@given(chains())
def test_backends_agree(c):
    a, z, hop, q, k, v = c
    y, _ = propagate(q, k, v, a, z, hop)
    with use_backend("chunked"):
        assert close(propagate(q, k, v, a, z, hop)[0], y)
