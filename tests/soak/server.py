"""Run commands of resnet-bk in forks of one process that has imported everything, with faults at their file calls.

A case costs the run, not seconds of imports. `python server.py SOCKET` is the process, `Server` its client. Each
connection is one case: the process forks a watcher, the watcher forks the command, which arms the library faults.c.
The process must never run a kernel or a backward pass: threads do not survive a fork.
"""

import contextlib
import ctypes
import errno
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

GO, FAIL, SHORT, BEFORE, AFTER = range(5)  # as in faults.c
HERE = Path(__file__).resolve().parent
LIMIT = 60  # seconds after which a command counts as hanging


@dataclass(frozen=True)
class Fault:
    """What happens at which file call; see faults.c.

    Attributes:
        at: number of the call, from 1; 0 for a run without a fault.
        action: it fails (FAIL), writes half (SHORT), or a signal comes BEFORE or AFTER it.
        number: errno of FAIL, or the signal: SIGSTOP pauses the process.
        stays: the calls after it fail, too.
        reads: opening a file to read it counts as a call.
        seconds: time after which the process is killed instead; None if it is not.
        power_cut: files that are not flushed when the process is killed lose what was not.
    """

    at: int = 0
    action: int = GO
    number: int = errno.ENOSPC
    stays: bool = False
    reads: bool = False
    seconds: float | None = None
    power_cut: bool = False

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"kill after {self.seconds:.3f} s"
        what = errno.errorcode[self.number] if self.action == FAIL else signal.Signals(self.number).name
        name = ("nothing at", f"{what} at", "half of", f"{what} before", f"{what} after")[self.action]
        return f"{'power cut, ' * self.power_cut}{name} call {self.at}{' and later ones' * self.stays}"


NO_FAULT = Fault()


