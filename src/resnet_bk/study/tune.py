"""The command ``resnet-bk tune``: search settings for the trade-off between quality and time.

The search is an Optuna study; its trials are runs of ``resnet-bk train``. One folder holds the study, the run of each
trial, and the results. Only one process at a time can work on a folder. If it is killed, only the steps since the last
checkpoint of the current run are lost.
"""

import contextlib
import dataclasses
import math
import os
import re
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from resnet_bk.extras import extra

with extra("study"):
    import optuna
    from optuna.exceptions import OptunaError
    from optuna.trial import FrozenTrial, TrialState
    from sqlalchemy.exc import SQLAlchemyError

from resnet_bk import folders
from resnet_bk.config import (
    ConfigError,
    TrainConfig,
    TuneConfig,
    check_integer,
    check_range,
    check_text,
    shown,
    visible,
)
from resnet_bk.files import LOCK, is_scratch, lock, remove_scratch, write_whole
from resnet_bk.hf import load_tokenizer
from resnet_bk.report import figures
from resnet_bk.report.tables import Console, markdown_table, print_table
from resnet_bk.report.terminal import say
from resnet_bk.study import run
from resnet_bk.study.finished import MOST_BITS, check_one_text, named, results_of, text_of
from resnet_bk.study.search import (
    Point,
    choose,
    default_space,
    hopeless,
    pareto_front,
    recipe_settings,
    with_settings,
)
from resnet_bk.training.errors import NonFiniteError, StoppedError
from resnet_bk.training.recorder import ProgressCallback
from resnet_bk.training.run import resolved

STUDY, TABLE, FIGURE, CHOSEN = "study.db", "pareto.md", "pareto.svg", "chosen.yaml"
RUNGS = (0.25, 0.5)  # progress of a run at which it may be stopped
WAIT = 5  # seconds for which another program may keep the database locked
_OWN = {LOCK, STUDY, f"{STUDY}-journal"}  # files that the folder of a new study may have
_CHANGEABLE = {"output_dir", "resume", "data.cache"}  # settings of the recipe that may change when a study continues


# ---------------------------------------------------------------------------------------------- study


@contextlib.contextmanager
def _opened(config: TuneConfig, recipe: TrainConfig, space: dict[str, list[float]]) -> Iterator[optuna.Study]:
    """Open the study in config.output_dir, or create it. The caller holds the lock of the folder.

    Raises:
        ConfigError: the folder holds another search or something else, or its database is damaged or cannot be written.
    """
    folder, path = Path(config.output_dir), Path(config.output_dir) / STUDY
    others = [inner.name for inner in folder.iterdir() if inner.name not in _OWN and not is_scratch(inner)]
    if not path.is_file() and (others or os.path.lexists(path)):
        raise ConfigError(
            f"tune.output_dir: {folder} exists and does not hold a study ({path} is not a file); choose another"
        )
    remove_scratch(folder)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with contextlib.ExitStack() as stack:
        with _naming(path, Exception):  # odd content raises errors of SQLite, SQLAlchemy, Alembic, Optuna and JSON
            if not _trials_in(path) and others:
                raise ConfigError(f"{path}: has no trials, but {folder} is not empty; choose another output_dir")
            # The path is not in the URL, where '?', '%' and '{' have a meaning.
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{STUDY}", {"creator": lambda: sqlite3.connect(path, timeout=WAIT)}
            )
            stack.callback(storage.engine.dispose)
            stack.callback(storage.remove_session)
            names = optuna.get_all_study_names(storage)
            if names and "tune" not in names:
                raise ConfigError(f"{path}: holds another study, {shown(names[0])}; choose another output_dir")
            study = optuna.create_study(
                storage=storage, study_name="tune", directions=["minimize"] * 2, load_if_exists=True
            )
            if [direction.name for direction in study.directions] != ["MINIMIZE"] * 2:
                raise ConfigError(f"{path}: the study does not minimise two values; choose another output_dir")
            _check_same_search(study, config, recipe, space)
            with named(path, "; restore it, or choose another output_dir"):
                for trial in study.get_trials():
                    _check_trial(trial, space)
            if not study.get_trials() and (settings := recipe_settings(recipe, space)):
                study.enqueue_trial(settings, {"settings": settings})
            _retry_killed(study)
        with _naming(path, SQLAlchemyError, OptunaError):
            yield study


