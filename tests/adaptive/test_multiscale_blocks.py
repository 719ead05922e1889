"""The multi-scale layers on their own, and their FLOPs."""

import pytest
import torch

from resnet_bk import (
    HierarchicalMultiScaleLayer,
    MultiScaleResNetBKBlock,
    MultiScaleResNetBKLayer,
    count_flops_multi_scale,
)


@pytest.mark.parametrize("hierarchical", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 127, 128, 130])
def test_the_block_keeps_shapes_at_any_length_and_is_causal(hierarchical, n):
    torch.manual_seed(0)
    block = MultiScaleResNetBKBlock(d_model=64, n_seq=128, num_experts=4, hierarchical=hierarchical).double()
    x = torch.randn(2, n, 64, dtype=torch.float64)
    y = block(x)
    assert y.shape == x.shape
    assert torch.isfinite(y).all()
    changed = x.clone()
    changed[:, n // 2 + 1 :] += 1
    assert torch.equal(block(changed)[:, : n // 2 + 1], y[:, : n // 2 + 1])


@pytest.mark.parametrize("kind", [MultiScaleResNetBKLayer, HierarchicalMultiScaleLayer])
def test_every_parameter_of_a_layer_learns(kind):
    layer = kind(d_model=16, n_seq=32, num_experts=2)
    assert {name.rpartition(".")[2] for name, _ in layer.named_parameters()} >= {"scale_low_res", "scale_full_res"}
    layer(torch.randn(4, 32, 16)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_a_wrong_width_is_an_error():
    with pytest.raises(ValueError, match=r"expected shape \(B, N, 16\) with N >= 1, got \(2, 3, 8\)"):
        MultiScaleResNetBKLayer(d_model=16)(torch.zeros(2, 3, 8))


def test_the_table_of_costs():
    table = count_flops_multi_scale(64, 128, 4)
    assert (table.standard, table.downsample, table.low_res) == (2_097_152, 8_192, 1_048_576)
    assert (table.upsample, table.refine, table.total) == (8_192, 2_097_152, 3_162_112)
    assert round(table.speedup, 2) == 0.66


@pytest.mark.parametrize("hierarchical", [False, True])
@pytest.mark.parametrize(("d_model", "n", "experts"), [(64, 128, 4), (96, 130, 1), (32, 511, 2)])
def test_the_exact_count_is_what_runs(d_model, n, experts, hierarchical):
    table = count_flops_multi_scale(d_model, n, experts, hierarchical)
    assert table.measured_standard == pytest.approx(table.exact_standard, rel=0.02)
    assert table.measured_total == pytest.approx(table.exact_total, rel=0.02)
