"""Exported programs: any length, the same numbers as the model; a package that runs without tracing."""

import copy
import io
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils import _pytree as pytree

from resnet_bk import LanguageModel, ModelOutput
from resnet_bk.hf import RecurrentCache, ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.hf.outputs import CACHE
from resnet_bk.layers.embedding import NgramMemory
from resnet_bk.layers.score import Score
from resnet_bk.layers.sparse import SparseBKCore
from resnet_bk.ops.packing import capacity

DYNAMIC = {1: torch.export.Dim.DYNAMIC}
LENGTHS = (1, 2, 5, 31, 32, 33, 64, 65, 300)
CHUNKS = {"factors": [3], "layers": [1, 3, 0]}
TECHNIQUES = {
    "bonds": {},
    "real": {"energy": "real"},
    "complex": {"energy": "complex"},
    "diagonal": {"readout": "diagonal"},
    "attention": {"attention": {"every": 2, "window": 8}},
    "wide attention": {"attention": {"every": 2, "window": 300}},
    "memory": {"memory": {"orders": [1, 2], "rows": 5000}},
    "recent": {"memory": {"recent": [1, 2], "recent_rows": 50}},
    "experts": {"num_experts": 4, "num_experts_per_tok": 2},
    "conditional experts": {"num_experts": 4, "experts": {"policy": "top_p", "identity": 1, "zero": 1}},
    "chunks": {"multiscale": CHUNKS},
    "words": {"multiscale": {**CHUNKS, "boundaries": "whitespace"}},
    "bounded words": {"multiscale": {**CHUNKS, "boundaries": "whitespace", "bound": 0.7}},
    "learned chunks": {"multiscale": {**CHUNKS, "boundaries": "learned"}},
    "act": {"depth": {"policy": "act"}},
    "bounded act": {"depth": {"policy": "act", "bound": 1.0}},
    "skip": {"depth": {"policy": "skip"}},
    "exit": {"depth": {"policy": "exit"}},
    "sparse": {"sparsity": {"target": 0.5}},
    "bounded sparse": {"sparsity": {"target": 0.5, "bound": 1.0}},
    "length": {"length": {"bins": 4, "max_length": 32}},
    "pooled length": {"length": {"bins": 4, "max_length": 32, "mode": "pool", "spacing": "words"}},
    "several": {
        "num_experts": 3,
        "attention": {"every": 2, "window": 8},
        "multiscale": {**CHUNKS, "boundaries": "learned"},
        "depth": {"policy": "act", "threshold": 0.3},
        "length": {"bins": 4, "max_length": 32, "mode": "pool"},
        "sparsity": {"target": 0.5},
    },
}


def text(length, seed=0):
    ids = torch.randint(97, 123, (2, length), generator=torch.Generator().manual_seed(seed))
    ids[:, ::4] = 35
    return ids


def make(fields):
    """Return an untrained model that makes decisions of both kinds."""
    torch.manual_seed(0)
    model = ResNetBKForCausalLM(ResNetBKConfig(d_model=16, n_layers=4, **fields)).double().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Score):
                module.bias.zero_()
                module.weight.normal_()
            if isinstance(module, SparseBKCore):
                module.importance.bias.zero_()
            if isinstance(module, NgramMemory):
                module.count(text(2000)[0].numpy())
    return model


def exported(model, **keywords):
    """Export a model for any number of positions, of its inputs and before them."""

    def dynamic(x):
        if isinstance(x, RecurrentCache):
            return [pytree.tree_map(lambda _: None, x.state), torch.export.Dim.DYNAMIC]
        return DYNAMIC if isinstance(x, torch.Tensor) else None

    shapes = {name: dynamic(value) for name, value in keywords.items()}
    with torch.no_grad():
        return torch.export.export(model, (), keywords, dynamic_shapes=shapes)


