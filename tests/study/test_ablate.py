"""``resnet-bk ablate``: the plan, the fit, what is trained and what is written."""

import dataclasses
import json
import math
import random
import re

import pytest
import yaml
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from resnet_bk import folders
from resnet_bk.cli import main
from resnet_bk.config import AblateConfig, ConfigError, ExpertsConfig, ModelConfig, SparsityConfig, TrainConfig
from resnet_bk.config.techniques import DepthConfig, MultiScaleConfig
from resnet_bk.files import lock
from resnet_bk.study import ablate, run
from resnet_bk.study.ablate import effects, plan

TECHNIQUES = ["depth", "sparsity", "experts"]
MODEL = ModelConfig(
    d_model=16,
    n_layers=4,
    num_experts=2,
    depth=DepthConfig(policy="act"),
    sparsity=SparsityConfig(target=0.5),
    experts=ExpertsConfig(policy="top_p", target=1.2),
)


def test_the_full_plan_has_every_combination_once():
    cells = plan(TECHNIQUES, "full")
    assert len(set(cells)) == len(cells) == 8
    assert cells[0] == tuple(TECHNIQUES)
    assert cells[-1] == ()


def test_the_half_plan_has_everything_on_and_everything_off():
    for techniques, cells in (("abcd", 8), ("abcde", 17)):
        half = plan(techniques, "half")
        assert len(set(half)) == len(half) == cells
        assert half[0] == tuple(techniques)
        assert half[-1] == ()


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_effects_and_interactions_are_found_again(noise):
    rng = random.Random(0)
    cells = plan(TECHNIQUES, "full") * 3

    def response(on):
        y = -0.5 * ("depth" in on) - 0.2 * ("sparsity" in on) + 0.1 * ("depth" in on and "sparsity" in on)
        return 7 + y + noise * rng.gauss(0, 1)

    found = {e.techniques: e for e in effects(TECHNIQUES, cells, [response(on) for on in cells])}
    expected = {("depth",): -0.45, ("sparsity",): -0.15, ("experts",): 0.0, ("depth", "sparsity"): 0.1}
    for techniques, value in expected.items():
        assert found[techniques].value == pytest.approx(value, abs=5 * noise + 1e-9)
        assert found[techniques].error == pytest.approx(2 * noise / math.sqrt(24), abs=noise + 1e-9)
    assert len(found) == 6


def test_half_of_four_gives_main_effects_and_no_interactions():
    cells = plan("abcd", "half")
    found = effects("abcd", cells, [len(on) + 0.8 * ("a" in on and "b" in on) for on in cells])
    assert [e.techniques for e in found] == [(technique,) for technique in "abcd"]
    assert [e.value for e in found] == pytest.approx([1.4, 1.4, 1, 1])


def test_half_of_five_gives_interactions_too():
    cells = plan("abcde", "half")
    found = {
        e.techniques: e.value for e in effects("abcde", cells, [("a" in on) * (1 + ("b" in on)) + 0.0 for on in cells])
    }
    assert found["a", "b"] == pytest.approx(1)
    assert found["a",] == pytest.approx(1.5)
    assert found["c", "d"] == pytest.approx(0)


def test_switching_off_leaves_the_rest_of_the_model():
    plain = MODEL.without(*TECHNIQUES)
    assert plain.techniques == []
    assert plain.top_k == plain.num_experts == 2
    assert MODEL.techniques == TECHNIQUES
    assert MODEL.without("depth").techniques == ["sparsity", "experts"]
    scales = ModelConfig(multiscale=MultiScaleConfig(factors=(4,), layers=(1, 3, 1)))
    assert scales.without("multiscale").blocks == 5


@pytest.fixture
def text():
    """Return the hash of the training text of made-up runs, in a list so that a test can change it."""
    return ["a"]


@pytest.fixture
def made_up(tmp_path, monkeypatch, text):
    """Replace training by made-up results: each technique raises bits per byte and lowers times. Returns the runs."""
    monkeypatch.chdir(tmp_path)
    runs = []

    def train(config, console):
        runs.append(config)
        n = len(config.model.techniques)
        rate = 1000.0 * 2**n
        costs = {"parameters": 9, "flops_per_byte": 1e6 / 2**n, "prefill": rate, "decode": rate / 10}
        hashes = {"train_sha256": text[0], "held_out_sha256": "b"}
        results = {
            "held_out": {"bits_per_byte": 2 + 0.1 * n + 0.001 * config.seed, "bytes": 90, "documents": 1},
            "costs": {**costs, "prefill_setting": "8 x 2048 tokens", "decode_setting": "1 sequence, 256 tokens"},
            "training": {"steps": 5, "seconds": 1.0, "bytes_per_second": rate / 5, **hashes},
            "versions": {"torch": "2"},
        }
        folder = tmp_path / config.output_dir
        folder.mkdir(parents=True)
        (folder / folders.RESULTS).write_text(json.dumps(results))
        (folder / folders.CONFIG).write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(config)))))
        return results

    monkeypatch.setattr(run, "train", train)
    return runs


