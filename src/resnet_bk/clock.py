"""Measuring time."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")


def timed(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """Call `run` and wait for the device to finish.

    Returns:
        What `run` returned, and the elapsed wall-clock time in seconds.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - started


class Clock:
    """Seconds of training over all sessions of a run. It runs between `start` and `stop` only."""

    def __init__(self) -> None:
        self.before: float = 0.0
        self.started: float | None = None

    def start(self, before: float) -> None:
        """Start at `before` seconds, the total of the earlier sessions."""
        self.before, self.started = before, time.perf_counter()

    def stop(self) -> None:
        self.before, self.started = self.seconds, None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stand still in the block, if it runs."""
        running = self.started is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start(self.before)

    @property
    def seconds(self) -> float:
        return self.before + (0.0 if self.started is None else time.perf_counter() - self.started)
