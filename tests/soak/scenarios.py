"""Commands to disturb, what each must leave behind, and the promises that hold at any moment."""

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGTERM
from typing import Any

import yaml
from server import AFTER, BEFORE, Fault, Outcome, Server

from resnet_bk.checkpoint import CheckpointError, verify

TEXT = "def add(a, b):\n    return a + b  # sum\n\n\nfor i in range(10):\n    print(add(i, 2 * i))\n" * 20
RECIPE = {
    "model": {"d_model": 16, "n_layers": 2, "n_seq": 16, "num_experts": 1},
    "batch_size": 2,
    "max_steps": 6,
    "save_every": 2,
    "log_every": 1,
}
BRIEF = {"max_steps": 2}  # for commands that train several models
SEARCH = json.dumps({"learning_rate": [0.001, 0.01]})
TWO_TECHNIQUES = {
    "model": RECIPE["model"] | {"num_experts": 2, "sparsity": {"target": 0.5}, "experts": {"policy": "top_p"}}
}
CLOCKS = {"elapsed.json", "trainer_state.json", "manifest.json", "README.md"}  # differ from run to run
Trace = list[list[str]]
Words = Callable[[Path], list[str]]

# -------------------------------------------------------------------------------------------- commands


def train(place: Path, *more: str) -> list[str]:
    return ["train", f"--config={place / 'recipe.yaml'}", f"--output_dir={place / 'run'}", *more]


def other_train(place: Path) -> list[str]:
    return train(place, "--seed=1")


def resume(place: Path) -> list[str]:
    return train(place, "--resume=true")


def tune(place: Path) -> list[str]:
    return ["tune", str(place / "recipe.yaml"), f"--output_dir={place / 'tune'}", "--trials=2", f"--space={SEARCH}"]


def ablate(place: Path) -> list[str]:
    return ["ablate", str(place / "recipe.yaml"), f"--output_dir={place / 'ablate'}", "--seeds=[0]"]


def evaluate(place: Path) -> list[str]:
    return ["eval", str(place / "run")]


def generate(place: Path) -> list[str]:
    return ["generate", str(place / "run"), "def", "--max_new_tokens=4"]


def inspect(place: Path) -> list[str]:
    return ["inspect", str(place / "run"), str(place / "recipe.yaml"), f"--output={place / 'inspect.html'}"]


def report(place: Path) -> list[str]:
    return ["report", str(place / "run"), f"--output={place / 'report.html'}"]


# ------------------------------------------------------------------------------------------- what is left


