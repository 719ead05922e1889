"""Which parameters the optimizer trains, and which of them decay."""

import pytest
import torch

from resnet_bk import LanguageModel
from resnet_bk.layers.matrices import matrices
from resnet_bk.training import optimizers


def make():
    torch.manual_seed(0)
    return LanguageModel(31, d_model=16, n_layers=1)


def test_every_trained_parameter_is_in_one_group():
    model = make()
    model.norm.weight.requires_grad_(False)
    optimizer = optimizers.create(model, 0.1, 0.5, (0.9, 0.99))
    found = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(set(found)) == len(list(model.parameters())) - 1
    decaying = {
        name for name, p in model.named_parameters() if any(p is q for q in optimizer.param_groups[0]["params"])
    }
    assert decaying == {name for name, p in model.named_parameters() if p.dim() >= 2}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_muon_updates_the_matrices_and_adamw_all_others():
    model = make()
    frozen = model.blocks[0].mixer.out_proj.weight, model.norm.weight
    for p in frozen:
        p.requires_grad_(False)
    optimizer = optimizers.create(model, 0.1, 0.5, (0.9, 0.99), "muon")
    found = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(set(found)) == len(list(model.parameters())) - 2
    assert not set(found) & set(frozen)
    hidden, decaying, others = (set(group["params"]) for group in optimizer.param_groups)
    assert hidden == {m.parameter for m in matrices(model)} - set(frozen)
    assert decaying == {p for p in model.parameters() if p.dim() >= 2} - hidden - set(frozen)
    assert model.embed.weight in decaying
    assert all(p.dim() < 2 for p in others)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5, 0.0]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1] * 3


def test_a_model_without_matrices_or_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="model: no layer names its matrices"):
        optimizers.create(torch.nn.Linear(4, 4), 0.1, 0.5, (0.9, 0.99), "muon")
    with pytest.raises(ValueError, match="kind: got 'sgd', allowed 'adamw' or 'muon'"):
        optimizers.create(make(), 0.1, 0.5, (0.9, 0.99), "sgd")


def test_muon_with_all_matrices_frozen_is_adamw():
    model, other = make(), make()
    for network in (model, other):
        for m in matrices(network):
            m.parameter.requires_grad_(False)
    ids = torch.randint(31, (2, 9))
    for network, kind in ((model, "muon"), (other, "adamw")):
        network(ids, targets=ids).loss.backward()
        optimizers.create(network, 0.1, 0.5, (0.9, 0.99), kind).step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))
