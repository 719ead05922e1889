"""Commands that work in one folder at the same time: what is left belongs to one of them, the others say why not.

The first command pauses at a file call, the second one runs from beginning to end, then the first one goes on. With a
pause at every call of the first command, the second one meets every state that it can meet.
"""

import shutil
import time
from functools import partial
from signal import SIGSTOP

import pytest
from scenarios import complaint, differences, left, sealed
from server import BEFORE, NO_FAULT, Fault

PAIRS = {
    ("train", "train"): 6,
    ("train", "resume from nothing"): 4,
    ("resume from nothing", "train"): 3,
    ("train", "train, other seed"): 4,
    ("resume", "resume"): 4,
    ("tune", "tune"): 3,
    ("ablate", "ablate"): 2,
}
READERS = {"generate": 4, "eval": 3, "inspect": 1, "report": 1}


def both(first, second, place, fault=NO_FAULT, offset=0.0):
    """Run two commands in one place and return their outcomes."""
    one = first.server.start(first.words(place), place, fault)
    paused = bool(fault.at) and one.pauses()
    time.sleep(offset)
    two = second.server.run(second.words(place), place)
    if paused:
        one.go_on()
    return one.outcome(), two


def mixed(first, second, fault=NO_FAULT, offset=0.0):
    """Yield what is wrong after two commands wrote to one folder."""
    place = first.place()
    outcomes = both(first, second, place, fault, offset)
    for outcome in outcomes:
        if outcome.code == 2 and not any(reason in outcome.err for reason in ("in use", "holds a run already")):
            yield f"{fault}, {offset}: the loser says {outcome.err}"
        if (text := complaint(outcome)) or outcome.code not in (0, 2):
            yield f"{fault}, {offset}: {text or outcome.err}"
    winners = [who for who, outcome in zip((first, second), outcomes, strict=True) if outcome.code == 0]
    problems = [list(differences(who.undisturbed[0], left(place))) for who in winners]
    if all(problems):  # also without a winner
        yield f"{fault}, {offset}: what is left is not that of one command: {problems}"
    models = [sealed(folder)["model"] for folder in place.glob("run-2")]
    if any(model not in [who.known["run/model"] for who in winners] for model in models):
        yield f"{fault}, {offset}: the second run has other weights than it should"
    shutil.rmtree(place)


@pytest.mark.parametrize("pair", PAIRS, ids=" & ".join)
def test_two_commands_that_write(scenario, some, holds, pair):
    first, second = map(scenario, pair)
    holds(partial(mixed, first, second), [Fault(n, BEFORE, SIGSTOP) for n in some(first.calls, PAIRS[pair])])


def test_two_commands_that_write_without_a_pause(scenario, some, holds):
    pairs = [(scenario(first), scenario(second)) for first, second in PAIRS]
    cases = [(*pair, NO_FAULT, pair[0].undisturbed[2] * part / 20) for pair in pairs for part in range(20)]
    holds(lambda case: mixed(*case), some(cases, 6))


def disturbed(writer, reader, fault, reader_pauses):
    """Yield what is wrong after one command wrote to a folder in which another one read."""
    place = writer.place()
    shutil.copy(writer.folder / "text.py", place / "text.py")
    first, second = (reader, writer) if reader_pauses else (writer, reader)
    outcomes = both(first, second, place, fault)
    for outcome in outcomes:
        if text := complaint(outcome):
            yield f"{fault}: {text}"
    code = outcomes[reader_pauses].code
    if code or (problems := list(differences(writer.undisturbed[0], left(place), more_files=True))):
        yield f"{fault}: the writer exits with {code} and leaves: {problems}"
    shutil.rmtree(place)


@pytest.mark.parametrize("name", READERS)
def test_a_reader_while_a_run_writes(scenario, some, holds, name):
    writer, reader = scenario("train"), scenario(name)
    faults = [Fault(n, BEFORE, SIGSTOP) for n in some(writer.calls, READERS[name])]
    holds(lambda fault: disturbed(writer, reader, fault, False), faults)


@pytest.mark.parametrize("name", READERS)
def test_a_run_while_a_reader_reads(scenario, some, holds, name):
    """The reader has chosen a checkpoint, which the run deletes."""
    writer, reader = scenario("resume"), scenario(name)
    faults = [Fault(n, BEFORE, SIGSTOP, reads=True) for n in some(reader.calls, READERS[name])]
    holds(lambda fault: disturbed(writer, reader, fault, True), faults)


def test_an_added_file_hides_no_other_difference():
    expected = {"files": ["a"], "metrics": [1]}
    found = {"files": ["a", "b"], "metrics": [2]}
    assert list(differences(expected, found, more_files=True)) == ["other metrics: expected [1], got [2]"]
    assert list(differences(expected, found)) == ["1 files are left over: b"]
