"""Experts: exact mixture, balance, gradients."""

import pytest
import torch
from torch.nn import functional as F

from resnet_bk.config import ModelConfig
from resnet_bk.layers.feedforward import Experts, SwiGLU, feed_forward


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_grouped_execution_equals_the_dense_mixture(top_k):
    experts = Experts(ModelConfig(d_model=8, num_experts=4, top_k=top_k)).double()
    x = torch.randn(3, 7, 8, dtype=torch.float64)
    y, _ = experts(x, None)
    p = experts.router(x).softmax(-1)
    gate, value = torch.einsum("bnd,edf->bnef", x, experts.up).chunk(2, dim=-1)
    every = torch.einsum("bnef,efd->bned", F.silu(gate) * value, experts.down)
    weights = p * (p >= p.topk(top_k).values[..., -1:])
    torch.testing.assert_close(y, (every * weights.unsqueeze(-1)).sum(-2), rtol=1e-12, atol=1e-12)


def test_balance_is_one_when_uniform_and_more_when_not():
    experts = Experts(ModelConfig(d_model=8, num_experts=4))
    x = torch.randn(2, 500, 8)
    torch.nn.init.zeros_(experts.router.weight)
    assert experts(x, None)[1]["balance"].item() == pytest.approx(1, abs=1e-5)
    with torch.no_grad():
        experts.router.weight[0] = 1
    assert experts(x.abs(), None)[1]["balance"].item() > 2


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
        experts(x, None)[1]["balance"].backward()
        optimizer.step()
    assert before > 0.9
    assert largest_share() < 0.5


def test_padding_is_neither_computed_nor_balanced():
    experts = Experts(ModelConfig(d_model=8, num_experts=4, top_k=2))
    x = torch.randn(2, 6, 8)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    y, losses = experts(x, mask)
    alone, expected = experts(x[mask].unsqueeze(0), None)
    torch.testing.assert_close(y[mask], alone[0])
    torch.testing.assert_close(losses["balance"], expected["balance"])
    assert (y[~mask] == 0).all()


def test_one_expert_is_a_plain_swiglu():
    assert isinstance(feed_forward(ModelConfig(num_experts=1)), SwiGLU)
    assert isinstance(feed_forward(ModelConfig(num_experts=2)), Experts)
