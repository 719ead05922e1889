"""Cross-entropy in pieces, against torch's on all logits: values and all gradients, and what it holds in memory."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_bk.layers import loss as module
from resnet_bk.layers.loss import linear_cross_entropy

T, D, V = 23, 4, 101


@pytest.fixture(autouse=True)
def _pieces_of_five_rows(monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 5 * V)


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, D, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(V, (T,), generator=generator)
    targets[3:9] = -100
    return x, weight, targets


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_and_its_gradients(reduction):
    results = []
    for at_once in (False, True):
        x, weight, targets = inputs()
        if at_once:
            nats = F.cross_entropy(F.linear(x, weight), targets, reduction=reduction)
        else:
            nats = linear_cross_entropy(x, weight, targets, reduction)
        (nats * torch.linspace(1, 2, nats.numel(), dtype=nats.dtype).view_as(nats)).sum().mul(3).backward()
        results.append((nats.detach(), x.grad, weight.grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_a_row_that_is_not_counted_does_not_matter():
    x, weight, targets = inputs()
    expected = linear_cross_entropy(x, weight, targets)
    with torch.no_grad():
        x[4] = math.nan
    loss = linear_cross_entropy(x, weight, targets)
    loss.backward()
    assert loss == expected
    assert not x.grad[3:9].any()
    x, weight, targets = inputs()
    loss = linear_cross_entropy(x, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0
    assert not x.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    tensors = inputs()
    tensors[frozen].requires_grad_(False)
    linear_cross_entropy(*tensors).backward()
    assert tensors[frozen].grad is None
    assert tensors[1 - frozen].grad.any()


def test_mixed_precision():
    x, weight, targets = inputs(torch.float32)
    expected = F.cross_entropy(F.linear(x, weight), targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets)
    loss.backward()
    assert x.grad.dtype == weight.grad.dtype == loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    reference = torch.autograd.grad(expected, (x, weight))
    for found, wanted in zip((x.grad, weight.grad), reference, strict=True):
        assert (found - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_second_derivatives(frozen):
    results = []
    for at_once in (True, False):
        *learned, targets = inputs()
        if frozen is not None:
            learned[frozen].requires_grad_(False)
        x, weight = learned
        wanted = [tensor for tensor in learned if tensor.requires_grad]
        nats = F.cross_entropy(F.linear(x, weight), targets) if at_once else linear_cross_entropy(x, weight, targets)
        first = torch.autograd.grad(3 * nats, wanted, create_graph=True)
        sum(g.square().sum() for g in first).backward()
        results.append([tensor.grad for tensor in wanted])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_float16_keeps_small_gradients(monkeypatch):
    """Of a vocabulary of 20,000, most ids are no target: their gradients are below what float16 can hold, divided by T.

    A gradient scaler multiplies the loss, not what the loss has computed before."""
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 2**23)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 4, generator=generator, requires_grad=True)
    weight = torch.randn(20_000, 4, generator=generator).mul_(0.05).requires_grad_()
    targets = torch.randint(100, (2048,), generator=generator)
    wanted = torch.autograd.grad(F.cross_entropy(F.linear(x, weight), targets), (x, weight))
    with torch.autocast("cpu", torch.float16):
        loss = linear_cross_entropy(x, weight, targets)
    found = torch.autograd.grad(loss * 65536, (x, weight))
    for a, b in zip((found[0], found[1][100:]), (wanted[0], wanted[1][100:]), strict=True):
        assert (a / 65536 - b).norm() < 0.01 * b.norm()


class Sizes(TorchDispatchMode):
    """Record the size of the largest result, the number of logits, and the names of the operators."""

    def __init__(self):
        super().__init__()
        self.largest = self.logits = 0
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket.__name__)
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
            if function is torch.ops.aten.mm.default and result.shape[1] == V:
                self.logits += result.numel()
        return result


def test_logits_are_computed_once_and_in_pieces():
    x, weight, targets = inputs()
    with Sizes() as sizes:
        linear_cross_entropy(x, weight, targets).backward()
    assert sizes.logits == T * V
    assert sizes.largest <= 5 * V
    assert "addmm_" in sizes.names
    with Sizes() as sizes, torch.no_grad():
        linear_cross_entropy(x, weight, targets)
    assert sizes.logits == T * V
    assert "addmm_" not in sizes.names  # no gradient is computed
