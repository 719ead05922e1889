"""Trained models are loaded whole and from one folder, even if a training replaces it meanwhile."""

import shutil

import pytest
import torch

from resnet_bk.checkpoint import CheckpointError
from resnet_bk.config import ConfigError
from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM, byte_tokenizer
from resnet_bk.inference import loading
from resnet_bk.inference.loading import load


def save(folder, value=1.0, tokenizer=None, **fields):
    """Write a model whose final norm has one value everywhere."""
    model = ResNetBKForCausalLM(ResNetBKConfig(d_model=16, n_layers=1, **fields))
    torch.nn.init.constant_(model.model.norm.weight, value)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)


def run(folder):
    """Make the run folder of a training that has saved checkpoint 10."""
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {}\n")
    save(folder / "checkpoints" / "checkpoint-10", 10.0)
    return folder


def value(model):
    return model.model.norm.weight[0].item()


def test_a_model_and_the_newest_checkpoint_of_a_run_are_loaded(tmp_path):
    save(tmp_path / "model", 3.0)
    assert value(load(str(tmp_path / "model"))[0]) == 3
    folder = run(tmp_path / "run")
    model, tokenizer = load(str(folder))
    assert value(model) == 10
    assert not model.training
    assert len(tokenizer) == 259


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_checkpoint_that_training_deletes_is_looked_for_again(when, tmp_path, monkeypatch):
    folder, read, calls = run(tmp_path / "run"), loading._read, []

    def and_training_goes_on(path, threshold):
        calls.append(path.name)
        found = read(path, threshold) if when == "after" else None
        if len(calls) == 1:
            save(folder / "checkpoints" / "checkpoint-20", 20.0)
            shutil.rmtree(path)
        return found or read(path, threshold)

    monkeypatch.setattr(loading, "_read", and_training_goes_on)
    assert value(load(str(folder))[0]) == 20
    assert calls == ["checkpoint-10", "checkpoint-20"]


def test_a_model_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    save(tmp_path / "model", 1.0)
    read, calls = loading._read, []

    def and_a_run_ends(path, threshold):
        calls.append(path)
        found = read(path, threshold)
        if len(calls) == 1:
            save(tmp_path / "model", 2.0)
        return found

    monkeypatch.setattr(loading, "_read", and_a_run_ends)
    assert value(load(str(tmp_path / "model"))[0]) == 2


def test_a_folder_that_never_rests_is_refused(tmp_path, monkeypatch):
    save(tmp_path / "model")
    monkeypatch.setattr(loading, "_read", lambda path, threshold: (save(path), None))
    with pytest.raises(CheckpointError, match=f"was replaced {loading.ATTEMPTS} times while it was read"):
        load(str(tmp_path / "model"))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<a>", "<b>"])
    save(tmp_path / "model", tokenizer=tokenizer)
    with pytest.raises(CheckpointError, match="the tokenizer has 261 ids, the model 259"):
        load(str(tmp_path / "model"))
    save(tmp_path / "model", tokenizer=tokenizer, vocab_size=300)
    assert len(load(str(tmp_path / "model"))[1]) == 261


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    save(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text("")
    with pytest.raises((CheckpointError, ConfigError), match="tokenizer") as caught:
        load(str(tmp_path / "model"))
    assert "\n" not in str(caught.value)


def test_a_threshold_needs_adaptive_depth(tmp_path):
    save(tmp_path / "model")
    with pytest.raises(ConfigError, match="depth_threshold: got"):
        load(str(tmp_path / "model"), 0.5)
