"""Run folders: the names of their files, choosing the folder of a run, and checking that a run may be resumed."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_bk.checkpoint import CheckpointError, newest_valid, verify
from resnet_bk.config import ConfigError, TrainConfig, read_yaml, shown

if TYPE_CHECKING:
    from rich.console import Console

CONFIG, TEXT_HASH, METRICS, RESULTS, REPORT, MODEL, CHECKPOINTS = (
    "config.yaml",
    "text.sha256",
    "metrics.jsonl",
    "results.json",
    "report.html",
    "model",
    "checkpoints",
)


def run_folder(config: TrainConfig, console: "Console") -> Path:
    """Return the folder of this run: a new one, or an unfinished one to resume; see TrainConfig.resume.

    Raises:
        ConfigError: the folder holds a run and `resume` is off, or it holds other files.
    """
    folder, number = Path(config.output_dir), 1
    while (folder / CONFIG).exists():
        if not config.resume:
            raise ConfigError(
                f"train.output_dir: {folder} holds a run already; pass --resume true to continue it, or choose another"
            )
        if not (folder / RESULTS).exists():
            console.print(f"continuing the unfinished run in {folder}")
            return folder
        number += 1
        console.print(f"{folder} is finished; starting a new run in {config.output_dir}-{number}")
        folder = Path(f"{config.output_dir}-{number}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"train.output_dir: {folder} exists and is not a run of this program; choose another")
    return folder


def model_folder(path: str) -> Path:
    """Return the verified folder of a model: `path` itself, or in a run folder its model or newest intact checkpoint.

    Raises:
        CheckpointError: there is no model, or it is damaged.
    """
    folder = Path(path)
    if (folder / CONFIG).exists() and not (folder / MODEL).exists():
        damaged: list[str] = []
        newest = newest_valid(folder / CHECKPOINTS, damaged.append)
        if newest is None:
            found = "; ".join(["the run has neither a finished model nor an intact checkpoint", *damaged])
            raise CheckpointError(f"{folder}: {found}")
        for message in damaged:
            print(f"resnet-bk: {message}", file=sys.stderr)
        return newest
    folder = folder / MODEL if (folder / MODEL).exists() else folder
    verify(folder)
    return folder


# Settings that may change when a run is resumed: paths, its end, how often it saves and logs, how it saves memory.
CHANGEABLE = {
    "output_dir",
    "resume",
    "max_steps",
    "max_seconds",
    "save_every",
    "log_every",
    "report_to",
    "sample",
    "activation_checkpointing",
    "shard",
    "data.cache",
}


def check_same_run(config: TrainConfig, folder: Path) -> None:
    """Raise ConfigError if `config` differs from the unfinished run in `folder`; do nothing if there is none."""
    if not (folder / CONFIG).exists():
        return
    saved = saved_settings("train.output_dir", folder)
    for name, value in flat(dataclasses.asdict(config)).items():
        if name not in CHANGEABLE and name in saved and saved[name] != value:
            raise ConfigError(
                f"train.{name}: got {value!r}, the run in {folder} was started with {shown(saved[name])}; "
                "set it to that to continue the run, or choose another output_dir"
            )


def saved_settings(where: str, folder: Path) -> dict[str, Any]:
    """Load the settings that the run in `folder` saved, by dotted name. `where`: the setting that names the folder."""
    values = read_yaml(where, folder / CONFIG)
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: {folder / CONFIG} holds {shown(values)} instead of settings; choose another")
    return flat(values)


def check_same_text(source: str, train_hash: str, folder: Path) -> None:
    """Raise ConfigError if the training text differs from that of the unfinished run in `folder`."""
    saved = folder / TEXT_HASH
    if saved.exists() and saved.read_text().strip() != train_hash:
        raise ConfigError(
            f"data.source: {source!r} has changed since the run in {folder} began; choose another output_dir"
        )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten {"model": {"d_model": 64}} to {"model.d_model": 64}. Tuples become lists, as YAML loads them."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        value = list(value) if isinstance(value, tuple) else value
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
