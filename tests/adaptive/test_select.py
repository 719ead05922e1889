"""Select, pack, merge."""

import pytest
import torch

from resnet_bk.adaptive.select import Chunks, run_rows
from resnet_bk.layers.block import Tokens
from resnet_bk.ops.packing import Packing, capacity
from resnet_bk.record import Loss, Record


def test_packed_rows_keep_their_order_and_come_back():
    selected = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)
    x = torch.arange(10).view(2, 5)
    packing = Packing(selected)
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
        selected = torch.rand(4, 17, generator=generator) < seed / 20
        x = torch.randn(4, 17, 3, generator=generator, requires_grad=True)
        packing = Packing(selected)
        merged = packing.merge(packing.pack(x))
        assert torch.equal(merged, torch.where(selected.unsqueeze(-1), x, 0.0))
        assert packing.mask.sum() == selected.sum()
        assert packing.mask.shape[1] == max(1, int(selected.sum(1).max()))
        merged.sum().backward()
        assert torch.equal(x.grad, selected.unsqueeze(-1).expand_as(x).float())


def running_sum(x, tokens, state, mask):
    """A layer whose state is the sum so far, and whose loss is the mean over non-padding positions."""
    mask = torch.ones_like(tokens.ids, dtype=torch.bool) if mask is None else mask
    shapes.append(tuple(x.shape))
    counted = x * mask.unsqueeze(-1)
    start = torch.zeros(len(x), x.shape[2]) if state is None else state
    y = start.unsqueeze(1) + counted.cumsum(1)
    return y, y[:, -1], [Record(losses={"mean": Loss(counted.sum() / mask.sum(), 1.0)}), Record()]


shapes: list[tuple[int, ...]] = []


@pytest.mark.parametrize("first", [True, False])
def test_rows_in_groups_are_rows_together(first):
    """Groups have the outputs, states and losses of all rows together, and no group is longer than it needs."""
    generator = torch.Generator().manual_seed(0)
    selected = torch.arange(40) < torch.tensor([[3], [33], [14], [1], [20]])
    x, ids = torch.randn(5, 40, 2, generator=generator), torch.zeros(5, 40, dtype=torch.int64)
    packing = Packing(selected, tile=16)
    state = None if first else torch.randn(5, 2, generator=generator)
    arguments = (running_sum, packing.pack(x), Tokens(packing.pack(ids)), state, packing)
    together = run_rows(*arguments, [torch.arange(5)])
    shapes.clear()
    groups = run_rows(*arguments, [torch.tensor([0, 2, 3]), torch.tensor([4]), torch.tensor([1])])
    assert shapes == [(3, 16, 2), (1, 32, 2), (1, 48, 2)]
    mask = packing.mask.unsqueeze(-1)
    torch.testing.assert_close(groups[0] * mask, together[0] * mask)
    torch.testing.assert_close(groups[1], together[1])
    assert [set(record.losses) for record in groups[2]] == [{"mean"}, set()]
    torch.testing.assert_close(groups[2][0].losses["mean"].value, together[2][0].losses["mean"].value)


def test_groups_that_report_less_are_left_out_of_the_losses():
    """In one group no chunk closes, so its stack on chunks does not run and reports nothing."""

    def layer(x, tokens, state, mask):
        records = [Record(losses={"outer": Loss(x.mean(), 1.0)}), Record(losses={"inner": Loss(x.mean(), 1.0)})]
        return x, x[:, 0], records[: 2 if x.shape[1] > 16 else 1]

    packing = Packing(torch.arange(40) < torch.tensor([[3], [33]]), tile=16)
    x, ids = torch.ones(2, 40, 1) * torch.tensor([[[5.0]], [[2.0]]]), torch.zeros(2, 40, dtype=torch.int64)
    arguments = (layer, packing.pack(x), Tokens(packing.pack(ids)), torch.zeros(2, 1), packing)
    records = run_rows(*arguments, [torch.tensor([0]), torch.tensor([1])])[2]
    assert [{name: loss.value.item() for name, loss in r.losses.items()} for r in records] == [
        {"outer": 2},
        {"inner": 2},
    ]


def test_rows_in_no_group_keep_their_state():
    packing = Packing(torch.tensor([[True, True], [False, False], [True, False]]))
    state = torch.tensor([[1.0], [2.0], [3.0]])
    ids = torch.zeros(3, 2, dtype=torch.int64)
    y, after, _ = run_rows(running_sum, torch.ones(3, 2, 1), Tokens(ids), state, packing, [torch.tensor([0, 2])])
    assert after.flatten().tolist() == [3, 2, 4]
    assert y[1].abs().sum() == 0


def test_a_bound_caps_the_width_whatever_is_selected():
    selected = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    x = torch.arange(10).view(2, 5)
    packing = Packing(selected, bound=3)
    assert packing.pack(x).shape == (2, 3)
    assert packing.mask.tolist() == [[True, True, False], [True, False, False]]
    assert packing.merge(packing.pack(x)).tolist() == [[0, 1, 0, 3, 0], [5, 0, 0, 0, 0]]
    assert Packing(selected, tile=4, bound=3).mask.shape == (2, 4)
    assert Packing(selected, bound=100).mask.shape == (2, 5)
    with pytest.raises(RuntimeError, match="more positions selected than capacity allows"):
        Packing(selected, bound=1)


def test_capacity_is_a_share_rounded_up():
    assert [capacity(share, 10) for share in (None, 0.0, 0.31, 1.0)] == [None, 0, 4, 10]


@pytest.mark.parametrize("started", [True, False])
def test_sums_position_by_position_are_those_of_the_whole(started):
    torch.manual_seed(0)
    closes = torch.tensor([[0, 1, 0, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0, 0]], dtype=torch.bool)
    x, weight = torch.randn(2, 7, 3, dtype=torch.float64), torch.rand(2, 7, dtype=torch.float64)
    past = torch.randn(2, 3, dtype=torch.float64) if started else None
    sums, still_open = Chunks(closes).sums(x, weight, past)
    for t in range(7):
        found, past = Chunks(closes[:, t : t + 1]).sums(x[:, t : t + 1], weight[:, t : t + 1], past)
        for row in closes[:, t].nonzero().flatten():
            torch.testing.assert_close(found[row, 0], sums[row, closes[row, :t].sum()])
    torch.testing.assert_close(past, still_open)
