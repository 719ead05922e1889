"""Two sizes of every check: the short one runs with all tests, the full one with `make soak`. Linux only."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

if sys.platform == "linux":
    from scenarios import scenarios
    from server import Server
collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]

AT_A_TIME = 2  # cases


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    if not shutil.which("cc"):
        pytest.skip("faults need a C compiler")
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="session")
def scenario(server, tmp_path_factory):
    """Return a scenario, given its name."""
    return scenarios(server, tmp_path_factory.mktemp("places")).__getitem__


@pytest.fixture(scope="session", params=["short", pytest.param("full", marks=pytest.mark.soak)])
def some(request):
    """Return the function that chooses from many cases: `count` of them, evenly spread, or all in the full size."""

    def choose(cases: Sequence, count: int) -> Sequence:
        if request.param == "full" or count >= len(cases):
            return cases
        return [cases[i * len(cases) // count] for i in range(count)]

    return choose


@pytest.fixture(scope="session")
def table():
    """Return the lines of the table; RESNET_BK_SOAK_TABLE names its file."""
    lines = ["| check | cases | broken | seconds |", "|---|---|---|---|"]
    yield lines
    if path := os.environ.get("RESNET_BK_SOAK_TABLE"):
        Path(path).write_text("\n".join(lines) + "\n")


@pytest.fixture
def holds(request, table):
    """Return the function that checks all cases, two at a time, and fails with the promises that were broken."""

    def check(broken: Callable[..., Iterable[str]], cases: Sequence) -> None:
        begin = time.monotonic()
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            bad = [found for found in pool.map(lambda case: list(broken(case)), cases) if found]
        table.append(f"| {request.node.name} | {len(cases)} | {len(bad)} | {time.monotonic() - begin:.0f} |")
        assert not bad, "\n".join(text for texts in bad for text in texts)

    return check