@contextlib.contextmanager
def _naming(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Turn an error of these kinds into a ConfigError that names the database and the first cause."""
    try:
        yield
    except ConfigError:
        raise
    except kinds as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        problem = f"{type(cause).__name__}: {cause}"
        raise ConfigError(
            f"{path}: cannot be used as a study ({problem}); mend that, or choose another output_dir"
        ) from error


def _trials_in(path: Path) -> int:
    """Return the number of trials in a database; make an empty database if there is none.

    Raises:
        ConfigError: it is damaged, or belongs to another program.
        sqlite3.Error: the file is no database or cannot be written, or another program is writing to it.
    """
    with contextlib.closing(sqlite3.connect(path, timeout=WAIT)) as database:
        database.execute("BEGIN IMMEDIATE")
        (problem,) = database.execute("PRAGMA integrity_check(1)").fetchone()
        if problem != "ok":
            raise ConfigError(f"{path}: is damaged ({shown(problem)}); restore it, or choose another output_dir")
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and "studies" not in tables:
            raise ConfigError(f"{path}: is the database of another program; choose another output_dir")
        return int(database.execute("SELECT COUNT(*) FROM trials").fetchone()[0]) if "trials" in tables else 0


def _check_same_search(
    study: optuna.Study, config: TuneConfig, recipe: TrainConfig, space: dict[str, list[float]]
) -> None:
    """Raise ConfigError if the study was started with another recipe, space or objective; a new study notes them."""
    base = {name: value for name, value in folders.flat(dataclasses.asdict(recipe)).items() if name not in _CHANGEABLE}
    asked = {"base": base, "space": space, "objective": config.objective}
    if "search" not in study.user_attrs and not study.get_trials():
        study.set_user_attr("search", asked)
    before, now = folders.flat(study.user_attrs["search"]), folders.flat(asked)
    for name in before | now:
        is_new = name.startswith("base.") and name not in before  # a setting that an older version did not have
        if not is_new and before.get(name) != now.get(name):
            raise ConfigError(
                f"tune.{name}: got {shown(now.get(name))}, the study in {config.output_dir} was started with "
                f"{shown(before.get(name))}; set it to that to continue, or choose another output_dir"
            )


def _check_trial(trial: FrozenTrial, space: dict[str, list[float]]) -> None:
    """Raise an error unless this program can have noted the trial."""
    where, notes = f"trial {trial.number}", trial.user_attrs
    for settings in (trial.params, notes.get("settings", {}), trial.system_attrs.get("fixed_params", {})):
        for name, value in settings.items():
            low, high = space[name]
            check_range(where, low, high, **{name: value})
            if isinstance(low, int):
                check_integer(where, low, int(high), **{name: value})
    for rung, bits in notes.get("rungs", {}).items():
        check_range(where, 0, 1e24, **{f"rungs.{rung}": bits})
    if not re.fullmatch(r"trial-[0-9]{4,}", folder := _folder(trial)):
        raise ConfigError(f"{where}.folder: got {shown(folder)}, allowed trial-NNNN")
    check_text(where, reason=notes.get("reason", "none"))
    if trial.state is TrialState.COMPLETE:
        bits, time = trial.values
        check_range(where, 0, 1_000, bits_per_byte=bits)  # its power of 2, the perplexity, is still a number
        check_range(where, 1e-24, 1e24, ms_per_kb=time)
        if missing := space.keys() - trial.params.keys():
            raise ConfigError(f"{where}: has no {', '.join(sorted(missing))}")


def _retry_killed(study: optuna.Study) -> None:
    """Queue the trials that a stopped process left running again, in their old folders, so that their runs continue.

    Each trial is queued before it is marked as failed, so that none is lost if the process is killed in between.
    """
    trials = study.get_trials()
    queued = {trial.user_attrs.get("folder") for trial in trials if trial.state is TrialState.WAITING}
    for trial in trials:
        if trial.state is TrialState.RUNNING:
            settings, folder = trial.user_attrs.get("settings", {}) | trial.params, _folder(trial)
            if folder not in queued:
                study.enqueue_trial(settings, {**trial.user_attrs, "settings": settings, "folder": folder})
            study.tell(trial.number, state=TrialState.FAIL)


def _folder(trial: optuna.Trial | FrozenTrial) -> str:
    """Return the name of a trial's folder."""
    return str(trial.user_attrs.get("folder", f"trial-{trial.number:04}"))


def _sampler(seed: int, done: int) -> optuna.samplers.TPESampler:
    """Return the sampler of one trial.

    Its seed depends on the number of finished trials, so that an interrupted search draws the same settings as an
    uninterrupted one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        mixed = int(np.random.SeedSequence([seed, done]).generate_state(1)[0])
        return optuna.samplers.TPESampler(seed=mixed, multivariate=True)


def _suggested(trial: optuna.Trial, name: str, low: float, high: float) -> float:
    """Draw a setting, on a log scale if its range covers a factor of 10."""
    log = low > 0 and high / low >= 10
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, log=log)
    return trial.suggest_float(name, low, high, log=log)


def _finished(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    """Return the trials in some states; by default those that are complete and those that were stopped."""
    return study.get_trials(states=states or (TrialState.COMPLETE, TrialState.PRUNED))


# ---------------------------------------------------------------------------------------------- trials


def tune(config: TuneConfig, recipe: TrainConfig, console: Console) -> Point | None:
    """Search until config.trials trials are finished.

    Args:
        config: settings of the search.
        recipe: settings of a run, from the file config.base.
        console: prints progress and the table.

    Returns:
        The chosen trial; None if no trial is complete.

    Raises:
        ConfigError: another process works in the folder, it holds another search or damaged files, or the recipe or its
            text cannot be used.
        StoppedError: a signal stopped the training of a trial.
    """
    space = config.space or default_space(recipe)
    full = resolved(recipe, len(load_tokenizer(recipe.data.tokenizer)))  # as the runs save it
    with lock(Path(config.output_dir), "tune.output_dir"), _opened(config, recipe, space) as study:
        while (done := len(_finished(study))) < config.trials:
            study.sampler = _sampler(config.seed, done)
            trial = study.ask()
            settings = {name: _suggested(trial, name, low, high) for name, (low, high) in space.items()}
            values = ", ".join(f"{name} = {value:.4g}" for name, value in settings.items())
            say(console, f"\nTrial {done + 1} of {config.trials}: {values}", "bold")
            try:
                study.tell(trial, _run_trial(study, trial, config, full, console))
            except (optuna.TrialPruned, NonFiniteError) as error:
                say(console, f"trial stopped: {error}")
                trial.set_user_attr("reason", visible(str(error)))
                study.tell(trial, state=TrialState.PRUNED)
            _write(study, config, recipe)
        return _conclude(study, config, recipe, console)


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    return _finished(study, TrialState.COMPLETE)


def _run_trial(
    study: optuna.Study, trial: optuna.Trial, config: TuneConfig, recipe: TrainConfig, console: Console
) -> tuple[float, float]:
    """Train a trial in its folder. Returns its held-out bits per byte and milliseconds per kilobyte.

    Raises:
        TrialPruned: the settings of the trial are impossible, or its training is hopeless.
        NonFiniteError: a loss, a gradient or a result is NaN or infinite.
        ConfigError: the recipe, its text, or a file in the folder is at fault.
    """
    folder = Path(config.output_dir) / _folder(trial)
    if folder.is_symlink():
        raise ConfigError(f"tune.output_dir: {folder} is a link, allowed a folder; move the folder itself there")
    trial.set_user_attr("folder", folder.name)
    try:
        settings = with_settings(recipe, trial.params | {"output_dir": str(folder), "resume": True})
    except ConfigError as error:
        raise optuna.TrialPruned(str(error)) from error
    results = results_of("tune.output_dir", settings)  # None, unless the process was killed before it noted them
    try:
        results = results or run.train(settings, console, _on_progress(study, trial, config.prune))
    except StoppedError as stopped:
        raise StoppedError(stopped.number, "the same command") from stopped
    except ConfigError as error:
        # An error that names no searched setting, or that even the first trial has, would stop all other trials, too.
        if _complete(study) and any(name in str(error) for name in trial.params):
            raise optuna.TrialPruned(str(error)) from error
        raise
    bits, time = results["held_out"]["bits_per_byte"], 1e6 / results["costs"][config.objective]
    if not (bits <= MOST_BITS and time < math.inf):  # also if one is NaN
        raise NonFiniteError(f"scored {bits} bits per byte at {time} ms per kB")
    text = text_of(results)
    check_one_text("tune.base", folder, text, study.user_attrs.get("text", text))
    study.set_user_attr("text", text)
    return bits, time


def _on_progress(study: optuna.Study, trial: optuna.Trial, prune: bool) -> ProgressCallback:
    """Return a callback that notes the training bits per byte at each rung, and ends a hopeless trial."""
    noted = dict(trial.user_attrs.get("rungs", {}))
    finished = [t.user_attrs.get("rungs", {}) for t in _complete(study)]

    def on_progress(progress: float, bits_per_byte: float) -> None:
        for rung in RUNGS:
            name = str(rung)
            if progress >= rung and name not in noted:
                noted[name] = bits_per_byte
                trial.set_user_attr("rungs", dict(noted))
            others = [at[name] for at in finished if name in at]
            # at each log line, because a process may have been killed between the note and the end of the trial
            if prune and name in noted and hopeless(noted[name], others):
                raise optuna.TrialPruned(
                    f"{noted[name]:.3f} training bits per byte at {rung:.0%} of the run, where the worst of "
                    f"{len(others)} finished trials had {max(others):.3f}"
                )

    return on_progress


# --------------------------------------------------------------------------------------------- results


def _write(study: optuna.Study, config: TuneConfig, recipe: TrainConfig) -> tuple[list[list[str]], Point | None]:
    """Write the table, the figure and the chosen settings. Returns the table, its head first, and the chosen trial."""
    folder, label = Path(config.output_dir), f"{config.objective}, ms per kB"
    points = [Point(_folder(t), t.params, *t.values) for t in _complete(study)]
    names = list(study.user_attrs["search"]["space"])
    front, chosen = set(pareto_front(points)), choose(points, config.max_loss) if points else None
    rows = [["trial", *names, "bits per byte", "perplexity per byte", label, ""]]
    for i, point in enumerate(points):
        values = [f"{point.settings[name]:.4g}" for name in names]
        marks = ["front"] * (i in front) + ["chosen"] * (i == chosen)
        numbers = [f"{point.bits_per_byte:.4f}", f"{point.perplexity:.4f}", f"{point.ms_per_kb:.4g}"]
        rows.append([point.name, *values, *numbers, ", ".join(marks)])
    text = markdown_table(rows)
    text += f"\nChosen: the fastest trial with a perplexity at most {100 * config.max_loss:.3g}% above the lowest.\n"
    pruned = [f"- {_folder(t)}: {t.user_attrs.get('reason')}\n" for t in _finished(study, TrialState.PRUNED)]
    write_whole(folder / TABLE, "".join([text, *(["\nStopped:\n\n", *pruned] if pruned else [])]))
    if chosen is None:
        return rows, None
    axes = [(point.bits_per_byte, point.ms_per_kb) for point in points]
    write_whole(folder / FIGURE, figures.figure_svg(figures.trade_off(axes, sorted(front), chosen, label)))
    settings = with_settings(recipe, points[chosen].settings | {"output_dir": str(folder / "chosen"), "resume": False})
    write_whole(folder / CHOSEN, yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))
    return rows, points[chosen]


def _conclude(study: optuna.Study, config: TuneConfig, recipe: TrainConfig, console: Console) -> Point | None:
    """Write and print the results. Returns the chosen trial; None if no trial is complete."""
    rows, chosen = _write(study, config, recipe)
    folder = Path(config.output_dir)
    if chosen is None:
        say(console, f"no trial is complete; {folder / TABLE} says why")
        return None
    title = f"{len(rows) - 1} finished trials, {len(_finished(study)) - len(rows) + 1} stopped"
    print_table(console, title, rows[1:], rows[0])
    say(console, f"wrote {folder}: {TABLE}, {FIGURE}, {CHOSEN}")
    command = folders.train_command(folder / CHOSEN)
    say(console, f"train with the chosen settings: {command}")
    return chosen
