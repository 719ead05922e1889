"""Exported programs: any length, the same numbers as the model; a package that runs without tracing."""

import copy
import shutil
import sys

import pytest
import torch
from torch.utils import _pytree as pytree

from resnet_bk import LanguageModel, ModelOutput
from resnet_bk.hf import RecurrentCache, ResNetBKConfig, ResNetBKForCausalLM

DYNAMIC = {1: torch.export.Dim.DYNAMIC}
LENGTHS = (1, 2, 5, 31, 32, 33, 64, 65, 300)
TECHNIQUES = {
    "bonds": {},
    "real": {"energy": "real"},
    "complex": {"energy": "complex"},
    "diagonal": {"readout": "diagonal"},
    "memory": {"memory": {"orders": [1, 2], "rows": 5000}},
    "words": {"multiscale": {"factors": [3], "layers": [1, 3, 0], "boundaries": "whitespace", "bound": 1.0}},
    "act": {"depth": {"policy": "act", "bound": 1.0}},
    "sparse": {"sparsity": {"target": 0.5, "bound": 1.0}},
}


def text(length, seed=0):
    return torch.randint(97, 123, (2, length), generator=torch.Generator().manual_seed(seed))


def make(fields):
    torch.manual_seed(0)
    model = ResNetBKForCausalLM(ResNetBKConfig(d_model=16, n_layers=4, **fields)).double().eval()
    with torch.no_grad():  # decisions of both kinds
        for name, p in model.named_parameters():
            if "units." in name or "routers." in name:
                p.normal_()
    return model


def exported(model, **keywords):
    shapes = {name: DYNAMIC if isinstance(value, torch.Tensor) else None for name, value in keywords.items()}
    with torch.no_grad():
        return torch.export.export(model, (), keywords, dynamic_shapes=shapes)


@pytest.mark.parametrize("name", TECHNIQUES)
@torch.no_grad()
def test_a_program_exported_at_one_length_computes_any_length(name):
    model = make(TECHNIQUES[name])
    program = exported(model, input_ids=text(70), use_cache=False).module()
    for length in LENGTHS:
        ids = text(length, seed=length)
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(program(input_ids=ids, use_cache=False).logits, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_program_reads_padding():
    model = make({})
    program = exported(model, input_ids=text(70), attention_mask=torch.ones(2, 70, dtype=torch.int64)).module()
    ids, mask = text(9), torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    got = program(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_cache_of_a_program_continues_in_the_model():
    model, ids = make({}), text(50)
    output = exported(model, input_ids=text(70)).module()(input_ids=ids[:, :40])
    cache = output["cache" if "cache" in output else "past_key_values"]
    assert isinstance(cache, RecurrentCache)
    assert cache.get_seq_length() == 40
    later = model(ids[:, 40:], past_key_values=cache).logits
    torch.testing.assert_close(later, model(ids).logits[:, 40:], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_language_model_exports_with_its_state():
    torch.manual_seed(0)
    model, ids = LanguageModel(259, d_model=16, n_layers=4).eval(), text(40)
    output = torch.export.export(model, (text(70),), dynamic_shapes=(DYNAMIC,)).module()(ids)
    assert isinstance(output, ModelOutput)
    torch.testing.assert_close(output.logits, model(ids).logits)
    later = model(ids, state=output.state).logits
    torch.testing.assert_close(later, model(torch.cat([ids, ids], 1)).logits[:, 40:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_program_is_saved(tmp_path):
    model, ids = make({}), text(40)
    torch.export.save(exported(model, input_ids=text(70), use_cache=False), tmp_path / "model.pt2")
    output = torch.export.load(tmp_path / "model.pt2").module()(input_ids=ids, use_cache=False)
    torch.testing.assert_close(output.logits, model(ids).logits)


def test_outputs_are_trees_of_tensors():
    model, ids = LanguageModel(259, d_model=16, n_layers=1), text(5)
    output = model(ids, targets=ids)
    doubled = pytree.tree_map_only(torch.Tensor, lambda x: 2 * x, output)
    torch.testing.assert_close(doubled.loss, 2 * output.loss)
    torch.testing.assert_close(doubled.losses["cross_entropy"], 2 * output.losses["cross_entropy"])
    cache = RecurrentCache(output.state, 5)
    assert pytree.tree_map(lambda x: x, copy.copy(cache)).get_seq_length() == 5


@pytest.mark.skipif(shutil.which("c++") is None or sys.platform != "linux", reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own use of torch
@torch.no_grad()
def test_a_package_of_a_forward_pass_runs(tmp_path):
    model = make({}).float()
    program = exported(model, input_ids=text(70), use_cache=False)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for length in (2, 33, 100):
        ids = text(length)
        output = package(input_ids=ids, use_cache=False)
        torch.testing.assert_close(output["logits"], model(ids).logits, rtol=1e-4, atol=1e-4)
