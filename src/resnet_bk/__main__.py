"""Entry point of ``python -m resnet_bk`` and of ``resnet-bk``: streams, signals and exit code of a process."""

import contextlib
import errno
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from resnet_bk.extras import MissingExtraError

_SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_CLOSED_PIPE = 141  # the exit code of a program that SIGPIPE ends


class _Output:
    """An output stream that never fails: after an error, `error` says why, and the null device takes the rest.

    So a run goes on when its terminal, the reader of its pipe, or the disk of its log file is gone.
    """

    def __init__(self, stream: TextIO):
        if isinstance(stream, io.TextIOWrapper):
            # Windows would write into a pipe in an encoding that lacks most characters.
            piped = os.name == "nt" and not stream.isatty() and "PYTHONIOENCODING" not in os.environ
            stream.reconfigure(errors="replace", encoding="utf-8" if piped else None)
        self.stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._attempt(self.stream.write, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, action: Callable[..., Any], *arguments: str) -> None:
        try:
            action(*arguments)
        except OSError as error:
            self.error = error
            with Path(os.devnull).open("wb") as null:
                os.dup2(null.fileno(), self.stream.fileno())


def _open_streams() -> _Output:
    """Prepare the standard streams. Returns standard output."""
    # A stream that was closed at the start is None. A file opened later would get its number and C libraries' output.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    output = _Output(sys.stdout)
    sys.stdout, sys.stderr = output, _Output(sys.stderr)
    return output


def _handle_signals() -> list[int]:
    """Make Ctrl-C and SIGTERM raise SystemExit, so that scratch files are removed.

    The same signal a second time ends the process.

    A training loop replaces these handlers while it runs.

    Returns:
        The signals that were received; the list will grow.
    """
    received: list[int] = []

    def stop(number: int, frame: Any) -> None:
        if number in received:
            os._exit(128 + number)
        received.append(number)
        if len(received) == 1:
            if os.environ.get("RANK", "0") == "0":
                with contextlib.suppress(OSError):  # not by sys.stderr, which may be in use
                    os.write(2, f"resnet-bk: {_SIGNALS[signal.Signals(number)]}\n".encode())
            raise SystemExit(128 + number)  # not KeyboardInterrupt, which Python and libraries treat specially

    def lost(unraisable: Any) -> None:
        """End the process if the signal came in a callback that cannot raise, such as those of Python's imports."""
        if isinstance(unraisable.exc_value, SystemExit) and received:
            os._exit(128 + received[0])
        sys.__unraisablehook__(unraisable)

    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # shells ignore SIGINT in a script's background jobs
            signal.signal(number, stop)
    sys.unraisablehook = lost
    return received


def _set_patience() -> None:
    """Let torch's threads soon give up waiting for each other, before torch is imported.

    On an idle machine nothing changes. Where another program occupies a core, they would else burn most of the time of
    the others: a training step on two cores took 50 times as long.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _show_log() -> None:
    """Show on standard error what the package logs, such as that kernels are being compiled."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("resnet-bk: %(message)s"))
    log = logging.getLogger("resnet_bk")
    log.handlers = [handler]
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


def main() -> int:
    """Run the command line and return its exit code.

    The code is 128 + n after signal n, unless the command has succeeded; 141 if the reader of the output is gone, 1 if
    the output fails otherwise, and 2 if a package that the command line needs is not installed.
    """
    output, received = _open_streams(), _handle_signals()
    _set_patience()
    _show_log()
    try:
        from resnet_bk import cli

        code = cli.main()
    except MissingExtraError as error:
        print(f"resnet-bk: error: {error}", file=sys.stderr)
        code = 2
    except SystemExit as left:  # of --help, a signal, or a run whose rank 0 has failed
        code = left.code if isinstance(left.code, int) else bool(left.code)
    except BaseException:
        if not received:
            raise
        code = 1  # a library has turned the SystemExit into an error of its own
    finally:
        output.flush()
    if received and code:
        code = 128 + received[0]
    received += _SIGNALS  # a signal that comes now ends the process
    if output.error is None or code:
        return code
    if output.error.errno == errno.EPIPE:
        return _CLOSED_PIPE
    print(f"resnet-bk: error: standard output: {output.error.strerror}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
