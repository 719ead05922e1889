"""Which parameters the layers name as matrices, and how they are cut."""

import re

import pytest
import torch

from resnet_bk import LanguageModel
from resnet_bk.layers.matrices import Matrices, matrices

SHAPE = {"d_model": 16, "n_layers": 3, "d_ff": 40}
MODELS = {
    "plain": {"num_experts": 1},
    "experts": {"num_experts": 4},
    "multiscale": {"num_experts": 1, "multiscale": {"factors": [2], "layers": [1, 1, 1], "boundaries": "learned"}},
    "length": {"length": {"bins": 2, "max_length": 8, "mode": "pool"}},
    "sparsity": {"sparsity": {"target": 0.5}},
    "depth": {"depth": {"policy": "exit", "first": 1, "every": 1}},
    "memory": {"memory": {"orders": [1, 2], "rows": 61, "recent": [1]}},
    "attention": {"attention": {"every": 2, "window": 4}},
    "diagonal": {"readout": "diagonal"},
}
# What has two dimensions and is not a hidden matrix.
OTHERS = (
    r"embed\.weight|head\.weight|.*\.(conv|potential|importance|router|weigh)\.weight|.*\.router|.*\.up\.gain|"
    r".*\.vectors\.\w+|.*\.predictor\.\w+\.weight"
)


@pytest.mark.parametrize("name", MODELS)
def test_every_hidden_matrix_is_named_once(name):
    model = LanguageModel(31, **SHAPE | MODELS[name])
    found = matrices(model)
    named = {id(m.parameter) for m in found}
    assert len(named) == len(found) > 0
    for parameter_name, p in model.named_parameters():
        if p.dim() < 2 or re.fullmatch(OTHERS, parameter_name):
            assert id(p) not in named, parameter_name
        else:
            assert id(p) in named, parameter_name
    for parameter, sizes, dim in found:
        assert parameter.dim() in (2, 3)
        assert not sizes or sum(sizes) == parameter.shape[dim]


def test_projections_that_share_a_parameter_are_cut():
    block = LanguageModel(31, **SHAPE, num_experts=1).blocks[0]
    heads = block.mixer.heads
    mixer = block.mixer.matrices()
    assert mixer == [
        Matrices(block.mixer.in_proj.weight, (16, 16, 16, 16, heads)),
        (block.mixer.out_proj.weight, (), 0),
    ]
    up, down = block.feed_forward.matrices()
    assert (up.sizes, up.dim, down.sizes) == ((40, 40), 0, ())
    up, down = LanguageModel(31, **SHAPE, num_experts=4).blocks[0].feed_forward.matrices()
    assert (up.sizes, up.dim, down.sizes) == ((40, 40), -1, ())
    assert up.parameter.shape == (4, 16, 80)


def test_other_modules_name_none():
    assert matrices(torch.nn.Linear(4, 4)) == []