@dataclass(frozen=True)
class Case:
    """A command to run: its words, the folder that is watched, the fault, and variables of the environment."""

    words: list[str]
    folder: str
    fault: Fault = NO_FAULT
    environment: dict[str, str] = field(default_factory=dict)
    limit: float = LIMIT


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: exit code; -9 if it was killed.
        hangs: it was killed at the time limit.
        seconds: from its start to its end, pauses included.
        out, err: what it printed.
        trace: its file calls as [name, path, new path or size].
    """

    code: int
    hangs: bool
    seconds: float
    out: str
    err: str
    trace: list[list[str]]


# ------------------------------------------------------------------------------------------- the process


def serve(path: str) -> None:
    """Accept cases until standard input closes, which it does when the client ends."""
    for name in ("run", "tune", "ablate", "comparison", "inspection", "evaluation"):
        importlib.import_module(f"resnet_bk.study.{name}")
    importlib.import_module("resnet_bk.cli")._parser()
    _shorten()
    gc.freeze()  # a fork neither scans nor copies what is there now
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # watchers need no one to wait for them
        while sys.stdin not in (ready := select.select([listener, sys.stdin], [], [])[0]):
            connection, _ = ready[0].accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _watch(connection)
                os._exit(0)
            connection.close()


def _shorten() -> None:
    """Replace what takes seconds and touches no file: timing, a long sample, drawn figures."""
    from resnet_bk.report import figures
    from resnet_bk.study import run

    measure, generate = run.measure, run.generate_text
    run.measure = lambda model, text, size: measure(model, text, size, batch=1, length=32, new=2, repeats=1)
    run.generate_text = lambda model, tokenizer, prompt, config: generate(
        model, tokenizer, prompt, type(config)(**asdict(config) | {"max_new_tokens": 8})
    )
    figures.figure_svg = lambda figure: "<svg/>"


def _watch(connection: socket.socket) -> None:
    """Fork the command, report when it stops and how it ends, and obey the client: continue it or kill it."""
    case, logs = json.loads(connection.makefile().readline())
    begin = time.monotonic()
    if (pid := os.fork()) == 0:
        connection.close()
        os._exit(_command(case, Path(logs)))
    connection.sendall(b"%d\n" % pid)
    seconds, limit = case["fault"]["seconds"], case["limit"]
    while True:
        done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
        if done and not os.WIFSTOPPED(status):
            break
        if done:
            connection.sendall(b"paused\n")
            limit += case["limit"]  # for the pause
        if select.select([connection], [], [], 0.005)[0]:
            os.kill(pid, signal.SIGCONT if connection.recv(1) == b"c" else signal.SIGKILL)
        if time.monotonic() - begin > (limit if seconds is None else seconds):
            os.kill(pid, signal.SIGKILL)
    took = time.monotonic() - begin
    found = {"code": os.waitstatus_to_exitcode(status), "hangs": took > limit, "seconds": took}
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(json.dumps(found).encode() + b"\n")


def _command(case: dict[str, Any], logs: Path) -> int:
    """Run the command in this process and return its exit code."""
    for descriptor, name in ((0, "in"), (1, "out"), (2, "err"), (3, "trace")):
        os.dup2(os.open(logs / name, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ |= {"XDG_CACHE_HOME": case["folder"]} | case["environment"]
    os.chdir(case["folder"])
    fault = case["fault"]
    root = os.path.realpath(case["folder"]).encode()
    numbers = [fault[name] for name in ("action", "number", "stays", "reads")]
    ctypes.CDLL(None).arm(root, ctypes.c_long(fault["at"]), *map(int, numbers), 3)
    try:
        sys.argv = ["resnet-bk", *case["words"]]
        code = importlib.import_module("resnet_bk.__main__").main()
    except SystemExit as exit:
        code = int(exit.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code


# -------------------------------------------------------------------------------------------- the client


class Running:
    """A case that runs. pid: of its process."""

    def __init__(self, connection: socket.socket, logs: Path):
        self.connection, self.logs, self.lines = connection, logs, connection.makefile()
        self.pid, self.end = int(self.lines.readline()), ""

    def pauses(self) -> bool:
        """Wait until the command pauses at its fault; False if it ends before."""
        line = self.end or self.lines.readline()
        self.end = "" if line == "paused\n" else line
        return not self.end

    def go_on(self) -> None:
        self.connection.sendall(b"c")

    def outcome(self) -> Outcome:
        """Wait until the command ends, and remove its logs."""
        while self.pauses():
            self.go_on()
        text = {name: (self.logs / name).read_text(errors="replace") for name in ("out", "err", "trace")}
        trace = [line.split("\t") for line in text.pop("trace").splitlines()]
        shutil.rmtree(self.logs)
        self.lines.close()
        self.connection.close()
        return Outcome(**json.loads(self.end), **text, trace=trace)


class Server:
    """Start the process, and cases in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        library = folder / "faults.so"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, HERE / "faults.c", "-ldl"], check=True)
        settings = {"LD_PRELOAD": str(library), "RESNET_BK_BACKEND": "chunked", "HF_HUB_OFFLINE": "1"}
        settings |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        words = [sys.executable, __file__, str(folder / "socket")]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, env=os.environ | settings)

    def __enter__(self) -> Self:
        while not (self.folder / "socket").exists():
            assert self.process.poll() is None, "the fork server could not start"
            time.sleep(0.05)
        return self

    def __exit__(self, *error: object) -> None:
        self.process.communicate(timeout=10)

    def start(self, words: list[str], folder: Path, fault: Fault = NO_FAULT, **more: Any) -> Running:
        """Start a command. more: further fields of Case."""
        logs = Path(tempfile.mkdtemp(dir=self.folder))
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.folder / "socket"))
        case = asdict(Case(words, str(folder), fault, **more))
        connection.sendall(json.dumps([case, str(logs)]).encode() + b"\n")
        return Running(connection, logs)

    def run(self, *arguments: Any, **more: Any) -> Outcome:
        """Run a command to its end. Arguments as for :meth:`start`."""
        return self.start(*arguments, **more).outcome()


if __name__ == "__main__":
    serve(sys.argv[1])
