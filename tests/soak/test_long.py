"""A long training and a long text: memory and the number of open files stay as they are after a minute."""

import os
import time
from pathlib import Path
from signal import SIGKILL

import numpy as np
from scenarios import generate, train
from server import NO_FAULT, Fault

LONG = int(os.environ.get("RESNET_BK_SOAK_SECONDS", "3600"))
TOKENS = 10**6
GROWTH = 8 << 20  # bytes; what an allocator adds at random


def samples(running):
    """Return times, resident bytes and numbers of open files of a command until it ends, twice a second."""
    process, page = Path(f"/proc/{running.pid}"), os.sysconf("SC_PAGE_SIZE")
    found, begin = [], time.monotonic()
    while process.exists():
        try:
            resident = int((process / "statm").read_text().split()[1]) * page
            found.append((time.monotonic() - begin, resident, len(list((process / "fd").iterdir()))))
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.5)
    return np.array(found)


def growth(found):
    """Return by how much resident memory and open files grow over the last two thirds, if they grow evenly.

    Medians of the halves of that time do not see what happens for a moment, such as the scores at the end.
    """
    earlier, later = np.array_split(found[len(found) // 3 :, 1:], 2)
    return 2 * (np.median(later, axis=0) - np.median(earlier, axis=0))


def flat(name, allowed, running, table):
    """Yield what is wrong with a command whose memory must not grow by more bytes than `allowed`."""
    found = samples(running)
    outcome = running.outcome()
    memory, files = growth(found)
    table.append(f"| {name}: {memory / 2**20:+.1f} MB, {files:+.1f} open files | 1 | | {outcome.seconds:.0f} |")
    if memory > allowed or files > 0.5:
        yield f"{name} grows by {memory / 2**20:.1f} MB and {files:.1f} open files: {found[:: len(found) // 10]}"
    if outcome.code not in (0, -SIGKILL) or outcome.hangs:
        yield f"{name} ends with {outcome.code}: {outcome.err}"


def test_memory_and_open_files(scenario, some, holds, table):
    """Train for a time, and decode a million tokens; the short size decodes for a time, too."""
    seconds = len(some(range(LONG), 20))
    run, reader = scenario("train"), scenario("generate")
    limits = ["--max_steps=1000000000", f"--max_seconds={seconds}", "--save_every=100", "--log_every=10"]
    fault = Fault(seconds=seconds) if seconds < LONG else NO_FAULT
    text = 24 * TOKENS  # the tokens, and a copy of them
    jobs = [
        ("training", GROWTH, run, lambda place: train(place, *limits), NO_FAULT),
        ("decoding", GROWTH + text, reader, lambda place: [*generate(place), *more], fault),
    ]
    more = [f"--max_new_tokens={TOKENS}", "--temperature=0"]

    def broken(job):
        name, allowed, begin, words, fault = job
        place = begin.place()
        yield from flat(name, allowed, begin.server.start(words(place), place, fault, limit=4 * LONG), table)

    holds(broken, jobs)
