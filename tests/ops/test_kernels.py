"""Tests of the registered operators: registration, backends, FLOP formulas, a planted bug.

Dimensions: B batch, N sites, H chains, K key width, V value width.
"""

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.ops import available_backends, chunked, left_green, naive, use_backend
from resnet_bk.ops.conv import short_conv, short_conv_op
from resnet_bk.ops.kernels import backend_for, green_op, scan, scan_op


def green_inputs(kind, dtype=torch.float64, n=37):
    d = -2.5 - torch.rand(2, n, 3, dtype=dtype)
    d = torch.complex(d, -0.3 * torch.ones_like(d)) if kind == "complex" else d
    mask = torch.rand(2, n) < 0.8
    return (
        d.requires_grad_(),
        torch.rand(2, n, 3, dtype=dtype).requires_grad_(),
        torch.zeros_like(d[:, 0]).detach(),
        mask,
    )


def scan_inputs(dtype=torch.float64, n=37, k=3, v=5):
    q, key = torch.randn(2, 2, n, 3, k, dtype=dtype)
    values = torch.randn(2, n, 3, v, dtype=dtype)
    alpha, beta = torch.randn(2, 2, n, 3, dtype=dtype).tanh()
    inputs = (q, key, values, alpha, beta, torch.randn(2, 3, k, v, dtype=dtype))
    return tuple(x.clone().requires_grad_() for x in inputs)


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("masked", [True, False])
def test_green_passes_opcheck(every_backend, kind, masked):
    d, w, g0, mask = green_inputs(kind)
    opcheck(green_op, (d, w, g0, mask if masked else None))


def test_scan_and_conv_pass_opcheck(every_backend):
    opcheck(scan_op, scan_inputs())
    x, weight = torch.randn(2, 12, 3).requires_grad_(), torch.randn(4, 3).requires_grad_()
    opcheck(short_conv_op, (x, weight))


@pytest.mark.parametrize("name", [name for name in available_backends() if name != "chunked"])
@pytest.mark.parametrize("n", [2, 31, 32, 33, 100])
def test_backends_agree_on_outputs_and_gradients(name, n):
    results = []
    for each in ("chunked", name):
        torch.manual_seed(1)
        with use_backend(each):
            found = []
            for kind in ("real", "complex"):
                d, w, g0, mask = green_inputs(kind, n=n)
                g0 = (g0 + 0.1).requires_grad_()
                for m in (None, mask):
                    g = green_op(d, w, g0, m)
                    found += [g, *torch.autograd.grad(g.abs().square().sum(), (d, w, g0))]
            inputs = scan_inputs(n=n)
            y, last, states = scan_op(*inputs)
            found += [y, last, states, *torch.autograd.grad(y.square().sum() + last.square().sum(), inputs)]
            results.append(found)
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_an_unknown_backend_is_refused():
    with use_backend("nonesuch"), pytest.raises(ValueError, match=r"not available on cpu; available: .*chunked"):
        left_green(torch.zeros(1, 2, 1) - 3, 0.0)


def test_numba_is_preferred_where_it_is_installed():
    expected = available_backends()[0]
    assert backend_for(torch.zeros(1)).__name__.endswith({"numba": "numba_kernels", "chunked": "chunked"}[expected])


def test_conv_equals_torch_and_its_gradient_is_exact(backend):
    x, weight = torch.randn(2, 13, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    expected = torch.nn.functional.conv1d(x.mT, weight.T.unsqueeze(1), groups=3).mT
    torch.testing.assert_close(short_conv(x, weight), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(short_conv(x[:, :4], weight), expected[:, :1], rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(short_conv, (x.requires_grad_(), weight.requires_grad_()))
    assert torch.autograd.gradgradcheck(short_conv, (x[:, :6], weight))


def test_registered_flops_count_the_steps():
    inputs = scan_inputs(n=10)
    with FlopCounterMode(display=False) as counter:
        y, _ = scan(*inputs)
    state_entries = 2 * 3 * 3 * 5
    assert counter.get_total_flops() == 5 * 10 * state_entries
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 14 * 10 * state_entries
    d, w, g0, _ = green_inputs("real", n=10)
    with FlopCounterMode(display=False) as counter:
        green_op(d, w, g0, None)
    assert counter.get_total_flops() == 3 * d.numel()


def test_a_wrong_scan_order_is_caught(monkeypatch):
    """Planted bug: the chunks come back in reversed order. The comparison with the dense definition must fail."""
    a = -2 - torch.rand(1, 50, 1, dtype=torch.float64)
    hop = torch.ones_like(a)
    expected = naive.left_green(a[0, :, 0], 0.0, hop[0, :, 0])
    with use_backend("chunked"):
        assert torch.allclose(left_green(a, 0.0, hop)[0][0, :, 0], expected, rtol=1e-12)
        monkeypatch.setattr(chunked, "_unfold", lambda x, n, unfold=chunked._unfold: unfold(x.flip(2), n))
        assert not torch.allclose(left_green(a, 0.0, hop)[0][0, :, 0], expected, rtol=1e-6)
