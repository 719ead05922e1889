import json
import math
import signal
import time

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import PrinterCallback, TrainerCallback

from resnet_bk import checkpoint
from resnet_bk.checkpoint import CheckpointError, newest_valid, seal, verify
from resnet_bk.config import ModelConfig, SparsityConfig, TrainConfig
from resnet_bk.data.tokens import TokenFile
from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.layers.sparse import SparseBKCore
from resnet_bk.training import trainer as module
from resnet_bk.training.recorder import Recorder
from resnet_bk.training.trainer import (
    BKTrainer,
    Clock,
    NonFiniteError,
    learning_rate_factor,
)
from resnet_bk.training.windows import Windows

MODEL = ModelConfig(vocab_size=40, d_model=16, n_layers=2, n_seq=8, num_experts=1)


def windows(count=14, length=8):
    ids = np.random.default_rng(0).integers(3, 40, count * length + 1).astype(np.uint16)
    return Windows(TokenFile(ids, np.array([0, len(ids)]), np.array([2 * len(ids)]), ("all",)), length)


class At(TrainerCallback):
    """Calls `action` after each step."""

    def __init__(self, action):
        self.action = action

    def on_step_end(self, args, state, control, **kwargs):
        self.action(state.global_step)


def build(folder, seed=0, model=MODEL, **settings):
    torch.manual_seed(seed)
    defaults = {"batch_size": 2, "log_every": 1, "save_every": 1000, "max_steps": 12}
    config = TrainConfig(model=model, output_dir=str(folder), **{**defaults, **settings})
    network = ResNetBKForCausalLM(ResNetBKConfig.from_model_config(model))
    return BKTrainer(network, config, windows(length=model.n_seq))


def stop_at(trainer, step):
    def stop(now):
        if now == step:
            trainer.received_signal = signal.SIGTERM

    trainer.callback_handler.callbacks.insert(0, At(stop))  # before RunControl, as a signal would arrive


def history(trainer):
    kept = ("step", "loss", "grad_norm", "learning_rate")
    return [{name: line[name] for name in kept} for line in trainer.state.log_history if "loss" in line]


def weights(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def checkpoints(folder):
    return sorted((p.name for p in (folder / "checkpoints").iterdir()), key=lambda n: int(n.rpartition("-")[2]))


# ----------------------------------------------------------------------------------------------- schedule


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine():
    assert learning_rate_factor(0.0, 0.1, 0.2) == pytest.approx(1e-3)
    assert learning_rate_factor(0.05, 0.1, 0.2) == pytest.approx(0.5)
    assert learning_rate_factor(0.1, 0.1, 0.2) == pytest.approx(1.0)
    assert learning_rate_factor(0.55, 0.1, 0.2) == pytest.approx(0.6)
    assert learning_rate_factor(1.0, 0.1, 0.2) == pytest.approx(0.2)
    assert learning_rate_factor(0.0, 0.0, 0.2) == 1.0
    assert learning_rate_factor(1.0, 1.0, 0.2) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_each_step_uses_the_scheduled_learning_rate(tmp_path, kind):
    trainer = build(tmp_path, warmup=0.5, learning_rate=0.01, optimizer=kind)
    trainer.run_training(None)
    expected = [0.01 * learning_rate_factor(step / 12, 0.5, 0.05) for step in range(12)]
    assert [line["learning_rate"] for line in history(trainer)] == pytest.approx(expected)


def test_a_time_budget_ends_a_run_with_a_checkpoint(tmp_path):
    trainer = build(tmp_path, max_steps=None, max_seconds=1.0)
    trainer.run_training(None)
    assert 1.0 <= trainer.clock.seconds < 3.0
    assert trainer.progress == 1.0
    assert trainer.optimizer.param_groups[0]["lr"] < 0.1 * trainer.config.learning_rate
    assert checkpoints(tmp_path) == [f"checkpoint-{trainer.state.global_step}"]


def test_the_clock_counts_all_sessions_and_stops_between_them(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock()
    now[0] = 5.0
    assert clock.seconds == 0.0
    clock.start(before=100.0)
    now[0] = 8.0
    assert clock.seconds == 103.0
    clock.stop()
    now[0] = 50.0
    clock.stop()
    assert clock.seconds == 103.0


# --------------------------------------------------------------------------------------------------- logs


def test_logged_bits_per_byte_are_the_cross_entropy(tmp_path):
    experts = ModelConfig(vocab_size=40, d_model=16, n_layers=1, n_seq=8, num_experts=3, balance_weight=50.0)
    trainer = build(tmp_path, model=experts, batch_size=14, max_steps=1, accumulate=1)
    rows = [trainer.train_dataset[i] for i in range(14)]
    batch = {name: x.to(trainer.args.device) for name, x in module.collate(rows).items()}
    with torch.no_grad():
        output = trainer.model(**batch)
    assert output.aux_loss > 10
    trainer.run_training(None)
    line = next(line for line in trainer.state.log_history if "loss" in line)
    nats = float(output.loss - output.aux_loss)
    assert line["loss"] == pytest.approx(nats, rel=1e-4)
    assert line["bits_per_byte"] == pytest.approx(nats / math.log(2) / 2.0, rel=1e-4)


def test_nothing_is_printed(tmp_path, capsys):
    trainer = build(tmp_path, max_steps=2)
    assert not any(isinstance(c, PrinterCallback) for c in trainer.callback_handler.callbacks)
    trainer.run_training(None)
    assert capsys.readouterr().out == ""


def test_accumulated_batches_train_as_one_large_batch(tmp_path):
    whole, parts = build(tmp_path / "a", batch_size=14), build(tmp_path / "b", batch_size=2, accumulate=7)
    for trainer in (whole, parts):
        trainer.model.double()
        trainer.run_training(None)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-5, atol=1e-7)
    assert [line["loss"] for line in history(parts)] == pytest.approx([line["loss"] for line in history(whole)])


def test_a_half_written_last_line_of_metrics_and_later_steps_are_dropped(tmp_path):
    trainer = build(tmp_path, max_steps=3)
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 0, "seconds": 1, "bits_per_byte": 8.0, "bytes_per_second": 9}\n'
    path.write_text(whole + '{"step": 0}\n{"step": 7}\n{"step": 1' + 400 * "0" + '}\n{"step": 8, "bits_p')
    recorder = Recorder(trainer, path, Console(quiet=True))
    recorder.remove_after(0)
    trainer.add_callback(recorder)
    trainer.run_training(None)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("settings", [{}, {"accumulate": 3}, {"optimizer": "muon"}])
