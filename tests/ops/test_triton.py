"""Tests of the Triton backend, on a GPU if there is one, else in Triton's interpreter; and its compilation for an H100.

Dimensions: B batch, N sites, H chains, K key width, V value width.
"""

import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'resnet-bk[gpu]'")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU, and TRITON_INTERPRET is not 1", allow_module_level=True)

from triton import knobs

from resnet_bk.config import ConfigError
from resnet_bk.ops import (
    Sparsity,
    available_backends,
    chunked,
    delta,
    kernels,
    left_green,
    naive,
    propagate,
    triton_check,
    triton_kernels,
    triton_scan,
    use_backend,
)
from resnet_bk.ops.conv import short_conv
from resnet_bk.ops.delta import delta_scan_op
from resnet_bk.ops.kernels import _green_by_steps, _scan_by_steps, backend_for, green_op, scan_op

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REGIMES = {"complex": 0.3 + 0.2j, "real": 0.1}


@pytest.fixture(autouse=True)
def _on_triton():
    with use_backend("triton"):
        yield


def chain(regime, n, batch=1, heads=1, k=4, v=3):
    hop = torch.rand(batch, n, heads, dtype=torch.float64) * 0.8 + 0.2
    a = -2 - torch.rand_like(hop) if regime == "real" else torch.rand_like(hop) * 6 - 3
    q, key = torch.randn(2, batch, n, heads, k, dtype=torch.float64)
    return [x.to(DEVICE) for x in (q, key, torch.randn(batch, n, heads, v, dtype=torch.float64), a, hop)]


def scan_inputs(n, k, v, batch=1, heads=2, dtype=torch.float64):
    """Return random inputs of the scan; decays have both signs, and some are 0."""
    q, key = torch.randn(2, batch, n, heads, k, dtype=torch.float64)
    alpha, beta = torch.randn(2, batch, n, heads, dtype=torch.float64).tanh()
    alpha[torch.rand_like(alpha) < 0.1] = 0
    values = torch.randn(batch, n, heads, v, dtype=torch.float64)
    inputs = (q, key, values, alpha, beta, torch.randn(batch, heads, k, v, dtype=torch.float64))
    return tuple(x.to(DEVICE, dtype).requires_grad_() for x in inputs)


def delta_inputs(n, k, v, **options):
    """Return the same with keys of length 1 and beta between 0 and 2, where the delta rule is stable."""
    q, key, values, alpha, beta, s0 = (x.detach() for x in scan_inputs(n, k, v, **options))
    key = torch.nn.functional.normalize(key, dim=-1)
    return tuple(x.requires_grad_() for x in (q, key, values, alpha, 1 + beta, s0))


def with_gradients(function, inputs):
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(DEVICE, x.dtype) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads, materialize_grads=True)]


def assert_equal(got, expected, tolerance=1e-11):
    for x, y in zip(got, expected, strict=True):
        assert (x.to(y.dtype) - y).abs().max() <= tolerance * max(1, y.abs().max())


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("n", [1, 2, 3, 31, 33, 65])
def test_the_propagator_and_its_gradients_equal_the_dense_definition(regime, n):
    inputs = [x.requires_grad_() for x in chain(regime, n)]
    z = REGIMES[regime]
    got = with_gradients(lambda q, k, v, a, hop: propagate(q, k, v, a, z, hop)[0], inputs)
    dense = lambda q, k, v, a, hop: naive.propagate(  # noqa: E731
        *(x[0, :, 0] for x in (q, k, v, a)), z, hop[0, :, 0]
    ).view(1, n, 1, -1)
    assert_equal(got, with_gradients(dense, inputs))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("n", [1, 2, 33, 130])
def test_green_and_its_gradients_with_masks_and_empty_rows(regime, n):
    d = -2.5 - torch.rand(3, n, 3, dtype=torch.float64)
    d = torch.complex(d + 1, 0.3 - torch.ones_like(d)) if regime == "complex" else d
    inputs = [x.to(DEVICE).requires_grad_() for x in (d, torch.rand(3, n, 3, dtype=torch.float64), 0.1 * d[:, 0])]
    mask = torch.rand(3, n) < 0.7
    mask[1] = False
    for sites in (None, mask.to(DEVICE)):
        got = with_gradients(lambda d, w, g0, sites=sites: green_op(d, w, g0, sites), inputs)
        assert_equal(got, with_gradients(lambda d, w, g0, sites=sites: _green_by_steps(d, w, g0, sites), inputs))


