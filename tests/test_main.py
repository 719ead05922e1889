"""The process of ``resnet-bk``: output that fails, signals, exit codes. Nothing of it ends in a traceback."""

import gc
import io
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resnet_bk import __main__, cli
from resnet_bk.checkpoint import seal
from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM, byte_tokenizer


@pytest.fixture
def run(monkeypatch):
    """Run a function as the command line. Returns the exit code."""

    def run(command):
        monkeypatch.setattr(cli, "main", command)
        return __main__.main()

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for name in ("stdin", "stdout", "stderr", "unraisablehook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # restored afterwards
    for name in ("handlers", "level"):
        monkeypatch.setattr(logging.getLogger("resnet_bk"), name, getattr(logging.getLogger("resnet_bk"), name))
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_encoding_lacks_are_replaced(run, monkeypatch, encoding):
    out, err = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, encoding))
    assert run(lambda: print("a\u2603\udcff") or print("\u2603", file=sys.stderr) or 0) == 0
    sys.stderr.flush()
    assert (out.getvalue().strip(), err.getvalue().strip()) == (b"a??", b"?")


def test_a_command_goes_on_when_the_reader_of_its_output_is_gone(run, monkeypatch, capfd):
    done = []

    def command():
        for i in range(3):
            print("x" * 100_000)
            done.append(i)
        return 0

    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert run(command) == 141
    assert done == [0, 1, 2]
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk")
def test_a_full_disk_behind_the_output_is_one_line(run, monkeypatch, capfd):
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(lambda: print("x") or 0) == 1
    assert capfd.readouterr().err == "resnet-bk: error: standard output: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full disk")
def test_an_error_that_cannot_be_printed_keeps_its_exit_code(run, monkeypatch):
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert run(lambda: print("x", file=sys.stderr) or 2) == 2


def test_streams_that_are_closed_are_opened(run, monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert run(lambda: print("x") or print("y", file=sys.stderr) or len(sys.stdin.read())) == 0
    assert sys.stdout.fileno() != sys.stderr.fileno()


@pytest.mark.parametrize(("code", "expected"), [(None, 0), (0, 0), (3, 3), ("text", 1)])
def test_a_command_may_exit(run, code, expected):
    assert run(lambda: sys.exit(code)) == expected


# ------------------------------------------------------------------------------------------ signals

SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]


@pytest.mark.parametrize(("number", "code", "word"), SIGNALS)
def test_a_signal_is_one_line_after_the_scratch_files_are_gone(run, capfd, number, code, word):
    removed = []

    def command():
        try:
            signal.raise_signal(number)
        finally:
            removed.append("scratch")

    assert run(command) == code
    assert removed == ["scratch"]
    assert capfd.readouterr() == ("", f"resnet-bk: {word}\n")


@pytest.mark.parametrize(("number", "code", "word"), SIGNALS)
def test_a_library_may_turn_a_signal_into_an_error_of_its_own(run, capfd, number, code, word):
    def command():
        try:
            signal.raise_signal(number)
        except BaseException as error:
            raise RuntimeError("a callback failed") from error

    assert run(command) == code
    assert capfd.readouterr().err == f"resnet-bk: {word}\n"


@pytest.fixture
def exits(monkeypatch):
    """Return the codes with which the process would have ended on the spot."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def test_a_second_signal_ends_the_process(run, exits, capfd):
    def command():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGTERM)  # as a launcher sends it after Ctrl-C: nothing is new
            assert exits == []
            signal.raise_signal(signal.SIGINT)

    assert run(command) == 130
    assert exits == [130]
    assert capfd.readouterr().err == "resnet-bk: interrupted\n"


def test_a_signal_after_the_end_does_not_raise(run, exits):
    assert run(lambda: 0) == 0
    signal.raise_signal(signal.SIGINT)
    assert exits == [130]


def test_a_signal_in_a_callback_that_cannot_raise_ends_the_process(run, exits):
    class Callback:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def command():
        Callback()
        gc.collect()
        return 0

    run(command)
    assert exits[0] == 130


def test_a_signal_that_the_parent_ignores_stays_ignored(run):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell script starts background jobs
    assert run(lambda: signal.raise_signal(signal.SIGINT) or 0) == 0


def test_only_rank_0_prints_that_a_signal_came(run, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    assert run(lambda: signal.raise_signal(signal.SIGTERM)) == 143
    assert capfd.readouterr().err == ""


def test_a_bug_is_not_hidden(run):
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 // 0)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(12))
def test_a_signal_at_any_time(tmp_path, seed):
    byte_tokenizer().save_pretrained(tmp_path / "model")
    ResNetBKForCausalLM(ResNetBKConfig(d_model=8, n_layers=1, num_experts=1)).save_pretrained(tmp_path / "model")
    seal(tmp_path / "model")
    draw = random.Random(seed)
    number, code, word = draw.choice(SIGNALS)
    words = [sys.executable, "-m", "resnet_bk", "generate", "model", "-"]  # imports, loads, and waits for a text
    process = subprocess.Popen(words, cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(draw.uniform(1, 12))
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == f"resnet-bk: {word}\n"
    assert process.returncode == code


def test_what_the_package_logs_is_shown_by_rank_0(run, monkeypatch, capsys):
    log = logging.getLogger("resnet_bk.jit")
    assert run(lambda: log.info("compiling") or 0) == 0
    monkeypatch.setenv("RANK", "1")
    assert run(lambda: log.info("compiling too") or 0) == 0
    assert capsys.readouterr().err == "resnet-bk: compiling\n"


def test_threads_wait_briefly_unless_told_otherwise(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    __main__._set_patience()
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    __main__._set_patience()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    __main__._set_patience()
    assert "GOMP_SPINCOUNT" not in os.environ