def test_every_cell_is_trained_once_and_the_tables_have_the_effects(made_up, text, tmp_path):
    recipe = TrainConfig(model=MODEL, max_steps=5)
    config = AblateConfig("base.yaml", output_dir="out", seeds=[0, 1])
    found = ablate.ablate(config, recipe, Console(quiet=True))
    assert len(made_up) == 16
    assert {(tuple(c.model.techniques), c.seed) for c in made_up} == {
        (on, s) for on in plan(TECHNIQUES, "full") for s in (0, 1)
    }
    for effect in found["prefill, us per byte"]:
        assert math.exp(effect.value) == pytest.approx(0.5 if len(effect.techniques) == 1 else 1)
    assert found["bits per byte"][0].value == pytest.approx(0.1)
    table = (tmp_path / "out" / ablate.TABLE).read_text()
    assert "| depth+sparsity+experts | 2.300" in table
    assert "| depth x sparsity |" in table
    assert len(json.loads((tmp_path / "out" / ablate.DATA).read_text())) == 16
    ablate.ablate(config, recipe, Console(quiet=True))
    assert len(made_up) == 16  # nothing is trained twice
    with pytest.raises(ConfigError, match=r"train\.max_steps: got 6, the finished run in .* had 5"):
        ablate.ablate(config, TrainConfig(model=MODEL, max_steps=6), Console(quiet=True))
    saved = tmp_path / "out" / "depth" / "seed-0" / folders.CONFIG
    kept = saved.read_text()
    saved.write_text("a: &a [1]\nb: *a\n")
    with pytest.raises(ConfigError, match=r"depth/seed-0/config\.yaml has a YAML alias"):
        ablate.ablate(config, recipe, Console(quiet=True))
    saved.write_text(kept)
    text[0] = "changed"
    with pytest.raises(ConfigError, match=r"used another text or tokenizer than the runs before it"):
        ablate.ablate(AblateConfig("base.yaml", output_dir="out", seeds=[0, 2]), recipe, Console(quiet=True))


RECIPE = TrainConfig(model=MODEL, max_steps=5)
SMALL = AblateConfig("base.yaml", output_dir="out", seeds=[0], techniques=["depth", "sparsity"])


def ablated():
    return ablate.ablate(SMALL, RECIPE, Console(quiet=True))


def test_damaged_results_are_an_error_that_names_the_file(made_up, tmp_path):
    ablated()
    table = (tmp_path / "out" / ablate.TABLE).read_text()
    results = tmp_path / "out" / "experts" / "seed-0" / folders.RESULTS
    good = results.read_text()
    for content in ("", "[]", "{}", good[:-30], good.replace('"prefill": ', '"prefill": 1e999, "x": ')):
        results.write_text(content)
        with pytest.raises(
            ConfigError, match=r"^out/experts/seed-0/results\.json: .*; restore it, or remove it to have"
        ):
            ablated()
    results.unlink()
    results.mkdir()
    with pytest.raises(ConfigError, match=r"out/experts/seed-0/results\.json is not a file"):
        ablated()
    results.rmdir()
    results.write_text(good)
    assert ablated()
    assert (tmp_path / "out" / ablate.TABLE).read_text() == table
    assert len(made_up) == 4


def write_nan(monkeypatch, place, name):
    """Let every run write NaN for one of its results."""
    train = run.train

    def spoiled(config, console):
        train(config, console)
        results = place / config.output_dir / folders.RESULTS
        results.write_text(re.sub(f'"{name}": [0-9.]+', f'"{name}": NaN', results.read_text()))

    monkeypatch.setattr(run, "train", spoiled)


def test_a_score_that_is_not_a_number_is_an_error_at_once_and_later(made_up, monkeypatch, tmp_path):
    write_nan(monkeypatch, tmp_path, "bits_per_byte")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"results\.json: held_out\.bits_per_byte: got nan, allowed 0 to 64"):
            ablated()
    assert len(made_up) == 1


def test_runs_that_were_too_short_to_log_their_speed_have_no_effects_on_it(made_up, monkeypatch, tmp_path):
    write_nan(monkeypatch, tmp_path, "bytes_per_second")
    assert set(ablated()) == set(ablate.RESPONSES) - {"training, us per byte"}
    table = (tmp_path / "out" / ablate.TABLE).read_text()
    assert table.count("| not logged |") == 4
    assert "nan" not in table


