"""Settings of a process that computes large batches on a CPU: the library of matrix products, and memory that is kept.

Neither changes what is computed. On an AMD EPYC with AVX-512 both together make a training step of small models 1.5
times as fast.
"""

import contextlib
import ctypes
import functools
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

SHAPE, REPEATS = (1024, 64, 256), 10  # rows, inner and columns of the product that is timed
CLEARLY_FASTER = 0.8  # share of the time
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD = -1, -3, 2**25  # of glibc's mallopt

_lock, _blocks, _before = threading.Lock(), 0, "none"  # number of open blocks, and the setting before the first


@contextlib.contextmanager
def large_batches() -> Iterator[None]:
    """Use oneDNN's products in float32 inside the block if they are faster here, and keep freed memory.

    torch computes products in float32 with MKL, which runs on half of the registers of CPUs that are not Intel's. A
    setting of torch leads products to oneDNN instead. Its name allows them to be rounded to bfloat16, which oneDNN does
    with AMX only; there it is not used, nor anywhere else where a product is not as exact as MKL's.

    The memory that is freed is kept until the process ends. glibc would give back large tensors at once, and the system
    clears each page that it gives out again.
    """
    global _blocks, _before
    _keep_memory()
    faster = _onednn_is_faster()
    with _lock:
        if _blocks == 0:
            _before = _products().fp32_precision
        _blocks += 1
        if _before == "none" and faster:
            _products().fp32_precision = "bf16"
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if _blocks == 0:
                _products().fp32_precision = _before


def _products() -> Any:
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@functools.cache
def _onednn_is_faster() -> bool:
    """Return whether oneDNN computes a product in clearly less time than MKL, and as exactly."""
    if not torch.backends.mkldnn.is_available() or torch.cpu._is_amx_tile_supported():
        return False
    rows, inner, columns = SHAPE
    generator = torch.Generator("cpu").manual_seed(0)
    x, weight = (torch.randn(size, inner, generator=generator, device="cpu") for size in (rows, columns))
    exact = x.double() @ weight.double().T
    products, errors = _products(), {}
    before, seconds = products.fp32_precision, {"none": float("inf"), "bf16": float("inf")}
    try:
        with torch.autocast("cpu", enabled=False):
            for _ in range(REPEATS):
                for setting in seconds:
                    products.fp32_precision = setting
                    started = time.perf_counter()
                    y = x @ weight.T
                    seconds[setting] = min(seconds[setting], time.perf_counter() - started)
                    errors[setting] = float((y.double() - exact).abs().max())
    finally:
        products.fp32_precision = before
    return seconds["bf16"] < CLEARLY_FASTER * seconds["none"] and errors["bf16"] < 4 * errors["none"]


@functools.cache
def _keep_memory() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library other than glibc
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
            mallopt(_TRIM_THRESHOLD, 2**31 - 1)
