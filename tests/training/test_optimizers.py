"""Which parameters the optimizer trains, and which of them decay."""

import torch

from resnet_bk import LanguageModel
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
