"""Steps in static buffers equal the model's own steps, and generation needs no host-device sync per token.

Dimensions: B sequences, N tokens.
"""

import math

import pytest
import torch
from torch.utils import _pytree as pytree

from resnet_bk import LanguageModel
from resnet_bk.inference.decoding import StaticStep, choose, generate

CHUNKS = {"factors": [3], "layers": [1, 1, 1]}
MODELS = {
    "plain": {},
    "real": {"energy": "real"},
    "complex": {"energy": "complex"},
    "diagonal": {"readout": "diagonal"},
    "attention": {"attention": {"every": 2, "window": 7}},
    "experts": {"num_experts": 4, "top_k": 2},
    "fixed chunks": {"multiscale": {**CHUNKS, "bound": 1.0}},
    "words": {"multiscale": {**CHUNKS, "boundaries": "whitespace", "bound": 1.0}},
    "learned chunks": {"multiscale": {**CHUNKS, "boundaries": "learned", "bound": 1.0}},
    "act": {"depth": {"policy": "act", "bound": 1.0}},
    "skip": {"depth": {"policy": "skip", "bound": 1.0}},
    "exit": {"depth": {"policy": "exit", "threshold": 0.5, "bound": 1.0}},
    "sparse": {"sparsity": {"target": 0.5, "bound": 1.0}},
}


def make(name, **fields):
    torch.manual_seed(0)
    return LanguageModel(259, **{"d_model": 16, "num_experts": 1, "n_seq": 32, **MODELS[name], **fields}).eval()


def text(batch, length):
    return torch.randint(97, 123, (batch, length)).where(torch.rand(batch, length) < 0.8, torch.tensor(35))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_static_step_equals_the_models_own_step_bit_for_bit(name):
    model, ids = make(name), text(3, 40)
    state = model(ids[:, :17]).state
    step = StaticStep(model, state)
    for t in range(17, 40):
        output = model(ids[:, t : t + 1], state=state)
        state = output.state
        assert torch.equal(step(ids[:, t : t + 1]), output.logits[:, 0])
    for own, expected in zip(pytree.tree_leaves(step.state), pytree.tree_leaves(state), strict=True):
        assert torch.equal(own, expected)


@torch.no_grad()
def test_buffers_stay_in_place_and_the_given_state_does_not_change():
    model, ids = make("real"), text(2, 9)  # all parts of its state change; g of bonds is -1
    state = model(ids).state
    before = pytree.tree_map(torch.clone, state)
    step = StaticStep(model, state)
    places = [x.data_ptr() for x in pytree.tree_leaves(step.state)]
    for _ in range(3):
        step(ids[:, -1:])
    assert [x.data_ptr() for x in pytree.tree_leaves(step.state)] == places
    assert all(map(torch.equal, pytree.tree_leaves(state), pytree.tree_leaves(before)))
    assert not any(map(torch.equal, pytree.tree_leaves(step.state), pytree.tree_leaves(before)))


@torch.no_grad()
def test_autocast_is_the_same_in_a_static_step():
    model, ids = make("plain"), text(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        state = model(ids).state
        step = StaticStep(model, state)
        for t in range(4):
            output = model(ids[:, t : t + 1], state=state)
            state = output.state
            assert torch.equal(step(ids[:, t : t + 1]), output.logits[:, 0])
            kinds = [x.dtype for x in pytree.tree_leaves(state)]
            assert [x.dtype for x in pytree.tree_leaves(step.state)] == kinds


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"multiscale": CHUNKS}, "but multiscale would need one; set model.multiscale.bound, or"),
        (
            {"depth": {"policy": "act"}, "sparsity": {"target": 0.5}},
            "but depth and sparsity would need one; set model.depth.bound and set model.sparsity.bound",
        ),
        ({"length": {"bins": 4}}, "but length would need one; leave model.length out"),
    ],
)
def test_a_model_that_needs_host_device_syncs_is_refused(fields, words):
    model = make("plain", **fields)
    with pytest.raises(ValueError, match=words):
        StaticStep(model, model(text(1, 8)).state)


@pytest.mark.parametrize("name", ["plain", "words", "experts", "attention"])
@torch.no_grad()
def test_generation_is_greedy_decoding(name):
    model, ids = make(name), text(2, 21)
    expected, logits, state = [], *(lambda o: (o.logits, o.state))(model(ids))
    for _ in range(30):
        expected.append(logits[:, -1:].argmax(-1))
        output = model(expected[-1], state=state)
        logits, state = output.logits, output.state
    assert torch.equal(generate(model, ids, 30), torch.cat(expected, dim=1))


@torch.no_grad()
def test_padding_on_the_left_changes_nothing():
    model, ids = make("plain").double(), text(2, 12)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :5] = False
    both = generate(model, ids, 10, mask=mask)
    assert torch.equal(both[:1], generate(model, ids[:1], 10))
    assert torch.equal(both[1:], generate(model, ids[1:, 5:], 10))


@pytest.mark.parametrize("sync_every", [1, 4, 100])
def test_sequences_end_at_the_stop_token_however_often_the_host_checks(sync_every):
    model, ids = make("plain"), text(3, 15)
    torch.manual_seed(1)
    free = generate(model, ids, 40, temperature=3.0)
    stop = int(free[0, 6])
    torch.manual_seed(1)
    got = generate(model, ids, 40, temperature=3.0, stop=stop, sync_every=sync_every)
    lengths = []
    for row, expected in zip(got, free, strict=True):
        at = (expected == stop).nonzero()
        lengths.append(int(at[0]) + 1 if len(at) else 40)
        assert torch.equal(row[: lengths[-1]], expected[: lengths[-1]])
        assert (row[lengths[-1] :] == stop).all()
    assert got.shape == (3, max(lengths))


def test_samples_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(40_000, 3)
    share = choose(logits, 1.0).bincount(minlength=3) / 40_000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=0.01)
    cold = choose(logits, 0.5).bincount(minlength=3) / 40_000
    torch.testing.assert_close(cold, torch.tensor([25.0, 9.0, 4.0]) / 38, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"new": 0}, "new, sync_every: expected 1 or more"),
        ({"new": 1, "temperature": -1.0}, "temperature: expected 0"),
        ({"new": 1, "temperature": math.nan}, "temperature: expected 0 or more, got nan"),
        ({"new": 1, "stop": 259}, "stop: got 259, allowed a token id from 0 to 258"),
        ({"new": 1, "mask": torch.tensor([[True, True, True, False]])}, "mask: a row ends with padding"),
    ],
)
def test_bad_settings_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        generate(make("plain"), text(1, 4), **fields)


def test_states_and_ids_that_do_not_fit_a_static_step_are_refused():
    model = make("plain")
    state = model(text(2, 4)).state
    with pytest.raises(ValueError, match=r"state: expected 4 entries, got 3"):
        StaticStep(model, state[:3])
    with pytest.raises(ValueError, match=r"state\[0\]\.conv: expected shape"):
        StaticStep(model, make("plain", d_model=32)(text(2, 4)).state)
    step = StaticStep(model, state)
    for ids in (text(1, 1), text(2, 2), text(2, 1).float()):
        with pytest.raises(ValueError, match=r"ids: expected int64 or int32 of shape \(2, 1\), got"):
            step(ids)
