"""The sums of n-gram memory: the kernel and the plain form against the definition, with all gradients."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from resnet_bk.ops import available_backends, use_backend
from resnet_bk.ops.ngram_sum import ngram_sum

M, ORDERS, S, LEVELS, V, D = 23, 3, 4, 10, 7, 5
BACKENDS = [name for name in available_backends() if name in ("numba", "chunked")]


def arguments(dtype=torch.float64, positions=M, width=D):
    generator = torch.Generator().manual_seed(0)
    shares = torch.randint(256, (positions, ORDERS, S), generator=generator)
    shares[:, :, 2:] *= torch.rand(positions, ORDERS, 2, generator=generator) < 0.5  # empty places
    sizes = (ORDERS * LEVELS,), (ORDERS * LEVELS, width), (V, width), (ORDERS, width)
    parts = [torch.randn(size, generator=generator, dtype=dtype) for size in sizes]
    level = torch.randint(LEVELS, (positions, ORDERS, 1), generator=generator)
    tokens = torch.randint(V, (positions, ORDERS, S), generator=generator)
    found = torch.cat([level, tokens << 8 | shares], dim=-1).int()
    return found, *(part.requires_grad_() for part in parts)


def definition(found, gain, vectors, table, scale):
    rows = []
    for entries in found.tolist():
        y = torch.zeros(table.shape[1], dtype=table.dtype)
        for o, (level, *successors) in enumerate(entries):
            sums = sum(np.float32((x & 255) / 255).item() * table[x >> 8] for x in successors)
            y = y + vectors[o * LEVELS + level] + scale[o] * gain[o * LEVELS + level] * sums
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("positions", "width"), [(1, D), (15, D), (16, 8), (17, 16), (M, 33)])
def test_sums_and_gradients_are_those_of_the_definition(backend, positions, width):
    inputs = arguments(positions=positions, width=width)
    grad = torch.randn(positions, width, dtype=torch.float64)
    expected = definition(*inputs)
    with use_backend(backend):
        y = ngram_sum(*inputs)
        found = torch.autograd.grad(y, inputs[1:], grad)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs[1:], grad), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_positions(backend):
    inputs = arguments(positions=0)
    with use_backend(backend):
        y = ngram_sum(*inputs)
        assert y.shape == (0, D)
        assert not any(x.any() for x in torch.autograd.grad(y.sum(), inputs[1:]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_differences(backend):
    rows, *parameters = arguments()
    with use_backend(backend):
        assert gradcheck(lambda *p: ngram_sum(rows, *p), parameters)
        assert gradgradcheck(lambda *p: ngram_sum(rows, *p), parameters)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_passes_opcheck(backend):
    with use_backend(backend):
        opcheck(ngram_sum, arguments())


@pytest.mark.skipif("numba" not in BACKENDS, reason="needs numba")
def test_many_vectors_and_half_precision_take_the_plain_form(monkeypatch):
    from resnet_bk.ops import numba_ngram_sum

    def result(*inputs):
        y = ngram_sum(*inputs)
        return [y, *torch.autograd.grad(y.sum(), inputs[1:])]

    whole = result(*arguments())
    half = [x.detach().bfloat16() if x.is_floating_point() else x for x in arguments()]
    found = result(half[0], *(x.requires_grad_() for x in half[1:]))
    torch.testing.assert_close([x.double() for x in found], whole, rtol=0.1, atol=0.3)
    monkeypatch.setattr(numba_ngram_sum, "LARGEST", V * D - 1)
    monkeypatch.setattr(numba_ngram_sum, "_forward", None)
    monkeypatch.setattr(numba_ngram_sum, "_backward", None)
    torch.testing.assert_close(result(*arguments()), whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("at", "wrong"), [(0, ORDERS * LEVELS), (0, -1 - ORDERS * LEVELS), (1, V << 8 | 1), (1, -1)])
def test_rows_that_do_not_exist_are_refused(backend, at, wrong):
    found, *parameters = arguments()
    found[1, 0, at] = wrong
    with use_backend(backend), pytest.raises((IndexError, RuntimeError), match=r"ngram_sum|out of|embedding"):
        ngram_sum(found, *parameters)