def test_a_folder_in_which_another_process_works_is_refused(made_up, tmp_path):
    with (
        lock(tmp_path / "out", "ablate.output_dir"),
        pytest.raises(ConfigError, match=r"^ablate\.output_dir: out is in use by another process; wait until it ends"),
    ):
        ablated()
    assert made_up == []
    ablated()
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_kill_loses_no_run_and_leaves_no_part_of_a_table(made_up, monkeypatch, tmp_path):
    train = run.train

    def killed(config, console):
        train(config, console)
        if len(made_up) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            ablated()
    with monkeypatch.context() as patch:
        patch.setattr(ablate, "write_whole", lambda path, text: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ablated()
    (tmp_path / "out" / ".ablation.md.1-0123abcd.partial").write_text("a part")
    ablated()
    assert len(made_up) == 4
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_file()} == {ablate.TABLE, ablate.DATA}


def test_cells_are_named_by_all_that_is_on_in_one_order(made_up, tmp_path):
    recipe = TrainConfig(model=MODEL, max_steps=5)
    for techniques in (["sparsity", "depth"], ["depth", "sparsity"]):
        ablate.ablate(
            AblateConfig("base.yaml", output_dir="out", seeds=[0], techniques=techniques), recipe, Console(quiet=True)
        )
    assert [c.output_dir for c in made_up] == [
        f"out/{name}/seed-0" for name in ("depth+sparsity+experts", "sparsity+experts", "depth+experts", "experts")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--techniques", "[length, depth]"],
            "ablate.techniques: got ['length', 'depth'], allowed at least two of those that",
        ),
        (
            ["--techniques", "[depht]"],
            "ablate.techniques: got 'depht', allowed 'memory', 'multiscale', 'length', 'depth'",
        ),
        (["--techniques", "[depth]"], "ablate.techniques: got ['depth'], allowed at least two"),
        (
            ["--techniques", "[depth, depth]"],
            "ablate.techniques: got ['depth', 'depth'], allowed at least two, without repetition",
        ),
        (["--seeds", "[]"], "ablate.seeds: got [], allowed at least one, without repetition"),
        (["--plan", "third"], "ablate.plan: got"),
        (
            ["--techniques", "[sparsity, depth]", "--plan", "half"],
            "ablate.plan: got 'half' for 2 techniques, allowed for 4 or more",
        ),
    ],
)
def test_an_impossible_ablation_is_one_line(made_up, tmp_path, capsys, arguments, message):
    (tmp_path / "base.yaml").write_text(
        "max_steps: 5\nmodel: {num_experts: 1, sparsity: {target: 0.5}, depth: {policy: act}}\n"
    )
    assert main(["ablate", "base.yaml", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"resnet-bk: error: {message}")
    assert said.count("\n") == 1
    assert made_up == []


@pytest.fixture
def quick(monkeypatch):
    """Shorten what takes most of the time of a real run: measuring, and sampling."""
    measure = run.measure
    monkeypatch.setattr(run, "measure", lambda model, text, size: measure(model, text, size, 1, 32, 2, 1))
    monkeypatch.setattr(run, "generate_text", lambda *arguments: "a sample")


def test_two_real_techniques_train(tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("def read(self):\n    return self.value\n" * 400)
    (tmp_path / "base.yaml").write_text(
        "max_steps: 2\nbatch_size: 2\nlog_every: 1\nsample: x\ndata: {source: text, val_fraction: 0.1}\n"
        "model: {d_model: 16, n_layers: 3, n_seq: 32, num_experts: 1, sparsity: {target: 0.5}, depth: {policy: act}}\n"
    )
    assert main(["ablate", "base.yaml", "--seeds", "[0]"]) == 0
    assert "depth x sparsity" in (tmp_path / "runs/ablate/ablation.md").read_text()
    assert {p.name for p in (tmp_path / "runs/ablate").iterdir() if p.is_dir()} == {
        "depth+sparsity",
        "depth",
        "sparsity",
        "plain",
    }


def test_an_ablation_with_its_own_tokenizer_can_be_repeated(tmp_path, monkeypatch, quick, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "def": 2, "return": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained("words")
    (tmp_path / "text").write_text("def read ( self ) : return self . value\n" * 200)
    (tmp_path / "base.yaml").write_text(
        "max_steps: 1\nbatch_size: 2\nsample: def\ndata: {source: text, val_fraction: 0.1, tokenizer: words}\n"
        "model: {d_model: 8, n_layers: 3, n_seq: 16, num_experts: 1, sparsity: {target: 0.5}, depth: {policy: act}}\n"
    )
    for _ in range(2):
        assert main(["ablate", "base.yaml", "--seeds", "[0]"]) == 0, capsys.readouterr().err
