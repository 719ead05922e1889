"""Corpora as id arrays, a plain training loop, scoring, timing and tables, shared by the benchmarks.

Dimensions: B sequences per step, N tokens.
"""

import argparse
import datetime
import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

import resnet_bk
from resnet_bk.config import DataConfig
from resnet_bk.data import corpus, tokens
from resnet_bk.layers.sparse import anneal
from resnet_bk.training import cpu, optimizers
from resnet_bk.training.trainer import learning_rate_factor

SAVED_EVERY = 300.0  # seconds of a training
SHARED = Path(os.environ.get("RESNET_BK_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def stdlib_ids() -> tuple[np.ndarray, np.ndarray]:
    """Return train and held-out byte ids of the default corpus."""
    parts = []
    text = corpus.split(DataConfig())
    for documents in (text.train, text.held_out):
        ids = [np.append(tokens.byte_ids(b"".join(d.pieces())), np.uint16(tokens.END_OF_DOCUMENT)) for d in documents]
        parts.append(np.concatenate(ids))
    return parts[0], parts[1]


def prose_ids() -> tuple[np.ndarray, np.ndarray]:
    """Return train and held-out byte ids of Tiny Shakespeare and WikiText-2's validation text, 90% and 10% of each."""
    files = SHARED / "data/tinyshakespeare/input.txt", SHARED / "data/wikitext-2/wiki.valid.raw"
    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for file in files:
        ids = tokens.byte_ids(file.read_bytes())
        cut = int(0.9 * len(ids))
        for part, piece in zip(parts, (ids[:cut], ids[cut:]), strict=True):
            part.append(np.append(piece, np.uint16(tokens.END_OF_DOCUMENT)))
    return np.concatenate(parts[0]), np.concatenate(parts[1])


# name -> function that returns train and held-out byte ids; description
CORPORA: dict[str, tuple[Callable[[], tuple[np.ndarray, np.ndarray]], str]] = {
    "stdlib": (stdlib_ids, "the default corpus"),
    "prose": (prose_ids, "Tiny Shakespeare and WikiText-2's validation text, a tenth of each held out"),
}


def batches(ids: np.ndarray, batch: int, length: int, seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Return a function that draws random windows: inputs (B, N) and their next tokens (B, N), fixed by the seed."""
    rng = np.random.default_rng(seed)

    def draw() -> tuple[Tensor, Tensor]:
        starts = rng.integers(0, len(ids) - length - 1, batch)
        rows = torch.from_numpy(np.stack([ids[s : s + length + 1] for s in starts]).astype(np.int64))
        return rows[:, :-1], rows[:, 1:]

    return draw


@cpu.large_batches()
def train(
    loss_of: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    draw: Callable[[], tuple[Tensor, Tensor]],
    steps: int | None = None,
    seconds: float | None = None,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.99),
    warmup: float = 0.05,
    final: float = 0.05,
    first: tuple[int, int] = (1, 8),
    clock: Callable[[], float] = time.perf_counter,
    optimizer: Literal["adamw", "muon"] = "adamw",
    score: Callable[[], float] | None = None,
    scored: Sequence[float] = (),
    state: Path | None = None,
) -> dict[str, Any]:
    """Train with a cosine schedule and gradient clipping at 1.

    Args:
        loss_of: returns the loss of inputs and targets, (B, N) each.
        model: the model to train, in place.
        draw: returns the next inputs and targets.
        steps, seconds: budget; training ends when either is used up.
        learning_rate: peak of the schedule.
        weight_decay: of matrices, see :func:`resnet_bk.training.optimizers.create`.
        betas: of AdamW.
        warmup: share of the budget in which the learning rate rises.
        final: share of the peak learning rate at the end.
        first: sequences and tokens of a pass before the clock starts, in which kernels are compiled.
        clock: returns seconds. With one thread and `time.process_time`, other programs on the machine matter little.
        optimizer: see :func:`resnet_bk.training.optimizers.create`.
        score: returns the quality of the model; its own time does not count.
        scored: seconds after which `score` is called.
        state: file that gets all that the training needs to go on, every SAVED_EVERY seconds; a training that finds it
            goes on from there. It is removed at the end.

    Returns:
        "steps", "seconds", "first_gradient_norm" and "curve", pairs of seconds and score.
    """
    updates = optimizers.create(model, learning_rate, weight_decay, betas, optimizer)
    x, y = draw()
    loss_of(x[: first[0], : first[1]], y[: first[0], : first[1]]).backward()
    updates.zero_grad()
    done, elapsed, first_norm, begin, curve = 0, 0.0, math.nan, 0.0, list[tuple[float, float]]()
    if state is not None and state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        updates.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])
        done, elapsed, first_norm, begin, curve = saved["progress"]
        for _ in range(done):
            draw()
    started, last_saved = clock() - elapsed, elapsed
    while True:
        elapsed = clock() - started
        progress = max(done / steps if steps else 0.0, elapsed / seconds if seconds else 0.0)
        if progress >= 1:
            if state is not None:
                state.unlink(missing_ok=True)
            return {"steps": done, "seconds": elapsed, "first_gradient_norm": first_norm, "curve": curve}
        due = max((x for x in scored if x <= elapsed), default=0.0)
        # no score where the counting of n-grams has outlasted its time
        if score is not None and due > (curve[-1][0] if curve else 0.0) and elapsed < 1.2 * due:
            curve.append((due, score()))
        if state is not None and elapsed > last_saved + SAVED_EVERY:
            parts = {"model": model.state_dict(), "optimizer": updates.state_dict(), "random": torch.get_rng_state()}
            torch.save({**parts, "progress": (done, elapsed, first_norm, begin, curve)}, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)
            last_saved = elapsed
        started = clock() - elapsed
        x, y = draw()
        if done == 0 and seconds:  # the first draw may count n-grams: the learning rate rises from here
            progress = begin = min(0.9, (clock() - started) / seconds)
        for group in updates.param_groups:
            group["lr"] = learning_rate * learning_rate_factor((progress - begin) / (1 - begin), warmup, final)
        anneal(model, progress)
        loss_of(x, y).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        first_norm = norm if done == 0 else first_norm
        updates.step()
        updates.zero_grad()
        done += 1


@torch.no_grad()
@cpu.large_batches()
def mean_nats(
    loss_of: Callable[[Tensor, Tensor], Tensor], ids: np.ndarray, length: int, limit: int = 2**62, batch: int = 16
) -> float:
    """Return the mean cross-entropy in nats.

    Args:
        loss_of: returns the mean loss of inputs and targets, (B, N) each.
        ids: the text.
        length: tokens per window; windows do not overlap.
        limit: tokens to score at most, from the beginning.
        batch: windows per pass.
    """
    windows = min(len(ids) - 1, limit) // length
    total = 0.0
    for first in range(0, windows, batch):
        starts = range(first, min(windows, first + batch))
        rows = torch.from_numpy(np.stack([ids[i * length : i * length + length + 1] for i in starts]).astype(np.int64))
        total += loss_of(rows[:, :-1], rows[:, 1:]).item() * len(rows)
    return total / windows


def seconds_of(run: Callable[[], Any], repeats: int = 7, warmup: int = 2) -> list[float]:
    """Return the seconds of each timed run; warm-up runs come first and are not timed."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return times


def interleaved(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each run by name. Runs alternate, so that changes of the machine's speed affect all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return times


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return the median in words, with the least and the greatest value where the digits shown differ."""
    middle, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def run_cells(script: str, cells: Sequence[dict[str, Any]], workers: int, log: Path) -> list[dict[str, Any]]:
    """Run each cell in its own process, ``script --cell JSON``, and return their results.

    Each process has one thread: teams of threads that wait for each other cost more than half of the time.

    Args:
        script: path of the benchmark.
        cells: settings of each run, as JSON objects.
        workers: processes at a time.
        log: file with a line of JSON per finished cell. Cells that it has of the same :func:`code_state` are not run
            again.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    code = code_state(script)

    def run(cell: dict[str, Any]) -> dict[str, Any]:
        for result in done:
            if result["cell"] == cell and result.get("code") == code:
                return result
        command = [sys.executable, script, "--cell", json.dumps(cell)]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=one_thread).stdout
        result = {"cell": cell, "code": code, **json.loads(output.splitlines()[-1])}
        with log.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result), flush=True)
        return result

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, cells))


