"""Bad input of every kind: no traceback, no hang, an exit code that says who is at fault, and one line."""

import functools
import json
import os
import shutil
import time
import types
from typing import Literal, Union, get_args, get_origin

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scenarios import complaint, differences, evaluate, generate, inspect, left, report, resume, train

from resnet_bk.config import TrainConfig, all_fields, is_section

MANY = 1000  # examples of each kind in the full size

KINDS = {name: kind for name, kind in all_fields(TrainConfig).items() if not is_section(kind)}
SETTINGS = sorted(set(KINDS) - {"max_steps", "max_seconds", "output_dir", "data.cache"})
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 8, 0.5, 1e-9, 1e30, 10**400, float("nan"), float("inf")])
STRANGE = st.recursive(
    NUMBERS | st.booleans() | st.none() | TEXTS | st.sampled_from(["byte", "~/x", "!!python/name:os.system"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)


def fitting(kind):
    """Values of the type of a setting, which it may still refuse."""
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is tuple:
        return st.lists(st.integers(1, 4), max_size=3)
    if get_origin(kind) is dict:
        return st.dictionaries(*map(fitting, get_args(kind)), max_size=3)
    if isinstance(kind, types.UnionType) or get_origin(kind) is Union:
        return st.one_of(map(fitting, get_args(kind)))
    values = {int: st.integers(0, 8), float: st.floats(0, 1), bool: st.booleans(), str: TEXTS, type(None): st.none()}
    return values[kind]


SETTING = st.sampled_from(SETTINGS).flatmap(lambda name: st.tuples(st.just(name), fitting(KINDS[name]) | STRANGE))
COMMANDS = ["train", "eval", "generate", "inspect", "report", "tune", "ablate"]
WORDS = (
    TEXTS
    | SETTING.map(lambda setting: f"--{setting[0]}={json.dumps(setting[1])}")
    | SETTING.map("--{0[0]}".format)
    | st.sampled_from(
        [
            "run",
            "recipe.yaml",
            "--config",
            "--config=recipe.yaml",
            "--help",
            "--version",
            "-",
            "--",
            "--resume",
            "\udcff",
            "a" * 10_000,
        ]
    )
)


@pytest.fixture
def fuzz(some, table, request):
    """Return the function that checks generated examples, and shrinks the first one that breaks a promise."""

    def check(strategy, broken, count):
        count = len(some(range(MANY), count))
        quick = [Phase.generate, Phase.shrink]

        @settings(max_examples=count, suppress_health_check=list(HealthCheck), phases=quick)
        @given(strategy)
        def every(example):
            assert not (found := [text for text in broken(example) if text]), found

        begin, failed = time.monotonic(), 1
        try:
            every()
            failed = 0
        finally:
            table.append(f"| {request.node.name} | {count} | {failed} | {time.monotonic() - begin:.0f} |")

    return check


def nested(flat):
    """Return {"model": {"d_model": 64}} for {"model.d_model": 64}."""
    found = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        functools.reduce(lambda section, part: section.setdefault(part, {}), path, found)[last] = value
    return found


def test_configurations(scenario, fuzz):
    run = scenario("train")

    def broken(values):
        place = run.place()
        (place / "more.yaml").write_text(json.dumps(nested(values)))
        yield complaint(run.server.run(train(place, f"--config={place / 'more.yaml'}", "--max_steps=1"), place))
        shutil.rmtree(place)

    fuzz(st.lists(SETTING, min_size=1, max_size=4).map(dict), broken, 30)


def test_command_lines(scenario, fuzz):
    run = scenario("generate")

    def broken(words):
        place = run.place()
        yield complaint(run.server.run(words, place))
        shutil.rmtree(place)

    command = st.builds(lambda name, words: [name, *words], st.sampled_from(COMMANDS), st.lists(WORDS, max_size=4))
    fuzz(st.lists(WORDS, max_size=3) | command, broken, 40)


def make_corpus(folder, files, oddities):
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    deep = folder / "deep" / "deeper"
    if "folder" in oddities:
        deep.mkdir(parents=True)
        (deep / "text").write_bytes(b"deep text" * 100)
    if "fifo" in oddities:
        os.mkfifo(folder / "fifo")
    if "dangling link" in oddities:
        (folder / "dangling").symlink_to("nowhere")
    if "link in a circle" in oddities:
        (folder / "circle").symlink_to(folder)
    if "no permission" in oddities:
        (folder / "closed").write_bytes(b"secret" * 100)
        (folder / "closed").chmod(0)


FILE_NAMES = st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=8).filter(
    lambda name: name.strip(".") and name not in ("deep", "fifo", "dangling", "circle", "closed")
)
CONTENTS = st.binary(max_size=50).flatmap(
    lambda data: st.sampled_from([data, data * 100, b"\r\n" * 50, b"\0" * 500, b""])
)
ODDITIES = st.sets(st.sampled_from(["folder", "fifo", "dangling link", "link in a circle", "no permission"]))


def test_corpora(scenario, fuzz):
    run = scenario("train")

    def broken(corpus):
        place = run.place()
        make_corpus(place / "corpus", *corpus)
        outcome = run.server.run(train(place, f"--data.source={place / 'corpus'}", "--max_steps=1"), place)
        yield complaint(outcome)
        if outcome.code == 0:
            yield complaint(run.server.run(evaluate(place), place))
        shutil.rmtree(place)

    files = st.dictionaries(FILE_NAMES.filter(encodable), CONTENTS, max_size=4)
    fuzz(st.tuples(files, ODDITIES), broken, 20)


def encodable(name):
    """True for names that a file may have: UTF-8, or bytes that Python shows as surrogates."""
    try:
        return len(os.fsencode(name)) < 200
    except UnicodeEncodeError:
        return False


def damage(run, other, kind, which, amount):
    """Damage one file of a run. other: a run with other weights."""
    files = sorted(path for path in run.rglob("*") if path.is_file() and not path.is_symlink())
    path = files[which % len(files)]
    data = path.read_bytes()
    if kind == "flip" and data:
        bit = amount % (8 * len(data))
        path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
    elif kind == "cut":
        path.write_bytes(data[: amount % (len(data) + 1)])
    elif kind == "grow":
        path.write_bytes(data + b"\0" * (amount % 100))
    elif kind == "link":
        path.unlink()
        path.symlink_to("/etc/passwd")
    elif kind == "swap":
        mate = files[amount % len(files)]
        path.write_bytes(mate.read_bytes())
        mate.write_bytes(data)
    elif kind == "mix" and (other / path.relative_to(run)).exists():
        shutil.copy(other / path.relative_to(run), path)
    else:
        path.unlink()


DAMAGES = st.sampled_from(["flip", "cut", "grow", "link", "swap", "mix", "delete"])
DAMAGE = st.lists(st.tuples(DAMAGES, st.integers(0, 200), st.integers(0, 10**6)), min_size=1, max_size=3)


@pytest.mark.parametrize("name", ["finished", "half"])
def test_damaged_runs(scenario, fuzz, name):
    begin = scenario("generate" if name == "finished" else "resume")
    other = scenario("generate, other seed").template

    def broken(example):
        command, damages = example
        place = begin.place()
        for each in damages:
            damage(place / "run", other / "run", *each)
        outcome = begin.server.run(command(place), place)
        yield complaint(outcome)
        if outcome.code == 0 and name == "half" and command is resume:
            yield from differences(begin.undisturbed[0], left(place) | {"metrics": begin.undisturbed[0]["metrics"]})
        shutil.rmtree(place)

    commands = st.sampled_from([generate, evaluate, inspect, report, resume])
    fuzz(st.tuples(commands, DAMAGE), broken, 25)
