"""``resnet-bk tune``: with real tiny runs where training matters, with made-up results elsewhere."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import sqlite3
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import TrialState
from rich.console import Console

from resnet_bk import cli
from resnet_bk.cli import main
from resnet_bk.config import ConfigError, DepthConfig, ModelConfig, TrainConfig, TuneConfig
from resnet_bk.files import lock
from resnet_bk.study import run, tune
from resnet_bk.training.errors import NonFiniteError
from resnet_bk.training.run import resolved
from resnet_bk.training.trainer import RunControl

TEXT = "def add(a, b):\n    return a + b  # sum\n\n\nfor i in range(10):\n    print(add(i, 2 * i))\n" * 10
SPACE = {"learning_rate": [0.001, 0.1], "model.num_experts": [1, 4]}
MEASURE, TRAIN, FIGURE = run.measure, run.train, tune.figures.figure_svg


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return a folder with a text and a recipe for it, base.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "measure", lambda model, text, size: MEASURE(model, text, size, 1, 32, 2, 1))
    monkeypatch.setattr(
        run, "generate_text", lambda *arguments: "a sample"
    )  # sampling takes as long as everything else
    (tmp_path / "text.py").write_text(TEXT)
    write(tmp_path / "base.yaml", recipe())
    return tmp_path


def recipe(**fields):
    model = {"d_model": 16, "n_layers": 2, "num_experts": 1, "n_seq": 16}
    data = {"source": "text.py", "cache": "cache", "val_fraction": 0.1}
    return {"model": model, "data": data, "batch_size": 2, "max_steps": 6, "log_every": 1, **fields}


def write(path, values):
    path.write_text(yaml.safe_dump(values))


def command(*more, trials=2, space=SPACE):
    return ["tune", "base.yaml", f"--space={json.dumps(space)}", "--output_dir=out", f"--trials={trials}", *more]


def trials(state=None):
    """Return the trials of the study in out/, of one state if given."""
    storage = optuna.storages.RDBStorage("sqlite:///out/study.db")
    try:
        found = optuna.load_study(study_name="tune", storage=storage).get_trials()
        return [trial for trial in found if state is None or trial.state is state]
    finally:
        storage.remove_session()
        storage.engine.dispose()


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def scored(bits, rate):
    """Return the results of a made-up run."""
    settings = {"prefill_setting": "8 x 2048 tokens", "decode_setting": "1 sequence, 256 tokens"}
    hashes = {"train_sha256": "a", "held_out_sha256": "b"}
    return {
        "held_out": {"bits_per_byte": bits, "bytes": 90, "documents": 1},
        "costs": {"parameters": 9, "flops_per_byte": 9.0, "prefill": rate, "decode": rate / 100, **settings},
        "training": {"steps": 6, "seconds": 1.0, "bytes_per_second": 9.0, **hashes},
        "versions": {"torch": "2"},
    }


def finish(config, results):
    """Write the files of a finished run."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "config.yaml", json.loads(json.dumps(dataclasses.asdict(config))))
    (folder / "results.json").write_text(json.dumps(results))


def killed(*arguments, **keywords):
    """Take the place of a function in which the process is killed."""
    raise KeyboardInterrupt


@pytest.fixture
def made_up(place, monkeypatch):
    """Replace training by made-up results, the better the slower. Returns the settings of each run, in order."""
    runs = []

    def train(config, console, on_progress):
        runs.append(config)
        on_progress(0.3, 2.0)
        on_progress(0.6, 1.5)
        return scored(1 + config.learning_rate, 1e6 * config.learning_rate / config.model.num_experts)

    monkeypatch.setattr(run, "train", train)
    monkeypatch.setattr(tune.figures, "figure_svg", lambda figure: "<svg></svg>")  # takes longer than everything else
    return runs


def searched(**fields):
    """Search by the library function, with made-up runs."""
    base = TrainConfig(model=ModelConfig(num_experts=1), max_steps=6)
    return tune.tune(
        TuneConfig(**{"base": "base.yaml", "space": SPACE, "output_dir": "out", **fields}), base, Console(quiet=True)
    )


# ---------------------------------------------------------------------------------------------- real runs


