"""N-gram memory: rows against a definition in plain integers, and what they do to a model."""

import pytest
import torch

from resnet_bk import LanguageModel
from resnet_bk.config import ConfigError, MemoryConfig
from resnet_bk.layers.block import Tokens
from resnet_bk.layers.embedding import MIX, STEP, NgramMemory
from resnet_bk.study.ledger import Ledger

ORDERS, ROWS = (1, 2, 5), 61


def make(**memory):
    torch.manual_seed(0)
    memory = {"orders": ORDERS, "rows": ROWS, **memory}
    model = LanguageModel(300, d_model=16, n_layers=2, memory=memory).double().eval()
    torch.nn.init.normal_(model.blocks[0].table)
    return model


def row(gram):
    """Return the row of an n-gram, given its ids plus 1, or 0 before the start; in Python's unbounded integers."""
    key = 0
    for token in reversed(gram):
        key = (key + token + 1) * STEP % 2**64
    signed = key - 2**64 if key >= 2**63 else key  # shifts of torch keep the sign
    mixed = (signed ^ (signed >> 29)) * MIX % 2**64
    mixed = mixed - 2**64 if mixed >= 2**63 else mixed
    return (mixed ^ (mixed >> 32)) % ROWS


def test_the_sum_of_one_row_for_each_order():
    memory = make().blocks[0]
    ids = torch.randint(300, (2, 9))
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    y, state, records = memory(x, Tokens(ids), None, None)
    table = memory.table.view(len(ORDERS), ROWS, 16)
    for b in range(2):
        text = [0] * 4 + [token + 1 for token in ids[b].tolist()]
        for t in range(9):
            rows = [table[i, row(text[t + 5 - n : t + 5])] for i, n in enumerate(ORDERS)]
            torch.testing.assert_close(y[b, t], x[b, t] + sum(rows))
    assert records == []
    assert torch.equal(state, ids[:, -4:] + 1)


def test_rows_are_spread_evenly():
    """Bigrams of bytes, all of them: no row has much more than its share."""
    memory = make(orders=[2], rows=1024).blocks[0]
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256))
    counts = memory.rows_of(pairs + 1).flatten().bincount(minlength=1024)
    assert counts.sum() == 2**16
    assert counts.min() > 30
    assert counts.max() < 110


def test_a_text_that_begins_is_no_text_after_the_first_token():
    """Positions before the start differ from every token."""
    memory = make().blocks[0]
    windows = torch.tensor([[0, 0, 0, 0, 8], [1, 1, 1, 1, 8]])
    start, zeros = memory.rows_of(windows)[:, 0]
    assert start[0] == zeros[0]
    assert (start[1:] != zeros[1:]).all()


def test_tables_start_at_zero_and_learn_only_what_is_read():
    model = LanguageModel(300, d_model=16, n_layers=2, memory={"orders": [2], "rows": ROWS})
    plain = LanguageModel(300, d_model=16, n_layers=2)
    kept = {
        name.replace("blocks.1", "blocks.0").replace("blocks.2", "blocks.1"): p
        for name, p in model.state_dict().items()
    }
    table = kept.pop("blocks.0.table")
    plain.load_state_dict(kept)
    ids = torch.randint(300, (1, 7))
    assert not table.any()
    assert torch.equal(model(ids).logits, plain(ids).logits)
    model(ids, targets=ids).loss.backward()
    read = model.blocks[0].rows_of(torch.cat([torch.zeros(1, 1, dtype=torch.int64), ids + 1], dim=1))
    learned = model.blocks[0].table.grad.any(1).nonzero().flatten()
    assert learned.tolist() == sorted(set(read.flatten().tolist()))


def test_a_look_up_costs_no_flops_but_its_projection_does():
    totals = []
    for memory in ({}, {"orders": ORDERS, "rows": ROWS}, {"orders": ORDERS, "rows": ROWS, "width": 4}):
        model = LanguageModel(300, d_model=16, n_layers=2, memory=memory)
        with Ledger(model) as ledger:
            model(torch.randint(300, (2, 9)))
        totals.append(ledger.total)
    assert totals[0] == totals[1] == totals[2] - 2 * 4 * 16 * 18
    assert isinstance(model.blocks[0], NgramMemory)
    assert ledger.stages["blocks.0 project"] == 2 * 4 * 16 * 18


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ([3, 2], "model.memory.orders: got [3, 2], allowed different lengths in ascending order"),
        ([2, 2], "model.memory.orders: got [2, 2], allowed different lengths in ascending order"),
        ([0], "model.memory.orders[0]: got 0, allowed an integer from 1 to 64"),
        (3, "model.memory.orders: got 3, allowed a list of integers"),
    ],
)
def test_orders_that_are_refused(orders, message):
    with pytest.raises(ConfigError) as caught:
        MemoryConfig(orders=orders)
    assert str(caught.value) == message
