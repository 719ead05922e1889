"""N-gram memory: what it adds to an embedding, against a definition; which table it reads; what it costs."""

import numpy as np
import pytest
import torch

from resnet_bk import LanguageModel
from resnet_bk.config import ConfigError, MemoryConfig
from resnet_bk.layers.block import Tokens
from resnet_bk.layers.embedding import NgramMemory, RecentNgrams
from resnet_bk.ops import use_backend
from resnet_bk.ops.chunked_ngrams import slots
from resnet_bk.ops.ngram_look_up import find_ngrams
from resnet_bk.study.ledger import Ledger

ORDERS, MEMORY = (1, 2, 5), {"orders": [1, 2, 5], "rows": 500, "successors": 3}


def text(length=2000, seed=0):
    return np.random.default_rng(seed).integers(9, size=length).astype(np.uint16)


def make(counted=True, **memory):
    torch.manual_seed(0)
    model = LanguageModel(300, d_model=16, n_layers=2, memory={**MEMORY, **memory}).double().eval()
    layer = model.blocks[0]
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    if counted:
        layer.count(text())
    return model


def test_vectors_of_what_followed_and_of_how_often():
    layer = make().blocks[0]
    ids = torch.from_numpy(text(22, seed=1).astype(np.int64)).view(2, 11)
    x = torch.randn(2, 11, 16, dtype=torch.float64)
    y, state, records = layer(x, Tokens(ids), None, None)
    window = torch.cat([torch.zeros(2, 4, dtype=torch.int64), ids + 1], dim=1)
    found = find_ngrams(window, layer.entries, ORDERS)
    gain, vectors = layer.vectors.gain.view(3, -1), layer.vectors.level_vectors.view(3, -1, 16)
    assert found[..., 0].unique().numel() > 4
    for b in range(2):
        for t in range(11):
            added = torch.zeros(16, dtype=torch.float64)
            for o, (often, *successors) in enumerate(found[b, t].tolist()):
                added += vectors[o, often]
                for token, share in ((x >> 8, np.float32((x & 255) / 255).item()) for x in successors):
                    added += gain[o, often] * share * layer.vectors.scale[o] * layer.vectors.token_vectors[token]
            torch.testing.assert_close(y[b, t], x[b, t] + added)
    assert records == []
    assert torch.equal(state, ids[:, -4:] + 1)


def test_a_new_memory_adds_nothing():
    memory = {"orders": [2], "rows": 60}
    model = LanguageModel(300, d_model=16, n_layers=2, memory=memory)
    plain = LanguageModel(300, d_model=16, n_layers=2)
    kept = {
        name.replace("blocks.1", "blocks.0").replace("blocks.2", "blocks.1"): p
        for name, p in model.state_dict().items()
        if not name.startswith("blocks.0.")
    }
    plain.load_state_dict(kept)
    ids = torch.randint(300, (1, 7))
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_training_reads_the_table_that_is_held_back():
    model = make()
    layer, ids = model.blocks[0], torch.from_numpy(text(30)[None].astype(np.int64))
    complete = model(ids).logits
    layer.held_back = torch.zeros_like(layer.entries)
    assert torch.equal(model(ids).logits, complete)
    training = model.train()(ids).logits
    assert not torch.equal(training, complete)
    layer.entries.zero_()
    assert torch.equal(model(ids).logits, training)
    layer.count(text())
    assert layer.held_back is None
    assert "blocks.0.held_back" not in model.state_dict()
    assert "blocks.0.entries" in model.state_dict()


def test_half_precision_keeps_the_table():
    model = make().bfloat16()
    ids = torch.from_numpy(text(30)[None].astype(np.int64))
    assert model.blocks[0].entries.dtype == torch.int32
    assert model(ids).logits.dtype == torch.bfloat16


def test_the_flops_of_the_sums():
    totals = []
    for memory in ({}, MEMORY):
        model = LanguageModel(300, d_model=16, n_layers=2, memory=memory)
        with Ledger(model) as ledger:
            model(torch.randint(300, (2, 9)))
        totals.append(ledger.total)
    sums = 2 * 3 * 3 * 16 * 18
    assert totals[1] - totals[0] == sums
    assert isinstance(model.blocks[0], NgramMemory)
    assert ledger.stages["blocks.0 vectors"] == sums


@pytest.mark.parametrize("ids", [[5], [3, -1], [3, 300]])
def test_texts_that_are_refused(ids):
    with pytest.raises(ValueError, match="ids: expected two or more from 0 to 299"):
        make(counted=False).blocks[0].count(np.array(ids))


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ([3, 2], "model.memory.orders: got [3, 2], allowed different lengths in ascending order"),
        ([2, 2], "model.memory.orders: got [2, 2], allowed different lengths in ascending order"),
        ([0], "model.memory.orders[0]: got 0, allowed an integer from 1 to 64"),
        (3, "model.memory.orders: got 3, allowed a list of integers"),
    ],
)
@pytest.mark.parametrize("name", ["orders", "recent"])
def test_orders_that_are_refused(orders, message, name):
    with pytest.raises(ConfigError) as caught:
        MemoryConfig(**{name: orders})
    assert str(caught.value) == message.replace("orders", name)


def test_recent_ngrams_tell_what_followed_in_the_text_so_far():
    model = LanguageModel(9, d_model=8, n_layers=1, num_experts=1, memory={"recent": [2], "recent_rows": 1000})
    layer = model.blocks[0]
    assert isinstance(layer, RecentNgrams)
    ids = torch.tensor([[1, 2, 3, 1, 2, 3, 1, 2, 5, 1, 2]])
    layer.vectors.token_vectors.data = torch.eye(9, 8)
    for level in range(3):
        layer.vectors.gain.data[level] = level
    added = layer(torch.zeros(1, 11, 8), Tokens(ids), None, None)[0][0]
    wanted = torch.zeros(11, 8)
    for position, token, level in ((4, 3, 1), (5, 1, 1), (6, 2, 1), (7, 3, 2), (10, 5, 1)):
        wanted[position, token] = level
    torch.testing.assert_close(added, wanted)


@pytest.mark.parametrize("backend", ["numba", "chunked"])
@pytest.mark.parametrize("entry", [16 << 40 | 3, -1 << 40, 1 << 40 | 9, 1 << 40 | 2**24 - 1], ids=hex)
def test_recent_ngrams_that_no_text_has_are_not_there(backend, entry):
    """A state may be damaged, or come from a model with another vocabulary."""
    layer = LanguageModel(9, d_model=8, n_layers=1, num_experts=1, memory={"recent": [1], "recent_rows": 50}).blocks[0]
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x, tokens = torch.zeros(1, 1, 8), Tokens(torch.tensor([[2]]))
    state = layer.layout(x)
    slot, tag = next(slots(tokens.ids + 1, (1,), 50))
    with use_backend(backend):
        expected = layer(x, tokens, state, None)[0]
        state.entries[0, slot] = entry | tag << 24
        torch.testing.assert_close(layer(x, tokens, state, None)[0], expected)
        state.entries[0, slot] = 1 << 40 | tag << 24 | 3
        assert not torch.allclose(layer(x, tokens, state, None)[0], expected)
