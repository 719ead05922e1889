"""``resnet-bk adapt``: a run with techniques that starts from a trained one, and its comparison with it."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

from resnet_bk.adaptive.depth import AdaptiveDepth
from resnet_bk.cli import main
from resnet_bk.config import AdaptConfig, ConfigError, ModelConfig, TrainConfig
from resnet_bk.config.techniques import DepthConfig
from resnet_bk.inference.loading import load
from resnet_bk.model import LanguageModel
from resnet_bk.study import adapt as module
from resnet_bk.study import run as scored
from resnet_bk.training.transfer import Teacher

TEXT = "def add(a, b):\n    return a + b  # sum\n\n\nfor i in range(10):\n    print(add(i, 2 * i))\n" * 6
MEASURE = scored.measure
EXIT = "{depth: {policy: exit}}"


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A trained run in a folder of its own, which is the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for place in (scored, module):
        monkeypatch.setattr(place, "measure", lambda model, text, size: MEASURE(model, text, size, 1, 32, 2, 1))
    (tmp_path / "corpus").mkdir()
    for i in range(22):
        (tmp_path / "corpus" / f"{i:02}.py").write_text(f"# file {i}\n" + TEXT)
    model = ("--model.d_model=16", "--model.n_layers=4", "--model.n_seq=32")
    more = ("--data.source=corpus", "--output_dir=base", "--batch_size=4", "--max_steps=4", "--learning_rate=0.01")
    assert main(["train", *model, *more]) == 0
    return tmp_path / "base"


def weights(folder):
    return dict(load(str(folder))[0].named_parameters())


def test_the_adapted_run_stands_beside_its_base(base, capsys):
    assert main(["adapt", "base", "--techniques", EXIT, "--max_steps=3", "--thresholds", "[0.5, 1]"]) == 0
    said = capsys.readouterr().out
    found = json.loads((base.parent / "runs" / "adapt" / "adapt.json").read_text())
    points = found["points"]
    assert [(point["name"], point["threshold"]) for point in points] == [
        ("base", None),
        ("adapted", 0.95),
        ("adapted", 0.5),
        ("adapted", 1.0),
    ]
    results = json.loads((base / "results.json").read_text())
    assert points[0]["scores"]["bits_per_byte"] == results["held_out"]["bits_per_byte"]
    blocks = [point["scores"]["blocks"] for point in points]
    assert blocks[0] is None
    assert blocks[2] <= blocks[1] <= blocks[3]
    assert [points[0]["difficulty"], points[3]["difficulty"]] == [0, 0]  # every position costs the same
    assert -1 <= points[1]["difficulty"] <= 1
    table = (base.parent / "runs" / "adapt" / "adapt.md").read_text()
    assert table.count("\n| adapted |") == 3
    assert f"{points[3]['scores']['bits_per_byte']:.4f}" in table
    assert "adapted" in said
    model = load("runs/adapt")[0]
    assert any(isinstance(m, AdaptiveDepth) for m in model.modules())


@pytest.mark.parametrize("sign", [1, -1])
def test_compute_that_follows_the_loss_correlates_with_it(monkeypatch, sign):
    torch.manual_seed(0)
    ids, model = torch.randint(3, 259, (1, 50)), LanguageModel(259, d_model=16, n_layers=1)
    loss = module._loss(model, ids)
    assert loss.shape == (49,)
    assert loss.mean().item() == pytest.approx(model(ids[:, :-1], targets=ids[:, 1:]).loss.item(), rel=1e-5)

    @contextlib.contextmanager
    def paid(model):
        yield SimpleNamespace(by_token=sign * torch.cat([loss, loss[:1]]).unsqueeze(0))

    monkeypatch.setattr(module, "Ledger", paid)
    assert module._difficulty(model, ids, loss) == pytest.approx(sign)


def test_only_new_parameters_change_if_only_they_are_trained(base):
    assert main(["adapt", "base", "--techniques", EXIT, "--max_steps=2", "--trained=new", "--distill=1"]) == 0
    old, new = weights(base), weights("runs/adapt")
    embed = next(name for name in old if name.endswith("embed.weight"))
    assert torch.equal(old[embed], new[embed])
    assert main(["adapt", "base", "--techniques", EXIT, "--max_steps=2", "--output_dir=all"]) == 0
    assert not torch.equal(old[embed], weights("all")[embed])


def test_an_adapted_run_that_is_resumed_has_its_teacher_and_its_frozen_weights_again(base, monkeypatch):
    settings = ["--techniques", EXIT, "--distill=0.7", "--trained=new", "--max_steps=3"]
    assert main(["adapt", "base", *settings]) == 0
    calls, teach = [], Teacher.__call__
    monkeypatch.setattr(Teacher, "__call__", lambda self, ids: calls.append(len(ids)) or teach(self, ids))
    assert main(["train", "--config=runs/adapt/config.yaml", "--max_steps=5", "--resume=true"]) == 0
    assert calls == [4, 4]  # one batch for each of the two steps that were left
    old, new = weights(base), weights("runs/adapt")
    embed = next(name for name in old if name.endswith("embed.weight"))
    assert torch.equal(old[embed], new[embed])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["corpus", "--max_steps=2"], "adapt.run: corpus is not a run of `resnet-bk train`"),
        (["base"], "adapt: got neither max_steps nor max_seconds"),
        (["base", "--max_steps=2", "--techniques", "{dept: {}}"], "did you mean 'depth'?"),
        (["base", "--max_steps=2", "--techniques", "{depth: {policy: exits}}"], "model.depth.policy: got 'exits'"),
        (["base", "--max_steps=2", "--techniques", "{n_layers: 2}"], "the new model has none"),
        (
            ["base", "--max_steps=2", "--techniques", "{d_model: 32}"],
            "embed.weight of LanguageModel 0 has shape (259, 16), the new model has one of shape (259, 32)",
        ),
        (["base", "--max_steps=2", "--trained=new"], "has all parameters of this model; use 'all'"),
        (["base", "--max_steps=2", "--distill=2"], "distill: got 2.0, allowed 0 to 1"),
        (["base", "--max_steps=2", "--thresholds", "[2]"], "thresholds: got 2.0, allowed 0 to 1"),
    ],
)
def test_what_cannot_be_adapted_is_refused(base, capsys, arguments, message):
    capsys.readouterr()
    assert main(["adapt", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_the_recipe_is_that_of_the_base_but_for_what_changes():
    model = ModelConfig(d_model=32, depth=DepthConfig(policy="act", target=0.5))
    base = TrainConfig(model=model, learning_rate=0.03, seed=7, max_steps=1)
    config = AdaptConfig("base", techniques={"depth": {"threshold": 0.9}, "n_seq": 64}, max_seconds=5.0)
    recipe = config.recipe(base)
    assert (recipe.model.depth.target, recipe.model.depth.threshold, recipe.model.n_seq) == (0.5, 0.9, 64)
    assert (recipe.learning_rate, recipe.init_from, recipe.max_steps, recipe.distill) == (0.01, "base", None, 0.5)
    for fields in ({"distill": 0.5}, {"trained": "new"}):
        with pytest.raises(ConfigError, match="without init_from"):
            TrainConfig(**fields, max_steps=1)