def tree(folder: Path) -> list[str]:
    """Return the names of all files below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def sealed(place: Path) -> dict[str, dict[str, str]]:
    """Map each verified model and checkpoint below a folder to the SHA-256 of its files, clocks left out."""
    found = {}
    for manifest in place.rglob("manifest.json"):
        folder, name = manifest.parent, str(manifest.parent.relative_to(place))
        if not (folder / "tokens.bin").exists() and not re.search(r"(^|/)\.", name):
            try:
                verify(folder)
            except CheckpointError:
                continue
            files = [path for path in folder.iterdir() if path.name not in CLOCKS]
            found[name] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return found


def newest(names: Iterable[str]) -> int:
    """Return the highest step among names of checkpoints of a run; 0 if there is none."""
    steps = (re.search(r"run/checkpoints/checkpoint-(\d+)$", name) for name in names)
    return max((int(step[1]) for step in steps if step), default=0)


def left(place: Path) -> dict[str, Any]:
    """Return what commands leave that must be the same after any fault, without times.

    It is: files, models and last checkpoints, what a run logged of each step, and the table of trials up to their bits
    per byte. Trials and checkpoints are counted from 0: a trial that begins again gets another number, and a run that
    stops at a signal saves at another step.
    """
    logs, tables = place / "run" / "metrics.jsonl", place / "tune" / "pareto.md"
    lines = [json.loads(line) for line in logs.read_text().splitlines()] if logs.exists() else []
    logged = [[line[name] for name in ("step", "bits_per_byte", "learning_rate", "grad_norm")] for line in lines]
    rows = [line.split("|")[1:-4] for line in tables.read_text().splitlines() if "|" in line] if tables.exists() else []
    # Not the run after one that was finished, and compiled models, which a fault may leave out.
    files = [name for name in tree(place) if not name.startswith(("run-2/", "resnet-bk/engines/"))]
    last = re.compile(rf"(?!run-2/).*/(model|checkpoint-{RECIPE['max_steps']})$")
    whole = {name: found for name, found in sealed(place).items() if last.match(name)}
    text = json.dumps({"files": files, "sealed": whole, "metrics": logged, "trials": rows})
    for pattern in (r"trial-\d{4}", r"checkpoint-\d"):
        for i, name in enumerate(sorted(set(re.findall(pattern, text)))):
            text = text.replace(name, f"{pattern[:5]} {i}")
    return json.loads(text)


def differences(expected: dict[str, Any], found: dict[str, Any], more_files: bool = False) -> Iterator[str]:
    """Yield how what was found differs from what was expected. more_files: added files are no difference."""
    missing, added = (sorted(set(a["files"]) - set(b["files"])) for a, b in ((expected, found), (found, expected)))
    if missing:
        yield f"{len(missing)} files are missing: {missing[-1]}"
    if more_files:
        added = []
    if added:
        yield f"{len(added)} files are left over: {added[0]}"
    for name in expected:
        if name != "files" and found[name] != expected[name] and not (missing or added):
            yield f"other {name}: expected {expected[name]}, got {found[name]}"


def complaint(outcome: Outcome, where: str = "") -> str | None:
    """Return what is wrong with how a command ended.

    It must succeed, be stopped by a signal, or fail with one line that has `where` in it.
    """
    lines = outcome.err.splitlines()
    errors = [line for line in lines if line.startswith("resnet-bk: error: ")]
    if outcome.hangs:
        return f"hangs: {lines[-1:]}"
    if "Traceback" in outcome.err + outcome.out:
        return f"traceback: {lines[-1]}"
    if outcome.code in (0, -SIGTERM, 128 + SIGTERM, 128 + SIGINT):
        return f"exit code {outcome.code}, and printed an error: {errors}" if errors else None
    if outcome.code not in (1, 2) or len(errors) != 1 or any(not line.startswith("resnet-bk: ") for line in lines):
        return f"exit code {outcome.code}, not one line: {lines}"
    return None if where in errors[0] else f"exit code {outcome.code}, names no file: {errors[0]}"


def lose_unflushed(trace: Trace) -> None:
    """Cut the files that a killed command has written to the size at which it has last flushed them: a power cut."""
    flushed: dict[str, int] = {}
    for call, path, other in trace:
        if call == "rename":
            moved = [name for name in flushed if name == path or name.startswith(f"{path}/")]
            flushed |= {other + name.removeprefix(path): flushed.pop(name) for name in moved}
        elif call in ("fsync", "fdatasync"):
            flushed[path] = int(other)
        elif call == "create":
            flushed[path] = 0
        elif call == "append":
            flushed.setdefault(path, int(other))
        elif call == "close" and path.endswith(".safetensors"):
            flushed.setdefault(path, 0)  # it was renamed by a system call that faults.c does not see
    for path, size in flushed.items():
        if Path(path).is_file() and Path(path).stat().st_size > size:
            os.truncate(path, size)


# --------------------------------------------------------------------------------------------- scenarios


@dataclass
class Scenario:
    """A command, the place where it begins, and what it leaves there when nothing disturbs it.

    Attributes:
        server: runs it.
        folder: has the places; each has all files of a case.
        words: the command, given a place.
        again: the command that continues it after a fault; default: itself.
        template: a place to begin with.
        settings: change the recipe.
        readers: commands that may read a place at any moment.
        reads: opening a file to read it is a call, too.
        known: the files of each sealed folder, which are the same in every case that has such a folder.
    """

    server: Server
    folder: Path
    words: Words
    again: Words | None = None
    template: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    readers: tuple[Words, ...] = ()
    reads: bool = False
    known: dict[str, dict[str, str]] = field(default_factory=dict)

    def place(self) -> Path:
        """Make a new place: a copy of the template, with the recipe."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        if self.template:
            shutil.copytree(self.template, place, dirs_exist_ok=True)
        data = {"data": {"source": str(self.folder / "text.py")}}
        (place / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | data | self.settings))
        return place

    @functools.cached_property
    def undisturbed(self) -> tuple[dict[str, Any], Trace, float]:
        """What is left, the file calls, and the seconds."""
        place = self.place()
        outcome = self.server.run(self.words(place), place, Fault(reads=self.reads))
        assert outcome.code == 0, outcome.err
        self.known |= sealed(place)
        return left(place), outcome.trace, outcome.seconds

    @property
    def calls(self) -> range:
        return range(1, len(self.undisturbed[1]) + 1)

    def broken(self, fault: Fault) -> list[str]:
        """Disturb the command, run it again, and return the promises that were not kept."""
        place = self.place()
        outcomes = [self.server.run(self.words(place), place, fault)]
        first = outcomes[0]
        if fault.power_cut:
            lose_unflushed(first.trace)
        found = [complaint(first, str(place))] if first.code != -SIGKILL or first.hangs else []
        found += [*self._lost(place, first.trace, fault), *pages_cut_off(place)]
        found += [complaint(self.server.run(words(place), place)) for words in self.readers]
        if first.code != 0:
            outcomes.append(self.server.run((self.again or self.words)(place), place))
            if outcomes[1].code:
                found.append(f"the next attempt fails: {complaint(outcomes[1]) or outcomes[1].err}")
        if any("skipping checkpoint" in outcome.out + outcome.err for outcome in outcomes):
            found.append("an intact checkpoint was not used")
        found += differences(self.undisturbed[0], left(place), more_files=first.code == 0)
        shutil.rmtree(place)
        call = first.trace[fault.at - 1] if 0 < fault.at <= len(first.trace) else []
        return [f"{fault}: {' '.join(call)}: {text}".replace(str(place), "PLACE") for text in found if text]

    def _lost(self, place: Path, trace: Trace, fault: Fault) -> Iterator[str]:
        """Yield each sealed folder with wrong content, and the newest checkpoint if it is gone."""
        now = sealed(place)
        for name, files in now.items():
            if not fault.power_cut:
                self.known.setdefault(name, files)
            if "model.safetensors" not in files or self.known.get(name, files) != files:
                yield f"{name} verifies, but is not what it should be"
        done = trace[: fault.at - (fault.action != AFTER)] if fault.at else trace[:-1]
        before = map(str, self.template.rglob("checkpoint-*") if self.template else ())
        if (had := newest([*before, *(new for _, _, new in done)])) > newest(now):
            yield f"checkpoint-{had} was sealed and is gone; there are {sorted(now)}"


