"""Search settings of a recipe for the trade between quality and time: an Optuna study whose trials are runs of `train`.

All of it is in one folder: the study, a run for each trial, and what they show. One process at a time works on it; a
killed one loses nothing but the steps since its run's last checkpoint.
"""

import contextlib
import dataclasses
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from resnet_bk import folders
from resnet_bk.checkpoint import write_whole
from resnet_bk.config import ConfigError, TrainConfig, TuneConfig, shown
from resnet_bk.extras import extra
from resnet_bk.report import html
from resnet_bk.study import run
from resnet_bk.study.search import (
    Point,
    choose,
    default_space,
    hopeless,
    pareto_front,
    recipe_settings,
    with_settings,
)
from resnet_bk.training.run import StoppedError
from resnet_bk.training.trainer import NonFiniteError, Watch

with extra("study"):
    import optuna
    from optuna.trial import FrozenTrial, TrialState
    from sqlalchemy.exc import SQLAlchemyError

STUDY, TABLE, FIGURE, CHOSEN = "study.db", "pareto.md", "pareto.svg", "chosen.yaml"
RUNGS = (0.25, 0.5)  # shares of a run at which it may be stopped
_FREE = {"output_dir", "resume", "data.cache"}  # of the recipe: may differ when a study goes on


class HopelessError(RuntimeError):
    """The trial's training was stopped by `hopeless`."""


# ---------------------------------------------------------------------------------------------- study


@contextlib.contextmanager
def _opened(config: TuneConfig, recipe: TrainConfig, space: dict[str, list[float]]) -> Iterator[optuna.Study]:
    """The study in config.output_dir, a new one or that of an earlier call; ConfigError where it is another search."""
    folder, path = Path(config.output_dir), Path(config.output_dir) / STUDY
    if folder.exists() and not path.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"tune.output_dir: {folder} exists and holds no study; choose another")
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    except (SQLAlchemyError, RuntimeError) as error:
        kind = type(error).__name__
        raise ConfigError(f"{path}: cannot be read as a study ({kind}); choose another output_dir") from error
    try:
        study = optuna.create_study(
            storage=storage, study_name="tune", directions=["minimize"] * 2, load_if_exists=True
        )
        _check_same_search(study, config, recipe, space)
        if not study.get_trials() and (settings := recipe_settings(recipe, space)):
            study.enqueue_trial(settings, {"settings": settings})
        _retry_killed(study)
        yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _check_same_search(
    study: optuna.Study, config: TuneConfig, recipe: TrainConfig, space: dict[str, list[float]]
) -> None:
    base = {name: value for name, value in folders.flat(dataclasses.asdict(recipe)).items() if name not in _FREE}
    asked = {"base": base, "space": space, "objective": config.objective}
    if "search" not in study.user_attrs:
        study.set_user_attr("search", asked)
    before, now = folders.flat(study.user_attrs["search"]), folders.flat(asked)
    for name in before | now:
        later = name.startswith("base.") and name not in before  # a setting that an older version did not have
        if not later and before.get(name) != now.get(name):
            raise ConfigError(
                f"tune.{name}: got {shown(now.get(name))}, the study in {config.output_dir} was started with "
                f"{shown(before.get(name))}; set it to that to go on, or choose another output_dir"
            )


def _retry_killed(study: optuna.Study) -> None:
    """Trials that a process left running, as it was killed or stopped, start again as new ones in their old folders,
    where their runs go on. Queued first and then marked: a kill between the two must not lose one."""
    trials = study.get_trials()
    queued = {trial.user_attrs.get("folder") for trial in trials if trial.state is TrialState.WAITING}
    for trial in trials:
        if trial.state is TrialState.RUNNING:
            settings, folder = trial.user_attrs.get("settings", {}) | trial.params, _folder(trial)
            if folder not in queued:
                study.enqueue_trial(settings, {**trial.user_attrs, "settings": settings, "folder": folder})
            study.tell(trial.number, state=TrialState.FAIL)


def _folder(trial: optuna.Trial | FrozenTrial) -> str:
    return str(trial.user_attrs.get("folder", f"trial-{trial.number:04}"))


