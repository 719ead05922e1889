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
from resnet_bk.folders import (
    CHANGEABLE,
    CONFIG,
    METRICS,
    RESULTS,
    check_same_run,
    flat,
    named_folder,
    saved_settings,
    train_command,
)

LARGEST_RESULTS, LARGEST_METRICS = 16 << 20, 256 << 20  # bytes
MOST_BITS = 64  # per byte; a model that has learned nothing has 8

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


def results_of(where: str, config: TrainConfig) -> dict[str, Any] | None:
    """Return the results of the run in config.output_dir, None if there is none or it is not finished.

    Args:
        where: the setting that names the folder, for messages.
        config: settings that the run must have, and the budget that it must have had if it is finished.

    Raises:
        ConfigError: the run has others, or a file is damaged.
    """
    folder = Path(config.output_dir)
    check_same_run(config, folder)
    if not (folder / RESULTS).exists():
        return None
    saved = saved_settings(where, folder)
    for name in ("max_steps", "max_seconds"):  # an unfinished run may be resumed with another budget
        if saved.get(name) != (now := getattr(config, name)):
            raise ConfigError(
                f"train.{name}: got {now}, the finished run in {folder} had {shown(saved.get(name))}; set it to that, "
                "or choose another output_dir"
            )
    return _read_results(where, folder, hint="; restore it, or remove it to have the run scored again")


def text_of(results: dict[str, Any]) -> dict[str, str]:
    """Return the hashes of the texts that a run was trained and scored on. They depend on the tokenizer, too."""
    return {name: results["training"][name] for name in _TEXTS["training"]}


def check_one_text(where: str, folder: Path, text: dict[str, str], first: dict[str, str]) -> None:
    """Raise ConfigError if the texts of the run in `folder` differ from those of the first run of a study."""
    if text != first:
        raise ConfigError(
            f"{where}: the run in {folder} used another text or tokenizer than the runs before it; restore the text "
            "and remove that folder, or choose another output_dir"
        )


def _read(where: str, folder: str) -> FinishedRun:
    """Read and check one run. where: the setting that names it."""
    path = named_folder(folder)
    settings, results, metrics = (path / name for name in (CONFIG, RESULTS, METRICS))
    if not settings.exists():
        raise ConfigError(f"{where}: {folder} is not a run of `resnet-bk train`: {settings} is missing")
    if not results.exists():
        command = train_command(settings, "--resume", "true")
        raise ConfigError(f"{where}: {folder} is not finished: {results} is missing; resume with: {command}")
    values = read_yaml(where, settings)
    with named(settings):
        config = _settings(values)
        if not settings.read_bytes().endswith(b"\n"):
            raise ConfigError("ends within a line, it was cut off; restore it, or leave the run out")
    text = _text(where, metrics, LARGEST_METRICS) if metrics.exists() else ""
    with named(metrics):
        lines = _metrics(text)
    return FinishedRun(folder, config, lines, _read_results(where, path, logged=bool(lines)))


def _read_results(where: str, folder: Path, logged: bool | None = None, hint: str = "") -> dict[str, Any]:
    """Read and check results.json.

    Args:
        where: the setting that names the run.
        folder: of the run.
        logged: True if the run has log lines: its speed is their median. False if not: it has none. None: either.
        hint: how to mend a damaged file.
    """
    text = _text(where, folder / RESULTS, LARGEST_RESULTS)
    with named(folder / RESULTS, hint):
        return _results(text, logged)


def _text(where: str, path: Path, limit: int) -> str:
    """Return the text of a file. Refuse a folder, a device, and a pipe, which could keep the reader waiting forever."""
    if not path.is_file():
        raise ConfigError(f"{where}: {path} is not a file; restore it")
    try:
        return read_limited(where, path, limit)
    except OSError as error:
        raise ConfigError(f"{where}: {path} cannot be read ({error.strerror}); allow it to be read") from error


@contextlib.contextmanager
def named(path: Path, hint: str = "") -> Iterator[None]:
    """Turn any error about the content of a file into a ConfigError that names the file.

    Args:
        path: the file.
        hint: how to mend it.
    """
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}{hint}") from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        problem, hint = f"{type(error).__name__}: {error}", hint or "; restore it, or leave the run out"
        raise ConfigError(f"{path}: is damaged ({problem}){hint}") from error


def _settings(values: Any) -> TrainConfig:
    """Check the content of config.yaml."""
    check_fields("train", TrainConfig, values)
    sections = {"model": ModelConfig.from_dict(values["model"]), "data": DataConfig(**values["data"])}
    return TrainConfig(**(values | sections))


def _metrics(text: str) -> list[dict[str, float]]:
    """Check the content of metrics.jsonl."""
    lines = [_parsed(line) for line in text.splitlines()]
    for i, line in enumerate(lines, 1):
        for name in _LINE:
            _check_number(f"line {i}", line, name)
    return lines


def _results(text: str, logged: bool | None) -> dict[str, Any]:
    """Check the content of results.json. logged: see `_read_results`."""
    values = _parsed(text)
    for section, names in _NUMBERS.items():
        for name in names:
            _check_number(section, values[section], name)
    speed = values["training"]["bytes_per_second"]
    is_unknown = speed is None or (isinstance(speed, float) and math.isnan(speed))  # NaN in files of earlier versions
    if logged is False and not is_unknown:
        raise ConfigError(f"training.bytes_per_second: got {shown(speed)}, allowed null: no speed was logged")
    if logged or not is_unknown:
        _check_number("training", values["training"], "bytes_per_second")
    if is_unknown:
        values["training"]["bytes_per_second"] = math.nan
    for section, names in _TEXTS.items():
        check_text(section, **{name: values[section][name] for name in names})
    for name, version in values["versions"].items():
        check_text("versions", name=name, version=version)
    return dict(values)


def _parsed(text: str) -> Any:
    """Parse JSON. Raise ValueError if a mapping has a key twice, of which Python would take the last value."""
    return json.loads(text, object_pairs_hook=_mapping)


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a mapping has a key twice")
    return values


def _check_number(where: str, values: dict[str, Any], name: str) -> None:
    """Check a number: bits per byte may be 0, for a text of one letter; all else is positive and can be drawn."""
    low, high = (0, MOST_BITS) if name == "bits_per_byte" else (1e-12, 1e24)
    check_range(where, low, high, **{name: values[name]})