def pages_cut_off(place: Path) -> Iterator[str]:
    for page in place.rglob("*.html"):
        if not page.name.startswith(".") and not page.read_text().rstrip().endswith("</html>"):
            yield f"{page} is not whole"


def scenarios(server: Server, folder: Path) -> dict[str, Scenario]:
    """Return all scenarios by name. folder: for their places."""
    (folder / "text.py").write_text(TEXT)  # the text of a run must not move with its place

    def scenario(words: Words, **more: Any) -> Scenario:
        return Scenario(server, folder, words, **more)

    fresh = scenario(train, again=resume, readers=(generate,))
    half, finished, other = fresh.place(), fresh.place(), fresh.place()
    server.run(train(half), half, Fault(len(fresh.calls) // 2, BEFORE, SIGKILL))
    for words in (train, inspect, report):
        server.run(words(finished), finished)
    shutil.rmtree(finished / "resnet-bk")  # the token files
    server.run(other_train(other), other)
    return {
        "train": fresh,
        "train, other seed": scenario(other_train),
        "generate, other seed": scenario(generate, template=other),
        "resume from nothing": scenario(resume),
        "resume": scenario(resume, template=half),
        "resume, reading": scenario(resume, template=half, reads=True),
        "tune": scenario(tune, settings=BRIEF),
        "ablate": scenario(ablate, settings=BRIEF | TWO_TECHNIQUES),
        "eval": scenario(evaluate, template=finished, reads=True),
        "generate": scenario(generate, template=finished, reads=True),
        "inspect": scenario(inspect, template=finished, reads=True),
        "report": scenario(report, template=finished, reads=True),
    }
