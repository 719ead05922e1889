"""The state of an optimizer is loaded only if every trained parameter has an intact one."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from resnet_bk import LanguageModel
from resnet_bk.checkpoint import OPTIMIZER, WEIGHTS, CheckpointError
from resnet_bk.layers.matrices import matrices
from resnet_bk.training import optimizers
from resnet_bk.training.states import (
    gather_optimizer_state,
    gather_weights,
    load_optimizer_state,
    load_weights,
    save_optimizer_state,
)

NAME = "blocks.0.mixer.in_proj.weight"
KINDS = ("adamw", "muon")


def build(frozen=(), kind="adamw"):
    torch.manual_seed(0)
    model = LanguageModel(20, d_model=16, n_layers=1)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    return model, optimizers.create(model, 1e-2, 0.1, (0.9, 0.99), kind)


def step(model, optimizer):
    ids = torch.randint(20, (2, 9), generator=torch.Generator().manual_seed(1))
    model(ids, targets=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def saved(folder, frozen=(), kind="adamw"):
    """Return a model and an optimizer after one step, and write their checkpoint."""
    model, optimizer = build(frozen, kind)
    step(model, optimizer)
    save_optimizer_state(gather_optimizer_state(model, optimizer), folder)
    weights = gather_weights(model)
    save_file({name: weights[name] for name, _ in model.named_parameters()}, folder / WEIGHTS)
    return model, optimizer


def assert_same(model, other):
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [(), (NAME,), ("embed.weight",)])
def test_training_goes_on_as_if_it_had_not_stopped(frozen, kind, tmp_path):
    model, optimizer = saved(tmp_path, frozen, kind)
    resumed, again = build(frozen, kind)
    load_weights(resumed, tmp_path)
    load_optimizer_state(resumed, again, tmp_path)
    for pair in ((model, optimizer), (resumed, again)):
        step(*pair)
    assert_same(model, resumed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [NAME, "embed.weight"])
def test_parameters_that_are_frozen_now_get_no_state(name, kind, tmp_path):
    saved(tmp_path, kind=kind)
    model, optimizer = build((name,), kind)
    load_optimizer_state(model, optimizer, tmp_path)
    assert dict(model.named_parameters())[name] not in optimizer.state


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_are_trained_now_but_were_not_are_missing(kind, tmp_path):
    saved(tmp_path, (NAME,), kind)
    with pytest.raises(CheckpointError, match=f"missing '{NAME}/"):
        load_optimizer_state(*build(kind=kind), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_another_optimizer_is_one_clear_line(kind, tmp_path):
    saved(tmp_path, kind=kind)
    other = "adamw" if kind == "muon" else "muon"
    model, optimizer = build(kind=other)
    with pytest.raises(CheckpointError) as caught:
        load_optimizer_state(model, optimizer, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / OPTIMIZER}: 'blocks.0.")
    assert message.endswith(
        f": is of the optimizer '{kind}', expected the state of '{other}'; resume with --optimizer {kind}"
    )
    assert not optimizer.state


def test_the_momentum_of_matrices_and_the_moments_of_the_others_are_saved(tmp_path):
    model, _ = saved(tmp_path, kind="muon")
    hidden = {id(m.parameter) for m in matrices(model)}
    entries = {
        f"{name}/{entry}"
        for name, p in model.named_parameters()
        for entry in (["momentum"] if id(p) in hidden else ["exp_avg", "exp_avg_sq", "step"])
    }
    assert set(load_file(tmp_path / OPTIMIZER)) == entries


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


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "missing"),
        (torch.zeros(16, 65), r"expected shape \(65, 16\), got \(16, 65\)"),
        (torch.zeros(65, 16, dtype=torch.int8), "got I8"),
        (torch.full((65, 16), torch.inf), "has a NaN or an infinity"),
    ],
)
def test_an_entry_that_muon_cannot_use_is_named(value, words, tmp_path):
    saved(tmp_path, kind="muon")
    state = load_file(tmp_path / OPTIMIZER)
    del state[f"{NAME}/momentum"]
    if value is not None:
        state[f"{NAME}/momentum"] = value
    save_file(state, tmp_path / OPTIMIZER)
    model, optimizer = build(kind="muon")
    with pytest.raises(CheckpointError, match=words) as caught:
        load_optimizer_state(model, optimizer, tmp_path)
    assert f"{tmp_path / OPTIMIZER}" in str(caught.value)
    assert f"{NAME}/momentum" in str(caught.value)
    assert not optimizer.state


@pytest.mark.parametrize("kind", KINDS)
def test_entries_of_other_floating_point_types_get_those_of_the_parameter(kind, tmp_path):
    model, optimizer = saved(tmp_path, kind=kind)
    state = {name: x.double() for name, x in load_file(tmp_path / OPTIMIZER).items()}
    save_file(state, tmp_path / OPTIMIZER)
    resumed, again = build(kind=kind)
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
