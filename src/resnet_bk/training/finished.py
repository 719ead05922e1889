"""Finished runs of ``resnet-bk train``, read back from their folders and grouped by settings."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from resnet_bk.config import ConfigError, DataConfig, ModelConfig, TrainConfig, check_fields, shown
from resnet_bk.training.run import CONFIG, FREE, METRICS, RESULTS, flat

# What runs of one group may differ in, beside all of data.*, for which the hash of the training text stands.
_BUT_FOR = (FREE - {"max_steps", "max_seconds"}) | {"seed"}
_LINE = ("step", "seconds", "bits_per_byte")
_NUMBERS = {
    "held_out": ("bits_per_byte", "bytes", "documents"),
    "costs": ("parameters", "flops_per_byte", "prefill", "decode"),
    "training": ("steps", "seconds"),
}
_TEXTS = {"costs": ("prefill_setting", "decode_setting"), "training": ("train_sha256", "held_out_sha256")}


@dataclass(frozen=True)
class FinishedRun:
    """folder: as it was named; metrics: lines of metrics.jsonl, none of a run too short for one; results: what
    results.json holds."""

    folder: str
    config: TrainConfig
    metrics: list[dict[str, float]]
    results: dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Runs of the same settings but for the seed. name: the techniques that are on; where other groups have the same
    ones on, the first folder too."""

    name: str
    runs: list[FinishedRun]


def read_runs(where: str, folders: Sequence[str]) -> list[FinishedRun]:
    """Runs that can be compared; ConfigError where one cannot. where: the setting that names them."""
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
    """In the order of their first runs."""
    found: dict[str, list[FinishedRun]] = {}
    for run in runs:
        settings = flat(dataclasses.asdict(run.config)).items()
        kept = {name: value for name, value in settings if name not in _BUT_FOR and not name.startswith("data.")}
        found.setdefault(repr((kept, run.results["training"]["train_sha256"])), []).append(run)
    names = [" + ".join(runs[0].config.model.rooms) or "plain" for runs in found.values()]
    return [
        Group(name if names.count(name) == 1 else f"{name} ({runs[0].folder})", runs)
        for name, runs in zip(names, found.values(), strict=True)
    ]


def _read(where: str, folder: str) -> FinishedRun:
    settings, results, metrics = (Path(folder) / name for name in (CONFIG, RESULTS, METRICS))
    if not settings.is_file():
        raise ConfigError(f"{where}: {folder} is no run of `resnet-bk train`: there is no {settings}")
    if not results.is_file():
        go_on = f"resnet-bk train --config {settings} --resume true"
        raise ConfigError(f"{where}: {folder} is not finished: there is no {results}; go on with: {go_on}")
    at = settings
    try:
        config = _settings(settings.read_bytes().decode())
        at = metrics
        lines = _metrics(metrics.read_bytes().decode()) if metrics.exists() else []
        at = results
        return FinishedRun(folder, config, lines, _results(results.read_bytes().decode(), logged=bool(lines)))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{at}: is damaged ({type(error).__name__}: {error}); restore it, or leave the run out"
        ) from error


def _settings(text: str) -> TrainConfig:
    values = yaml.safe_load(text)
    check_fields("train", TrainConfig, values)
    sections = {"model": ModelConfig.from_dict(values["model"]), "data": DataConfig(**values["data"])}
    return TrainConfig(**(values | sections))


def _metrics(text: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        for name in _LINE:
            _check_number(line, name)
    return lines


def _results(text: str, logged: bool) -> dict[str, Any]:
    """logged: whether the run has log lines, which its speed is the median of."""
    values = json.loads(text)
    for section, names in _NUMBERS.items():
        for name in names:
            _check_number(values[section], name)
    if logged:
        _check_number(values["training"], "bytes_per_second")
    texts = [values[section][name] for section, names in _TEXTS.items() for name in names]
    for value in [*texts, *values["versions"].values()]:
        if not isinstance(value, str):
            raise ValueError(f"{shown(value)} stands where a text belongs")
    return dict(values)


def _check_number(values: dict[str, Any], name: str) -> None:
    """Finite and positive; bits per byte may be 0, as those of a text of one letter are."""
    value = values[name]
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and name != "bits_per_byte"):
        raise ValueError(f"{name} is {shown(value)}")
