"""States that a model cannot continue from are refused before anything runs, in one line that names the part."""

import pytest
import torch
from torch.utils import _pytree as pytree

from resnet_bk import LanguageModel

FIELDS = {
    "plain": {},
    "complex": {"energy": "complex"},
    "diagonal": {"readout": "diagonal"},
    "chunks": {"multiscale": {"factors": [2], "layers": [0, 1, 1]}},
    "length": {"length": {"bins": 2, "max_length": 8}},
    "depth": {"n_layers": 3, "depth": {"policy": "act"}},
    "sparse": {"sparsity": {"target": 0.5}},
    "attention": {"attention": {"every": 2, "window": 5}},
}
IDS = torch.randint(20, (3, 9), generator=torch.Generator().manual_seed(0))


def build(**fields):
    defaults = {"d_model": 16, "n_heads": 2, "n_layers": None if "multiscale" in fields else 2}
    return LanguageModel(20, **{**defaults, **fields}).eval()


def state_of(ids=IDS, **fields):
    with torch.no_grad():
        return build(**fields)(ids).state


def refused(model, state, error, words):
    with pytest.raises(error, match=words) as caught:
        model(IDS[:, :1], state=state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FIELDS)
@torch.no_grad()
def test_states_of_the_model_itself_are_accepted_in_every_precision(name):
    """Under autocast a state may be computed and continued without autocast, and the other way round."""
    model = build(**FIELDS[name])
    with torch.autocast("cpu", torch.bfloat16):
        half = model(IDS).state
        model(IDS, state=model(IDS, state=half).state)
        model(IDS, state=state_of(**FIELDS[name]))
    model(IDS, state=half)
    model(IDS, state=tuple(half))
    for dtype in (torch.bfloat16, torch.float64):
        model = model.to(dtype)
        model(IDS, state=model(IDS, state=model(IDS).state).state)


@pytest.mark.parametrize("name", FIELDS)
def test_states_of_other_sequences_or_models_are_refused(name):
    fields = FIELDS[name]
    model, state = build(**fields), state_of(**fields)
    refused(model, state_of(IDS[:2], **fields), ValueError, r"state\[0\].*: expected shape \(3, .*got \(2,")
    refused(model, state_of(**fields, conv_width=3), ValueError, "conv: expected shape")
    refused(
        model, [*state, state[0]], ValueError, r"state: expected (\d) entries, got \d; pass the state that the model"
    )
    refused(model, state[0], (TypeError, ValueError), "state")
    refused(model, build(**fields).double()(IDS).state, TypeError, "expected torch.float32, got torch.float64")
    refused(model, pytree.tree_map(lambda x: x.to("meta"), state), ValueError, "on meta, the model is on cpu")
    refused(model, pytree.tree_map(lambda x: None, state), TypeError, "expected a tensor, got NoneType")
    refused(model, pytree.tree_map(lambda x: x.tolist(), state), TypeError, "expected a tensor, got")
    for other in FIELDS:
        if other != name:
            refused(model, state_of(**FIELDS[other]), (TypeError, ValueError), r"state.*: expected")


def test_a_window_of_another_length_is_refused():
    attention = {"every": 2, "window": 5}
    state = state_of(attention=attention | {"window": 6})
    refused(build(attention=attention), state, ValueError, r"state\[1\]\.past: expected shape \(3, 4, 34\)")


def test_a_bidirectional_model_continues_nothing():
    model = build(causal=False)
    refused(model, model(IDS).state, ValueError, "state: got a state, allowed None; a bidirectional model")
