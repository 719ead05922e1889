"""Run folders: the names of their files, choosing the folder of a run, and checking that a run may be resumed."""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from resnet_bk import files
from resnet_bk.checkpoint import CheckpointError, newest_valid, saved_steps, verify
from resnet_bk.config import ConfigError, TrainConfig, read_yaml, shown, visible

CONFIG, TEXT_HASH, METRICS, RESULTS, REPORT, MODEL, BEST, CHECKPOINTS = (
    "config.yaml",
    "text.sha256",
    "metrics.jsonl",
    "results.json",
    "report.html",
    "model",
    "best",
    "checkpoints",
)
_MODELS = Path(__file__).resolve().parent / "models"
HELD_OUT = "held_out_bits_per_byte"  # in the lines of METRICS after whose update held-out text was scored


@contextlib.contextmanager
def run_folder(config: TrainConfig, report: Callable[[str], None]) -> Iterator[Path]:
    """Choose this run's folder, a new one or one whose run goes on, and hold its lock.

    See TrainConfig.resume. `report` is called with a line that says what was chosen.

    Raises:
        ConfigError: the folder is in use, holds other files, or holds a run and `resume` is off.
    """
    folder, number = Path(config.output_dir), 1
    while True:
        with files.lock(folder, "train.output_dir"):
            if not (config.resume and is_begun(folder) and _is_used_up(folder, config)):
                _check_free(folder, config, report)
                files.remove_scratch(folder)
                yield folder
                return
        number += 1
        report(f"{folder} is finished; starting a new run in {config.output_dir}-{number}")
        folder = Path(f"{config.output_dir}-{number}")


def is_begun(folder: Path) -> bool:
    """Return True if the folder holds a run. An empty config.yaml without checkpoints counts as nothing begun."""
    config = folder / CONFIG
    return config.exists() and (config.stat().st_size > 0 or bool(saved_steps(folder / CHECKPOINTS)))


def _is_used_up(folder: Path, config: TrainConfig) -> bool:
    """Return True if the run in `folder` is finished and the budget of `config` leaves no further steps to it.

    Raises:
        ConfigError: a file of the run is not a file, or its results are damaged.
    """
    for name in (CONFIG, TEXT_HASH, METRICS, RESULTS):
        if os.path.lexists(folder / name) and not (folder / name).is_file():
            raise ConfigError(f"train.output_dir: {folder / name} is not a file; move it away")
    results = folder / RESULTS
    if not results.exists():
        return False
    try:
        training = json.loads(results.read_bytes())["training"]
        steps, seconds = float(training["steps"]), float(training["seconds"])
    except (ValueError, RecursionError, TypeError, LookupError) as error:
        raise ConfigError(
            f"train.output_dir: {results} is damaged; restore it, or remove it to have the run scored again"
        ) from error
    return steps >= (config.max_steps or math.inf) or seconds >= (config.max_seconds or math.inf)


def _check_free(folder: Path, config: TrainConfig, report: Callable[[str], None]) -> None:
    """Raise ConfigError unless this run may write to the folder."""
    if is_begun(folder):
        if not config.resume:
            raise ConfigError(
                f"train.output_dir: {folder} holds a run already; pass --resume true to continue it, or choose another"
            )
        if (folder / RESULTS).exists():
            report(
                f"continuing the finished run in {folder} with a larger budget: the learning rate, which had reached "
                "its end, goes on from where the schedule of the new budget is by now"
            )
        else:
            report(f"continuing the unfinished run in {folder}")
        return
    for path in folder.iterdir():  # what a run killed at its start may have left is no obstacle
        started = path.name in (files.LOCK, CONFIG, TEXT_HASH) or files.is_scratch(path)
        if not started and not (path.name == CHECKPOINTS and path.is_dir() and not any(path.iterdir())):
            raise ConfigError(f"train.output_dir: {folder} exists and is not a run of this program; choose another")


