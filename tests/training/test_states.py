"""The state of AdamW is loaded only if every trained parameter has an intact one."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from resnet_bk import LanguageModel
from resnet_bk.checkpoint import OPTIMIZER, WEIGHTS, CheckpointError
from resnet_bk.training.states import (
    gather_optimizer_state,
    gather_weights,
    load_optimizer_state,
    load_weights,
    save_optimizer_state,
)

NAME = "blocks.0.mixer.in_proj.weight"


def build(frozen=()):
    torch.manual_seed(0)
    model = LanguageModel(20, d_model=16, n_layers=1)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    return model, optimizer


def step(model, optimizer):
    ids = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(1))
    model(ids, targets=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def saved(folder, frozen=()):
    """Return a model and an optimizer after one step, and write their checkpoint."""
    model, optimizer = build(frozen)
    step(model, optimizer)
    save_optimizer_state(gather_optimizer_state(model, optimizer), folder)
    weights = gather_weights(model)
    save_file({name: weights[name] for name, _ in model.named_parameters()}, folder / WEIGHTS)
    return model, optimizer


def assert_same(model, other):
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("frozen", [(), (NAME,)])
def test_training_goes_on_as_if_it_had_not_stopped(frozen, tmp_path):
    model, optimizer = saved(tmp_path, frozen)
    resumed, again = build(frozen)
    load_weights(resumed, tmp_path)
    load_optimizer_state(resumed, again, tmp_path)
    for pair in ((model, optimizer), (resumed, again)):
        step(*pair)
    assert_same(model, resumed)


def test_parameters_that_are_frozen_now_get_no_state(tmp_path):
    saved(tmp_path)
    model, optimizer = build(frozen=(NAME,))
    load_optimizer_state(model, optimizer, tmp_path)
    assert dict(model.named_parameters())[NAME] not in optimizer.state


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("exp_avg", None, "missing"),
        ("exp_avg_sq", None, "missing"),
        ("step", None, "missing"),
        ("exp_avg", torch.zeros(1), r"expected shape \(65, 16\), got \(1,\)"),
        ("exp_avg_sq", torch.zeros(16, 64), "expected shape"),
        ("step", torch.ones(1), r"expected shape \(\), got \(1,\)"),
        ("exp_avg", torch.zeros(65, 16, dtype=torch.int8), "got I8"),
        ("step", torch.tensor(3), "got I64"),
        ("exp_avg", torch.full((65, 16), torch.nan), "has a NaN or an infinity"),
        ("exp_avg_sq", torch.full((65, 16), -1.0), "expected 0 or more, got -1"),
        ("step", torch.tensor(-1.0), "expected 0 or more, got -1"),
        ("other", torch.zeros(1), "unexpected"),
    ],
)
def test_an_entry_that_adamw_cannot_use_is_named(entry, value, words, tmp_path):
    saved(tmp_path)
    state = load_file(tmp_path / OPTIMIZER)
    state.pop(f"{NAME}/{entry}", None)
    if value is not None:
        state[f"{NAME}/{entry}"] = value
    save_file(state, tmp_path / OPTIMIZER)
    model, optimizer = build()
    with pytest.raises(CheckpointError, match=words) as caught:
        load_optimizer_state(model, optimizer, tmp_path)
    assert f"{tmp_path / OPTIMIZER}" in str(caught.value)
    assert f"{NAME}/{entry}" in str(caught.value)
    assert not optimizer.state


def test_entries_of_other_floating_point_types_get_those_of_the_parameter(tmp_path):
    model, optimizer = saved(tmp_path)
    state = {name: x.double() for name, x in load_file(tmp_path / OPTIMIZER).items()}
    save_file(state, tmp_path / OPTIMIZER)
    resumed, again = build()
    load_weights(resumed, tmp_path)
    load_optimizer_state(resumed, again, tmp_path)
    step(model, optimizer)
    step(resumed, again)
    assert_same(model, resumed)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=WEIGHTS):
        load_weights(build()[0], tmp_path)
    with pytest.raises(CheckpointError, match=OPTIMIZER):
        load_optimizer_state(*build(), tmp_path)
