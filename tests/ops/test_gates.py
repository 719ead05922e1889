"""Tests of the kernels around matrix products: the definition, all gradients, odd lengths and widths.

Dimensions: B batch, N positions, H heads, K head width, D = H K, W positions of the convolution, F hidden width.
"""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.nn import functional as F

from resnet_bk.ops import available_backends, gates, use_backend

pytestmark = pytest.mark.skipif("numba" not in available_backends(), reason="needs numba")

DTYPES = [(torch.float64, 1e-12), (torch.float32, 2e-5)]


def with_gradients(function, inputs):
    """Return the outputs and all gradients for fixed random gradients of the outputs."""
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in out]
    return [*out, *torch.autograd.grad(out, inputs, grads, materialize_grads=True)]


def assert_equal(got, expected, tolerance):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def inputs_of_a_mixer(n, dtype=torch.float64, width=16, taps=4, delta=True, batch=2, heads=2):
    d = width * heads
    shapes = (batch, n, 4 * d + heads * delta), (batch, taps - 1, 3 * d), (taps, 3 * d)
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def operator(delta, heads=2):
    return lambda *x: gates.mixer_inputs_op(*x, heads, delta)


def definition(delta, heads=2):
    return lambda *x: gates._mixer_inputs(*x, heads, delta)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 31, 32, 33, 34, 35, 36, 70])
def test_inputs_of_a_mixer_and_their_gradients_equal_the_definition(n, delta):
    for dtype, tolerance in DTYPES:
        x = inputs_of_a_mixer(n, dtype, delta=delta)
        assert_equal(with_gradients(operator(delta), x), with_gradients(definition(delta), x), tolerance)


@pytest.mark.parametrize(("width", "taps"), [(16, 1), (16, 2), (32, 7), (48, 4)])
def test_other_widths_and_convolutions(width, taps):
    x = inputs_of_a_mixer(40, width=width, taps=taps)
    assert_equal(with_gradients(operator(True), x), with_gradients(definition(True), x), 1e-12)


def test_the_definition_of_the_inputs_position_by_position():
    p, past, weight = (x.detach() for x in inputs_of_a_mixer(5))
    q, k, v, gate, write = gates.mixer_inputs(p, past, weight, 2, True)
    rows = torch.cat([past, p[..., :96]], dim=1)
    for t in range(5):
        u = F.silu((rows[:, t : t + 4] * weight).sum(1)).view(2, 3, 2, 16)
        assert_equal([q[:, t], v[:, t]], [u[:, 0] / math.sqrt(16), u[:, 2]], 1e-12)
        assert_equal([k[:, t]], [u[:, 1] / (1 + u[:, 1].norm(dim=-1, keepdim=True) ** 2).sqrt()], 1e-12)
    assert_equal([gate, write], [F.silu(p[..., 96:128]), p[..., 128:].sigmoid()], 1e-12)


def normed(n, dtype=torch.float64, width=16, heads=2):
    y, gate = torch.randn(2, n, heads, width, dtype=dtype), torch.randn(2, n, heads * width, dtype=dtype)
    return tuple(x.requires_grad_() for x in (y, torch.rand(width, dtype=dtype), gate))


@pytest.mark.parametrize("n", [1, 2, 3, 33])
@pytest.mark.parametrize("width", [16, 48])
def test_the_gated_norm_and_its_gradients_equal_the_definition(n, width):
    for dtype, tolerance in DTYPES:
        x = normed(n, dtype, width)
        got, expected = (
            with_gradients(lambda *x, f=f: f(*x, 1e-5), x) for f in (gates.gated_norm_op, gates._gated_norm)
        )
        assert_equal(got, expected, tolerance)


@pytest.mark.parametrize("width", [16, 17, 31, 172])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (40,)])
def test_swiglu_and_its_gradient_equal_the_definition(shape, width):
    for dtype, tolerance in DTYPES:
        x = (torch.randn(*shape, 2 * width, dtype=dtype, requires_grad=True),)
        assert_equal(with_gradients(gates.swiglu_op, x), with_gradients(gates._swiglu, x), tolerance)


