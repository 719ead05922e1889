"""The machine that benchmarks/gpu.py measures, and the page that it writes meanwhile."""

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

# Dense bfloat16 FLOPs per second of a card by a part of its name; the longest matching part counts.
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
    """The device, the size of the benchmark, and the time at which its current part should end."""

    def __init__(self, device: str, quick: bool, compiles: bool):
        """Set device ("cuda", "cpu", ...), miniature size (`quick`), and whether blocks are compiled (`compiles`)."""
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
        """Wait until the device has finished."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16)

    def compile(self, module: torch.nn.Module) -> None:
        """Compile a module in place, per shape; in miniature only trace it, which needs no compiler."""
        if self.compiles:
            module.compile(dynamic=False, backend="aot_eager" if self.quick else "inductor")

    def seconds(self, run: Callable[[], Any], repeats: int = 10, warmup: int = 2) -> float:
        """Return the median seconds of a run, the device's work included."""

        def whole() -> None:
            run()
            self.wait()

        return statistics.median(seconds_of(whole, 2 if self.quick else repeats, 1 if self.quick else warmup))

    def forget(self) -> None:
        """Free memory that is no longer used."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def peak_gib(self, run: Callable[[], Any]) -> float:
        """Run once and return the peak memory of the card in GiB; NaN on a CPU."""
        if not self.on_gpu:
            run()
            return float("nan")
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) / 2**30


class Page:
    """The results so far, on the screen and in a file that is rewritten after each addition."""

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
        """Add a section. If it raises an error, the page shows the traceback and the benchmark continues.

        Args:
            title: heading of the section.
            machine: gets the time at which the section should end.
            seconds: time that the section may take.
            parts: yields text to add.
        """
        started = time.perf_counter()
        machine.ends = started + seconds
        self.add(f"\n## {title}\n\n")
        try:
            for part in parts:
                self.add(part)
        except Exception:
            self.failed = True
            self.add(f"\n**Failed here; the results above are valid.**\n\n```\n{traceback.format_exc()}```\n")
        self.add(f"\nThis part took {time.perf_counter() - started:.0f} s.\n")
        torch.compiler.reset()
        machine.forget()