def test_a_run_stopped_three_times_is_bitwise_the_run_that_never_stopped(tmp_path, settings):
    """Seven batches per epoch, so stops fall inside epochs and, without accumulation, on the end of one."""
    straight = build(tmp_path / "straight", **settings)
    straight.run_training(None)
    resumed_from = None
    for stop in (4, 7, 10, None):
        trainer = build(tmp_path / "stopped", seed=0 if resumed_from is None else 99, **settings)
        if stop is not None:
            stop_at(trainer, stop)
        trainer.run_training(resumed_from)
        resumed_from = newest_valid(tmp_path / "stopped" / "checkpoints", pytest.fail)
        assert resumed_from.name == f"checkpoint-{stop or 12}"
    assert history(trainer) == history(straight)
    assert len(history(straight)) == 12
    for a, b in zip(weights(straight), weights(trainer), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("first", "then"), [("adamw", "muon"), ("muon", "adamw")])
def test_a_run_cannot_resume_with_another_optimizer(tmp_path, first, then):
    build(tmp_path, max_steps=2, optimizer=first).run_training(None)
    saved = newest_valid(tmp_path / "checkpoints", pytest.fail)
    with pytest.raises(CheckpointError, match=f"is of the optimizer '{first}', expected the state of '{then}'"):
        build(tmp_path, optimizer=then).run_training(saved)


def test_seconds_continue_from_the_checkpoint(tmp_path):
    first = build(tmp_path)
    stop_at(first, 3)
    first.run_training(None)
    saved = newest_valid(tmp_path / "checkpoints", pytest.fail)
    (saved / "elapsed.json").write_text('{"seconds": 1000.0}')
    second = build(tmp_path)
    second.run_training(saved)
    assert 1000.0 < second.clock.seconds < 1030.0


def test_a_run_that_was_already_at_its_end_makes_no_further_step(tmp_path):
    first = build(tmp_path, max_steps=3)
    first.run_training(None)
    second = build(tmp_path, seed=99, max_steps=3)
    second.run_training(newest_valid(tmp_path / "checkpoints", pytest.fail))
    assert second.state.global_step == 3
    for a, b in zip(weights(first), weights(second), strict=True):
        assert torch.equal(a, b)


# -------------------------------------------------------------------------------------------- checkpoints


