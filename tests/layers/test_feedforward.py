"""Experts: exact mixture, balance, gradients."""

import pytest
import torch
from torch.nn import functional as F

from resnet_bk.config import ExpertsConfig, ModelConfig
from resnet_bk.layers.feedforward import Experts, SwiGLU, feed_forward


def balance(experts, x):
    _, (record,) = experts(x, None)
    return record.losses["balance"].value


def every_expert(experts, x):
    """Return (B, N, E, D), every expert on every token."""
    gate, value = torch.einsum("bnd,edf->bnef", x, experts.up).chunk(2, dim=-1)
    return torch.einsum("bnef,efd->bned", F.silu(gate) * value, experts.down)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_grouped_execution_equals_the_dense_mixture(top_k):
    experts = Experts(ModelConfig(d_model=8, num_experts=4, top_k=top_k)).double()
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    y, _ = experts(x, None)
    p = experts.router(x).softmax(-1)
    every = every_expert(experts, x)
    weights = p * (p >= p.topk(top_k).values[..., -1:])
    torch.testing.assert_close(y, (every * weights.unsqueeze(-1)).sum(-2), rtol=1e-12, atol=1e-12)


def test_balance_is_one_when_uniform_and_more_when_not():
    experts = Experts(ModelConfig(d_model=8, num_experts=4))
    x = torch.randn(2, 500, 8)
    torch.nn.init.zeros_(experts.router.weight)
    assert balance(experts, x).item() == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        experts.router.weight[0] = 1
    assert balance(experts, x.abs()).item() > 2


