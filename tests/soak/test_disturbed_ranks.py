"""Two ranks of which one has another setting: both end within seconds, with one line that names the setting."""

import dataclasses
import errno
import random
import shutil
import socket
from functools import partial
from signal import SIGKILL
from typing import Literal, get_args, get_origin

import pytest
from scenarios import RECIPE, complaint, differences, left, train
from server import BEFORE, FAIL, NO_FAULT, Fault

from resnet_bk.config import TrainConfig, all_fields, is_section
from resnet_bk.folders import flat

LIMIT = 20  # seconds; two ranks meet in one
MAY_DIFFER = {"data.cache"}
BAD = ["--learning_rate=-1", "--nonesuch=1", "--max_steps=many", "--data.source=nowhere", "--config=nowhere"]


def other(kind, value):
    """Return a value that a setting of this type may have, other than `value`, as the command line takes it."""
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    if kind is bool:
        return str(not value).lower()
    if get_origin(kind) is tuple:
        return "[3]"
    kinds = get_args(kind) or (kind,)
    if float in kinds:
        return value / 2 if value else 0.5
    return (value or 0) + 1 if int in kinds else f"{value}-other"


BASE = flat(
    dataclasses.asdict(TrainConfig(**{name: RECIPE[name] for name in ("batch_size", "max_steps", "save_every")}))
)
SETTINGS = [name for name, kind in all_fields(TrainConfig).items() if not is_section(kind) and name not in MAY_DIFFER]


def free_port():
    """Return a port that nothing uses, below those that a system gives to connections: no program gets it by chance."""
    while True:
        port = random.randint(10_000, 32_000)
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)):
                return port


def ranks(server, place, *options, fault=NO_FAULT):
    """Run `train` with one rank for each of `options`, with a fault on rank 0, and return the outcomes."""
    size = len(options)
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    running = []
    for rank, more in enumerate(options):
        environment = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        words, faults = train(place, *more), NO_FAULT if rank else fault
        running.append(server.start(words, place, faults, environment=environment, limit=LIMIT))
    return [one.outcome() for one in running]


def disagree(scenario, option, rank=1):
    """Yield what is wrong after two ranks of which one has an option."""
    place = scenario.place()
    options = [[], []]
    options[rank] = [option]
    first, second = ranks(scenario.server, place, *options)
    name = option.removeprefix("--").partition("=")[0]
    named = any(part in first.err for part in name.split(".")[1:] or [name])  # a section may be refused as a whole
    if first.hangs or second.hangs or (first.code, second.code) != (2, 2):
        yield f"{option} on rank {rank}: exit codes {first.code}, {second.code}: {first.err} {second.err}"
    elif first.err.count("\n") != 1 or not named or second.err:
        yield f"{option} on rank {rank}: {first.err} {second.err}"
    if (place / "run").exists():
        yield f"{option} on rank {rank}: the folder was created"


def test_a_setting_that_differs(scenario, some, holds):
    kinds = all_fields(TrainConfig)
    options = [f"--{name}={other(kinds[name], BASE[name])}" for name in some(SETTINGS, 12)]
    holds(partial(disagree, scenario("train")), options)


@pytest.mark.parametrize("rank", [0, 1])
def test_bad_input_on_one_rank(scenario, some, holds, rank):
    holds(partial(disagree, scenario("train"), rank=rank), some(BAD, 2))


def test_a_cache_may_differ(scenario):
    place = scenario("train").place()
    outcomes = ranks(scenario("train").server, place, [], [f"--data.cache={place / 'other'}"])
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes


@pytest.mark.parametrize("what", [Fault(0, BEFORE, SIGKILL), Fault(0, FAIL, errno.EIO)], ids=["killed", "disk error"])
def test_a_fault_on_rank_zero_ends_all_and_loses_nothing(scenario, some, holds, what):
    run = scenario("train")
    place = run.place()
    assert [outcome.code for outcome in ranks(run.server, place, [], [])] == [0, 0]
    expected = left(place)

    def broken(n):
        place, fault = run.place(), dataclasses.replace(what, at=n)
        outcomes = ranks(run.server, place, [], [], fault=fault)
        errors = [line for outcome in outcomes for line in outcome.err.splitlines()]
        killed = outcomes[0].code == -SIGKILL and not outcomes[0].hangs
        found = [complaint(outcome) for outcome in outcomes[killed:] if outcome.err]
        if any(outcome.hangs for outcome in outcomes) or len(errors) > 1:
            found.append(f"exit codes {[outcome.code for outcome in outcomes]}, printed {errors}")
        if any(outcome.code for outcome in outcomes):
            again = ranks(run.server, place, ["--resume=true"], ["--resume=true"])
            found += [f"the next attempt: {outcome.err}" for outcome in again if outcome.code]
        found += differences(expected, left(place), more_files=not outcomes[0].code)
        shutil.rmtree(place)
        return [f"{fault}: {text}" for text in found if text]

    holds(broken, some(run.calls, 3))
