"""``resnet-bk train`` with several processes: rank 0 prints and writes, and all of them end together."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from resnet_bk.checkpoint import newest_valid, verify
from resnet_bk.cli import main
from resnet_bk.study import run as scored
from resnet_bk.training.trainer import RunControl

TEXT = "def add(a, b):\n    return a + b  # sum\n\n\nfor i in range(10):\n    print(add(i, 2 * i))\n" * 6
MEASURE = scored.measure


@pytest.fixture
def place(tmp_path):
    """A folder with a corpus of 22 files, two of them held out."""
    (tmp_path / "corpus").mkdir()
    for i in range(22):
        (tmp_path / "corpus" / f"{i:02}.py").write_text(f"# file {i}\n" + TEXT)
    return tmp_path


def arguments(place, *more, steps=6):
    model = ("--model.d_model=16", "--model.n_layers=1", "--model.n_seq=32", "--model.num_experts=1")
    data = (f"--data.source={place / 'corpus'}", f"--data.cache={place / 'cache'}", f"--output_dir={place / 'run'}")
    return ["train", *model, *data, "--batch_size=4", "--log_every=2", f"--max_steps={steps}", *more]


def command(rank, words, fails_at=None):
    """Return exit code, stdout and stderr. fails_at: (rank, step) at which that rank runs out of memory."""
    out, err = io.StringIO(), io.StringIO()
    scored.measure = lambda model, text, size: MEASURE(model, text, size, 1, 32, 2, 1)
    real = RunControl.on_step_end

    def step_end(self, args, state, control, **kwargs):
        if (rank, state.global_step) == fails_at:
            raise MemoryError("out of memory")
        real(self, args, state, control, **kwargs)

    RunControl.on_step_end = step_end
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(words)
            except SystemExit as exit:
                code = exit.code
    finally:
        RunControl.on_step_end, scored.measure = real, MEASURE
    return code, out.getvalue(), err.getvalue()


def test_two_processes_make_one_run(workers, place):
    first, second = workers.run(2, command, arguments(place))
    assert (first[0], second[0]) == (0, 0), first[2]
    assert "2 processes of 1 threads" in " ".join(first[1].split())
    assert second[1:] == ("", "")
    run = place / "run"
    assert {path.name for path in place.iterdir()} == {"corpus", "cache", "run"}
    verify(run / "model")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    results = json.loads((run / "results.json").read_text())
    assert results["training"]["processes"] == 2
    assert results["held_out"]["documents"] == 2

    (alone,) = workers.run(1, command, arguments(place, f"--output_dir={place / 'alone'}"))
    assert alone[0] == 0
    other = [json.loads(line) for line in (place / "alone" / "metrics.jsonl").read_text().splitlines()]
    for line, as_one in zip(lines, other, strict=True):
        assert line["bits_per_byte"] == pytest.approx(as_one["bits_per_byte"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(as_one["grad_norm"], rel=1e-4)

    first, second = workers.run(2, command, arguments(place))
    assert (first[0], second[0]) == (2, 2)
    assert "holds a run already" in first[2]
    assert second[1:] == ("", "")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--batch_size=5",), "train.batch_size: got 5, allowed a multiple of 2, the number of processes"),
        (("--report_to=nonesuch",), "train.report_to: got 'nonesuch'"),
        (("--learning_rate=-1",), "train.learning_rate: got -1.0"),
    ],
)
def test_bad_input_is_one_line_from_rank_zero(workers, place, more, message):
    first, second = workers.run(2, command, arguments(place, *more))
    assert first[0] == 2
    assert message in first[2]
    assert first[2].count("\n") == 1
    assert second[0] == 2
    assert second[1:] == ("", "")


def command_of_each(rank, lines):
    return command(rank, lines[rank])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--batch_size=8",), "train.batch_size: got 8 on rank 1, 4 on rank 0; start every process with the same"),
        (("--seed=5",), "train.seed: got 5 on rank 1, 0 on rank 0"),
        (("--max_steps=7",), "train.max_steps: got 7 on rank 1, 6 on rank 0"),
        (("--model.d_model=32",), "train.model.d_model: got 32 on rank 1, 16 on rank 0"),
        (("--learning_rate=-1",), "rank 1: train.learning_rate: got -1.0"),
        (("--nonsense=1",), "rank 1: train: unknown option '--nonsense'"),
    ],
)
def test_a_setting_of_one_rank_ends_all_with_one_line_that_names_it(workers, place, more, message):
    first, second = workers.run(2, command_of_each, (arguments(place), arguments(place, *more)))
    assert (first[0], second[0]) == (2, 2)
    assert message in first[2]
    assert first[2].count("\n") == 1
    assert second[1:] == ("", "")
    assert not (place / "run").exists()


def test_another_text_on_one_rank_ends_all(workers, place):
    shutil.copytree(place / "corpus", place / "elsewhere" / "corpus")
    (place / "elsewhere" / "corpus" / "01.py").write_text("changed = 1\n" * 60)
    first, second = workers.run(2, in_a_folder_of_its_own, place, arguments(place, "--data.source=corpus"))
    assert (first[0], second[0]) == (2, 2)
    assert "data.source: got " in first[2]
    assert "on rank 1, " in first[2]
    assert "give every process the same text and tokenizer" in first[2]


def in_a_folder_of_its_own(rank, place, words):
    with contextlib.chdir(place / "elsewhere" if rank else place):
        return command(rank, words)


def test_only_train_runs_in_several_processes(workers, place):
    first, second = workers.run(2, command, ["eval", str(place)])
    assert first[0] == second[0] == 2
    assert "eval: got 2 processes, allowed 1" in first[2]


def test_a_process_that_fails_ends_the_others(workers, place):
    first, second = workers.run(2, command, arguments(place, steps=10**6), (1, 3))
    assert second[0] == first[0] == 1
    assert "out of memory" in second[2]
    assert "another process of this run has ended" in first[2]


def workers_of(process):
    """Return the process ids of the workers that torchrun started."""
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "resnet_bk" in line]


def test_torchrun_and_a_signal_to_one_of_its_processes(workers, place):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "resnet_bk"]
    words = [*launcher, *arguments(place, "--save_every=5", steps=10**6)]
    with (place / "log.txt").open("w") as log:
        process = subprocess.Popen(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 90
        while not list(place.glob("run/checkpoints/checkpoint-*")):
            assert process.poll() is None, (place / "log.txt").read_text()
            assert time.monotonic() < until, (place / "log.txt").read_text()
            time.sleep(0.1)
        os.kill(workers_of(process)[-1], signal.SIGTERM)
        assert process.wait(60) != 0
    finally:
        process.kill()
    text = (place / "log.txt").read_text()
    assert text.count("stopped by signal 15 after saving a checkpoint. Resume with") == 1, text
    stopped = int(newest_valid(place / "run" / "checkpoints", pytest.fail).name.rpartition("-")[2])
    (resumed,) = workers.run(1, command, arguments(place, "--resume=true", "--log_every=1", steps=stopped + 2))
    assert resumed[0] == 0, resumed[2]
    assert json.loads((place / "run" / "results.json").read_text())["training"]["steps"] == stopped + 2