def test_a_search_continues_until_enough_trials_are_finished(place, capsys):
    assert main(command()) == 0
    out = place / "out"
    names = {"study.db", "pareto.md", "pareto.svg", "chosen.yaml"}
    assert {path.name for path in out.iterdir()} == names | {"trial-0000", "trial-0001"}
    first, second = trials(TrialState.COMPLETE)
    assert first.params == {"learning_rate": 0.01, "model.num_experts": 1}, "the first trial is the recipe"
    for trial in (first, second):
        folder = out / f"trial-{trial.number:04}"
        results = json.loads((folder / "results.json").read_text())
        assert trial.values == [results["held_out"]["bits_per_byte"], 1e6 / results["costs"]["prefill"]]
        ran = yaml.safe_load((folder / "config.yaml").read_text())
        assert ran["learning_rate"] == trial.params["learning_rate"]
        assert ran["model"]["num_experts"] == trial.params["model.num_experts"]
        assert set(trial.user_attrs["rungs"]) == {"0.25", "0.5"}
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert trial.user_attrs["rungs"] == {"0.25": lines[1]["bits_per_byte"], "0.5": lines[2]["bits_per_byte"]}
    said = capsys.readouterr().out
    assert "resnet-bk train --config out/chosen.yaml" in said
    assert "2 finished trials, 0 stopped" in said
    assert "[I 20" not in said, "Optuna's own log lines"

    before = files(out / "trial-0000") | files(out / "trial-0001")
    assert main(command(trials=3)) == 0
    assert {path.name for path in out.iterdir()} == names | {"trial-0000", "trial-0001", "trial-0002"}
    assert files(out / "trial-0000") | files(out / "trial-0001") == before
    assert len(trials()) == 3


def test_a_stopped_trial_resumes_in_its_folder(place, monkeypatch, capsys):
    real = RunControl.on_step_end

    def interrupting(self, args, state, control, **kwargs):
        if state.global_step == 3 and "trial-0001" in str(self.trainer.checkpoints):
            signal.raise_signal(signal.SIGTERM)
        real(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(RunControl, "on_step_end", interrupting)
        assert main(command()) == 143
    assert (
        capsys.readouterr().err
        == "resnet-bk: stopped by signal 15 after saving a checkpoint. Resume with: the same command\n"
    )
    (stopped,) = trials(TrialState.RUNNING)
    begun = (place / "out" / "trial-0001" / "metrics.jsonl").read_text()
    assert begun.count("\n") == 3
    assert main(command()) == 0
    assert (place / "out" / "trial-0001" / "metrics.jsonl").read_text().startswith(begun)
    assert sorted(path.name for path in (place / "out").glob("trial-*")) == ["trial-0000", "trial-0001"]
    assert [trial.number for trial in trials(TrialState.FAIL)] == [1]
    again = trials(TrialState.COMPLETE)[1]
    assert again.params == stopped.params
    assert again.user_attrs["rungs"] == stopped.user_attrs["rungs"]
    assert "| trial-0001 |" in (place / "out" / "pareto.md").read_text()


@pytest.mark.parametrize("prune", [True, False])
def test_a_hopeless_trial_ends_at_the_first_rung(made_up, monkeypatch, place, prune):
    """Four made-up trials are far better than any real one at a quarter of the run; then a real one follows."""
    assert main(command(trials=4)) == 0
    monkeypatch.setattr(run, "train", TRAIN)
    monkeypatch.setattr(tune, "check_one_text", lambda *arguments: None)  # the made-up trials had none
    assert main(command(f"--prune={prune}", trials=5)) == 0
    last, folder = trials()[4], place / "out" / "trial-0004"
    steps = (folder / "metrics.jsonl").read_text().count("\n")
    assert (last.state, steps) == ((TrialState.PRUNED, 2) if prune else (TrialState.COMPLETE, 6))
    assert (folder / "results.json").exists() is not prune
    noted = re.search(
        r"^- trial-0004: [4-9]\.\d+ training bits per byte at 25% of the run, where the worst of 4 finished trials had "
        r"2\.000$",
        (place / "out" / "pareto.md").read_text(),
        re.MULTILINE,
    )
    assert bool(noted) is prune


# ---------------------------------------------------------------------------------------------- bookkeeping


def test_what_a_search_writes(made_up, place, monkeypatch):
    monkeypatch.setattr(tune.figures, "figure_svg", FIGURE)
    chosen = searched(trials=8, max_loss=0.02)
    lines = (place / "out" / "pareto.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| trial-")]
    done = trials(TrialState.COMPLETE)
    assert [cell[0] for cell in cells] == [f"trial-{i:04}" for i in range(8)]
    for cell, trial in zip(cells, done, strict=True):
        bits, time = trial.values
        rate, experts = trial.params["learning_rate"], trial.params["model.num_experts"]
        assert cell[1:6] == [f"{rate:.4g}", str(experts), f"{bits:.4f}", f"{2**bits:.4f}", f"{time:.4g}"]
    points = [tune.Point(cell[0], trial.params, *trial.values) for cell, trial in zip(cells, done, strict=True)]
    front, best = tune.pareto_front(points), tune.choose(points, 0.02)
    assert 1 < len(front) < 8, "the case shows nothing"
    assert {i for i, cell in enumerate(cells) if "front" in cell[6]} == set(front)
    assert [i for i, cell in enumerate(cells) if "chosen" in cell[6]] == [best]
    assert chosen == points[best]

    figure = (place / "out" / "pareto.svg").read_text()
    ElementTree.fromstring(figure)
    assert "prefill, ms per kB" in figure
    assert "held-out bits per byte" in figure
    _, settings = cli._parse(["train", "--config", "out/chosen.yaml"])
    ran = made_up[best]
    assert resolved(settings, 259) == dataclasses.replace(ran, output_dir="out/chosen", resume=False)
    assert not list((place / "out").glob(".*")), "temporary files are left"


