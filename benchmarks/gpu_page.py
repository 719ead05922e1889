"""The machine that benchmarks/gpu.py measures, and the page it writes while it does."""

import contextlib
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import seconds_of

# Dense bfloat16 operations a second of a card, by a part of its name; of several, the longest.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


class Machine:
    """Where the parts of the benchmark run, how large they are, and when the part that runs should end."""

    def __init__(self, device: str, quick: bool, compiles: bool):
        """quick: in miniature. compiles: whether blocks are compiled."""
        self.device, self.quick, self.compiles = torch.device(device), quick, compiles
        self.ends = float("inf")

    @property
    def late(self) -> bool:
        return time.perf_counter() > self.ends

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.on_gpu else "CPU"

    @property
    def peak_flops(self) -> float | None:
        known = [name for name in PEAK_FLOPS if name in self.name]
        return PEAK_FLOPS[max(known, key=len)] if known else None

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16)

    def compile(self, module: torch.nn.Module) -> None:
        """In place, for the shapes it meets; in miniature only as a graph, which needs no compiler."""
        if self.compiles:
            module.compile(dynamic=False, backend="aot_eager" if self.quick else "inductor")

    def seconds(self, run: Callable[[], Any], repeats: int = 10, warmup: int = 2) -> float:
        """The median, each run waited for."""

        def whole() -> None:
            run()
            self.wait()

        return statistics.median(seconds_of(whole, 2 if self.quick else repeats, 1 if self.quick else warmup))

    def forget(self) -> None:
        """Give back memory that nothing uses."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def peak_gib(self, run: Callable[[], Any]) -> float:
        """GiB of the card's memory at its highest while it ran; nan on a CPU."""
        if not self.on_gpu:
            run()
            return float("nan")
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) / 2**30


class Page:
    """What has been found so far, on the screen and, written anew each time, in a file."""

    def __init__(self, out: Path | None):
        self.out, self.text, self.failed = out, "", False

    def add(self, text: str) -> None:
        print(text, end="", flush=True)
        self.text += text
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            scratch = self.out.with_suffix(".partial")
            scratch.write_text(self.text)
            scratch.replace(self.out)

    def section(self, title: str, machine: Machine, seconds: float, parts: Iterator[str]) -> None:
        """Whatever comes of it: an error is written down, and the page goes on. seconds: what it should take."""
        started = time.perf_counter()
        machine.ends = started + seconds
        self.add(f"\n## {title}\n\n")
        try:
            for part in parts:
                self.add(part)
        except Exception:
            self.failed = True
            self.add(f"\n**Failed here; what is above stands.**\n\n```\n{traceback.format_exc()}```\n")
        self.add(f"\nThis part took {time.perf_counter() - started:.0f} s.\n")
        torch.compiler.reset()
        machine.forget()