def _sampler(seed: int, done: int) -> optuna.samplers.TPESampler:
    """Seeded anew for each trial, so that a search that was interrupted draws what one in a single go would have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        mixed = int(np.random.SeedSequence([seed, done]).generate_state(1)[0])
        return optuna.samplers.TPESampler(seed=mixed, multivariate=True)


def _suggested(trial: optuna.Trial, name: str, low: float, high: float) -> float:
    log = low > 0 and high / low >= 10
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, log=log)
    return trial.suggest_float(name, low, high, log=log)


def _finished(study: optuna.Study, *states: TrialState) -> list[FrozenTrial]:
    return study.get_trials(states=states or (TrialState.COMPLETE, TrialState.PRUNED))


# ---------------------------------------------------------------------------------------------- trials


def tune(config: TuneConfig, recipe: TrainConfig, console: Console) -> Point | None:
    """Search until config.trials are finished; returns the chosen point, None where no trial came to its end.

    recipe: the settings in the file config.base.
    """
    space = config.space or default_space(recipe)
    with _opened(config, recipe, space) as study:
        while (done := len(_finished(study))) < config.trials:
            study.sampler = _sampler(config.seed, done)
            trial = study.ask()
            settings = {name: _suggested(trial, name, low, high) for name, (low, high) in space.items()}
            values = ", ".join(f"{name} = {value:.4g}" for name, value in settings.items())
            console.print(f"\n[bold]Trial {done + 1} of {config.trials}[/bold]: {values}")
            try:
                possible = with_settings(recipe, settings)
            except ConfigError as error:
                _prune(study, trial, error, console)
                continue
            try:
                study.tell(trial, _run_trial(study, trial, config, possible, console))
            except (ConfigError, NonFiniteError, HopelessError) as error:
                if isinstance(error, ConfigError) and not _complete(study):
                    raise  # nothing has been trained yet: what cannot be may be the recipe, or its text
                _prune(study, trial, error, console)
            _write(study, config, recipe)
        return _conclude(study, config, recipe, console)


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    return _finished(study, TrialState.COMPLETE)


def _prune(study: optuna.Study, trial: optuna.Trial, error: Exception, console: Console) -> None:
    console.print(f"trial stopped: {error}", markup=False)
    trial.set_user_attr("reason", str(error))
    study.tell(trial, state=TrialState.PRUNED)


def _run_trial(
    study: optuna.Study, trial: optuna.Trial, config: TuneConfig, settings: TrainConfig, console: Console
) -> tuple[float, float]:
    """Held-out bits per byte and milliseconds per kilobyte of a trial, trained in its folder."""
    folder = Path(config.output_dir) / _folder(trial)
    trial.set_user_attr("folder", folder.name)
    settings = dataclasses.replace(settings, output_dir=str(folder), resume=True)
    if (folder / folders.RESULTS).exists():  # the process was killed between the end of the run and that of the trial
        results = json.loads((folder / folders.RESULTS).read_text())
    else:
        try:
            results = run.train(settings, console, _watch(study, trial, config.prune))
        except StoppedError as stopped:
            raise StoppedError(stopped.number, "the same command") from stopped
    values = (results["held_out"]["bits_per_byte"], 1e6 / results["costs"][config.objective])
    if not all(map(math.isfinite, values)):
        raise NonFiniteError(f"scored {values[0]} bits per byte at {values[1]} ms per kB")
    return values


def _watch(study: optuna.Study, trial: optuna.Trial, prune: bool) -> Watch:
    """Notes the training bits per byte at each rung, and raises HopelessError where `hopeless` says so."""

    def watch(progress: float, bits_per_byte: float) -> None:
        seen = trial.user_attrs.get("rungs", {})
        for rung in RUNGS:
            if progress < rung or str(rung) in seen:
                continue
            seen = {**seen, str(rung): bits_per_byte}
            trial.set_user_attr("rungs", seen)
            others = [at[str(rung)] for t in _complete(study) if str(rung) in (at := t.user_attrs.get("rungs", {}))]
            if prune and hopeless(bits_per_byte, others):
                raise HopelessError(
                    f"{bits_per_byte:.3f} training bits per byte at {rung:.0%} of the run, where the worst of "
                    f"{len(others)} finished trials had {max(others):.3f}"
                )

    return watch


# ---------------------------------------------------------------------------------------------- what it shows


def _write(study: optuna.Study, config: TuneConfig, recipe: TrainConfig) -> tuple[list[list[str]], Point | None]:
    """Write the table, the figure and the chosen settings. Returns the table, its head first, and the chosen point."""
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
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    pruned = [f"- {_folder(t)}: {t.user_attrs.get('reason')}" for t in _finished(study, TrialState.PRUNED)]
    rule = (
        f"Chosen: the fastest whose perplexity per byte is at most {config.max_loss:.3g}, as a share, above the least."
    )
    write_whole(folder / TABLE, "\n".join([*lines, "", rule, *(["", "Stopped:", "", *pruned] if pruned else []), ""]))
    if chosen is None:
        return rows, None
    axes = [(point.bits_per_byte, point.ms_per_kb) for point in points]
    write_whole(folder / FIGURE, html.figure_svg(html.trade_off(axes, sorted(front), chosen, label)))
    settings = with_settings(recipe, points[chosen].settings | {"output_dir": str(folder / "chosen"), "resume": False})
    write_whole(folder / CHOSEN, yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))
    return rows, points[chosen]


def _conclude(study: optuna.Study, config: TuneConfig, recipe: TrainConfig, console: Console) -> Point | None:
    rows, chosen = _write(study, config, recipe)
    folder = Path(config.output_dir)
    if chosen is None:
        console.print(f"no trial came to its end; {folder / TABLE} says why")
        return None
    title = f"{len(rows) - 1} finished trials, {len(_finished(study)) - len(rows) + 1} stopped"
    table = Table(title=title, box=None, padding=(0, 2, 0, 0))
    for name in rows[0]:
        table.add_column(name.replace(".", ".\n"), overflow="fold")  # dotted names are long
    for row in rows[1:]:
        table.add_row(*row)
    console.print(table)
    console.print(f"wrote {folder}: {TABLE}, {FIGURE}, {CHOSEN}", markup=False)
    console.print(f"train the chosen one: resnet-bk train --config {folder / CHOSEN}", markup=False, soft_wrap=True)
    return chosen
