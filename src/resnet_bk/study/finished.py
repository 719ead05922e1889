"""Read finished runs of ``resnet-bk train`` from their folders, and group them by their settings."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_bk.config import (
    ConfigError,
    DataConfig,
    ModelConfig,
    TrainConfig,
    check_fields,
    check_range,
    check_text,
    read_limited,
    read_yaml,
    shown,
)
from resnet_bk.folders import CHANGEABLE, CONFIG, METRICS, RESULTS, flat

LARGEST_RESULTS, LARGEST_METRICS = 16 << 20, 256 << 20  # bytes

# Settings in which the runs of a group may differ, in addition to data.*, which the hash of the training text replaces.
_NOT_COMPARED = (CHANGEABLE - {"max_steps", "max_seconds"}) | {"seed"}
_LINE = ("step", "seconds", "bits_per_byte")
_NUMBERS = {
    "held_out": ("bits_per_byte", "bytes", "documents"),
    "costs": ("parameters", "flops_per_byte", "prefill", "decode"),
    "training": ("steps", "seconds"),
}
_TEXTS = {"costs": ("prefill_setting", "decode_setting"), "training": ("train_sha256", "held_out_sha256")}


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        folder: its folder, as the user named it.
        config: its settings.
        metrics: lines of metrics.jsonl; empty if the run was too short to log one.
        results: content of results.json.
    """

    folder: str
    config: TrainConfig
    metrics: list[dict[str, float]]
    results: dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Runs whose settings differ in the seed only.

    The name lists the techniques that are on. If several groups have the same ones on, it also has the first folder.
    """

    name: str
    runs: list[FinishedRun]


def read_runs(where: str, folders: Sequence[str]) -> list[FinishedRun]:
    """Read runs that can be compared. where: the setting that names them.

    Raises:
        ConfigError: a folder is not a finished run, is damaged or is given twice; runs were scored on different text.
    """
    for i, folder in enumerate(folders):
        for other in folders[:i]:
            if Path(folder).resolve() == Path(other).resolve():
                raise ConfigError(f"{where}: {other} and {folder} are the same run; give each once")
    runs = [_read(where, folder) for folder in folders]
    for run in runs[1:]:
        if run.results["training"]["held_out_sha256"] != runs[0].results["training"]["held_out_sha256"]:
            raise ConfigError(
                f"{where}: {runs[0].folder} and {run.folder} were scored on different held-out text, or with different "
                "tokenizers, and cannot be compared; give runs on one text"
            )
    return runs


def grouped(runs: Sequence[FinishedRun]) -> list[Group]:
    """Group runs by their settings, in the order of their first runs."""
    found: dict[str, list[FinishedRun]] = {}
    for run in runs:
        settings = flat(dataclasses.asdict(run.config)).items()
        kept = {name: value for name, value in settings if name not in _NOT_COMPARED and not name.startswith("data.")}
        found.setdefault(repr((kept, run.results["training"]["train_sha256"])), []).append(run)
    names = [" + ".join(runs[0].config.model.techniques) or "plain" for runs in found.values()]
    return [
        Group(name if names.count(name) == 1 else f"{name} ({runs[0].folder})", runs)
        for name, runs in zip(names, found.values(), strict=True)
    ]


def _read(where: str, folder: str) -> FinishedRun:
    """Read and check one run. where: the setting that names it."""
    settings, results, metrics = (Path(folder) / name for name in (CONFIG, RESULTS, METRICS))
    if not settings.is_file():
        raise ConfigError(f"{where}: {folder} is not a run of `resnet-bk train`: {settings} is missing")
    if not results.is_file():
        command = f"resnet-bk train --config {settings} --resume true"
        raise ConfigError(f"{where}: {folder} is not finished: {results} is missing; resume with: {command}")
    values = read_yaml(where, settings)
    with _named(settings):
        config = _settings(values)
    text = read_limited(where, metrics, LARGEST_METRICS) if metrics.is_file() else ""
    with _named(metrics):
        lines = _metrics(text)
    text = read_limited(where, results, LARGEST_RESULTS)
    with _named(results):
        return FinishedRun(folder, config, lines, _results(text, logged=bool(lines)))


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn any error about the content of a file into a ConfigError that names the file."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        kind = type(error).__name__
        raise ConfigError(f"{path}: is damaged ({kind}: {error}); restore it, or leave the run out") from error


def _settings(values: Any) -> TrainConfig:
    """Check the content of config.yaml."""
    check_fields("train", TrainConfig, values)
    sections = {"model": ModelConfig.from_dict(values["model"]), "data": DataConfig(**values["data"])}
    return TrainConfig(**(values | sections))


def _metrics(text: str) -> list[dict[str, float]]:
    """Check the content of metrics.jsonl."""
    lines = [json.loads(line) for line in text.splitlines()]
    for i, line in enumerate(lines, 1):
        for name in _LINE:
            _check_number(f"line {i}", line, name)
    return lines


def _results(text: str, logged: bool) -> dict[str, Any]:
    """Check the content of results.json. logged: True if the run has log lines; its speed is their median, else NaN."""
    values = json.loads(text)
    for section, names in _NUMBERS.items():
        for name in names:
            _check_number(section, values[section], name)
    speed = values["training"]["bytes_per_second"]
    if logged:
        _check_number("training", values["training"], "bytes_per_second")
    elif not isinstance(speed, float) or not math.isnan(speed):
        raise ConfigError(f"training.bytes_per_second: got {shown(speed)}, allowed NaN: no speed was logged")
    for section, names in _TEXTS.items():
        check_text(section, **{name: values[section][name] for name in names})
    for name, version in values["versions"].items():
        check_text("versions", name=name, version=version)
    return dict(values)


def _check_number(where: str, values: dict[str, Any], name: str) -> None:
    """Check a number: bits per byte are 0 to 64 (0 for a text of one letter), all else is positive and can be drawn."""
    low, high = (0, 64) if name == "bits_per_byte" else (1e-12, 1e24)
    check_range(where, low, high, **{name: values[name]})
