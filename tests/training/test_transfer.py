"""A model with other techniques starts as its base, and learns from the predictions of its base."""

import pytest
import torch
from torch.nn import functional as F

from resnet_bk import LanguageModel
from resnet_bk.training.transfer import Teacher, roles, transfer

V = 31
WORDS = {"factors": [2], "layers": [1, 4, 1], "boundaries": "fixed"}
BASE = {"d_model": 16, "n_layers": 4, "n_seq": 32}


def build(seed=0, **fields):
    torch.manual_seed(seed)
    return LanguageModel(V, **{**BASE, **fields}).eval()


def ids(rows=3, length=20):
    return torch.randint(V, (rows, length))


@pytest.mark.parametrize("shape", [{}, {"multiscale": WORDS, "n_layers": 6}, {"attention": {"every": 2, "window": 8}}])
@pytest.mark.parametrize(
    "depth", [{"policy": "exit", "threshold": 1.0}, {"policy": "skip"}, {"policy": "act"}], ids=lambda d: d["policy"]
)
@torch.no_grad()
def test_an_adapted_model_starts_with_the_weights_of_its_base(shape, depth):
    if "multiscale" in shape and depth["policy"] == "exit":
        pytest.skip("chunks have no next token to be confident about")
    base, model = build(**shape), build(seed=1, depth=depth, **shape)
    new = transfer(base, model)
    x = ids()
    if depth["policy"] == "exit":  # through all blocks it is the base
        torch.testing.assert_close(model(x).logits, base(x).logits)
    theirs, ours = roles(base), roles(model)
    assert len({id(p) for p in ours.values()}) == len(list(model.parameters()))
    assert all(torch.equal(ours[role], parameter) for role, parameter in theirs.items())
    assert {id(p) for p in new} == {id(p) for role, p in ours.items() if role not in theirs}
    assert new


@torch.no_grad()
def test_learned_length_and_memory_are_new_parts_of_a_model():
    base = build()
    model = build(seed=1, length={"bins": 2, "max_length": 8}, memory={"orders": [1, 2], "rows": 64})
    new = transfer(base, model)
    names = {name for name, p in model.named_parameters() if any(p is q for q in new)}
    assert {name.split(".")[1] for name in names} == {"0", "1"}
    assert torch.equal(
        roles(model)["Block", 3, "mixer.in_proj.weight"], roles(base)["Block", 3, "mixer.in_proj.weight"]
    )
    assert transfer(model, build(seed=2)) == []  # and back, without them


@pytest.mark.parametrize("fields", [{"d_model": 32}, {"n_layers": 3}, {"d_ff": 24}, {"sparsity": {"target": 0.5}}])
def test_a_model_without_a_place_for_the_weights_is_refused(fields):
    with pytest.raises(ValueError, match=r"has shape \(.*\), the new model has (none|one of shape)"):
        transfer(build(), build(**fields))


@pytest.mark.parametrize("depth", [{}, {"policy": "exit"}])
def test_what_is_taught_is_a_share_of_the_loss(depth):
    base, model, x, y = build(), build(seed=1, depth=depth).train(), ids(), ids()
    y[0, 3] = -100
    teacher = Teacher(base, model)

    def loss(share):
        torch.manual_seed(5)
        model.taught = (teacher(x), share) if share is not None else None
        return model(x, targets=y, logits=False).loss

    assert torch.equal(teacher(x), base(x).logits.log_softmax(-1))
    torch.testing.assert_close(loss(0.0), loss(None))
    if not depth:
        log_p, p = model(x).logits.log_softmax(-1), base(x).logits.softmax(-1)
        soft = -(p * log_p).sum(-1)[y != -100].mean()
        torch.testing.assert_close(loss(1.0), soft)
        hard = F.cross_entropy(model(x).logits.transpose(1, 2), y)
        torch.testing.assert_close(loss(0.25), 0.75 * hard + 0.25 * soft)
    loss(0.5).backward()
    assert all(p.grad is None for p in base.parameters())
    assert model.embed.weight.grad.abs().max() > 0
    model.eval()
    assert torch.equal(model(x, targets=y).loss, loss(None))  # only in training


def test_a_base_with_memory_reads_the_tables_of_the_training():
    """Its own table was counted from the training text, which it would predict better than any other text."""
    memory = {"orders": [1, 2, 3], "rows": 256}
    base, model = build(memory=memory), build(seed=1, memory=memory).train()
    text = torch.randint(V, (400,)).numpy()
    base.memory.count(text)
    model.memory.count(text)
    model.memory.held_back = torch.zeros_like(model.memory.entries)
    x = torch.from_numpy(text[:40]).unsqueeze(0)
    with torch.no_grad():
        knows = base(x).logits.log_softmax(-1)
        told = Teacher(base, model)(x)
        base.memory.entries.zero_()
        base.memory.held_back = None
        empty = base(x).logits.log_softmax(-1)
    assert (knows - told).abs().max() > 0.01
    torch.testing.assert_close(told, empty)
