"""The sums of n-gram memory: the kernel and the plain form against the definition, with all gradients."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from resnet_bk.ops import available_backends, use_backend
from resnet_bk.ops.ngram_sum import ngram_sum

M, ORDERS, S, L, V, D = 23, 3, 4, 10, 7, 5
BACKENDS = [name for name in available_backends() if name in ("numba", "chunked")]


def arguments(dtype=torch.float64, positions=M):
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(positions, ORDERS, S, generator=generator, dtype=dtype)
    shares[:, :, 2:] *= torch.rand(positions, ORDERS, 2, generator=generator) < 0.5  # empty places
    parts = [torch.randn(size, generator=generator, dtype=dtype) for size in ((L,), (L, D), (V, D), (ORDERS, D))]
    level = torch.randint(L, (positions, ORDERS), generator=generator)
    tokens = torch.randint(V, (positions, ORDERS, S), generator=generator)
    return level, tokens, shares, *(part.requires_grad_() for part in parts)


def definition(level, tokens, shares, gain, vectors, table, scale):
    rows = []
    for m in range(len(level)):
        y = torch.zeros(D, dtype=table.dtype)
        for o in range(ORDERS):
            sums = sum(shares[m, o, s] * table[tokens[m, o, s]] for s in range(S))
            y = y + vectors[level[m, o]] + scale[o] * gain[level[m, o]] * sums
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positions", [1, 15, 16, 17, M])
def test_sums_and_gradients_are_those_of_the_definition(backend, positions):
    inputs = arguments(positions=positions)
    grad = torch.randn(positions, D, dtype=torch.float64)
    expected = definition(*inputs)
    with use_backend(backend):
        y = ngram_sum(*inputs)
        found = torch.autograd.grad(y, inputs[3:], grad)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs[3:], grad), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_differences(backend):
    rows, parameters = arguments()[:3], arguments()[3:]
    with use_backend(backend):
        assert gradcheck(lambda *p: ngram_sum(*rows, *p), parameters)
        assert gradgradcheck(lambda *p: ngram_sum(*rows, *p), parameters)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_passes_opcheck(backend):
    with use_backend(backend):
        opcheck(ngram_sum, arguments())


@pytest.mark.skipif("numba" not in BACKENDS, reason="needs numba")
def test_many_vectors_and_half_precision_take_the_plain_form(monkeypatch):
    from resnet_bk.ops import numba_ngram_sum

    def result(*inputs):
        y = ngram_sum(*inputs)
        return [y, *torch.autograd.grad(y.sum(), inputs[3:])]

    whole = result(*arguments())
    half = [x.detach().bfloat16() if x.is_floating_point() else x for x in arguments()]
    found = result(*half[:3], *(x.requires_grad_() for x in half[3:]))
    torch.testing.assert_close([x.double() for x in found], whole, rtol=0.1, atol=0.3)
    monkeypatch.setattr(numba_ngram_sum, "LARGEST", V * D - 1)
    monkeypatch.setattr(numba_ngram_sum, "_forward", None)
    monkeypatch.setattr(numba_ngram_sum, "_backward", None)
    torch.testing.assert_close(result(*arguments()), whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("at", "wrong"), [(0, L), (0, -1), (1, V), (1, -1)])
def test_rows_that_do_not_exist_are_refused(backend, at, wrong):
    inputs = list(arguments())
    inputs[at] = inputs[at].clone()
    inputs[at].view(-1)[5] = wrong
    with use_backend(backend), pytest.raises((IndexError, RuntimeError), match=r"ngram_sum|out of|embedding"):
        ngram_sum(*inputs)
