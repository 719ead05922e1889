"""Files of a finished run: whatever they hold, they are read right or refused in one line that names the file."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from resnet_bk.config import ConfigError, DepthConfig, ModelConfig, TrainConfig
from resnet_bk.folders import flat
from resnet_bk.study import finished
from resnet_bk.study.finished import read_runs, results_of

CONFIG = TrainConfig(model=ModelConfig(depth=DepthConfig("act")), max_steps=4, seed=12, output_dir="run")
RESULTS = {
    "held_out": {"bits_per_byte": 2.5, "bytes": 90, "documents": 1, "perplexity_per_byte": 5.7},
    "costs": {
        "parameters": 9,
        "flops_per_byte": 9.5,
        "prefill": 1e5,
        "prefill_setting": "8 x 2048 tokens",
        "decode": 1e3,
        "decode_setting": "1 sequence, 256 tokens",
    },
    "training": {"steps": 4, "seconds": 1.5, "bytes_per_second": 9.0, "train_sha256": "a", "held_out_sha256": "b"},
    "versions": {"torch": "2", "machine": "m"},
    "sample": "def",
}
LINES = [{"step": i, "seconds": float(i), "bits_per_byte": 8.0 - i, "bytes_per_second": 9.0} for i in (1, 2, 3)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the folder of a finished run, written by hand."""
    folder = tmp_path_factory.mktemp("made") / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(CONFIG)))))
    (folder / "results.json").write_text(json.dumps(RESULTS, indent=1) + "\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """Return a folder with a copy of the run."""
    shutil.copytree(made, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read_for_report():
    (one,) = read_runs("report.runs", ["run"])
    assert (one.config, one.metrics) == (CONFIG, LINES)
    return one.results


def read_for_tune_and_ablate():
    return results_of("ablate.output_dir", CONFIG)


READERS = [read_for_report, read_for_tune_and_ablate]


def refusal(read, name):
    """Return the message with which a reader refuses the run, or None if it reads it right."""
    try:
        results = read()
    except ConfigError as error:
        said = str(error)
    else:
        assert results == RESULTS
        return None
    assert "\n" not in said or name == "config.yaml"  # PyYAML's own words; the command line joins the lines
    other = {"config.yaml": "the run in run was started with", "metrics.jsonl": "allowed null: no speed was logged"}
    assert f"run/{name}" in said or other[name] in said or "the finished run in run had" in said
    assert len(said) < 500
    return said


@pytest.fixture
def same_settings(monkeypatch):
    """Do not read config.yaml, which takes longer than everything else."""
    values = json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    monkeypatch.setattr(finished, "read_yaml", lambda *arguments: values)
    monkeypatch.setattr(finished, "saved_settings", lambda *arguments: flat(values))
    monkeypatch.setattr(finished, "check_same_run", lambda *arguments: None)


def odd(good):
    """Yield contents, none of which is a right JSON or YAML file of a run, given a right one."""
    yield from (b"", b" ", b"\n", b"\0" * 99, b"\xff" + good, good + b"\xff", good.decode().encode("utf-16"))
    yield from (b"hello", b"7", b"-1e999", b"NaN", b"null", b"true", b'"text"', b"[]", b"[1, 2]", b"{}", b'{"x": 1}')
    yield from (b"[" * 10_000, b"[" * 10_000 + b"]" * 10_000, b'{"a":' * 10_000, b"9" * 5_000, b"- " * 10_000)
    yield from (
        b"{",
        b"'",
        b"%",
        b"\t",
        b"a: b: c",
        b"!!python/name:os.system",
        b"&a [*a]",
        b"\x1b[2J",
        b"PK\3\4",
        b"\0",
    )


@pytest.fixture(params=["results.json", "config.yaml", "metrics.jsonl"])
def file(place, request):
    """Return the path of one file of the run."""
    if request.param != "config.yaml":
        request.getfixturevalue("same_settings")
    return place / "run" / request.param


@pytest.mark.parametrize("read", READERS)
def test_the_run_is_read(place, read):
    assert read() == RESULTS


@pytest.mark.parametrize("read", READERS)
def test_odd_content_is_refused(file, read):
    good = file.read_bytes()
    for content in odd(good):
        file.write_bytes(content)
        said = refusal(read, file.name)
        # Those commands need the results only.
        without_metrics = file.name == "metrics.jsonl" and read is read_for_tune_and_ablate
        assert said or without_metrics, content[:99]


@pytest.mark.parametrize("read", READERS)
def test_a_file_that_is_cut_off_is_refused(file, read):
    good = file.read_bytes()
    for length in range(0, len(good) - 1, 23):
        if good[length - 1 : length] == b"\n" and file.name != "results.json":
            continue  # whole lines: an older version has written fewer settings, and a short run fewer lines
        file.write_bytes(good[:length])
        assert refusal(read, file.name) or read is read_for_tune_and_ablate, good[:length]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["results.json", "config.yaml", "metrics.jsonl"])
@pytest.mark.parametrize(
    "kind", ["folder", "pipe", "link to nothing", "link to itself", "device", "300 MB", "unreadable"]
)
def test_a_path_that_is_not_a_readable_file_is_refused(place, monkeypatch, read, name, kind):
    path = place / "run" / name
    good = path.read_bytes()
    path.unlink()
    if sys.platform == "win32" and kind not in ("folder", "300 MB", "unreadable"):
        pytest.skip("no such files")
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "link to nothing":
            path.symlink_to("none")
        case "link to itself":
            path.symlink_to(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "300 MB":
            with path.open("wb") as file:
                file.truncate(300_000_000)  # sparse
        case "unreadable":
            path.write_bytes(good)
            open_path = Path.open

            def forbidden(self, *arguments, **keywords):
                if self.name == name:
                    raise PermissionError(13, "Permission denied", str(self))
                return open_path(self, *arguments, **keywords)

            monkeypatch.setattr(Path, "open", forbidden)
    if read is read_for_tune_and_ablate and name == "metrics.jsonl":
        assert read() == RESULTS
    elif kind.startswith("link") and name == "results.json" and read is read_for_tune_and_ablate:
        assert read() is None  # no results: the run is resumed, and replaces the link
    else:
        assert refusal(read, name)


@pytest.mark.parametrize("read", READERS)
def test_a_part_of_another_type_is_refused(place, same_settings, read):
    path = place / "run" / "results.json"
    parts = [(section, name) for section, values in RESULTS.items() if section != "sample" for name in (None, *values)]
    parts.remove(("held_out", "perplexity_per_byte"))  # nothing reads it
    values = [None, True, "5", [], {}, -1, float("nan"), float("inf"), 10**400, "\ud800", "\0", "missing"]
    for section, name in parts:
        for value in values:
            changed = json.loads(json.dumps(RESULTS))
            inner, key = (changed, section) if name is None else (changed[section], name)
            inner[key] = value
            if value == "missing":
                del inner[key]
            path.write_text(json.dumps(changed))
            wanted_text = name is not None and isinstance(RESULTS[section][name], str)
            if wanted_text and value in ("5", "missing") and (value == "5" or section == "versions"):
                continue  # a right text; versions may have any names
            if name == "bytes_per_second" and str(value) in ("None", "nan") and read is read_for_tune_and_ablate:
                continue  # of a run that was too short to log its speed
            if (section, name, value) == ("versions", None, {}):
                continue
            assert "results.json" in (refusal(read, "results.json") or ""), (section, name, value)


def test_numbers_that_json_writes_in_odd_ways(place, same_settings):
    path = place / "run" / "results.json"
    for old, new, is_right in [
        ('"prefill": 100000.0', '"prefill": 1e5', True),
        ('"prefill": 100000.0', '"prefill": 1e999', False),
        ('"prefill": 100000.0', '"prefill": -0', False),
        ('"prefill": 100000.0', '"prefill": 01', False),
        ('"prefill": 100000.0', f'"prefill": {"9" * 5_000}', False),
        ('"prefill": 100000.0', '"prefill": 7, "prefill": 100000.0', False),
        ('"sample": "def"', '"sample": "\\u001b[2J"', None),
    ]:
        path.write_text(json.dumps(RESULTS).replace(old, new))
        if is_right is None:
            assert results_of("tune.output_dir", CONFIG)["sample"] == "\x1b[2J"
        else:
            assert (refusal(read_for_tune_and_ablate, "results.json") is None) is is_right, new


def test_the_message_says_what_to_do(place):
    path = place / "run" / "results.json"
    for content in ("{", json.dumps(RESULTS | {"held_out": RESULTS["held_out"] | {"bytes": "5"}})):
        path.write_text(content)
        with pytest.raises(
            ConfigError, match=r"^run/results\.json: .*; restore it, or remove it to have the run scored"
        ):
            read_for_tune_and_ablate()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 0.5}, r"train\.learning_rate: got 0\.5, the run in run was started with 0\.01; set it"),
        ({"max_steps": 5}, r"train\.max_steps: got 5, the finished run in run had 4; set it to that, or choose"),
        ({"max_seconds": 9.0}, r"train\.max_seconds: got 9\.0, the finished run in run had None; set it to that"),
    ],
    ids=range(3),
)
def test_results_of_another_run_are_refused(place, changed, message):
    with pytest.raises(ConfigError, match=message):
        results_of("tune.output_dir", dataclasses.replace(CONFIG, **changed))


def test_a_run_without_results_is_not_finished(place):
    (place / "run" / "results.json").unlink()
    assert results_of("tune.output_dir", CONFIG) is None
    with pytest.raises(ConfigError, match=r"run is not finished: run/results\.json is missing; resume with"):
        read_for_report()
    shutil.rmtree(place / "run")
    assert results_of("tune.output_dir", CONFIG) is None
