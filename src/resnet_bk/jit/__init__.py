"""The decorators that compile kernels with numba, with their threads and their cache; registers in ``simd.py``.

Importing this package raises an ImportError where numba cannot run kernels. It does not import torch.
"""

import contextlib
import functools
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba.core.caching import FunctionCache, NullCache

if numba.version_info[:2] < (0, 63):
    raise ImportError(f"numba {numba.__version__} is too old, 0.63 is needed")
if getattr(numba.config, "DISABLE_JIT", False):
    raise ImportError("NUMBA_DISABLE_JIT is set, kernels would run a thousand times slower")

_LOG = logging.getLogger(__name__)


def _torch_threads() -> int | None:
    """Return the number of threads that torch may use; None before torch is imported."""
    torch: Any = sys.modules.get("torch")
    return torch.get_num_threads() if hasattr(torch, "get_num_threads") else None


_threads = _torch_threads()
# Starts numba's threads. With OpenMP, which torch uses too, this changes torch's number of threads; restore it.
numba.get_num_threads()
if _torch_threads() != _threads:
    sys.modules["torch"].set_num_threads(_threads)
# numba's layer "workqueue" aborts the process if two Python threads run kernels at the same time.
_turn = threading.Lock() if numba.threading_layer() == "workqueue" else contextlib.nullcontext()


class _Cache(FunctionCache):
    """Numba's cache of a kernel on the disk. Damaged files are replaced, and a failure to save is no error."""

    def __init__(self, kernel: Callable[..., None]):
        super().__init__(kernel)
        # Numba compiles a kernel again when its own file changes; it must do so too when what it inlines changes.
        self._cache_file._source_stamp = _stamp(Path(kernel.__code__.co_filename).parent)

    def load_overload(self, sig: tuple[Any, ...], target_context: Any) -> Any:
        found = self._stored(sig, target_context)
        if found is None:
            _say_that_it_compiles()
        return found

    def _stored(self, sig: tuple[Any, ...], target_context: Any) -> Any:
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # damaged files raise the many classes of pickle and LLVM
            with contextlib.suppress(OSError):
                self.flush()
            return None
        # Two processes that compile for different dtypes at the same time may write to one file.
        return found if found is not None and found.signature.args == sig else None

    def save_overload(self, sig: tuple[Any, ...], data: Any) -> None:
        with contextlib.suppress(Exception):
            super().save_overload(sig, data)


@functools.cache
def _say_that_it_compiles() -> None:
    _LOG.info("compiling kernels for this machine, half a minute at most; they are kept for the next time")


@functools.cache
def _stamp(folder: Path) -> tuple[tuple[float, int], ...]:
    """Return the times and sizes of the files that kernels in a folder may inline."""
    package = Path(__file__).parent.parent
    constants = package / "ngram_format.py", package / "config" / "__init__.py"
    files = sorted({*folder.glob("*.py"), *package.glob("jit/*.py"), *constants})
    return tuple((status.st_mtime, status.st_size) for status in (file.stat() for file in files))


def _cache_of(kernel: Callable[..., None]) -> _Cache | NullCache:
    """Return the cache of a kernel; warn and return an empty one if there is no folder to write to."""
    try:
        if not os.environ.get("NUMBA_CACHE_DIR") and not os.environ.get("XDG_CACHE_HOME"):
            Path.home()  # raises an error where numba would make a folder named "~"
        return _Cache(kernel)
    except RuntimeError:
        warnings.warn(
            "numba: no writable folder for compiled kernels, so each process compiles them again; "
            "set NUMBA_CACHE_DIR to a folder that can be written",
            RuntimeWarning,
            stacklevel=1,
        )
        return NullCache()


TASKS = 16  # of kernels that sum gradients: it decides their order, so it does not depend on the threads
# fastmath allows vectorised reductions and fused multiply-add; NaN, infinity and division stay IEEE.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}


def jit_on_one_thread(kernel: Callable[..., None]) -> Callable[..., None]:
    """Compile a kernel without a loop over threads."""
    compiled: Any = numba.njit(nogil=True, **OPTIONS)(kernel)
    compiled._cache = _cache_of(kernel)
    return compiled


def jit(kernel: Callable[..., None], parallel: bool = True) -> Callable[..., None]:
    """Compile a kernel. It runs on the threads that torch may use, or on fewer if numba is limited to fewer.

    parallel: False if the loops over threads are not in the kernel itself, but in functions that it calls.
    """
    compiled: Any = numba.njit(parallel=parallel, nogil=True, **OPTIONS)(kernel)
    compiled._cache = _cache_of(kernel)

    @functools.wraps(kernel)
    def run(*args: np.ndarray) -> None:
        # numba keeps this number per Python thread; autograd may run the backward pass in another one.
        allowed = numba.get_num_threads()
        numba.set_num_threads(min(allowed, _torch_threads() or allowed))
        try:
            with _turn:
                compiled(*args)
        finally:
            numba.set_num_threads(allowed)

    return run
