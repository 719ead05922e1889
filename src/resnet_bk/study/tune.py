"""The command ``resnet-bk tune``: search settings for the trade-off between quality and time.

The search is an Optuna study; its trials are runs of ``resnet-bk train``. One folder holds the study, the run of each
trial, and the results. Only one process may work on a folder at a time. If it is killed, only the steps since the last
checkpoint of the current run are lost.
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

from resnet_bk.extras import extra

with extra("study"):
    import optuna
    from optuna.trial import FrozenTrial, TrialState
    from sqlalchemy.exc import SQLAlchemyError

from resnet_bk import folders
from resnet_bk.checkpoint import write_atomically
from resnet_bk.config import ConfigError, TrainConfig, TuneConfig, shown
from resnet_bk.report import html
from resnet_bk.report.tables import Console, markdown_table, print_table
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
from resnet_bk.training.trainer import NonFiniteError, ProgressCallback

STUDY, TABLE, FIGURE, CHOSEN = "study.db", "pareto.md", "pareto.svg", "chosen.yaml"
RUNGS = (0.25, 0.5)  # progress of a run at which it may be stopped
_CHANGEABLE = {"output_dir", "resume", "data.cache"}  # settings of the recipe that may change when a study continues


class HopelessError(RuntimeError):
    """The training of a trial was stopped by the rule `hopeless`."""


# ---------------------------------------------------------------------------------------------- study


@contextlib.contextmanager
def _opened(config: TuneConfig, recipe: TrainConfig, space: dict[str, list[float]]) -> Iterator[optuna.Study]:
    """Open the study in config.output_dir, or create it; ConfigError if the folder holds another search."""
    folder, path = Path(config.output_dir), Path(config.output_dir) / STUDY
    if folder.exists() and not path.is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"tune.output_dir: {folder} exists and does not hold a study; choose another")
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
    """Raise ConfigError if the study was started with another recipe, space or objective; a new study notes them."""
    base = {name: value for name, value in folders.flat(dataclasses.asdict(recipe)).items() if name not in _CHANGEABLE}
    asked = {"base": base, "space": space, "objective": config.objective}
    if "search" not in study.user_attrs:
        study.set_user_attr("search", asked)
    before, now = folders.flat(study.user_attrs["search"]), folders.flat(asked)
    for name in before | now:
        is_new = name.startswith("base.") and name not in before  # a setting that an older version did not have
        if not is_new and before.get(name) != now.get(name):
            raise ConfigError(
                f"tune.{name}: got {shown(now.get(name))}, the study in {config.output_dir} was started with "
                f"{shown(before.get(name))}; set it to that to continue, or choose another output_dir"
            )


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
                    raise  # no trial is complete yet: the recipe or its text may be at fault, not the trial's settings
                _prune(study, trial, error, console)
            _write(study, config, recipe)
        return _conclude(study, config, recipe, console)


def _complete(study: optuna.Study) -> list[FrozenTrial]:
    return _finished(study, TrialState.COMPLETE)


def _prune(study: optuna.Study, trial: optuna.Trial, error: Exception, console: Console) -> None:
    """End a trial without a result, and note why."""
    console.print(f"trial stopped: {error}", markup=False)
    trial.set_user_attr("reason", str(error))
    study.tell(trial, state=TrialState.PRUNED)


def _run_trial(
    study: optuna.Study, trial: optuna.Trial, config: TuneConfig, settings: TrainConfig, console: Console
) -> tuple[float, float]:
    """Train a trial in its folder. Returns its held-out bits per byte and milliseconds per kilobyte."""
    folder = Path(config.output_dir) / _folder(trial)
    trial.set_user_attr("folder", folder.name)
    settings = dataclasses.replace(settings, output_dir=str(folder), resume=True)
    if (folder / folders.RESULTS).exists():  # the process was killed after the run, before the study noted its result
        results = json.loads((folder / folders.RESULTS).read_text())
    else:
        try:
            results = run.train(settings, console, _on_progress(study, trial, config.prune))
        except StoppedError as stopped:
            raise StoppedError(stopped.number, "the same command") from stopped
    values = (results["held_out"]["bits_per_byte"], 1e6 / results["costs"][config.objective])
    if not all(map(math.isfinite, values)):
        raise NonFiniteError(f"scored {values[0]} bits per byte at {values[1]} ms per kB")
    return values


def _on_progress(study: optuna.Study, trial: optuna.Trial, prune: bool) -> ProgressCallback:
    """Return a callback that notes the training bits per byte at each rung, and ends a hopeless trial."""

    def on_progress(progress: float, bits_per_byte: float) -> None:
        noted = trial.user_attrs.get("rungs", {})
        for rung in RUNGS:
            if progress < rung or str(rung) in noted:
                continue
            noted = {**noted, str(rung): bits_per_byte}
            trial.set_user_attr("rungs", noted)
            others = [at[str(rung)] for t in _complete(study) if str(rung) in (at := t.user_attrs.get("rungs", {}))]
            if prune and hopeless(bits_per_byte, others):
                raise HopelessError(
                    f"{bits_per_byte:.3f} training bits per byte at {rung:.0%} of the run, where the worst of "
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
    write_atomically(folder / TABLE, "".join([text, *(["\nStopped:\n\n", *pruned] if pruned else [])]))
    if chosen is None:
        return rows, None
    axes = [(point.bits_per_byte, point.ms_per_kb) for point in points]
    write_atomically(folder / FIGURE, html.figure_svg(html.trade_off(axes, sorted(front), chosen, label)))
    settings = with_settings(recipe, points[chosen].settings | {"output_dir": str(folder / "chosen"), "resume": False})
    write_atomically(folder / CHOSEN, yaml.safe_dump(dataclasses.asdict(settings), sort_keys=False))
    return rows, points[chosen]


def _conclude(study: optuna.Study, config: TuneConfig, recipe: TrainConfig, console: Console) -> Point | None:
    """Write and print the results. Returns the chosen trial; None if no trial is complete."""
    rows, chosen = _write(study, config, recipe)
    folder = Path(config.output_dir)
    if chosen is None:
        console.print(f"no trial is complete; {folder / TABLE} says why")
        return None
    title = f"{len(rows) - 1} finished trials, {len(_finished(study)) - len(rows) + 1} stopped"
    print_table(console, title, rows[1:], rows[0])
    console.print(f"wrote {folder}: {TABLE}, {FIGURE}, {CHOSEN}", markup=False)
    console.print(
        f"train with the chosen settings: resnet-bk train --config {folder / CHOSEN}", markup=False, soft_wrap=True
    )
    return chosen
