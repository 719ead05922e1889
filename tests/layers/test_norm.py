"""Norm: a single position is normalised like any other."""

import pytest
import torch
from torch import nn

from resnet_bk.layers.norm import Norm


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("shape", [(1, 1, 32), (3, 1, 32), (3, 1, 4, 32), (3, 7, 4, 32)], ids=str)
def test_every_number_of_positions_is_layer_norm(shape, dtype, tolerance):
    torch.manual_seed(0)
    norm = Norm(32).to(dtype)
    nn.init.normal_(norm.weight)
    x = (5 * torch.randn(shape) + 3).to(dtype).requires_grad_()
    y, expected = norm(x), nn.functional.layer_norm(x, (32,), norm.weight, eps=1e-5)
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    coefficients = torch.randn(shape).to(dtype)
    for got, wanted in zip(
        *(torch.autograd.grad((out * coefficients).sum(), (x, norm.weight)) for out in (y, expected)), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=10 * tolerance)
