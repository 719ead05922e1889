import json
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from resnet_bk.checkpoint import newest_valid, verify
from resnet_bk.cli import main
from resnet_bk.config import ConfigError, ModelConfig, TrainConfig
from resnet_bk.folders import check_same_run
from resnet_bk.hf import ResNetBKForCausalLM
from resnet_bk.study import run as scored
from resnet_bk.training import run as module
from resnet_bk.training.trainer import RunControl

TEXT = "def add(a, b):\n    return a + b  # sum\n\n\nfor i in range(10):\n    print(add(i, 2 * i))\n" * 6


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a corpus of 22 files, two of them held out, and its own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(scored, "measure", lambda model, text, size: MEASURE(model, text, size, 1, 32, 2, 1))
    (tmp_path / "corpus").mkdir()
    for i in range(22):
        (tmp_path / "corpus" / f"{i:02}.py").write_text(f"# file {i}\n" + TEXT)
    return tmp_path


MEASURE = scored.measure


def arguments(place, *more, steps=6):
    model = ("--model.d_model=16", "--model.n_layers=1", "--model.n_seq=32", "--model.num_experts=1")
    rest = (f"--data.source={place / 'corpus'}", f"--output_dir={place / 'run'}", "--batch_size=4", "--log_every=2")
    return ["train", *model, *rest, f"--max_steps={steps}", *more]


def settings(place, **fields):
    model = ModelConfig(d_model=16, n_layers=1, n_seq=32, num_experts=1)
    defaults = {"output_dir": str(place / "run"), "max_steps": 6, "resume": True}
    return TrainConfig(**{"model": model, **defaults, **fields})


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


def metrics(place):
    return [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]