def test_decode_is_an_objective_too(made_up):
    assert searched(trials=1, objective="decode").ms_per_kb == pytest.approx(1e6 / 100)


def test_an_interrupted_search_draws_the_same_settings(made_up, monkeypatch):
    """Of 13 trials the last three are drawn by TPE's model; Optuna warns that it is experimental."""
    searched(trials=13, output_dir="straight")
    straight = [(config.learning_rate, config.model.num_experts) for config in made_up]
    assert len(set(straight)) == 13
    made_up.clear()
    searched(trials=2)

    with monkeypatch.context() as patch:
        patch.setattr(run, "train", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                searched(trials=13)
    searched(trials=5)
    searched(trials=13)
    assert [(config.learning_rate, config.model.num_experts) for config in made_up] == straight
    assert [len(trials(state)) for state in (TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING)] == [13, 2, 0]
    assert {config.output_dir for config in made_up} == {f"out/trial-{i:04}" for i in (0, 1, 2, *range(5, 15))}
    assert all(config.resume for config in made_up)


def test_another_seed_draws_other_settings(made_up):
    for seed in (0, 1):
        searched(trials=2, seed=seed, output_dir=f"seed{seed}")
    first, a, again, b = [config.learning_rate for config in made_up]
    assert first == again
    assert a != b


def test_a_kill_before_settings_were_drawn_repeats_the_recipe(made_up, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tune, "_suggested", killed)
        with pytest.raises(KeyboardInterrupt):
            searched(trials=1)
    searched(trials=1)
    assert [(config.learning_rate, config.model.num_experts) for config in made_up] == [(0.01, 1)]


def test_a_kill_while_trials_are_queued_again_loses_and_doubles_none(made_up, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            searched(trials=1)
    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", killed)
        with pytest.raises(KeyboardInterrupt):
            searched(trials=1)
    assert [trial.state for trial in trials()] == [TrialState.RUNNING, TrialState.WAITING]
    searched(trials=1)
    assert [trial.state for trial in trials()] == [TrialState.FAIL, TrialState.COMPLETE]


def test_a_run_that_ended_before_the_kill_is_not_trained_again(made_up, monkeypatch, place):
    def train(config, console, on_progress):
        finish(config, scored(1.25, 1e5))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "train", train)
        with pytest.raises(KeyboardInterrupt):
            searched(trials=1)
    chosen = searched(trials=1)
    assert (chosen.name, chosen.bits_per_byte, chosen.ms_per_kb) == ("trial-0000", 1.25, 10.0)
    assert made_up == []


def test_impossible_settings_are_skipped_with_the_reason(made_up, place):
    searched(trials=8, space={"model.top_k": [1, 8]})
    pruned = trials(TrialState.PRUNED)
    assert 0 < len(pruned) < 8
    assert all(trial.params["model.top_k"] > 1 for trial in pruned)
    assert len(made_up) == 8 - len(pruned)
    table = (place / "out" / "pareto.md").read_text()
    for trial in pruned:
        reason = f"model.top_k: got {trial.params['model.top_k']}, allowed an integer from 1 to 1"
        assert trial.user_attrs["reason"] == reason
        assert f"- trial-{trial.number:04}: {reason}\n" in table


@pytest.mark.parametrize("result", [NonFiniteError("step 3: the loss is nan"), scored(float("nan"), 1.0)])
def test_without_a_complete_trial_nothing_is_chosen(place, monkeypatch, result):
    def train(config, console, on_progress):
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(run, "train", train)
    assert searched(trials=2) is None
    assert len(trials(TrialState.PRUNED)) == 2
    assert "nan" in (place / "out" / "pareto.md").read_text()
    assert not (place / "out" / "chosen.yaml").exists()


def test_an_impossible_recipe_is_an_error_and_an_impossible_setting_is_skipped(made_up, monkeypatch):
    def refused(config, console, on_progress):
        raise ConfigError(message)

    message = "data.source: 9 tokens make 0 windows; lower model.num_experts"

    with monkeypatch.context() as patch:
        patch.setattr(run, "train", refused)
        with pytest.raises(ConfigError, match="0 windows"):
            searched(trials=2)
    searched(trials=1)
    monkeypatch.setattr(run, "train", refused)
    searched(trials=2)
    assert [trial.state for trial in trials()] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.PRUNED]


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changed", "more", "message"),
    [
        (
            {"batch_size": 3},
            [],
            "tune.base.batch_size: got 3, the study in out was started with 2; set it to that to continue, or choose "
            "another output_dir",
        ),
        ({"model": {"d_model": 32}}, [], "tune.base.model.d_model: got 32, the study in out was started with 16"),
        ({}, ["--objective=decode"], "tune.objective: got 'decode', the study in out was started with 'prefill'"),
        (
            {},
            ['--space={"learning_rate": [0.001, 0.2], "model.num_experts": [1, 4]}'],
            "tune.space.learning_rate: got [0.001, 0.2], the study in out was started with [0.001, 0.1]",
        ),
        (
            {},
            ['--space={"learning_rate": [0.001, 0.1]}'],
            "tune.space.model.num_experts: got None, the study in out was started with [1, 4]",
        ),
        (
            {},
            ["--space=" + json.dumps(SPACE | {"seed": [0, 9]})],
            "tune.space.seed: got [0, 9], the study in out was started with None",
        ),
    ],
    ids=range(6),
)
def test_another_search_in_the_same_folder_is_refused(made_up, place, capsys, changed, more, message):
    assert main(command()) == 0
    write(place / "base.yaml", recipe(**changed))
    before = files(place / "out")
    capsys.readouterr()
    assert main(command(*more, trials=5)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"resnet-bk: error: {message}")
    assert said.count("\n") == 1
    assert files(place / "out") == before
    assert len(made_up) == 2


