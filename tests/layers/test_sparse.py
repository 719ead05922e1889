"""Learned sparsity: decisions, the price, the schedule, training."""

import pytest
import torch

from resnet_bk import LanguageModel
from resnet_bk.config import ModelConfig, SparsityConfig
from resnet_bk.layers.sparse import SparseBKCore, SparsityRecord, anneal


def build(**settings):
    torch.manual_seed(0)
    return SparseBKCore(ModelConfig(d_model=16, sparsity=SparsityConfig(target=0.5, **settings)), heads=2)


def train(layer, loss_of, steps=200):
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()


def test_gates_are_exactly_zero_or_one_and_have_a_gradient_where_kept():
    layer = build()
    layer.importance.bias.data.zero_()
    x = torch.randn(3, 50, 16)
    sparsity, record = layer(x, None)
    assert set(sparsity.gate.unique().tolist()) == {0.0, 1.0}
    assert (record.kept == (sparsity.gate > 0)).all()
    assert record.sparsity == pytest.approx(1 - sparsity.gate.mean().item())
    (grad,) = torch.autograd.grad(sparsity.gate.sum(), layer.importance.bias)
    soft = layer.importance(x).squeeze(-1).sigmoid()
    assert grad.item() == pytest.approx((1 - soft)[record.kept].sum().item(), rel=1e-4)


def test_before_learning_nearly_every_site_is_kept():
    _, record = build()(torch.randn(2, 500, 16), None)
    assert record.sparsity < 0.05


@pytest.mark.parametrize("sampling", ["threshold", "gumbel"])
@pytest.mark.parametrize("target", [0.25, 0.5, 0.75])
def test_the_price_alone_brings_sparsity_to_within_two_points_of_the_target(target, sampling):
    torch.manual_seed(0)
    settings = SparsityConfig(target=target, sampling=sampling)
    layer = SparseBKCore(ModelConfig(d_model=16, sparsity=settings), heads=2)
    x = torch.randn(4, 500, 16)
    train(layer, lambda: layer(x, None)[1].losses["sparsity"].value, steps=400)
    assert layer.eval()(x, None)[1].sparsity == pytest.approx(target, abs=0.02)


def test_the_goal_follows_the_schedule():
    layer = build(warmup=0.5)
    layer.importance.bias.data.zero_()
    x = torch.randn(4, 500, 16)
    prices = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        anneal(layer, progress)
        prices.append(layer(x, None)[1].losses["sparsity"].value.item())
    assert prices[0] < 0  # half are kept where all should be
    assert prices[0] == prices[1]  # both beyond the largest price
    assert abs(prices[2]) < 0.5
    assert prices[2] == prices[3]


def test_padding_is_neither_kept_nor_counted():
    layer = build()
    mask = torch.arange(20) < torch.tensor([[20], [5], [0]])
    _, record = layer(torch.randn(3, 20, 16), mask)
    assert int(record.sites) == 25
    assert not record.kept[~mask].any()


def test_sampling_differs_from_call_to_call_in_training_only():
    layer = build(sampling="gumbel")
    layer.importance.bias.data.zero_()
    x = torch.randn(1, 200, 16)
    draws = {tuple(layer(x, None)[1].kept.flatten().tolist()) for _ in range(3)}
    assert len(draws) == 3
    layer.eval()
    assert len({tuple(layer(x, None)[1].kept.flatten().tolist()) for _ in range(3)}) == 1


@pytest.mark.parametrize("readout", ["propagator", "diagonal"])
def test_a_site_that_the_task_needs_is_kept_and_one_it_does_not_is_left_out(readout):
    """Each target repeats the last marker (1 or 2) before any number of zeros, so only markers must be written."""
    torch.manual_seed(0)
    target = 0.75 * 47 / 48  # the share of zeros
    model = LanguageModel(
        8,
        d_model=32,
        n_layers=1,
        num_experts=1,
        conv_width=1,
        readout=readout,
        sparsity={"target": target, "warmup": 0.5, "penalty": 1.0},
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    def draw(batch):
        markers = torch.rand(batch, 48) < 0.25
        markers[:, 0] = True
        ids = torch.where(markers, torch.randint(1, 3, (batch, 48)), 0)
        last = torch.where(markers, torch.arange(48), 0).cummax(1).values
        return ids, ids.gather(1, last)

    for step in range(250):
        anneal(model, step / 250)
        ids, targets = draw(32)
        optimizer.zero_grad()
        model(ids, targets=targets, logits=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    ids, targets = draw(64)
    output = model.eval()(ids, targets=targets)
    record = next(r for r in output.records if isinstance(r, SparsityRecord))
    kept = [record.kept[ids == 0].double().mean().item(), record.kept[ids > 0].double().mean().item()]
    assert kept[1] > kept[0] + 0.4
    assert output.losses["cross_entropy"] < 0.35