def test_gradients_are_exact():
    x = inputs_of_a_mixer(3, width=8, taps=2, batch=1)
    assert gradcheck(operator(True), x)
    assert gradgradcheck(operator(True), x)
    x = normed(2, width=8)
    assert gradcheck(lambda *x: gates.gated_norm_op(*x, 1e-5), x)
    assert gradgradcheck(lambda *x: gates.gated_norm_op(*x, 1e-5), x)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert gradcheck(gates.swiglu_op, x)
    assert gradgradcheck(gates.swiglu_op, x)


def test_the_operators_are_registered_properly():
    opcheck(gates.mixer_inputs_op, (*inputs_of_a_mixer(5), 2, True))
    opcheck(gates.gated_norm_op, (*normed(5), 1e-5))
    opcheck(gates.swiglu_op, (torch.randn(3, 5, 32, requires_grad=True),))


def test_what_numba_cannot_take_is_computed_by_torch(monkeypatch):
    def refuse(*args):
        raise AssertionError

    for name in ("mixer_inputs_op", "gated_norm_op", "swiglu_op"):
        monkeypatch.setattr(gates, name, refuse)
    gates.mixer_inputs(*inputs_of_a_mixer(5, width=12), 2, True)  # heads that do not fill a register
    gates.mixer_inputs(*inputs_of_a_mixer(5, torch.bfloat16), 2, True)
    gates.mixer_inputs(*inputs_of_a_mixer(1), 2, True)  # a step of decoding
    gates.gated_norm(*normed(5, width=12), 1e-5)
    gates.swiglu(torch.randn(3, 2))
    with use_backend("chunked"):
        gates.mixer_inputs(*inputs_of_a_mixer(5), 2, True)
        gates.gated_norm(*normed(5), 1e-5)
        gates.swiglu(torch.randn(3, 64))
    with pytest.raises(AssertionError):
        gates.mixer_inputs(*inputs_of_a_mixer(5), 2, True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_exponential_of_lanes(dtype):
    from numba import prange

    from resnet_bk.jit import jit
    from resnet_bk.jit.simd import LANE_BYTES, exp, load, store

    @jit
    def run(x, y):
        lanes = LANE_BYTES // x.itemsize
        for group in prange(x.size // lanes):
            c = group * lanes
            store(y, c, exp(load(x, c)))

    least, most = (-86, 88) if dtype == np.float32 else (-708, 709)
    x = np.linspace(least, most, 64_000).astype(dtype)
    y = np.empty_like(x)
    run(x, y)
    error = np.abs(y / np.exp(x.astype(np.longdouble)) - 1).max() / np.finfo(dtype).eps
    assert error <= 2
    x = np.resize(np.array([-1e30, least - 1, most + 1, 1e30], dtype), 64)
    y = np.empty_like(x)
    run(x, y)
    np.testing.assert_allclose(y, np.exp(np.clip(x, least, most)), rtol=1e-6)


def test_a_nan_and_an_overflow_reach_the_output():
    """They end a training; a kernel must not hide them."""
    for bad in (math.nan, math.inf, 1e30):
        y, weight, gate = (x.detach().float() for x in normed(2))
        y[0, 1, 0, 3] = bad
        assert not gates.gated_norm_op(y, weight, gate, 1e-5)[0, 1, :16].isfinite().any()
    for bad in (math.nan, math.inf):
        x = torch.ones(1, 32)
        x[0, 3] = bad
        torch.testing.assert_close(gates.swiglu_op(x), gates._swiglu(x), equal_nan=True)
        p, past, weight = (x.detach() for x in inputs_of_a_mixer(3))
        p[0, 1, 5] = bad
        assert not gates.mixer_inputs_op(p, past, weight, 2, True)[0][0, 1, 0, 5].isfinite()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # by torch itself
def test_transforms_of_functions_use_torch():
    x, t = torch.randn(3, 64), torch.randn(3, 64)
    got = torch.func.jvp(gates.swiglu, (x,), (t,))[1]
    torch.testing.assert_close(got, torch.func.jvp(gates._swiglu, (x,), (t,))[1])
    torch.testing.assert_close(
        torch.func.grad(lambda x: gates.swiglu(x).sum())(x),
        torch.autograd.functional.jacobian(lambda x: gates.swiglu(x).sum(), x),
    )
