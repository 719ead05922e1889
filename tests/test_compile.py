"""Models under ``torch.compile``: one graph, the same losses and gradients; bounds change shapes and nothing else.

Dimensions: B sequences, N tokens.
"""

import pytest
import torch

from resnet_bk import LanguageModel
from resnet_bk.config import ConfigError

CHUNKS = {"factors": [3], "layers": [1, 1, 0]}
# The technique's fields, and the section whose bound makes its shapes static, where it needs one.
TECHNIQUES = {
    "plain": ({}, None),
    "real": ({"energy": "real"}, None),
    "complex": ({"energy": "complex"}, None),
    "diagonal": ({"readout": "diagonal"}, None),
    "attention": ({"attention": {"every": 2, "window": 7}}, None),
    "memory": ({"memory": {"orders": [1, 2], "rows": 5000, "recent": [1, 3], "recent_rows": 50}}, None),
    "fixed chunks": ({"multiscale": CHUNKS}, None),
    "words": ({"multiscale": {**CHUNKS, "boundaries": "whitespace"}}, "multiscale"),
    "learned chunks": ({"multiscale": {**CHUNKS, "boundaries": "learned"}}, "multiscale"),
    "act": ({"depth": {"policy": "act"}}, "depth"),
    "skip": ({"depth": {"policy": "skip"}}, "depth"),
    "exit": ({"depth": {"policy": "exit"}}, "depth"),
    "sparse": ({"sparsity": {"target": 0.5}}, "sparsity"),
}
BALANCED = {
    "num_experts": 4,
    "top_k": 4,
    "multiscale": {**CHUNKS, "layers": [1, 3, 0], "boundaries": "whitespace", "bound": 0.7},
    "depth": {"policy": "act", "bound": 1.0},
    "sparsity": {"target": 0.5, "bound": 1.0},
    "experts": {"policy": "top_p", "target": 1.3, "zero": 1, "identity": 1},
}


def bounded(fields, section, bound=1.0):
    return fields if section is None else {**fields, section: {**fields[section], "bound": bound}}


def make(fields):
    torch.manual_seed(0)
    model = LanguageModel(259, **{"d_model": 16, "num_experts": 1, "n_seq": 32, **fields})
    with torch.no_grad():  # decisions of both kinds
        for name, p in model.named_parameters():
            if ".units." in name and name.endswith("weight"):
                p.normal_()
            if name.endswith("importance.bias"):
                p.zero_()
    if "memory" in fields:
        model.blocks[0].count(text()[0].numpy())
    return model


def text():
    ids = torch.randint(97, 123, (2, 50), generator=torch.Generator().manual_seed(0))
    ids[:, ::4] = 35
    return ids


def losses_and_gradients(model, run, precise=torch.float32):
    ids = text()
    torch.manual_seed(3)  # some techniques draw in training
    with torch.autocast("cpu", torch.bfloat16, enabled=precise == torch.bfloat16):
        loss = run(ids[:, :-1], ids[:, 1:])
    loss.backward()
    found = [loss.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())]
    model.zero_grad()
    return found


def loss_of(model):
    return lambda x, y: model(x, targets=y, logits=False).loss


@pytest.fixture(autouse=True)
def _forget():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("name", TECHNIQUES)
def test_training_is_one_graph_and_the_same(name):
    model = make(bounded(*TECHNIQUES[name]))
    expected = losses_and_gradients(model, loss_of(model))
    got = losses_and_gradients(model, torch.compile(loss_of(model), fullgraph=True, backend="aot_eager"))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "attention", "words"])
@torch.no_grad()
def test_prefill_is_one_graph_and_the_same(name):
    model, ids = make(bounded(*TECHNIQUES[name])).eval(), text()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected, got = model(ids), compiled(ids)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
    later = model(ids[:, :7], state=expected.state).logits
    torch.testing.assert_close(compiled(ids[:, :7], state=got.state).logits, later, rtol=1e-4, atol=1e-5)


def test_several_techniques_and_experts_are_one_graph_in_bfloat16():
    model = make(BALANCED)
    expected = losses_and_gradients(model, loss_of(model), torch.bfloat16)
    compiled = torch.compile(loss_of(model), fullgraph=True, backend="aot_eager")
    got = losses_and_gradients(model, compiled, torch.bfloat16)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-3, atol=1e-3)
    for one, other in zip(got[1:], expected[1:], strict=True):
        assert (one - other).norm() <= 0.05 * other.norm() + 1e-3


@pytest.mark.parametrize(
    "name", [name for name, (_, section) in TECHNIQUES.items() if section not in (None, "sparsity")]
)
def test_without_a_bound_shapes_follow_the_text(name):
    """The planted bug of the tests above: they can fail. (Of sparse chains torch can carry the unknown width along.)"""
    model = make(TECHNIQUES[name][0])
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(loss_of(model), fullgraph=True, backend="aot_eager")(text()[:, :-1], text()[:, 1:])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [name for name, (_, section) in TECHNIQUES.items() if section])
def test_a_bound_changes_no_number(name, training):
    fields, section = TECHNIQUES[name]
    runs = []
    for kind in (fields, bounded(fields, section)):
        model = make(kind).double().train(training)
        found = losses_and_gradients(model, loss_of(model))
        with torch.no_grad():
            first = model.eval()(text()[:, :21])
            runs.append([*found, first.logits, model(text()[:, 21:], state=first.state).logits])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["words", "act", "skip", "exit", "sparse"])
def test_what_does_not_fit_is_an_error(name):
    model, ids = make(bounded(*TECHNIQUES[name], bound=0.05)), text()
    ids[:, ::2] = 35  # more words than a tile has rows
    with pytest.raises(RuntimeError, match="more positions selected than capacity allows"):
        model(ids)


def test_a_bound_is_a_share():
    with pytest.raises(ConfigError, match=r"model\.depth\.bound: got 2, allowed 0 to 1"):
        make({"depth": {"policy": "act", "bound": 2}})