def test_paths_may_change(made_up, place):
    assert main(command(trials=1)) == 0
    write(place / "base.yaml", recipe(output_dir="elsewhere", data=recipe()["data"] | {"cache": "other"}))
    assert main(command("--max_loss=0.2", "--seed=4", trials=2)) == 0
    assert made_up[1].data.cache == "other"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out", "tune.output_dir: out exists and is not a folder; choose another"),
        (
            "out/thesis.txt",
            "tune.output_dir: out exists and does not hold a study (out/study.db is not a file); choose",
        ),
        ("out/study.db", "out/study.db: cannot be used as a study (DatabaseError: file is not a database); mend that"),
    ],
)
def test_a_folder_that_holds_something_else_is_left_alone(made_up, place, capsys, name, message):
    path = place / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine, and no database at all")
    assert main(command()) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert files(place)[path] == b"mine, and no database at all"
    assert made_up == []


# ------------------------------------------------------------------------------------- odd databases


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Return the folder of a study with two complete trials, a stopped one, and one that was running at a kill."""
    place = tmp_path_factory.mktemp("begun")

    def train(config, console, on_progress):
        on_progress(0.3, 2.0)
        finish(config, scored(1 + config.learning_rate, 1e5))
        number = int(Path(config.output_dir).name[-4:])
        if number == 2:
            raise NonFiniteError("step 3: the loss is nan")
        if number == 3:
            raise KeyboardInterrupt
        return scored(1 + config.learning_rate, 1e5)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(run, "train", train)
        patch.setattr(tune.figures, "figure_svg", lambda figure: "<svg></svg>")
        with pytest.raises(KeyboardInterrupt):
            searched(trials=9)
    return place / "out"


@pytest.fixture
def changed(begun, made_up, place):
    """Copy the study and change its database. Returns the path of it."""
    shutil.copytree(begun, place / "out")
    path = place / "out" / "study.db"

    def change(*statements):
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            for statement in statements:
                database.execute(statement)
        return path

    return change


def refused(path):
    """Return the message with which the study is refused. Nothing may be written."""
    before = files(path.parent)
    with pytest.raises(ConfigError) as caught:
        searched(trials=5)
    said = str(caught.value)
    assert "\n" not in said
    assert "out/study.db" in said or "the study in out was started with" in said
    assert "choose another output_dir" in said
    assert len(said) < 500
    assert files(path.parent) == before
    return said


def test_a_study_that_was_killed_goes_on(changed, made_up):
    changed()
    searched(trials=4)
    assert [trial.state.name for trial in trials()] == ["COMPLETE", "COMPLETE", "PRUNED", "FAIL", "COMPLETE"]
    assert made_up == [], "the run had ended before the kill"


DEEP = "[" * 10_000 + "]" * 10_000
NOTE = "UPDATE trial_user_attributes SET value_json = '{}' WHERE key = '{}'"
PARAMETER = "UPDATE trial_params SET {} WHERE param_name = 'learning_rate'"
FIXED = "UPDATE trial_system_attributes SET value_json = '{}' WHERE key = 'fixed_params'"


@pytest.mark.parametrize(
    "statement",
    [
        *(NOTE.format(value, "folder") for value in ('"../x"', '"/tmp/x"', '""', "5", "null", "[", '"trial-1"', DEEP)),
        *(NOTE.format(value, "folder") for value in ('"trial-0000/../../x"', '"trial-0000\\n"', '"trial-\u0660001"')),
        *(NOTE.format(value, "rungs") for value in ("5", "[1]", '{"0.25": NaN}', '{"0.25": "2"}', '{"0.25": true}')),
        *(NOTE.format(value, "settings") for value in ("5", '{"zzz": 1}', '{"learning_rate": 1e999}')),
        *(NOTE.format(value, "reason") for value in ("5", '"\\ud800"', '"\\u0000"', "")),
        *(
            FIXED.format(value)
            for value in ("5", '{"seed": 1}', '{"learning_rate": "x"}', '{"model.num_experts": 1.5}')
        ),
        *(PARAMETER.format(f"param_value = {value}") for value in ("9.0", "-1", "9e999", "'x'", "0")),
        *(PARAMETER.format(f"distribution_json = '{value}'") for value in ("x", "{}", '{"name": "X"}', DEEP)),
        PARAMETER.format("param_name = 'seed'"),
        "DELETE FROM trial_params WHERE param_name = 'learning_rate'",
        *(f"UPDATE trial_values SET value = {value}" for value in ("'x'", "-1", "1e300", "9e999")),
        "UPDATE trial_values SET value = NULL, value_type = 'INF_POS'",
        "UPDATE trial_values SET value_type = 'X'",
        "DELETE FROM trial_values",
        "DELETE FROM trial_values WHERE objective = 1",
        "UPDATE trials SET state = 'X'",
        "UPDATE trials SET state = 'COMPLETE'",
        "UPDATE trials SET datetime_start = 'x'",
        "DELETE FROM trials",
        "DELETE FROM study_user_attributes",
        *(f"UPDATE study_user_attributes SET value_json = '{value}'" for value in ("5", "{}", "null", "[", "", DEEP)),
        "UPDATE studies SET study_name = 'other'",
        "DELETE FROM studies",
        "DELETE FROM study_directions",
        "DELETE FROM study_directions WHERE objective = 1",
        "UPDATE study_directions SET direction = 'MAXIMIZE'",
        "UPDATE study_directions SET direction = 'X'",
        "UPDATE alembic_version SET version_num = 'v99'",
        "INSERT INTO alembic_version VALUES ('v99')",
        "DROP TABLE studies",
        "ALTER TABLE trials RENAME COLUMN state TO mood",
    ],
    ids=lambda statement: statement[:90],
)
def test_an_odd_database_is_refused(changed, statement):
    refused(changed(statement))


def test_a_database_that_is_cut_off_or_overwritten_is_refused(changed):
    path = changed()
    whole = path.read_bytes()
    for length in (0, 1, 15, 16, 99, 100, 4095, 4096, *range(5000, len(whole), len(whole) // 30), len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path)
    for content in (b"\0" * 9999, b"{}", whole[:100] + b"\xff" * (len(whole) - 100), whole[:-4096] + b"\xff" * 4096):
        path.write_bytes(content)
        refused(path)


def test_the_database_of_another_program_is_left_alone(changed, place):
    path = changed()
    for inner in files(path.parent):
        inner.unlink()
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE mine (x)")
    assert "is the database of another program" in refused(path)
    shutil.rmtree(path.parent)
    path.parent.mkdir()
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    optuna.create_study(storage=storage, study_name="mine")
    storage.remove_session()
    storage.engine.dispose()
    assert "holds another study, 'mine'" in refused(path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing"])
def test_a_study_that_is_not_a_file_is_refused(made_up, place, kind):
    if kind != "folder" and sys.platform == "win32":
        pytest.skip("no such files")
    path = place / "out" / "study.db"
    path.parent.mkdir()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("none")
    with pytest.raises(ConfigError, match=r"out exists and does not hold a study \(out/study\.db is not a file\)"):
        searched()


def test_a_giant_file_is_refused(made_up, place):
    path = place / "out" / "study.db"
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(300_000_000)  # sparse
    with pytest.raises(ConfigError, match="file is not a database"):
        searched()


def test_a_database_that_another_program_has_locked_is_refused_soon(changed, monkeypatch):
    path = changed()
    monkeypatch.setattr(tune, "WAIT", 0.1)
    for mode in ("EXCLUSIVE", "IMMEDIATE"):
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute(f"BEGIN {mode}")
            assert "database is locked" in refused(path)


def test_a_database_that_cannot_be_written_is_refused(changed, monkeypatch):
    path, connect = changed(), sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda path, **keywords: connect(f"file:{path}?mode=ro", uri=True))
    assert "attempt to write a readonly database" in refused(path)


def test_a_write_that_fails_during_a_trial_is_one_line_and_loses_nothing(changed, monkeypatch, made_up):
    path = changed()

    def train(config, console, on_progress):
        finish(config, scored(1.0, 1e5))
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
            database.execute("BEGIN EXCLUSIVE")
            on_progress(0.3, 2.0)

    monkeypatch.setattr(tune, "WAIT", 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(run, "train", train)
        with pytest.raises(
            ConfigError, match=r"^out/study\.db: cannot be used as a study \(OperationalError: database is"
        ):
            searched(trials=5)
    searched(trials=5)
    assert [trial.state.name for trial in trials()][3:] == ["FAIL", "COMPLETE", "FAIL", "COMPLETE"]
    assert made_up == []


def test_a_folder_with_any_name_holds_its_study(made_up, place):
    for name in ("a?b=1", "a%41#b", "{SCHEMA_VERSION}", "[red]x[/]"):
        searched(trials=1, output_dir=name)
        assert (place / name / "study.db").is_file()
    assert len(list(place.iterdir())) == 4 + 2


# --------------------------------------------------------------------- damaged runs, kills, two processes


def test_a_trial_with_damaged_results_is_an_error_and_is_not_lost(changed, made_up):
    path = changed()
    results = path.parent / "trial-0003" / "results.json"
    good = results.read_bytes()
    for content in (b"", b"{}", b"[]", good[:99], good.replace(b'"prefill": ', b'"prefill": 1e999, "x": ')):
        results.write_bytes(content)
        with pytest.raises(
            ConfigError, match=r"out/trial-0003/results\.json: .*; restore it, or remove it to have the"
        ):
            searched(trials=4)
    results.write_bytes(good)
    searched(trials=4)
    assert len(trials(TrialState.COMPLETE)) == 3
    assert made_up == []


def test_results_of_other_settings_are_not_taken_for_those_of_the_trial(changed):
    folder = changed().parent
    shutil.copy(folder / "trial-0000" / "config.yaml", folder / "trial-0003")
    with pytest.raises(ConfigError, match=r"got \S+ the run in out/trial-0003 was started with \S+; set it"):
        searched(trials=4)


def test_a_link_is_not_followed(changed, place):
    folder = changed().parent
    (folder / "trial-0003").rename(place / "elsewhere")
    (folder / "trial-0003").symlink_to(place / "elsewhere")
    with pytest.raises(ConfigError, match=r"tune\.output_dir: out/trial-0003 is a link, allowed a folder"):
        searched(trials=4)


def test_an_error_that_names_no_searched_setting_is_not_taken_for_the_fault_of_a_trial(changed, monkeypatch):
    changed()

    def train(config, console, on_progress):
        raise ConfigError("data.source: 'text.py' is not a file")

    with monkeypatch.context() as patch:
        patch.setattr(run, "train", train)
        with pytest.raises(ConfigError, match=r"'text\.py' is not a file"):
            searched(trials=5)
    assert len(trials(TrialState.PRUNED)) == 1


def test_trials_on_another_text_are_not_mixed_in(changed, monkeypatch):
    changed()
    searched(trials=4)
    other = scored(1.0, 1e5)
    other["training"]["held_out_sha256"] = "changed"
    monkeypatch.setattr(run, "train", lambda *arguments: other)
    with pytest.raises(ConfigError, match=r"tune\.base: the run in out/trial-0005 used another text or tokenizer than"):
        searched(trials=5)
    assert len(trials(TrialState.COMPLETE)) == 3


def test_a_giant_score_is_not_a_result(made_up, monkeypatch, place):
    monkeypatch.setattr(run, "train", lambda *arguments: scored(2000.0, 1e5))
    assert searched(trials=1) is None
    assert "scored 2000.0 bits per byte" in (place / "out" / "pareto.md").read_text()


def test_a_hopeless_trial_that_was_killed_before_it_ended_is_stopped_when_it_goes_on(made_up, monkeypatch):
    searched(trials=4)

    def train(config, console, on_progress):
        on_progress(0.3, 9.0)

    monkeypatch.setattr(run, "train", train)
    with monkeypatch.context() as patch:
        patch.setattr(tune, "hopeless", killed)
        with pytest.raises(KeyboardInterrupt):
            searched(trials=5)
    monkeypatch.setattr(run, "train", lambda config, console, on_progress: on_progress(0.3, 1.0))
    searched(trials=5)
    assert trials()[-1].state is TrialState.PRUNED
    assert "9.000 training bits per byte at 25% of the run" in trials()[-1].user_attrs["reason"]


def test_a_kill_between_writes_to_the_study_loses_and_doubles_nothing(made_up, monkeypatch, place):
    made, connect = run.train, sqlite3.connect

    def train(config, console, on_progress):
        assert not Path(config.output_dir, "results.json").exists(), "a run that ended is not trained again"
        results = made(config, console, on_progress)
        finish(config, results)
        return results

    def killed_before(number):
        """Search until a write to the study. Return False if there are fewer."""
        left = iter(range(number))

        class Connection(sqlite3.Connection):
            def commit(self):
                if self.in_transaction and next(left, None) is None:
                    raise KeyboardInterrupt
                super().commit()

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(sqlite3, "connect", lambda path, **keywords: connect(path, factory=Connection, **keywords))
            searched(trials=1)
            return False
        return True

    monkeypatch.setattr(run, "train", train)
    number = 0
    while killed_before(number):
        searched(trials=1)
        (found,) = trials(TrialState.COMPLETE)
        assert tuple(found.params.values()) == (0.01, 1), number
        assert found.values[0] == 1.01
        shutil.rmtree(place / "out")
        number += 2  # all of them would take twice the time
    assert number > 12


def test_a_folder_in_which_another_process_works_is_refused(changed):
    path = changed()
    before = files(path.parent)
    with lock(path.parent, "tune.output_dir"):
        with pytest.raises(
            ConfigError, match=r"^tune\.output_dir: out is in use by another process; wait until it ends"
        ):
            searched(trials=5)
        assert files(path.parent) == before | {path.parent / ".lock": b""}
    (path.parent / ".lock").write_text("")  # as after a kill
    searched(trials=5)
    assert not (path.parent / ".lock").exists()


# ------------------------------------------------------------------------------------ bad settings


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("{model.depth.penlty: [0, 1]}", "tune.space: unknown setting 'model.depth.penlty'; did you mean "),
        ("{zzz: [0, 1]}", "tune.space: unknown setting 'zzz'; see resnet-bk train --help"),
        ("{model.readout: [0, 1]}", "tune.space: model.readout allows 'propagator' or 'diagonal'; only "),
        ("{model.length.levels: [1, 2]}", "tune.space: model.length.levels allows 1 or 2; only numbers"),
        ("{model.causal: [0, 1]}", "tune.space: model.causal allows true or false; only numbers"),
        ("{data.cache: [0, 1]}", "tune.space: data.cache allows text or null; only numbers"),
        ("{model.multiscale.factors: [2, 4]}", "tune.space: model.multiscale.factors allows a list of "),
        ("{model: [0, 1]}", "tune.space: model allows a mapping of its fields; only numbers"),
        ("{seed: [5, 5]}", "tune.space.seed: got [5.0, 5.0], allowed low < high"),
        ("{learning_rate: [0.2, 0.1]}", "tune.space.learning_rate: got [0.2, 0.1], allowed low < high"),
        ("{seed: [1, 2.5]}", "tune.space.seed: got [1.0, 2.5], allowed two integers, [low, high]"),
        ("{seed: [1]}", "tune.space.seed: got [1.0], allowed two numbers, [low, high]"),
        ("{seed: [1, 2, 3]}", "tune.space.seed: got [1.0, 2.0, 3.0], allowed two numbers, [low, high]"),
        ("{learning_rate: [.nan, 1]}", "tune.space.learning_rate: got nan, allowed "),
        ("{learning_rate: [0, .inf]}", "tune.space.learning_rate: got inf, allowed "),
        ("{}", "tune.space: got {}, allowed a mapping of settings to [low, high], such as {learning_rate: "),
    ],
    ids=range(16),
)
@pytest.mark.parametrize("form", ["option", "file"])
def test_a_bad_space_is_one_line(place, capsys, space, message, form):
    (place / "tune.yaml").write_text(f"space: {space}\n")
    assert main(["tune", "base.yaml", *(["--config=tune.yaml"] if form == "file" else [f"--space={space}"])]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"resnet-bk: error: {message}")
    assert said.count("\n") == 1
    assert not (place / "runs").exists()


@pytest.mark.parametrize("space", ["{seed: 3}", "{seed: [a, 3]}", "[1, 2]", "x", "{seed: {low: 1, high: 2}}", "0.5"])
@pytest.mark.parametrize("form", ["option", "file"])
def test_a_space_that_is_not_a_mapping_to_ranges_is_one_line(place, capsys, space, form):
    (place / "tune.yaml").write_text(f"space: {space}\n")
    assert main(["tune", "base.yaml", *(["--config=tune.yaml"] if form == "file" else [f"--space={space}"])]) == 2
    said = capsys.readouterr().err
    allowed = "a mapping of settings to [low, high], such as {learning_rate: [0.001, 0.01]} or null"
    assert re.fullmatch(rf"resnet-bk: error: tune\.space: got \S.*, allowed {re.escape(allowed)}\n", said)


def test_a_space_is_read_from_the_command_line_and_from_a_file(place, monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "_run", lambda command, config: calls.append(config) or 0)
    (place / "tune.yaml").write_text("base: b.yaml\nspace: {model.depth.penalty: [1e-2, 1], model.d_ff: [8, 64]}\n")
    assert main(["tune", "--config", "tune.yaml"]) == 0
    assert main(["tune", "b.yaml", "--space", "{model.depth.penalty: [0.01, 1.0], model.d_ff: [8, 64]}"]) == 0
    assert calls[0] == calls[1] == TuneConfig("b.yaml", {"model.depth.penalty": [0.01, 1.0], "model.d_ff": [8, 64]})
    assert [type(bound) for bounds in calls[1].space.values() for bound in bounds] == [float, float, int, int]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "tune.base: 'base.yaml' is not a file; give a YAML file"),
        ("", "tune.base: base.yaml is empty; write settings as 'name: value'"),
        ("[1", "tune.base: base.yaml is not plain YAML at line 1"),
        ("max_stps: 3", "base.yaml: unknown field 'max_stps'; did you mean 'max_steps'?"),
        ("max_steps: x", "train.max_steps: got 'x', allowed an integer or null"),
        ("seed: 1", "train: neither max_steps nor max_seconds is set"),
        ("max_steps: 1", "tune.space: missing, and the default, the settings of adaptive depth, has no effect"),
    ],
    ids=range(7),
)
def test_a_bad_recipe_is_one_line(place, capsys, text, message):
    (place / "base.yaml").unlink()
    if text is not None:
        (place / "base.yaml").write_text(text)
    assert main(["tune", "base.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"resnet-bk: error: {message}")
    assert said.count("\n") == 1
    assert "plain, quality" not in said  # a preset has no budget
    assert not (place / "runs").exists()


def test_the_default_space_begins_with_the_recipe(made_up):
    base = TrainConfig(model=ModelConfig(depth=DepthConfig("act")), max_steps=6)
    tune.tune(TuneConfig("base.yaml", output_dir="out", trials=2), base, Console(quiet=True))
    first, second = (config.model.depth for config in made_up)
    assert (first.threshold, first.penalty, first.target) == (0.5, 0.3, 0.5)
    assert 0.5 <= second.threshold <= 0.99
    assert 0.01 <= second.penalty <= 1
    assert (second.threshold, second.penalty) != (0.5, 0.3)
