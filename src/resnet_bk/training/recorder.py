"""The record of a training run: metrics.jsonl and the progress bar."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnet_bk.extras import extra
from resnet_bk.files import append_line, write_whole
from resnet_bk.folders import HELD_OUT

with extra("train"):
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from transformers import TrainerCallback

if TYPE_CHECKING:
    from resnet_bk.training.trainer import BKTrainer

_NEEDED = ("step", "seconds", "bits_per_byte", "bytes_per_second")  # read from a line by scoring and by reports

# Called at each log line with the progress, 0 to 1, and the training bits per byte since the last line.
ProgressCallback = Callable[[float, float], None]


class Recorder(TrainerCallback):
    """Write metrics.jsonl, one line per log; show a progress bar with bits per byte and bytes per second."""

    def __init__(self, trainer: "BKTrainer", path: Path, console: Console, on_progress: ProgressCallback | None = None):
        self.trainer, self.path, self.on_progress = trainer, path, on_progress
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.bar = Progress(*columns, *times, console=console)
        self.task = self.bar.add_task("training", start=False, total=1.0)
        self.held_out = ""  # the last score, as the bar shows it
        self.marks: list[tuple[float, int]] = []  # seconds and step of the last log lines

    def remove_after(self, step: int) -> None:
        """Remove the lines of later steps, which a run that resumes after `step` logs again."""
        if self.path.exists():
            lines = self.path.read_text("utf-8", errors="replace").splitlines()
            write_whole(self.path, "".join(line + "\n" for line in lines if _logged_step(line) <= step))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.marks = [(self.trainer.clock.seconds, state.global_step)]
        self.bar.start_task(self.task)
        self.bar.update(self.task, completed=self.trainer.progress)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=self.trainer.progress)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "bits_per_byte" not in logs:
            return
        self.marks = [*self.marks[-10:], (logs["seconds"], state.global_step)]
        (t0, s0), (t1, s1) = self.marks[0], self.marks[-1]
        rate = (s1 - s0) * self.trainer.bytes_per_step / max(1e-9, t1 - t0)
        line = {"step": state.global_step, "bytes_per_second": round(rate, 1)}
        line |= {name: logs[name] for name in ("seconds", "bits_per_byte", "learning_rate", "grad_norm")}
        line |= {HELD_OUT: logs[HELD_OUT]} if HELD_OUT in logs else {}
        append_line(self.path, json.dumps(line))
        text = f"step {state.global_step}  {logs['bits_per_byte']:.3f} bits/byte  {rate / 1000:.1f} kB/s"
        self.held_out = f"  held out {logs[HELD_OUT]:.3f}" if HELD_OUT in logs else self.held_out
        text += self.held_out
        self.bar.update(self.task, description=text)
        if self.on_progress is not None:
            self.on_progress(self.trainer.progress, logs["bits_per_byte"])

    def close(self) -> None:
        self.bar.stop()


def _logged_step(line: str) -> float:
    """Return the step of a line of metrics.jsonl; infinity for any other line, such as a killed run may leave."""
    try:
        values = json.loads(line)
        return float(values["step"]) if all(math.isfinite(values[name]) for name in _NEEDED) else math.inf
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return math.inf
