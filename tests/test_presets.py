"""Presets: models to start from, in Python and on the command line."""

import pytest
import torch
import yaml

from resnet_bk import ConfigError, ConfigurableResNetBK, LanguageModel, cli, encode
from resnet_bk.config import PRESETS, ModelConfig, TrainConfig, preset, preset_file
from resnet_bk.study.ledger import Ledger

TEXT = "def forward(self, x):\n    return self.head(self.norm(x))\n" * 4


@pytest.mark.parametrize("name", PRESETS)
def test_each_is_a_model_and_at_most_its_batch_size(name):
    assert {"model"} <= set(yaml.safe_load(preset_file(name).read_text())) <= {"model", "batch_size"}
    model = LanguageModel.from_preset(name)
    assert model.config.blocks == {"plain": 8, "quality": 8, "balanced": 5, "fast": 3}[name]
    assert model.config.techniques == ([] if name == "plain" else ["memory", "multiscale"])


def test_they_are_ordered_from_the_most_to_the_fewest_flops():
    ids = encode(TEXT)[None]
    costs = []
    for name in PRESETS:
        torch.manual_seed(0)
        model = LanguageModel.from_preset(name)
        with Ledger(model) as ledger, torch.no_grad():
            model(ids)
        costs.append(ledger.total)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 3 * costs[-1]


def test_further_fields_override_the_preset():
    model = ConfigurableResNetBK.from_preset("balanced", 300, d_model=64, memory={})
    assert model.config.vocab_size == 300
    assert model.config.d_model == 64
    assert model.config.techniques == ["multiscale"]


def test_an_unknown_name_is_refused():
    for run in (preset, preset_file, LanguageModel.from_preset):
        with pytest.raises(ConfigError, match="preset: got 'quick', allowed 'plain', 'quality', 'balanced', 'fast'"):
            run("quick")


@pytest.fixture
def parsed(monkeypatch, tmp_path):
    """Return the configuration that a command line is parsed to. No command is run."""
    monkeypatch.chdir(tmp_path)
    configs = []
    monkeypatch.setattr(cli, "_run", lambda command, config: configs.append(config) or 0)

    def parse(*arguments):
        assert cli.main(arguments) == 0
        return configs[-1]

    return parse


@pytest.mark.parametrize("form", [["--config", "fast"], ["--config=fast"]], ids=["two", "one"])
def test_on_the_command_line(parsed, form):
    config = parsed("train", *form, "--model.n_seq", "512", "--seed", "3", "--max_steps", "1")
    assert isinstance(config, TrainConfig)
    assert (config.model.multiscale.layers, config.model.n_seq, config.seed) == ((1, 2, 0), 512, 3)
    assert config.model.techniques == ["memory", "multiscale"]


def test_a_file_of_that_name_comes_first(parsed, tmp_path):
    (tmp_path / "fast").write_text("seed: 7\nmax_steps: 1\n")
    config = parsed("train", "--config", "fast")
    assert (config.seed, config.model) == (7, ModelConfig())


@pytest.mark.parametrize("command", ["tune", "ablate"])
def test_the_recipe_of_another_command_is_not_a_preset(capsys, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, "fast"]) == 2
    assert capsys.readouterr().err == f"resnet-bk: error: {command}.base: 'fast' is not a file; give a YAML file\n"


def test_a_recipe_on_top_of_a_preset(parsed, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {n_seq: 64}\nmax_steps: 5\n")
    config = parsed("train", "--config", "quality", "--config", "mine.yaml")
    assert (config.max_steps, config.model.n_seq, config.model.multiscale.layers) == (5, 64, (2, 6, 0))
