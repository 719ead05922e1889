"""Nothing is lost, and nothing is mixed, at any call that fails and any moment at which the process dies."""

import dataclasses
import errno
import random
from signal import SIGINT, SIGKILL, SIGTERM

import pytest
from server import AFTER, BEFORE, FAIL, SHORT, Fault

# The number of cases of each command in the short size.
COMMANDS = {
    "train": 39,
    "resume": 26,
    "resume, reading": 13,
    "tune": 13,
    "ablate": 6,
    "eval": 5,
    "generate": 5,
    "inspect": 5,
    "report": 5,
}
FAULTS = [
    Fault(0, BEFORE, SIGKILL),
    Fault(0, AFTER, SIGKILL),
    Fault(0, BEFORE, SIGKILL, power_cut=True),
    Fault(0, BEFORE, SIGTERM),
    Fault(0, BEFORE, SIGINT),
    Fault(0, FAIL, errno.ENOSPC),
    Fault(0, FAIL, errno.ENOSPC, stays=True),
    Fault(0, FAIL, errno.EIO),
    Fault(0, FAIL, errno.EDQUOT, stays=True),
    Fault(0, FAIL, errno.EROFS, stays=True),
    Fault(0, FAIL, errno.EACCES),
    Fault(0, SHORT),
    Fault(0, SHORT, stays=True),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_fault_at_any_call(scenario, some, holds, command):
    disturbed = scenario(command)
    calls = [(n, call[0]) for n, call in zip(disturbed.calls, disturbed.undisturbed[1], strict=True)]
    cases = [
        dataclasses.replace(fault, at=n, reads=disturbed.reads)
        for fault in FAULTS
        for n, name in calls
        if fault.action != SHORT or "write" in name
    ]
    holds(disturbed.broken, some(cases, COMMANDS[command]))


@pytest.mark.parametrize("command", ["train", "tune"])
def test_a_kill_at_any_moment(scenario, some, holds, command):
    disturbed, draw = scenario(command), random.Random(0)
    moments = [draw.uniform(0, disturbed.undisturbed[2]) for _ in range(40)]
    holds(disturbed.broken, [Fault(seconds=seconds) for seconds in some(moments, 3)])
