"""Tests of the registered operators: registration, backends, FLOP formulas, a planted bug.

Dimensions: B batch, N sites, H chains, K key width, V value width.
"""

import importlib.util
import multiprocessing
import sys

import pytest
import torch
from torch.library import opcheck
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.config import ConfigError
from resnet_bk.ops import available_backends, chunked, kernels, left_green, naive, propagate, use_backend
from resnet_bk.ops.conv import short_conv, short_conv_op
from resnet_bk.ops.kernels import backend_for, green_op, load_backend, scan, scan_op


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


def test_an_unknown_backend_is_refused(monkeypatch):
    with (
        use_backend("nonesuch"),
        pytest.raises(ConfigError, match=r"'nonesuch'.*not available on cpu.*allowed .*chunked"),
    ):
        left_green(torch.zeros(1, 2, 1) - 3, 0.0)
    monkeypatch.setenv("RESNET_BK_BACKEND", "nonesuch")
    with pytest.raises(ConfigError, match=r"^RESNET_BK_BACKEND: got 'nonesuch', allowed triton, numba, chunked"):
        kernels._chosen()


def test_numba_is_preferred_where_it_is_installed():
    expected = "numba_kernels" if importlib.util.find_spec("numba") else "chunked"
    assert backend_for(torch.zeros(1)).__name__.endswith(expected)


def test_a_broken_package_costs_its_backend_and_one_warning(monkeypatch):
    def load(name):
        if name == "numba":
            raise ImportError("Numba needs NumPy 2.4 or less.\nGot NumPy 2.6.")
        return chunked

    monkeypatch.setattr(kernels, "load_backend", load)
    monkeypatch.setattr(kernels, "_defects", {})
    monkeypatch.setattr(kernels, "_installed", lambda device_type: ("numba", "chunked"))
    kernels._warn.cache_clear()
    reason = r"\(ImportError: Numba needs NumPy 2.4 or less. Got NumPy 2.6.\)"
    with pytest.warns(RuntimeWarning, match=f"'numba' cannot be used {reason}") as warned:
        assert [backend_for(torch.zeros(1)) for _ in range(2)] == [chunked, chunked]
    assert len(warned) == 1
    assert available_backends() == ("chunked",)
    with use_backend("numba"), pytest.raises(ConfigError, match=f"got 'numba', .*{reason}, allowed chunked"):
        backend_for(torch.zeros(1))


def gradient_of_a_pass():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 100, 4, 8, dtype=torch.float64).unbind()
    torch.ones(600, 600).exp()  # large enough for torch's OpenMP threads
    y, _ = propagate(q.requires_grad_(), k, v, -2.1 - torch.rand(2, 100, 4, dtype=torch.float64), 0.0)
    return torch.autograd.grad(y.square().sum(), q)[0]


def in_a_process():
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(gradient_of_a_pass().numpy()))
    process.start()
    try:
        assert receiver.poll(60), "the child hangs"
        return torch.from_numpy(receiver.recv())
    finally:
        process.kill()
        process.join()


class Passes(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return gradient_of_a_pass()


def in_a_worker():
    (found,) = DataLoader(Passes(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    return found


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system's own libraries do not allow forks")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, torch refuses gradients in a fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and later
@pytest.mark.filterwarnings("ignore:backend 'numba' cannot be used:RuntimeWarning")
@pytest.mark.parametrize("run", [in_a_process, in_a_worker])
def test_a_child_forked_after_a_pass_computes_the_same(run, two_threads):
    expected = gradient_of_a_pass()
    torch.testing.assert_close(run(), expected)
    assert torch.get_num_threads() == 2


@pytest.mark.skipif("numba" not in available_backends(), reason="needs the extra cpu-fast")
def test_a_forked_child_has_one_thread_and_no_numba(monkeypatch, two_threads):
    load_backend("numba")
    monkeypatch.setattr(kernels, "_defects", {})
    kernels._after_fork()
    assert torch.get_num_threads() == 1
    assert "numba" not in available_backends()
    with use_backend("numba"), pytest.raises(ConfigError, match=r"fork of one that ran numba; .*'spawn'"):
        backend_for(torch.zeros(1))


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
