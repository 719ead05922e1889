"""The language model as a whole: shapes, losses, bad input."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from resnet_bk import LanguageModel, ModelConfig
from resnet_bk import model as model_module
from resnet_bk.layers import loss as loss_module


def test_the_documented_call_works():
    model = LanguageModel(50, d_model=64, n_layers=4, n_seq=128, num_experts=4, top_k=1)
    for n in (1, 3, 128, 129, 300):
        assert model(torch.randint(50, (2, n))).logits.shape == (2, n, 50)


def test_config_and_keywords_are_the_same_model():
    config = ModelConfig(vocab_size=20, d_model=32, n_layers=1)
    assert LanguageModel.from_config(config).config == LanguageModel(20, d_model=32, n_layers=1).config == config


def test_loss_is_cross_entropy_plus_weighted_balance():
    model = LanguageModel(20, d_model=16, n_layers=2, num_experts=4, balance_weight=0.5)
    ids = torch.randint(20, (2, 9))
    targets = torch.randint(20, (2, 9))
    targets[0, :4] = -100
    output = model(ids, targets=targets)
    expected = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(output.losses["cross_entropy"], expected)
    torch.testing.assert_close(output.loss, expected + 0.5 * output.losses["balance"])


def test_the_loss_in_pieces_equals_the_loss_at_once(monkeypatch):
    results = []
    for limit in (2**24, 1):
        monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", limit)
        torch.manual_seed(0)
        model = LanguageModel(997, d_model=16, n_layers=1, num_experts=1)
        ids = torch.randint(997, (4, 65))
        targets = ids[:, 1:].clone()
        targets[1, 7:30] = -100
        loss = model(ids[:, :-1], targets=targets, logits=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("limit", [2**24, 1])
@pytest.mark.parametrize("fields", [{}, {"depth": {"policy": "exit"}}])
def test_a_batch_without_counted_targets_has_a_loss_of_zero(fields, limit, monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", limit)
    model = LanguageModel(20, d_model=16, n_layers=3, **fields)
    ids = torch.randint(20, (2, 5))
    nothing = {"targets": torch.full_like(ids, -100)}, {"targets": ids, "mask": torch.zeros_like(ids, dtype=torch.bool)}
    for keywords in nothing:
        output = model(ids, **keywords)
        assert output.losses["cross_entropy"] == 0
        output.loss.backward()
        assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"readout": "diagonal", "energy": "complex"},
        {"causal": False},
        {"attention": {"every": 1, "window": 4}},
        {"memory": {"orders": [1, 2, 3], "rows": 100, "recent": [1, 2], "recent_rows": 20}},
    ],
)
def test_a_nan_in_padding_reaches_nothing(fields):
    model = LanguageModel(20, d_model=16, n_layers=2, tie_word_embeddings=False, **fields).double()
    ids, mask = torch.randint(1, 20, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    ids[0, :4], mask[0, :4] = 0, False
    ids[1, 7:], mask[1, 7:] = 0, False
    results = []
    for value in (1.0, math.nan):
        model.embed.weight.data[0] = value
        model.zero_grad()
        output = model(ids, targets=ids, mask=mask)
        output.loss.backward()
        results.append([output.logits, output.loss, *(p.grad for p in model.parameters())])
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_a_large_vocabulary_never_needs_all_logits_in_memory():
    """2,048 tokens x 50,000 ids would be 410 MB of float32 logits, and 410 MB for their gradient."""
    code = (
        "import resource, torch\n"
        "from resnet_bk import LanguageModel\n"
        "model = LanguageModel(50_000, d_model=16, n_layers=1, num_experts=1)\n"
        "ids = torch.randint(50_000, (2, 1025))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "model(ids[:, :-1], targets=ids[:, 1:], logits=False).loss.backward()\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(grown) < 250


@pytest.mark.parametrize(
    ("ids", "keywords", "error", "words"),
    [
        (torch.zeros(1, 3), {}, TypeError, "ids: expected int64 or int32"),
        (torch.zeros(3, dtype=torch.long), {}, ValueError, r"expected shape \(B, N\)"),
        (torch.zeros(1, 0, dtype=torch.long), {}, ValueError, r"B, N >= 1, got \(1, 0\)"),
        (torch.tensor([[1, 20]]), {}, ValueError, "token id 20 is outside the vocabulary, allowed 0 to 19"),
        (torch.tensor([[-1, 2]]), {}, ValueError, "token id -1"),
        (torch.tensor([[1, 2]], device="meta"), {}, ValueError, "on meta, the model is on cpu"),
        (torch.tensor([[1, 2]]), {"mask": torch.ones(1, 2)}, TypeError, "mask: expected bool"),
        (
            torch.tensor([[1, 2]]),
            {"mask": torch.ones(1, 3, dtype=torch.bool)},
            ValueError,
            "mask: expected the shape of ids",
        ),
        (torch.tensor([[1, 2]]), {"targets": torch.tensor([1, 2])}, ValueError, "targets: expected the shape of ids"),
        ([[1, 2]], {}, TypeError, "ids: expected int64 or int32 token ids, got list"),
        (None, {}, TypeError, "ids: .* got NoneType"),
        (torch.tensor([[1, 2]]), {"targets": [[1, 2]]}, TypeError, "targets: expected int64 token ids, got list"),
        (
            torch.tensor([[1, 2]], dtype=torch.int32),
            {"targets": torch.tensor([[1, 2]], dtype=torch.int32)},
            TypeError,
            "targets: expected int64 token ids, got torch.int32",
        ),
        (torch.tensor([[1, 2]]), {"targets": torch.ones(1, 2)}, TypeError, "targets: .* got torch.float32"),
        (torch.tensor([[1, 2]]), {"targets": torch.tensor([[1, -1]])}, ValueError, "targets: token id -1 is outside"),
        (
            torch.tensor([[1, 2]]),
            {"targets": torch.tensor([[-100, 20]])},
            ValueError,
            "targets: token id 20 .* 0 to 19, and -100",
        ),
        (
            torch.tensor([[1, 2]]),
            {"targets": torch.tensor([[1, 2]], device="meta")},
            ValueError,
            "targets: on meta, the model is on cpu",
        ),
        (
            torch.tensor([[1, 2]]),
            {"mask": torch.ones(1, 2, dtype=torch.bool, device="meta")},
            ValueError,
            "mask: on meta, the model is on cpu",
        ),
        (torch.tensor([[1, 2]]), {"state": 5}, TypeError, "state: expected a list, got int"),
    ],
)
def test_bad_input_is_refused(ids, keywords, error, words):
    with pytest.raises(error, match=words):
        LanguageModel(20, d_model=16, n_layers=1)(ids, **keywords)


def test_layers_import_in_one_direction_only():
    """A package imports packages on its own floor or below; only hf and training import transformers."""
    import ast

    floors = [
        {"jit", "ngram_format"},
        {"config", "checkpoint", "clock", "extras", "files", "folders", "record", "weights", "ops"},
        {"layers"},
        {"adaptive", "data"},
        {"model", "report"},
        {"engine"},
        {"hf", "wrapper"},
        {"inference", "training"},
        {"study", "serve"},
        {"cli", "models"},
    ]
    order = {package: floor for floor, packages in enumerate(floors) for package in packages}
    siblings = {"inference": "training", "training": "inference"}
    root = Path(model_module.__file__).parent
    for path in root.rglob("*.py"):
        part = path.relative_to(root).parts[0].removesuffix(".py")
        if part.startswith("__"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name and name.startswith("resnet_bk."):
                    other = name.split(".")[1]
                    assert order[other] <= order[part], f"{path.name} imports {name}"
                    assert other != siblings.get(part), f"{path.name} imports {name}"
                if name and name.split(".")[0] in ("transformers", "tokenizers", "accelerate"):
                    assert part in ("hf", "training"), f"{path.name} imports {name}"