def saved(program):
    """Return a program as another process would load it."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", TECHNIQUES)
@torch.no_grad()
def test_a_program_exported_at_one_length_computes_any_length(name):
    model = make(TECHNIQUES[name])
    program = exported(model, input_ids=text(70), use_cache=False).module()
    for length in LENGTHS:
        ids = text(length, seed=length)
        close(program(input_ids=ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("name", ["bonds", "complex", "attention", "experts", "words", "act", "sparse", "several"])
@torch.no_grad()
def test_a_saved_program_continues_from_any_cache(name):
    model = make(TECHNIQUES[name])
    program = saved(exported(model, input_ids=text(70), **{CACHE: model(text(40))[CACHE]}))
    for length, before in ((1, 7), (33, 1), (64, 65)):
        ids = text(before + length, seed=length)
        got = program(input_ids=ids[:, before:], **{CACHE: model(ids[:, :before])[CACHE]})
        whole = model(ids)
        close(got.logits, whole.logits[:, before:])
        assert got[CACHE].get_seq_length() == before + length
        later = text(3, seed=1)
        close(program(input_ids=later, **{CACHE: got[CACHE]}).logits, model(later, **{CACHE: whole[CACHE]}).logits)


LOAD = """
import sys
import torch
from resnet_bk.hf import ResNetBKForCausalLM
program = torch.export.load(sys.argv[1])
inputs = program.example_inputs[1]
torch.save(program.module()(**inputs).logits, sys.argv[2])
"""


@torch.no_grad()
def test_another_process_loads_a_program_that_takes_a_cache(tmp_path):
    model = make({})
    inputs = {"input_ids": text(9), CACHE: model(text(40))[CACHE]}
    torch.export.save(exported(model, **inputs), tmp_path / "program.pt2")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "program.pt2"), str(tmp_path / "logits")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "weights_only" not in done.stderr, "it holds nothing that torch would unpickle unasked"
    close(torch.load(tmp_path / "logits"), model(**inputs).logits)


@pytest.mark.parametrize("name", ["bonds", "attention", "words"])
@torch.no_grad()
def test_a_program_reads_padding(name):
    model = make(TECHNIQUES[name])
    program = exported(model, input_ids=text(70), attention_mask=torch.ones(2, 70, dtype=torch.int64)).module()
    ids, mask = text(9), torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    expected = model(ids, attention_mask=mask).logits[mask.bool()]
    close(program(input_ids=ids, attention_mask=mask).logits[mask.bool()], expected)


@torch.no_grad()
def test_the_cache_of_a_program_continues_in_the_model():
    model, ids = make({}), text(50)
    cache = exported(model, input_ids=text(70)).module()(input_ids=ids[:, :40])[CACHE]
    assert isinstance(cache, RecurrentCache)
    assert cache.get_seq_length() == 40
    close(model(ids[:, 40:], **{CACHE: cache}).logits, model(ids).logits[:, 40:])


@torch.no_grad()
def test_a_language_model_exports_with_its_state():
    torch.manual_seed(0)
    model, ids = LanguageModel(259, d_model=16, n_layers=2).double().eval(), text(40)
    state = model(ids).state
    shapes = {"ids": DYNAMIC, "state": pytree.tree_map(lambda _: None, state)}
    output = saved(torch.export.export(model, (text(70),), {"state": state}, dynamic_shapes=shapes))(ids, state=state)
    assert isinstance(output, ModelOutput)
    close(output.logits, model(ids, state=state).logits)
    later = model(ids, state=output.state).logits
    close(later, model(torch.cat([ids] * 3, 1)).logits[:, 80:])


@torch.no_grad()
def test_a_program_has_the_bound_of_its_technique():
    model = make({"depth": {"policy": "act", "bound": 0.1, "threshold": 1.0}})
    program = exported(model, input_ids=text(70), use_cache=False).module()
    program(input_ids=text(16), use_cache=False)  # fits: a bound is rounded up to whole tiles
    with pytest.raises(RuntimeError, match="more positions selected than capacity allows"):
        program(input_ids=text(17), use_cache=False)


@torch.no_grad()
def test_a_capacity_in_integers_is_the_share_rounded_up():
    class Positions(torch.nn.Module):
        def forward(self, x):
            return [x.new_zeros(capacity(share, x.shape[1])) for share in (None, 1.0, 0.7, 1 / 3, 0.0)]

    program = torch.export.export(Positions(), (torch.zeros(2, 70),), dynamic_shapes=(DYNAMIC,)).module()
    for n, expected in ((10, [10, 10, 7, 4, 0]), (299, [299, 299, 210, 100, 0])):
        assert [len(x) for x in program(torch.zeros(2, n))] == expected
        assert [capacity(share, n) for share in (1.0, 0.7, 1 / 3, 0.0)] == expected[1:]
    assert [capacity(share, 1600) for share in (0.07, 1e-7, None)] == [112, 1, None]


def test_outputs_are_trees_of_tensors():
    model, ids = LanguageModel(259, d_model=16, n_layers=1), text(5)
    output = model(ids, targets=ids)
    doubled = pytree.tree_map_only(torch.Tensor, lambda x: 2 * x, output)
    torch.testing.assert_close(doubled.loss, 2 * output.loss)
    torch.testing.assert_close(doubled.losses["cross_entropy"], 2 * output.losses["cross_entropy"])
    cache = RecurrentCache(output.state, 5)
    assert pytree.tree_map(lambda x: x, copy.copy(cache)).get_seq_length() == 5
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(cache)[0]]
    assert paths[0].startswith(".state[0]")
    assert paths[-1] == ".length"


@pytest.mark.skipif(shutil.which("c++") is None or sys.platform != "linux", reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own use of torch
@pytest.mark.parametrize("name", ["bonds", pytest.param("experts", marks=pytest.mark.soak)])
@torch.no_grad()
def test_a_package_of_a_forward_pass_runs(name, tmp_path):
    model = make(TECHNIQUES[name]).float()
    program = exported(model, input_ids=text(70), use_cache=False)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for length in (2, 33, 100):
        ids = text(length)
        output = package(input_ids=ids, use_cache=False)
        torch.testing.assert_close(output["logits"], model(ids).logits, rtol=1e-4, atol=1e-4)
