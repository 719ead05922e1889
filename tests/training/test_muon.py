"""Muon against its definition, one matrix at a time in a loop."""

import copy
import math

import pytest
import torch
from torch import nn

from resnet_bk import LanguageModel
from resnet_bk.layers.matrices import Matrices, matrices
from resnet_bk.training import muon, optimizers

RATE, DECAY, BETAS = 0.02, 0.3, (0.9, 0.99)


def definition(matrix, outputs):
    """Return the update of one matrix, from its momentum. outputs: its number of outputs."""
    x = matrix.T if len(matrix) > len(matrix.T) else matrix
    x = x / (x.square().sum().sqrt() + 1e-7)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    x = x.T if len(matrix) > len(matrix.T) else x
    return 1.6 * math.sqrt(max(1, outputs / matrix.numel() * outputs)) * x


def pieces(parameter, sizes, dim):
    """Return the single matrices of a parameter, as views."""
    parts = parameter.split(sizes, dim) if sizes else [parameter]
    return [x for part in parts for x in (part if part.dim() == 3 else [part])]


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]


def make(dtype=torch.float64, **fields):
    torch.manual_seed(0)
    return LanguageModel(31, **{"d_model": 16, "n_layers": 2, "d_ff": 40, **fields}).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("experts", [1, 3])
def test_updates_are_those_of_the_definition(experts, dtype):
    model = make(dtype, num_experts=experts)
    plain = copy.deepcopy(model)
    optimizer = optimizers.create(model, RATE, DECAY, BETAS, "muon")
    hidden = matrices(plain)
    others = [p for p in plain.parameters() if all(p is not m.parameter for m in hidden)]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.dim() >= 2], "weight_decay": DECAY},
            {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=RATE,
        betas=BETAS,
    )
    momenta = [torch.zeros_like(m.parameter) for m in hidden]
    for step in range(3):
        for network in (model, plain):
            for p, gradient in zip(network.parameters(), gradients(model, step), strict=True):
                p.grad = gradient
        optimizer.step()
        adamw.step()
        with torch.no_grad():
            for (p, sizes, dim), momentum in zip(hidden, momenta, strict=True):
                momentum += 0.05 * (p.grad - momentum)
                nesterov = 0.05 * p.grad + 0.95 * momentum
                for x, update in zip(pieces(p, sizes, dim), pieces(nesterov, sizes, dim), strict=True):
                    outputs = x.shape[1] if p.dim() == 3 else x.shape[0]
                    x.mul_(1 - RATE * DECAY).sub_(RATE * definition(update, outputs))
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (2, 64), (1, 8), (5, 24, 64), (5, 64, 24), (200, 50)])
def test_updates_are_nearly_orthogonal(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    muon.orthogonalize_([x])
    u, _, v = torch.linalg.svd(before, full_matrices=False)
    inputs, outputs = shape[-2:] if len(shape) == 3 else reversed(shape)
    scale = 1.6 * math.sqrt(max(1, outputs / inputs))
    for values in (torch.linalg.svdvals(x), (u.mT @ x @ v.mT).diagonal(dim1=-2, dim2=-1)):  # with the same vectors
        assert 0.6 < values.min() / scale <= values.max() / scale < 1.3


def test_matrices_that_are_computed_together_are_as_if_alone():
    generator = torch.Generator().manual_seed(0)
    shapes = [(16, 40), (40, 16), (16, 16), (3, 16, 40), (2, 16), (16, 40)]
    together = [torch.randn(shape, generator=generator) for shape in shapes]
    wide = torch.randn(4, 16, 80, generator=generator)  # two matrices side by side, not contiguous
    alone = [x.clone() for x in (*together, *wide.split((40, 40), -1))]
    muon.orthogonalize_([*together, *wide.split((40, 40), -1)])
    for x in alone:
        for matrix in x.split(1) if x.dim() == 3 else [x]:
            muon.orthogonalize_([matrix])
    for a, b in zip((*together, *wide.split((40, 40), -1)), alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_batches_of_matrices_do_not_change_the_update(monkeypatch):
    results = []
    for batch in (muon.BATCH, 1000, 1):
        monkeypatch.setattr(muon, "BATCH", batch)
        model = make()
        optimizer = optimizers.create(model, RATE, DECAY, BETAS, "muon")
        for p, gradient in zip(model.parameters(), gradients(model, 0), strict=True):
            p.grad = gradient
        optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(results[2], results[0], rtol=1e-12, atol=1e-12)


def test_a_gradient_of_zeros_moves_nothing():
    x = torch.zeros(3, 4, 8)
    muon.orthogonalize_([x])
    assert not x.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_the_matrix(dtype):
    assert muon.newton_schulz(torch.randn(2, 4, 8).to(dtype)).dtype == dtype


def test_parameters_without_a_gradient_stay_as_they_are():
    model = make()
    optimizer = optimizers.create(model, RATE, DECAY, BETAS, "muon")
    before = [p.detach().clone() for p in model.parameters()]
    for i, (p, gradient) in enumerate(zip(model.parameters(), gradients(model, 0), strict=True)):
        p.grad = gradient if i % 2 else None
    optimizer.step()
    for i, (p, old) in enumerate(zip(model.parameters(), before, strict=True)):
        assert torch.equal(p, old) == (i % 2 == 0)
        assert (p in optimizer.state) == (i % 2 == 1)


def test_gradients_are_left_as_they_are():
    model = make()
    optimizer = optimizers.create(model, RATE, DECAY, BETAS, "muon")
    for p, gradient in zip(model.parameters(), gradients(model, 0), strict=True):
        p.grad = gradient
    optimizer.step()
    assert all(map(torch.equal, (p.grad for p in model.parameters()), gradients(model, 0)))


def test_state_and_schedule_survive_load_state_dict():
    """The Trainer's own wrapper loads the state of an optimizer back into it."""
    model, other = make(), make()
    pair = [optimizers.create(m, RATE, DECAY, BETAS, "muon") for m in (model, other)]
    for group in (group for optimizer in pair for group in optimizer.param_groups):
        group["initial_lr"] = RATE
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in pair]
    for step in range(3):
        pair[1].load_state_dict(copy.deepcopy(pair[1].state_dict()))
        for network, optimizer, schedule in zip((model, other), pair, schedules, strict=True):
            for p, gradient in zip(network.parameters(), gradients(model, step), strict=True):
                p.grad = gradient
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert {group["lr"] for optimizer in pair for group in optimizer.param_groups} == {RATE / 4}
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_closure_is_evaluated_with_gradients():
    model = make()
    optimizer = optimizers.create(model, RATE, DECAY, BETAS, "muon")

    def closure():
        ids = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
        loss = model(ids, targets=ids).loss
        loss.backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    assert optimizer.step(closure).requires_grad
    assert not any(map(torch.equal, before, (m.parameter for m in matrices(model))))


def test_any_layer_may_name_matrices():
    class Layer(nn.Linear):
        def matrices(self):
            return [Matrices(self.weight, (4, 4))]

    layer = Layer(8, 8)
    optimizer = optimizers.create(layer, RATE, 0.0, BETAS, "muon")
    layer(torch.randn(16, 8)).square().sum().backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    for half in (before - layer.weight.detach()).split(4):
        values = torch.linalg.svdvals(half) / (RATE * 1.6)
        assert 0.6 < values.min() <= values.max() < 1.3