@pytest.mark.parametrize(
    ("n", "k", "v"), [(1, 3, 5), (2, 16, 16), (31, 24, 40), (33, 3, 72), (65, 40, 24), (130, 8, 8)]
)
def test_the_scan_and_its_gradients_equal_the_recurrence(n, k, v):
    inputs = scan_inputs(n, k, v)
    got = with_gradients(lambda *x: scan_op(*x)[:2], inputs)
    assert_equal(got, with_gradients(_scan_by_steps, inputs))
    assert_equal([scan_op(*inputs)[2]], [chunked.scan_forward(*inputs)[2].flatten()])


@pytest.mark.parametrize(
    ("n", "k", "v"), [(1, 3, 5), (2, 16, 16), (31, 24, 40), (33, 3, 72), (65, 40, 24), (100, 8, 8)]
)
def test_the_scan_with_the_delta_rule_and_its_gradients_equal_the_recurrence(n, k, v):
    inputs = delta_inputs(n, k, v)
    got = with_gradients(lambda *x: delta_scan_op(*x)[:2], inputs)
    assert_equal(got, with_gradients(lambda *x: delta._by_steps(*x)[:2], inputs))
    states, error = chunked.delta_scan_forward(*inputs)[2:]
    assert_equal(delta_scan_op(*inputs)[2:], [states.flatten(), error])


def test_reflections_at_one_key_stay_exact():
    """Powers of the triangular matrix of a chunk would reach 1e13 here; the inverse has entries up to 2."""
    q, k, v, alpha, beta, s0 = (x.detach() for x in delta_inputs(64, 16, 16, dtype=torch.float32))
    inputs = [q, k[:, :1].expand_as(k), v, torch.ones_like(alpha), torch.full_like(beta, 2), s0]
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got = with_gradients(lambda *x: delta_scan_op(*x)[:2], inputs)
    expected = with_gradients(lambda *x: delta._by_steps(*x)[:2], exact)
    for x, y in zip(got, expected, strict=True):
        assert (x.double() - y).norm() <= 1e-5 * y.norm()


@pytest.mark.parametrize("programs", [1, 4, 6])
def test_segments_of_several_chunks(programs, monkeypatch):
    """Six chunks in one segment, in two segments of three, in three of two; the last chunk has five sites."""
    monkeypatch.setattr(triton_scan, "PROGRAMS", programs)
    inputs = scan_inputs(165, 3, 5)
    assert_equal(
        with_gradients(lambda *x: scan_op(*x)[:2], inputs),
        with_gradients(_scan_by_steps, inputs),
    )


def test_a_state_that_stays_in_its_segment_is_caught(monkeypatch):
    """Planted bug: the state is not carried over the segments."""

    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **options: None

    inputs = scan_inputs(70, 3, 5)
    expected = _scan_by_steps(*inputs)[0]
    assert_equal([scan_op(*inputs)[0]], [expected])
    monkeypatch.setattr(triton_scan, "_carry_over_segments", Nothing())
    with pytest.raises(AssertionError):
        assert_equal([scan_op(*inputs)[0]], [expected], 1e-3)


