"""Select, pack, merge."""

import torch

from resnet_bk.adaptive.select import Packing


def test_packed_rows_keep_their_order_and_come_back():
    keep = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
    x = torch.arange(10).view(2, 5)
    packing = Packing(keep)
    packed = packing.pack(x)
    assert packed.shape == (2, 3)
    assert packed[0].tolist() == [1, 3, 4]
    assert packed[1, 0] == 5
    assert packing.mask.tolist() == [[True, True, True], [True, False, False]]
    assert packing.merge(packed).tolist() == [[0, 1, 0, 3, 4], [5, 0, 0, 0, 0]]
    assert packing.merge(packed * 10, base=x).tolist() == [[0, 10, 2, 30, 40], [50, 6, 7, 8, 9]]


def test_random_selections_round_trip_and_pass_gradients():
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        keep = torch.rand(4, 17, generator=generator) < seed / 20
        x = torch.randn(4, 17, 3, generator=generator, requires_grad=True)
        packing = Packing(keep)
        merged = packing.merge(packing.pack(x))
        assert torch.equal(merged, torch.where(keep.unsqueeze(-1), x, 0.0))
        assert packing.mask.sum() == keep.sum()
        assert packing.mask.shape[1] == max(1, int(keep.sum(1).max()))
        merged.sum().backward()
        assert torch.equal(x.grad, keep.unsqueeze(-1).expand_as(x).float())