def state_file(script: str, cell: dict[str, Any]) -> Path:
    """Return the file that a cell's training goes on from, see :func:`train`; its folder exists."""
    name = hashlib.sha256(f"{code_state(script)} {json.dumps(cell)}".encode()).hexdigest()[:16]
    file = Path("runs/benchmarks") / f"{Path(script).stem}-{name}.state"
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def code_state(script: str) -> str:
    """Return a hash of what decides the results of a benchmark: its file, the models, the peers, the training loop."""
    library, here = Path(resnet_bk.__file__).parent, Path(__file__)
    files = [Path(script), here, here.with_name("peer_mixers.py"), library / "model.py"]
    files += [library / "training" / name for name in ("muon.py", "optimizers.py", "trainer.py", "windows.py")]
    for folder in ("config", "ops", "layers", "adaptive"):
        files += sorted((library / folder).glob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def conditions(command: str) -> str:
    """Return date, hardware, versions and command: the first paragraph of every results page."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    date = datetime.date.today().isoformat()
    return (
        f"{date}. {cpu or platform.processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads. "
        f"Python {platform.python_version()}, torch {torch.__version__}. Command: `{command}`.\n"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines) + "\n" + "".join(map(table_row, rows))


def table_row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |\n"


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="write the results page here as well as to the screen")
    return parser


def publish(text: str, out: Path | None) -> None:
    """Print the page, and write it to `out` if given."""
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