def test_inputs_need_not_be_contiguous():
    n, heads, width = 37, 2, 6
    together = torch.randn(2, n, 3 * heads * width, dtype=torch.float64, device=DEVICE)
    q, k, v = together.unflatten(-1, (3, heads, width)).unbind(2)
    alpha, beta = (torch.rand(2, heads, n, dtype=torch.float64, device=DEVICE).mT for _ in range(2))
    s0 = torch.randn(2, heads, width, width, dtype=torch.float64, device=DEVICE).mT
    inputs = [x.requires_grad_() for x in (q.detach(), k.detach(), v.mT.contiguous().mT, alpha, beta, s0)]
    assert not any(x.is_contiguous() for x in inputs)
    assert_equal(with_gradients(lambda *x: scan_op(*x)[:2], inputs), with_gradients(_scan_by_steps, inputs))
    d = -2.5 - torch.rand(2, 3, n, dtype=torch.float64, device=DEVICE).mT
    w, g0 = torch.rand(2, 3, n, dtype=torch.float64, device=DEVICE).mT, torch.zeros(3, 2, device=DEVICE).mT.double()
    inputs = [x.requires_grad_() for x in (d, w, g0)]
    mask = (torch.rand(n, 2) < 0.7).mT.to(DEVICE)
    got = with_gradients(lambda d, w, g0: green_op(d, w, g0, mask), inputs)
    assert_equal(got, with_gradients(lambda d, w, g0: _green_by_steps(d, w, g0, mask), inputs))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)])
def test_low_precision_stays_near_float64(dtype, tolerance):
    for inputs, operator, by_steps in (
        (scan_inputs(70, 24, 16, dtype=dtype), scan_op, _scan_by_steps),
        (delta_inputs(70, 24, 16, dtype=dtype), delta_scan_op, delta._by_steps),
    ):
        exact = [x.detach().double().requires_grad_() for x in inputs]
        got = with_gradients(lambda *x, run=operator: run(*x)[:2], inputs)
        assert all(x.dtype == dtype for x in got)
        expected = with_gradients(lambda *x, run=by_steps: run(*x)[:2], exact)
        for x, y in zip(got, expected, strict=True):
            assert (x.double() - y).norm() <= tolerance * y.norm()


def test_a_gradient_can_be_differentiated():
    found = []
    for name in ("triton", "chunked"):
        torch.manual_seed(3)
        inputs = scan_inputs(3, 2, 2)
        with use_backend(name):
            y, last, _ = scan_op(*inputs)
            grads = torch.autograd.grad(y.square().sum() + last.sum(), inputs, create_graph=True)
            found.append(torch.autograd.grad(sum(x.square().sum() for x in grads), inputs))
    assert_equal(*found)


@pytest.mark.parametrize("regime", REGIMES)
def test_sparse_chains(regime):
    """They run the dense scan on packed sites: the backend has no sparse kernel."""
    found = []
    for name in ("triton", "chunked"):
        torch.manual_seed(3)
        q, k, v, a, hop = (x.requires_grad_() for x in chain(regime, 40, batch=2, heads=2))
        gate = (torch.rand(2, 40) < 0.5).double().to(DEVICE)
        kept = Sparsity(gate, *torch.rand(2, 2, dtype=torch.float64).to(DEVICE))
        with use_backend(name):
            run = lambda q, k, v, a, hop, kept=kept: propagate(  # noqa: E731
                kept.sites.pack(q), kept.sites.pack(k), v, a, REGIMES[regime], hop, sparsity=kept
            )[0]
            found.append(with_gradients(run, (q, k, v, a, hop)))
    assert_equal(*found)


def test_the_convolution_equals_torch():
    x = torch.randn(2, 70, 67, dtype=torch.float64, device=DEVICE).requires_grad_()
    weight = torch.randn(4, 67, dtype=torch.float64, device=DEVICE).requires_grad_()
    expected = lambda x, weight: torch.nn.functional.conv1d(x.mT, weight.T.unsqueeze(1), groups=67).mT  # noqa: E731
    assert_equal(with_gradients(short_conv, (x, weight)), with_gradients(expected, (x, weight)))


def test_it_is_preferred_on_gpus_only():
    with use_backend(None):
        assert backend_for(torch.zeros(1)).__name__ != "resnet_bk.ops.triton_kernels"
    assert available_backends("cuda")[0] == "triton"
    assert backend_for(torch.zeros(1, device=DEVICE)).__name__ == "resnet_bk.ops.triton_kernels"


@pytest.fixture
def _unchecked(monkeypatch):
    """Make Triton the preferred backend, not yet checked, with a small check."""
    monkeypatch.setattr(kernels, "_installed", lambda device_type: ("triton", "chunked"))
    monkeypatch.setattr(triton_check, "LENGTH", 70)
    monkeypatch.setattr(triton_check, "WIDTH", 16)
    monkeypatch.setattr(triton_scan, "PROGRAMS", 4)
    trusted = triton_check.trusted
    trusted.cache_clear()
    with use_backend(None):
        yield
    trusted.cache_clear()