def test_train_eval_and_generate_from_the_command_line(place, capsys):
    run = place / "run"
    assert main(arguments(place)) == 0
    assert {p.name for p in run.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "model",
        "report.html",
        "results.json",
        "text.sha256",
    }
    verify(run / "model")
    card = (run / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| held-out bits per byte |" in card
    assert str(place) not in card, "a card is published; the folders of this machine are not"
    assert not [p for p in run.rglob("*") if p.name == "training_args.bin"]
    assert [line["step"] for line in metrics(place)] == [2, 4, 6]
    assert set(metrics(place)[0]) == {
        "step",
        "seconds",
        "bits_per_byte",
        "bytes_per_second",
        "learning_rate",
        "grad_norm",
    }
    results = json.loads((run / "results.json").read_text())
    assert set(results) == {"held_out", "costs", "training", "versions", "sample"}
    assert results["training"]["steps"] == 6
    assert results["training"]["seconds"] < metrics(place)[-1]["seconds"] + 1
    assert 0 < results["held_out"]["bits_per_byte"] < 12
    assert results["held_out"]["documents"] == 2
    assert results["held_out"]["perplexity_per_word"] > 1
    assert results["sample"].startswith("def ")
    report = (run / "report.html").read_text()
    for part in (f"{results['held_out']['bits_per_byte']:.4f}", "<svg", "resnet-bk train --config"):
        assert part in report
    assert "{'" not in capsys.readouterr().out, "the Trainer prints dictionaries"

    assert main(["eval", str(run)]) == 0
    assert f"{results['held_out']['bits_per_byte']:.4f}" in capsys.readouterr().out
    assert main(["eval", str(run), "--max_bytes=300", f"--source={place / 'corpus'}", "--context=sliding"]) == 0
    assert "inf" not in capsys.readouterr().out
    assert main(["generate", str(run), "for i", "--max_new_tokens=5", "--temperature=0"]) == 0
    assert capsys.readouterr().out.startswith("for i")

    before = files(run)
    assert main(arguments(place)) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert files(run) == before
    assert main(arguments(place, "--resume=true")) == 0
    assert files(run) == before
    assert json.loads((place / "run-2" / "results.json").read_text())["training"]["steps"] == 6


def test_a_run_starts_from_the_weights_of_another(place, monkeypatch):
    assert main(arguments(place)) == 0
    first = []

    def begin(self, checkpoint):
        first.extend(p.detach().clone() for p in self.network.parameters())
        raise KeyboardInterrupt

    for source in ("run", "run/model", "run/checkpoints/checkpoint-6"):
        first.clear()
        rest = (f"--init_from={place / source}", "--seed=7", f"--output_dir={place / source.replace('/', '-')}-2")
        with monkeypatch.context() as patch:
            patch.setattr(module.BKTrainer, "run_training", begin)
            with pytest.raises(KeyboardInterrupt):
                main(arguments(place, *rest))
        trained = ResNetBKForCausalLM.from_pretrained(place / "run" / "model")
        for found, expected in zip(first, trained.parameters(), strict=True):
            assert torch.equal(found, expected)


def test_a_resumed_run_does_not_start_again_from_other_weights(place, monkeypatch):
    assert main(arguments(place)) == 0
    again = arguments(place, f"--init_from={place / 'run'}", f"--output_dir={place / 'second'}", "--save_every=2")
    with monkeypatch.context() as patch:
        patch.setattr(module, "replacing", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(again)
    final = (place / "second" / "checkpoints" / "checkpoint-6" / "model.safetensors").read_bytes()
    assert main([*again, "--resume=true"]) == 0
    assert (place / "second" / "model" / "model.safetensors").read_bytes() == final


def test_a_finished_run_goes_on_with_a_larger_budget(place, capsys):
    """And ends as a run does that is stopped at the same step and resumed with the larger budget."""
    assert main(arguments(place, "--save_every=2")) == 0
    shutil.copytree(place / "run", place / "stopped")
    (place / "stopped" / "results.json").unlink()
    capsys.readouterr()
    assert main(arguments(place, "--resume=true", steps=10)) == 0
    assert "continuing the finished run" in " ".join(capsys.readouterr().out.split())
    assert main(arguments(place, "--resume=true", f"--output_dir={place / 'stopped'}", steps=10)) == 0
    assert json.loads((place / "run" / "results.json").read_text())["training"]["steps"] == 10
    assert yaml.safe_load((place / "run" / "config.yaml").read_text())["max_steps"] == 10
    lines = metrics(place)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    assert lines[3]["learning_rate"] > lines[2]["learning_rate"], "the new schedule is not at its end yet"
    weights = [(place / name / "model" / "model.safetensors").read_bytes() for name in ("run", "stopped")]
    assert weights[0] == weights[1]
    assert not (place / "run-2").exists()


def test_a_finished_run_does_not_go_on_with_other_settings_or_without_a_checkpoint(place, capsys):
    assert main(arguments(place)) == 0
    results = (place / "run" / "results.json").read_bytes()
    assert main(arguments(place, "--resume=true", "--learning_rate=0.1", steps=10)) == 2
    assert "train.learning_rate: got 0.1, the run in" in capsys.readouterr().err
    shutil.rmtree(place / "run" / "checkpoints")
    assert main(arguments(place, "--resume=true", steps=10)) == 2
    assert "is finished and has no intact checkpoint to continue from" in capsys.readouterr().err
    assert (place / "run" / "results.json").read_bytes() == results


def test_a_run_that_goes_on_and_is_stopped_is_unfinished(place, monkeypatch):
    assert main(arguments(place)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(module.BKTrainer, "run_training", lambda self, checkpoint: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(arguments(place, "--resume=true", steps=10))
    assert not (place / "run" / "results.json").exists()
    assert main(arguments(place, "--resume=true", steps=10)) == 0
    assert json.loads((place / "run" / "results.json").read_text())["training"]["steps"] == 10


def test_the_table_of_n_grams_is_counted_again_from_the_new_text(place):
    memory = ("--model.memory.orders=[1, 2]", "--model.memory.rows=500")
    assert main(arguments(place, *memory)) == 0
    (place / "other").mkdir()
    for i in range(22):
        (place / "other" / f"{i:02}.py").write_text(f"# other {i}\n" + TEXT.upper())
    more = (f"--init_from={place / 'run'}", f"--data.source={place / 'other'}", f"--output_dir={place / 'new'}")
    assert main(arguments(place, *memory, "--model.memory.rows=300", *more)) == 0
    first, second = (
        ResNetBKForCausalLM.from_pretrained(place / name / "model").model.memory for name in ("run", "new")
    )
    assert first.entries.any()
    assert second.entries.shape == (300, 5)
    tokens = [set((x.entries[:, 1:] >> 8).flatten().tolist()) for x in (first, second)]
    assert ord("f") + 3 in tokens[0] - tokens[1]


def test_the_table_has_at_most_one_row_for_each_token_of_the_text(place):
    memory = ("--model.memory.orders=[1, 2]", "--model.memory.rows=1000000")
    assert main(arguments(place, *memory)) == 0
    assert main(arguments(place, *memory, "--resume=true", steps=10)) == 0
    model = ResNetBKForCausalLM.from_pretrained(place / "run" / "model").model
    held_out = json.loads((place / "run" / "results.json").read_text())["held_out"]
    tokens = sum(path.stat().st_size + 1 for path in (place / "corpus").glob("*.py"))  # bytes and the end of each
    assert len(model.memory.entries) == tokens - held_out["bytes"] - held_out["documents"]
    assert yaml.safe_load((place / "run" / "config.yaml").read_text())["model"]["memory"]["rows"] == 1_000_000


@pytest.mark.parametrize("memory", [(), ("--model.memory.orders=[1, 2]", "--model.memory.rows=500")])
def test_a_run_on_several_sources(place, capsys, monkeypatch, memory):
    monkeypatch.setenv("COLUMNS", "300")
    (place / "more.txt").write_text("".join(f"line {i} of another text\n" for i in range(100)))
    mixture = {str(place / "corpus"): 0.25, str(place / "more.txt"): 0.75}
    given = [x for x in arguments(place, *memory, "--eval_every=3") if "--data.source" not in x]

    def train(mixture, *more):
        return main([*given, f"--data.sources={yaml.safe_dump(mixture, default_flow_style=True).strip()}", *more])

    assert train(mixture) == 0
    printed = capsys.readouterr().out
    assert f"0.25 of them from {place}/corpus, which an epoch reads 0." in printed
    assert f"0.75 of them from {place}/more.txt, which an epoch reads " in printed
    results = json.loads((place / "run" / "results.json").read_text())
    assert results["held_out"]["documents"] == 3
    assert main(["eval", str(place / "run")]) == 0
    assert f"{results['held_out']['bits_per_byte']:.4f}" in capsys.readouterr().out
    (place / "run" / "results.json").unlink()
    final = (place / "run" / "model" / "model.safetensors").read_bytes()
    changes = {**mixture, str(place / "more.txt"): 0.7}, {str(place / "corpus"): 0.25}, {**mixture, "stdlib": 1.0}
    for changed in changes:
        assert train(changed, "--resume=true") == 2
        assert "train.data.sources." in capsys.readouterr().err
    assert main([*given, f"--data.source={place / 'corpus'}", "--resume=true"]) == 2
    assert "train.data.source: got" in capsys.readouterr().err
    assert train(mixture, "--resume=true") == 0
    assert (place / "run" / "model" / "model.safetensors").read_bytes() == final


def test_a_text_too_short_for_two_parts_is_refused(place, capsys):
    assert main(arguments(place, "--model.memory.orders=[2]", "--model.memory.rows=50", "--batch_size=200")) == 2
    assert "two parts need the 200 windows of an update each (batch_size x accumulate)" in capsys.readouterr().err


def test_weights_of_another_model_are_refused(place, capsys):
    recent = "--model.memory.recent"
    assert main(arguments(place, f"{recent}=[2, 3]")) == 0
    new = f"--output_dir={place / 'new'}"
    for change, message in (
        ("--model.d_ff=24", "the settings of model that differ are d_ff (None)"),
        ("--model.energy=real", "the settings of model that differ are energy ('bonds')"),
        (f"{recent}=[4, 5]", "the settings of model that differ are memory.recent ("),
        (f"--init_from={place / 'corpus'}", "corpus"),
    ):
        assert main(arguments(place, f"--init_from={place / 'run'}", new, f"{recent}=[2, 3]", change)) == 2
        assert message in capsys.readouterr().err


def test_a_run_killed_before_its_first_checkpoint_starts_again_in_its_folder(place, monkeypatch):
    def killed(self, checkpoint):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.BKTrainer, "run_training", killed)
        with pytest.raises(KeyboardInterrupt):
            main(arguments(place))
    assert (place / "run" / "config.yaml").exists()
    (place / "run" / "metrics.jsonl").write_text('{"step": 2, "bits_per_byte": 1.0}\n{"st')
    assert main(arguments(place, "--resume=true")) == 0
    assert [line["step"] for line in metrics(place)] == [2, 4, 6]
    assert metrics(place)[0]["bits_per_byte"] > 1.5
    assert not (place / "run-2").exists()


def test_a_run_killed_while_it_was_scored_ends_without_another_step(place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "replacing", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(arguments(place))
    final = (place / "run" / "checkpoints" / "checkpoint-6" / "model.safetensors").read_bytes()
    assert main(arguments(place, "--resume=true")) == 0
    assert (place / "run" / "model" / "model.safetensors").read_bytes() == final
    assert [line["step"] for line in metrics(place)] == [2, 4, 6]
    assert json.loads((place / "run" / "results.json").read_text())["training"]["steps"] == 6


def test_an_interrupted_run_exits_by_its_signal_and_resumes_where_it_stopped(place, monkeypatch, capsys):
    """Signals come from raise_signal; the subprocess tests below send them from outside."""
    real = RunControl.on_step_end

    def interrupting(self, args, state, control, **kwargs):
        if state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)
        real(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RunControl, "on_step_end", interrupting)
        assert main(arguments(place, "--log_every=1")) == 143
    assert "--resume true" in capsys.readouterr().err
    assert main(["eval", str(place / "run")]) == 0, "a checkpoint can be evaluated"
    with (place / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "from": "a step that was lost"}\n{"step": 5')
    command = ["train", "--config", str(place / "run" / "config.yaml"), "--resume", "true"]
    assert main(command) == 0
    resumed = metrics(place)
    assert main(arguments(place, "--log_every=1", f"--output_dir={place / 'straight'}")) == 0
    place.joinpath("run").rename(place / "was")
    place.joinpath("straight").rename(place / "run")
    kept = ("step", "bits_per_byte", "grad_norm", "learning_rate")
    assert [[line[name] for name in kept] for line in resumed] == [
        [line[name] for name in kept] for line in metrics(place)
    ]
    assert (place / "was" / "model" / "model.safetensors").read_bytes() == (
        place / "run" / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": ModelConfig(d_model=32, n_layers=1, n_seq=32, num_experts=1)}, r"train\.model\.d_model: got 32.*16"),
        ({"batch_size": 5}, r"train\.batch_size: got 5, the run in .* was started with 12"),
        ({"seed": 1}, r"train\.seed: got 1"),
    ],
)
def test_resuming_with_other_settings_names_the_first_that_differs(place, changed, message):
    folder = place / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(module.dataclasses.asdict(settings(place))))
    with pytest.raises(ConfigError, match=message):
        check_same_run(settings(place, **changed), folder)


def test_settings_that_may_change_on_resume(place):
    folder = place / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(module.dataclasses.asdict(settings(place, resume=False))))
    changed = {
        "max_steps": 9,
        "max_seconds": 5.0,
        "save_every": 7,
        "log_every": 3,
        "sample": "x",
        "output_dir": "there",
    }
    check_same_run(settings(place, **changed), folder)
    (folder / "config.yaml").write_text("model: [")
    with pytest.raises(ConfigError, match=r"^train\.output_dir: .*config\.yaml is not plain YAML at line 1"):
        check_same_run(settings(place), folder)
    (folder / "config.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match=r"^train\.output_dir: .*config\.yaml holds \[1\] instead of settings"):
        check_same_run(settings(place), folder)


def test_resuming_other_data_from_the_command_line_is_an_error(place, capsys, monkeypatch):
    monkeypatch.setattr(module, "replacing", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(arguments(place))
    before = files(place / "run")
    capsys.readouterr()
    assert main(arguments(place, "--resume=true", "--data.val_fraction=0.1")) == 2
    error = capsys.readouterr().err
    assert "data.val_fraction: got 0.1" in error
    assert error.count("\n") == 1
    assert files(place / "run") == before
    (place / "corpus" / "03.py").write_text("changed = True\n")
    assert main(arguments(place, "--resume=true")) == 2
    assert "has changed since the run" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nonesuch", "tensorboard,nonesuch"])
def test_an_unknown_tracker_is_one_line(place, capsys, name):
    assert main(arguments(place, f"--report_to={name}")) == 2
    error = capsys.readouterr().err
    assert f"train.report_to: got '{name}'" in error
    assert error.count("\n") == 1


def start(place, *more):
    command = [sys.executable, "-m", "resnet_bk", *arguments(place, "--save_every=1", *more, steps=100_000)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    log = (place / "log.txt").open("a")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    log.close()
    return process


def newest(place):
    return newest_valid(place / "run" / "checkpoints", lambda message: None)


def wait_for_steps(place, process, after):
    """Wait for a checkpoint later than step `after`."""
    until = time.monotonic() + 90
    while time.monotonic() < until:
        assert process.poll() is None, (place / "log.txt").read_text()
        found = list((place / "run" / "checkpoints").glob("checkpoint-*"))
        if any(int(path.name.rpartition("-")[2]) > after for path in found):
            return
        time.sleep(0.01)
    process.kill()
    pytest.fail(f"no checkpoint within 90 seconds: {(place / 'log.txt').read_text()}")


def step_of(place):
    return int(newest(place).name.rpartition("-")[2])


def test_runs_killed_at_any_moment_keep_an_intact_checkpoint_and_sigterm_saves_one(place):
    """Three kills at random moments, each followed by a resumption; then SIGTERM; the last resumption is in-process."""
    reached = 0
    for kill in range(3):
        process = start(place, "--resume=true")
        wait_for_steps(place, process, reached)
        time.sleep(random.Random(kill).uniform(0.0, 0.3))
        process.kill()
        assert process.wait(30) == -signal.SIGKILL
        assert newest(place) is not None
        assert step_of(place) > reached
        reached = step_of(place)
    process = start(place, "--resume=true")
    wait_for_steps(place, process, reached)
    process.terminate()
    assert process.wait(60) == 143, (place / "log.txt").read_text()
    stopped = step_of(place)
    assert stopped > reached
    assert not list((place / "run" / "checkpoints").glob(".*")), (
        "the incomplete checkpoint of a killed run is still there"
    )
    assert main([*arguments(place, "--resume=true", steps=stopped + 2)]) == 0
    assert json.loads((place / "run" / "results.json").read_text())["training"]["steps"] == stopped + 2
    assert not (place / "run-2").exists()


def refused(arguments, capsys):
    """Return the one line with which a command is refused."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("resume", ["false", "true"])
def test_a_second_run_in_the_same_folder_is_refused(place, capsys, resume, monkeypatch):
    real, refusals = RunControl.on_step_end, []

    def step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:  # in the middle of the first run
            before = files(place / "run")
            refusals.append(refused(arguments(place, f"--resume={resume}", "--seed=5"), capsys))
            assert files(place / "run") == before
        real(self, args, state, control, **kwargs)

    monkeypatch.setattr(RunControl, "on_step_end", step_end)
    assert main(arguments(place)) == 0
    assert refusals == [
        f"resnet-bk: error: train.output_dir: {place / 'run'} is in use by another process; wait until it ends, or "
        "choose another folder\n"
    ]
    assert yaml.safe_load((place / "run" / "config.yaml").read_text())["seed"] == 0
    assert [line["step"] for line in metrics(place)] == [2, 4, 6]


def test_a_fault_of_the_held_out_text_is_found_before_the_training(place, capsys, monkeypatch):
    monkeypatch.setattr(module.BKTrainer, "run_training", lambda *_: pytest.fail("trained"))
    tokenizer = place / "tokenizer"
    module.load_tokenizer("byte").save_pretrained(tokenizer)
    saved = json.loads((tokenizer / "tokenizer.json").read_text())
    saved["model"]["vocab"]["xy"] = 259  # not the byte tokenizer any more, so texts must be UTF-8
    (tokenizer / "tokenizer.json").write_text(json.dumps(saved))
    (place / "held-out.txt").write_bytes(b"good until \xff here")
    error = refused(
        arguments(place, f"--data.tokenizer={tokenizer}", f"--data.val_source={place}/held-out.txt"), capsys
    )
    assert "'held-out.txt' is not UTF-8 at byte 11" in error
    assert not (place / "run").exists()


@pytest.mark.parametrize(
    ("function", "name"),
    [("training.recorder.append_line", "metrics.jsonl"), ("hf.modeling.ResNetBKForCausalLM.save_pretrained", "model")],
)
def test_an_error_of_the_disk_names_the_checkpoint_wherever_it_comes(place, capsys, monkeypatch, function, name):
    def full(*arguments, **options):
        if name == "model" and "state_dict" in options:  # of a checkpoint
            return real(*arguments, **options)
        if name == "metrics.jsonl" and json.loads(arguments[1])["step"] < 4:
            return real(*arguments)
        raise OSError(28, "No space left on device", str(place / "run" / name))

    where, _, last = f"resnet_bk.{function}".rpartition(".")
    real = getattr(pkgutil.resolve_name(where), last)
    monkeypatch.setattr(f"{where}.{last}", full)
    assert main(arguments(place, "--save_every=2", "--log_every=2")) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    goes_on = f"the run can go on from {newest(place).name}"
    assert line == f"resnet-bk: error: {place / 'run' / name}: No space left on device; {goes_on}"


def test_a_full_disk_ends_a_run_with_one_line(place, capsys, monkeypatch):
    real = module.BKTrainer._save_checkpoint

    def full(self, *args):
        if self.state.global_step == 4:
            monkeypatch.setattr("resnet_bk.training.trainer.save_optimizer_state", no_space)
        real(self, *args)

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.BKTrainer, "_save_checkpoint", full)
    assert main(arguments(place, "--save_every=2")) == 1
    lines = capsys.readouterr().err.splitlines()
    folder = place / "run" / "checkpoints" / "checkpoint-4"
    assert lines[-1] == (f"resnet-bk: error: {folder}: No space left on device; the run can go on from checkpoint-2"), (
        lines
    )
    monkeypatch.undo()
    assert newest(place).name == "checkpoint-2"