def test_the_last_two_checkpoints_are_kept_sealed_and_without_pickles(tmp_path):
    trainer = build(tmp_path, save_every=2)
    trainer.run_training(None)
    assert checkpoints(tmp_path) == ["checkpoint-10", "checkpoint-12"]
    for name in checkpoints(tmp_path):
        folder = tmp_path / "checkpoints" / name
        verify(folder)
        covered = set(json.loads((folder / "manifest.json").read_text()))
        others = {"manifest.json", "generation_config.json", "modeling_resnet_bk.py"}
        assert covered == {path.name for path in folder.iterdir()} - others
        assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json", ".py"}
        assert {"model.safetensors", "optimizer.safetensors", "trainer_state.json", "elapsed.json"} <= covered


def test_checkpoints_do_not_grow_with_the_number_of_log_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "KEPT_LINES", 3)
    build(tmp_path, save_every=6).run_training(None)
    for step in (6, 12):
        saved = json.loads((tmp_path / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert [line["step"] for line in saved["log_history"]][-2:] == [step - 1, step]
        assert len(saved["log_history"]) <= 4


def test_what_a_kill_after_the_last_save_left_is_removed_when_the_run_resumes(tmp_path, monkeypatch):
    trainer = build(tmp_path, save_every=4)
    with monkeypatch.context() as patch:
        patch.setattr(BKTrainer, "_delete_checkpoints", lambda *_: None)  # killed before
        trainer.run_training(None)
    assert checkpoints(tmp_path) == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    (tmp_path / "checkpoints" / ".checkpoint-12.1-0123abcd.partial").mkdir()
    build(tmp_path).run_training(tmp_path / "checkpoints" / "checkpoint-12")
    assert checkpoints(tmp_path) == ["checkpoint-8", "checkpoint-12"]


def test_an_older_intact_checkpoint_exists_until_the_new_one_is_sealed(tmp_path, monkeypatch):
    seen, real = [], checkpoint.seal

    def seal(folder, required=()):
        seen.append(newest_valid(tmp_path / "checkpoints", lambda message: None))
        real(folder, required)
        seen.append(newest_valid(tmp_path / "checkpoints", lambda message: None))

    monkeypatch.setattr(checkpoint, "seal", seal)
    build(tmp_path, save_every=1, max_steps=5).run_training(None)
    assert [found and found.name for found in seen] == [
        name for step in range(5) for name in 2 * [f"checkpoint-{step}" if step else None]
    ]


def test_a_failed_save_leaves_the_older_checkpoint_and_no_incomplete_one(tmp_path, monkeypatch):
    trainer, real = build(tmp_path, save_every=1), module.save_optimizer_state

    def full(state, folder):
        if trainer.state.global_step == 4:
            raise OSError(28, "No space left on device")
        real(state, folder)

    monkeypatch.setattr(module, "save_optimizer_state", full)
    with pytest.raises(
        OSError, match=r"No space left on device; the run can go on from checkpoint-3: '.*checkpoint-4'"
    ):
        trainer.run_training(None)
    assert checkpoints(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert newest_valid(tmp_path / "checkpoints", pytest.fail).name == "checkpoint-3"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("elapsed.json", "", r"elapsed\.json: expected JSON, got 0 bytes"),
        ("elapsed.json", "[1]", r"elapsed\.json: expected a mapping, got \[1\]"),
        ("elapsed.json", '{"seconds": "1"}', r"elapsed\.json: expected 'seconds', a number of at least 0, got '1'"),
        ("elapsed.json", '{"seconds": NaN}', r"elapsed\.json: expected 'seconds', a number of at least 0, got nan"),
        ("elapsed.json", '{"seconds": true}', r"elapsed\.json: expected 'seconds', a number of at least 0, got True"),
        ("trainer_state.json", "[" * 100_000, r"trainer_state\.json: expected JSON, got 100000 bytes"),
        ("trainer_state.json", "{}", r"trainer_state\.json: expected 'global_step' 12, got None"),
        (
            "trainer_state.json",
            '{"global_step": 12, "odd": 1}',
            r"trainer_state\.json: expected a state of transformers",
        ),
    ],
)
def test_a_checkpoint_of_odd_content_is_refused_by_name(tmp_path, name, text, message):
    trainer = build(tmp_path)
    trainer.run_training(None)
    folder = tmp_path / "checkpoints" / "checkpoint-12"
    (folder / name).write_text(text)
    seal(folder)
    with pytest.raises(CheckpointError, match=message):
        build(tmp_path, max_steps=14).run_training(folder)


def test_a_resumed_run_saves_and_logs_as_often_as_the_new_settings_say(tmp_path):
    first = build(tmp_path, save_every=4, log_every=4)
    stop_at(first, 4)
    first.run_training(None)
    second = build(tmp_path, save_every=3, log_every=1)
    second.run_training(tmp_path / "checkpoints" / "checkpoint-4")
    assert [line["step"] for line in history(second)] == [4, *range(5, 13)]
    assert checkpoints(tmp_path) == ["checkpoint-9", "checkpoint-12"]


def test_a_damaged_checkpoint_is_skipped_and_replaced(tmp_path):
    straight = build(tmp_path / "straight")
    straight.run_training(None)
    first = build(tmp_path / "run", save_every=2)
    stop_at(first, 6)
    first.run_training(None)
    weights_file = tmp_path / "run" / "checkpoints" / "checkpoint-6" / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1])
    messages = []
    found = newest_valid(tmp_path / "run" / "checkpoints", messages.append)
    assert found.name == "checkpoint-4"
    assert "checkpoint-6" in messages[0]
    second = build(tmp_path / "run", save_every=1)
    stop_at(second, 5)
    second.run_training(found)
    # It stays until the run gets there: a disk may have failed to read it once only.
    assert checkpoints(tmp_path / "run") == ["checkpoint-4", "checkpoint-5", "checkpoint-6"]
    third = build(tmp_path / "run", save_every=1)
    third.run_training(newest_valid(tmp_path / "run" / "checkpoints", messages.append))
    assert checkpoints(tmp_path / "run") == ["checkpoint-11", "checkpoint-12"]
    for a, b in zip(weights(straight), weights(third), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------- NaN, infinity, signals


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_or_infinite_weight_stops_the_run_at_its_step(tmp_path, value):
    trainer = build(tmp_path)
    after = []

    def spoil(step):
        if step == 3:
            with torch.no_grad():
                trainer.model.model.head.weight[5, 5] = value
            after.extend(weights(trainer))

    trainer.add_callback(At(spoil))
    with pytest.raises(NonFiniteError, match=r"step 4: the loss is (nan|inf); no update was made"):
        trainer.run_training(None)
    for before, now in zip(after, weights(trainer), strict=True):
        assert torch.equal(before.nan_to_num(7.0), now.nan_to_num(7.0))


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_nan_or_infinite_gradient_never_reaches_a_weight(tmp_path, value):
    trainer = build(tmp_path)
    before = []

    def spoil(gradient):
        if trainer.state.global_step < 2:
            return gradient
        before.extend(weights(trainer))
        return torch.full_like(gradient, value)

    trainer.model.model.norm.weight.register_hook(spoil)
    with pytest.raises(NonFiniteError, match="step 3: the gradient norm is not finite; no update was made"):
        trainer.run_training(None)
    for a, b in zip(before, weights(trainer), strict=True):
        assert torch.equal(a, b)
    assert trainer.clock.started is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_stops(tmp_path, number):
    before = signal.getsignal(number)
    trainer = build(tmp_path)
    trainer.add_callback(At(lambda step: step == 5 and signal.raise_signal(number)))
    trainer.run_training(None)
    assert trainer.stopped_by == number
    assert trainer.state.global_step in (5, 6)
    assert checkpoints(tmp_path) == [f"checkpoint-{trainer.state.global_step}"]
    assert signal.getsignal(number) == before


def test_windows_cover_the_text_once_and_targets_are_the_next_tokens():
    data = windows(count=14)
    assert len(data) == 14
    inputs = np.concatenate([data[i]["input_ids"] for i in range(14)])
    targets = np.concatenate([data[i]["shift_labels"] for i in range(14)])
    assert np.array_equal(inputs, data.tokens.ids[:-1])
    assert np.array_equal(targets, data.tokens.ids[1:])


def test_schedules_of_the_model_follow_the_progress(tmp_path):
    sparse = ModelConfig(
        vocab_size=40, d_model=16, n_layers=1, n_seq=8, num_experts=1, sparsity=SparsityConfig(target=0.5)
    )
    trainer = build(tmp_path, model=sparse, max_steps=4)
    technique = next(m for m in trainer.network.modules() if isinstance(m, SparseBKCore))
    assert technique.progress == 1.0
    seen = []
    technique.register_forward_hook(lambda module, inputs, output: seen.append(module.progress))
    trainer.run_training(None)
    assert seen == [0.0, 0.25, 0.5, 0.75]
