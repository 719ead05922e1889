"""The bundled models: they load by name, score, write text, and are no larger than promised."""

import json
from pathlib import Path

import bundle
import pytest
import torch

from resnet_bk import LanguageModel, encode
from resnet_bk.cli import main
from resnet_bk.config import ConfigError, ModelConfig
from resnet_bk.config.saved import saved_config
from resnet_bk.folders import BUNDLED, RESULTS, model_folder, named_folder
from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_model_loads_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = LanguageModel.from_pretrained(name)
    assert not model.training
    assert model.embed.weight.dtype == torch.float32
    ids = encode("def __init__(self, x):\n    self.x = x\n").unsqueeze(0)
    bits = model(ids[:, :-1], targets=ids[:, 1:]).loss.item() / 0.6931
    results = json.loads((named_folder(name) / RESULTS).read_text())
    assert bits < 2 * results["held_out"]["bits_per_byte"]
    assert sum(path.stat().st_size for path in named_folder(name).rglob("*") if path.is_file()) <= bundle.LARGEST


def test_a_folder_of_the_same_name_is_preferred(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named_folder("fast-python") != Path("fast-python")
    (tmp_path / "fast-python").mkdir()
    assert named_folder("fast-python") == Path("fast-python")
    assert named_folder("other") == Path("other")


def test_commands_take_the_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "fast-python", "def ", "--max_new_tokens", "5", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("def ")
    assert main(["eval", "fast-python", "--max_bytes", "2000"]) == 0
    assert "bits per byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fields", [{}, {"memory": {"orders": [1, 2], "rows": 64}}, {"num_experts": 2, "tie_word_embeddings": False}]
)
def test_from_pretrained_is_the_model_that_was_saved(tmp_path, fields):
    torch.manual_seed(0)
    saved = ResNetBKForCausalLM(ResNetBKConfig(d_model=16, n_layers=2, **fields)).eval()
    saved.save_pretrained(tmp_path)
    model = LanguageModel.from_pretrained(tmp_path)
    ids = torch.randint(3, 259, (2, 20))
    assert torch.equal(model(ids).logits, saved.model(ids).logits)
    assert saved_config(tmp_path) == saved.config.model_config()


def test_a_configuration_that_no_model_has_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"d_model": -1}))
    with pytest.raises(ConfigError, match=r"config\.json: model\.d_model: got -1"):
        saved_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected a mapping"):
        saved_config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert saved_config(tmp_path) == ModelConfig.from_dict({})


def test_a_run_is_put_into_a_folder_of_its_own(tmp_path):
    run = model_folder("fast-python").parent
    assert 0 < bundle.bundle(run, tmp_path / "copy") < bundle.LARGEST
    assert torch.equal(
        LanguageModel.from_pretrained(tmp_path / "copy").head.weight,
        LanguageModel.from_pretrained("fast-python").head.weight,
    )
