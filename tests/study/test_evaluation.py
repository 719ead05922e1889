"""The command ``resnet-bk eval``: which text it scores, and what it prints about it."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import yaml

from resnet_bk.config import ConfigError, DataConfig, EvalConfig
from resnet_bk.data import corpus
from resnet_bk.hf import byte_tokenizer, token_file
from resnet_bk.model import LanguageModel
from resnet_bk.report.terminal import console
from resnet_bk.study import evaluation

COPIES = "documents left out because another one has the same content: 1"
CHANGED = "the held-out text has changed since the run ended; the model may have been trained on some of it"


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    """Return a function that evaluates a tiny model and returns its scores and what was printed."""
    model = SimpleNamespace(model=LanguageModel(259, d_model=16, n_layers=1, num_experts=1).eval())
    monkeypatch.setattr(evaluation, "load", lambda path, threshold: (model, byte_tokenizer()))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        scores = evaluation.evaluate_checkpoint(EvalConfig("run", *arguments), console())
        return scores, capsys.readouterr().out

    return run


@pytest.fixture
def run(tmp_path):
    """A finished run on a folder of 40 files. Returns a function that changes its results."""
    (tmp_path / "run").mkdir()
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i:02}").write_text(f"number {i}\n")
    data = DataConfig(str(tmp_path / "text"), cache=str(tmp_path / "cache"))
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({"data": dataclasses.asdict(data)}))
    held_out = corpus.split(data).held_out
    results = {"training": {"held_out_sha256": token_file(held_out, data, byte_tokenizer())[1]}}
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    return tmp_path / "run"


def test_the_text_that_a_run_held_out(evaluate, run):
    scores, printed = evaluate()
    assert (scores["documents"], scores["bytes"], scores["words"]) == (2, 19, 6)
    assert "run on its held-out text" in printed
    assert COPIES not in printed
    assert CHANGED not in printed


def test_copies_in_the_text_are_counted(evaluate, run, tmp_path):
    (tmp_path / "text" / "99").symlink_to("20")
    scores, printed = evaluate()
    assert scores["documents"] == 2
    assert COPIES in printed
    assert CHANGED not in printed
    scores, printed = evaluate("text")
    assert scores["documents"] == 40
    assert COPIES in printed


def test_a_held_out_text_that_has_changed_is_said(evaluate, run, tmp_path):
    (tmp_path / "text" / "00").unlink()
    scores, printed = evaluate()
    assert scores["documents"] == 2
    assert CHANGED in printed
    assert CHANGED not in evaluate("text")[1]


@pytest.mark.parametrize("results", [None, "", "[]", "{}", '{"training": 5}', b"\xff"])
def test_a_run_that_has_not_ended(evaluate, run, results):
    (run / "results.json").unlink()
    if results is not None:
        (run / "results.json").write_bytes(results if isinstance(results, bytes) else results.encode())
    assert CHANGED not in evaluate()[1]


@pytest.mark.parametrize("source", ["nowhere", "text/00"])
def test_a_text_that_cannot_be_scored(evaluate, run, tmp_path, source):
    (tmp_path / "text" / "00").write_text("")
    with pytest.raises(ConfigError, match=rf"^eval.source: '{source}' is "):
        evaluate(source)