@pytest.mark.usefixtures("_unchecked")
def test_right_kernels_are_trusted():
    assert backend_for(torch.zeros(1, device=DEVICE)) is triton_kernels


@pytest.mark.parametrize(
    ("kernel", "factor"), [("green", 1.01), ("scan", 0.99), ("delta_scan", 1.01), ("conv", torch.nan)]
)
@pytest.mark.usefixtures("_unchecked")
def test_a_wrong_kernel_is_replaced_after_one_warning(kernel, factor, monkeypatch):
    """Planted bug: one gradient of a kernel is wrong by 1%, or NaN."""
    backward = getattr(triton_kernels, f"{kernel}_backward")

    def wrong(*inputs):
        grads = list(backward(*inputs))
        grads[-1] *= factor
        return tuple(grads)

    monkeypatch.setattr(triton_kernels, f"{kernel}_backward", wrong)
    error = "nan" if factor != factor else r"1\.0e-02"
    message = rf"^{kernel}\w* kernel of Triton .* got a relative error of {error}, allowed 1e-04; .*'chunked' is used"
    with pytest.warns(RuntimeWarning, match=message):
        assert backend_for(torch.zeros(1, device=DEVICE)) is chunked
    x, weight = torch.randn(1, 7, 5, device=DEVICE), torch.randn(4, 5, device=DEVICE)
    assert torch.equal(short_conv(x, weight), chunked.conv_forward(x, weight))
    with use_backend("triton"):
        assert backend_for(x) is triton_kernels


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.usefixtures("_unchecked")
def test_tracing_does_not_check(monkeypatch):
    checked = []
    monkeypatch.setattr(triton_check, "trusted", lambda device: not checked.append(device))
    ones = torch.ones(1, 9, dtype=torch.float64, device=DEVICE)
    kept = Sparsity(ones, ones[0, :2], ones[0, :2], bound=9)

    def run(q, k, v, a, hop):
        return propagate(q, k, v, a, 0.1, hop, sparsity=kept)[0] + propagate(q, k, v, a, 0.1, hop)[0]

    def backend(graph, inputs):
        assert not checked
        return graph.forward

    torch.compile(run, fullgraph=True, backend=backend)(*chain("real", 9, heads=2))
    assert checked


def test_without_a_gpu_or_the_interpreter_it_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(kernels, "_installed", kernels._installed.__wrapped__)
    with pytest.raises(ConfigError, match=r"got 'triton', .*not available on cpu\), allowed .*chunked; .*\[gpu\]"):
        left_green(torch.zeros(1, 2, 1) - 3, 0.0)


@pytest.mark.parametrize("dtypes", ["float32 bfloat16", pytest.param("float16 float64", marks=pytest.mark.soak)])
def test_every_kernel_compiles_for_an_h100(dtypes, tmp_path):
    """The compiler checks what the interpreter does not: types, shapes of products, shared memory."""
    command = [sys.executable, Path(__file__).with_name("compile_triton.py"), *dtypes.split()]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in compiled} == {
        *("_compose", "_carry_g", "_recur", "_adjoint", "_carry_adjoint"),
        *("_carry_state", "_carry_over_segments", "_outputs", "_gradients", "_forward", "_backward"),
        *("_solve", "_carry_errors"),
    }
    assert all(int(shared) <= 227 * 1024 for _, shared in compiled)


def test_where_triton_cannot_write_kernels_compile_in_a_temporary_folder(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    for folder in (str(tmp_path / "file" / "cache"), "~/.triton/cache"):  # the latter: the user has no home directory
        monkeypatch.setattr(knobs.cache, "dir", folder)
        with pytest.warns(RuntimeWarning, match=rf"^triton: {folder} cannot be written.*set TRITON_CACHE_DIR"):
            importlib.reload(triton_kernels)
        assert Path(knobs.cache.dir).is_dir()
        assert Path(knobs.cache.dir).parent == Path(tempfile.gettempdir())