def test_the_balancing_loss_moves_tokens_away_from_a_crowded_expert():
    torch.manual_seed(0)
    experts = Experts(ModelConfig(d_model=8, num_experts=4))
    x = torch.randn(1, 400, 8) + 1
    with torch.no_grad():
        experts.router.weight[2] += 1

    def largest_share():
        return experts.router(x).argmax(-1).flatten().bincount(minlength=4).max().item() / 400

    before = largest_share()
    optimizer = torch.optim.Adam(experts.router.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        balance(experts, x).backward()
        optimizer.step()
    assert before > 0.9
    assert largest_share() < 0.5


@pytest.mark.parametrize("policy", ["top_k", "top_p"])
def test_padding_is_neither_computed_nor_balanced(policy):
    settings = ExpertsConfig(policy=policy, least=2, most=2)
    experts = Experts(ModelConfig(d_model=8, num_experts=4, top_k=2, experts=settings))
    x = torch.randn(2, 6, 8)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    y, (record,) = experts(x, mask)
    unpadded, (expected,) = experts(x[mask].unsqueeze(0), None)
    torch.testing.assert_close(y[mask], unpadded[0])
    assert set(record.losses) == set(expected.losses)
    for name, loss in record.losses.items():
        torch.testing.assert_close(loss.value, expected.losses[name].value)
        (gradient,) = torch.autograd.grad(loss.value, experts.router.weight, retain_graph=True)
        assert gradient.isfinite().all()
    assert (y[~mask] == 0).all()
    assert (record.used == 2 * mask).all()
    assert record.load.sum() == 18
    assert record.mean_used == 2


def test_one_expert_is_a_plain_swiglu():
    assert isinstance(feed_forward(ModelConfig(num_experts=1)), SwiGLU)
    assert isinstance(feed_forward(ModelConfig(num_experts=2)), Experts)


def conditional(**settings):
    config = ModelConfig(d_model=8, num_experts=4, experts=ExpertsConfig(policy="top_p", **settings))
    torch.manual_seed(0)
    experts = Experts(config).double()
    torch.nn.init.normal_(experts.router.weight, std=1.0)
    return experts


@pytest.mark.parametrize("null", [{}, {"identity": 2, "zero": 1}])
def test_top_p_takes_as_many_of_the_likeliest_as_make_up_p(null):
    experts = conditional(top_p=0.7, least=2, most=3, **null)
    x = torch.randn(3, 40, 8, dtype=torch.float64)
    y, (record,) = experts(x, None)
    probabilities = experts.router(x).softmax(-1)
    every = torch.cat([every_expert(experts, x), x.unsqueeze(2).expand(-1, -1, 2, -1)], dim=2)
    expected, used = torch.zeros_like(x), torch.zeros(3, 40, dtype=torch.int64)
    for b in range(3):
        for n in range(40):
            p, so_far = probabilities[b, n], 0.0
            for i, e in enumerate(p.argsort(descending=True).tolist()[:3]):
                if i >= 2 and so_far >= 0.7:
                    break
                so_far += p[e].item()
                used[b, n] += e < 4
                if e < 6:
                    expected[b, n] += p[e] * every[b, n, e]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert (record.used == used).all()
    assert len(used.unique()) > 1
    assert int(record.load.sum()) == int(used.sum())


def test_easy_tokens_use_one_expert_and_hard_ones_several():
    experts = conditional(top_p=0.6)
    x = torch.randn(1, 200, 8, dtype=torch.float64)
    _, (sure,) = experts(20 * x, None)
    _, (unsure,) = experts(0.05 * x, None)
    assert sure.mean_used < 1.2
    assert unsure.mean_used == pytest.approx(3, abs=0.1)


def test_the_cost_brings_the_experts_used_to_the_target():
    experts = conditional(top_p=0.6, target=1.5)
    x = 0.3 * torch.randn(1, 500, 8, dtype=torch.float64)
    optimizer = torch.optim.Adam(experts.router.parameters(), lr=0.02)
    before = experts(x, None)[1][0].mean_used
    for _ in range(200):
        optimizer.zero_grad()
        experts(x, None)[1][0].losses["cost"].value.backward()
        optimizer.step()
    assert before > 1.8
    assert experts(x, None)[1][0].mean_used == pytest.approx(1.5, abs=0.15)


def test_a_bias_balances_without_a_gradient_to_the_router():
    torch.manual_seed(0)
    config = ModelConfig(d_model=8, num_experts=4, top_k=1, experts=ExpertsConfig(balance="bias"))
    experts = Experts(config)
    x = torch.randn(1, 400, 8) + 1
    with torch.no_grad():
        experts.router.weight[2] += 1
    optimizer = torch.optim.Adam(experts.parameters(), lr=0.05)
    before = experts(x, None)[1][0].load
    for _ in range(150):
        optimizer.zero_grad()
        _, (record,) = experts(x, None)
        record.losses["balance"].value.backward()
        assert experts.router.weight.grad is None
        optimizer.step()
    after = experts(x, None)[1][0].load
    assert before.max() > 360
    assert after.max() < 200
    assert after.min() > 50


def test_tokens_of_experts_that_compute_nothing_cost_nothing():
    experts = conditional(top_p=0.1, zero=1, identity=1)
    x = torch.randn(1, 64, 8, dtype=torch.float64)
    with torch.no_grad():
        experts.router.weight[4] = 50 * x.mean((0, 1))
        experts.router.weight[5] = -experts.router.weight[4]
        experts.router.weight[:4] *= 1e-3
    y, (record,) = experts(x, None)
    p = experts.router(x).softmax(-1)
    identity = p.argmax(-1) == 4
    assert 0 < identity.sum() < 64
    assert int(record.load.sum()) == int((p.argmax(-1) < 4).sum()) < 10
    torch.testing.assert_close(y[identity], x[identity] * p[identity][:, 4:5])
    assert (y[p.argmax(-1) == 5] == 0).all()


@pytest.mark.parametrize("null", [{}, {"identity": 1, "zero": 1}])
def test_grouped_products_equal_separate_products(null):
    """In bfloat16, forward and backward, although rows beyond the last group are never written."""
    experts = conditional(top_p=0.6, **null).bfloat16()
    x = torch.randn(2, 50, 8).bfloat16().requires_grad_()
    found = []
    for run in (experts._run_each, experts._run_grouped):
        experts._run_each = run
        y, _ = experts(x, torch.arange(50).expand(2, -1) < 45)
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, experts.up, experts.down, experts.router.weight))])
    for one, other in zip(*found, strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(other.float(), one.float(), rtol=0.05, atol=0.02)