def cache_folder() -> Path | None:
    """Return the folder of files that can be made again; None if the user has no home directory.

    XDG_CACHE_HOME names its parent. A relative path there is ignored, as the XDG Base Directory Specification wants it.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path.home() / ".cache") / "resnet-bk"
    except RuntimeError:
        return None


def warn(message: str) -> None:
    """Print a message that is no error on standard error."""
    print(f"resnet-bk: {visible(message)}", file=sys.stderr)


BUNDLED = ("fast-python",)  # models that come with this package


def named_folder(path: str) -> Path:
    """Return the folder `path`, or that of a bundled model if `path` is its name and nothing else has that name."""
    return _MODELS / path if path in BUNDLED and not os.path.lexists(path) else Path(path)


def model_folder(path: str, warn: Callable[[str], None] = warn) -> Path:
    """Return the verified folder of a model: `path`, or a run folder's model, else its newest intact checkpoint.

    path: folder, or the name of a bundled model.
    warn: called with a message for each damaged checkpoint that is passed over.

    Raises:
        CheckpointError: there is no model, or it is damaged.
    """
    folder = named_folder(path)
    if (folder / CONFIG).exists() and not (folder / MODEL).exists():
        damaged: list[str] = []
        newest = newest_valid(folder / CHECKPOINTS, damaged.append)
        if newest is None:
            found = "; ".join(["the run has neither a finished model nor an intact checkpoint", *damaged])
            raise CheckpointError(f"{folder}: {found}")
        for message in damaged:
            warn(message)
        return newest
    folder = folder / MODEL if (folder / MODEL).exists() else folder
    verify(folder)
    return folder


# Settings that may change when a run is resumed: paths, its end, what it reports and when, how it saves memory.
CHANGEABLE = {
    "output_dir",
    "resume",
    "max_steps",
    "max_seconds",
    "save_every",
    "log_every",
    "eval_every",
    "eval_bytes",
    "report_to",
    "sample",
    "activation_checkpointing",
    "shard",
    "data.cache",
}


def check_same_run(config: TrainConfig, folder: Path) -> None:
    """Raise ConfigError if `config` differs from the unfinished run in `folder`; do nothing if there is none."""
    if not is_begun(folder):
        return
    saved, given = saved_settings("train.output_dir", folder), flat(dataclasses.asdict(config))
    for name in given | saved:
        # each source has a setting of its own, its weight, which only one of the two may have
        is_compared = (name in saved and name in given) or f"{name}.".startswith("data.sources.")
        if is_compared and name not in CHANGEABLE and saved.get(name) != given.get(name):
            raise ConfigError(
                f"train.{name}: got {given.get(name)!r}, the run in {folder} was started with "
                f"{shown(saved.get(name))}; set it to that to continue the run, or choose another output_dir"
            )


def saved_settings(where: str, folder: Path) -> dict[str, Any]:
    """Load the settings that the run in `folder` saved, by dotted name. `where`: the setting that names the folder."""
    values = read_yaml(where, folder / CONFIG)
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {folder / CONFIG} holds {shown(values)} instead of settings; choose another")
    return {"optimizer": "adamw", **flat(values)}  # earlier versions had no other one, and no setting


def check_same_text(source: str, train_hash: str, folder: Path, where: str = "data.source") -> None:
    """Raise ConfigError if the training text differs from that of the unfinished run in `folder`.

    Args:
        source: where the text is, for messages.
        train_hash: the hash of the text.
        folder: of the run.
        where: the setting that names the source, for messages.
    """
    saved = folder / TEXT_HASH
    if is_begun(folder) and saved.exists() and saved.read_text(errors="replace").strip() not in ("", train_hash):
        raise ConfigError(f"{where}: {source!r} has changed since the run in {folder} began; choose another output_dir")


def train_command(config: Path, *options: str) -> str:
    """Return the command that trains with a configuration file, quoted for a shell."""
    return shlex.join(["resnet-bk", "train", "--config", str(config), *options])


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten {"model": {"d_model": 64}} to {"model.d_model": 64}. Tuples become lists, as YAML loads them."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        value = list(value) if isinstance(value, tuple) else value
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
