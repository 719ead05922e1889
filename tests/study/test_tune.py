"""``resnet-bk tune``: with real tiny runs where training matters, with made-up results elsewhere."""

import dataclasses
import json
import re
import signal
import xml.etree.ElementTree as ElementTree

import optuna
import pytest
import yaml
from optuna.trial import TrialState
from rich.console import Console

from resnet_bk import cli
from resnet_bk.cli import main
from resnet_bk.config import ConfigError, DepthConfig, ModelConfig, TrainConfig, TuneConfig
from resnet_bk.study import run, tune
from resnet_bk.training.trainer import NonFiniteError, RunControl

TEXT = "def add(a, b):\n    return a + b  # sum\n\n\nfor i in range(10):\n    print(add(i, 2 * i))\n" * 10
SPACE = {"learning_rate": [0.001, 0.1], "model.num_experts": [1, 4]}
MEASURE, TRAIN = run.measure, run.train


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
    return {"held_out": {"bits_per_byte": bits}, "costs": {"prefill": rate, "decode": rate / 100}}


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
    assert first.params == {"learning_rate": 3e-3, "model.num_experts": 1}, "the first trial is the recipe"
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


def test_what_a_search_writes(made_up, place):
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
    assert settings == dataclasses.replace(ran, output_dir="out/chosen", resume=False)
    assert not list((place / "out").glob(".*")), "temporary files are left"


def test_decode_is_an_objective_too(made_up):
    assert searched(trials=1, objective="decode").ms_per_kb == pytest.approx(1e6 / 30)


def test_an_interrupted_search_draws_the_same_settings(made_up, monkeypatch):
    """Of 13 trials the last three are drawn by TPE's model; Optuna warns that it is experimental."""
    searched(trials=13, output_dir="straight")
    straight = [(config.learning_rate, config.model.num_experts) for config in made_up]
    assert len(set(straight)) == 13
    made_up.clear()
    searched(trials=2)

    def killed(config, console, on_progress):
        raise KeyboardInterrupt

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
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tune, "_suggested", killed)
        with pytest.raises(KeyboardInterrupt):
            searched(trials=1)
    searched(trials=1)
    assert [(config.learning_rate, config.model.num_experts) for config in made_up] == [(3e-3, 1)]


def test_a_kill_while_trials_are_queued_again_loses_and_doubles_none(made_up, monkeypatch):
    def killed(*arguments, **keywords):
        raise KeyboardInterrupt

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
        (place / "out" / "trial-0000").mkdir()
        (place / "out" / "trial-0000" / "results.json").write_text(json.dumps(scored(1.25, 1e5)))
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
        raise ConfigError("data.source: 9 tokens make 0 windows")

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


@pytest.mark.parametrize("name", ["out", "out/thesis.txt", "out/study.db"])
def test_a_folder_that_holds_something_else_is_left_alone(made_up, place, capsys, name):
    path = place / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine, and no database at all")
    assert main(command()) == 2
    said = capsys.readouterr().err
    assert ("cannot be read as a study" if name == "out/study.db" else "out exists and does not hold a study") in said
    assert said.count("\n") == 1
    assert files(place)[path] == b"mine, and no database at all"
    assert made_up == []


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
