"""Tests of the decorator of numba kernels: threads, the cache on the disk, versions of numba that cannot be used."""

import errno
import importlib.util
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

numba = pytest.importorskip("numba")

from numba.core.caching import CompileResultCacheImpl, FunctionCache  # noqa: E402

from resnet_bk import jit  # noqa: E402
from resnet_bk.ops import propagate, use_backend  # noqa: E402


def load_again():
    """Return a second copy of the module, imported in the environment that a test has made."""
    spec = importlib.util.find_spec("resnet_bk.jit")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("asked", [3, 20])
def test_kernels_run_on_torchs_number_of_threads_at_most_on_numbas(asked, monkeypatch):
    numbers = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked)
    monkeypatch.setattr(numba, "get_num_threads", lambda: 8)
    monkeypatch.setattr(numba, "set_num_threads", numbers.append)
    q, k, v = (torch.randn(1, 40, 2, 4).requires_grad_() for _ in range(3))
    with use_backend("numba"):
        y, _ = propagate(q, k, v, -3 - torch.rand(1, 40, 2), 0.0)
        in_forward = len(numbers)
        y.sum().backward()
    assert 0 < in_forward < len(numbers)  # the gradient's kernels, too
    assert numbers == [min(asked, 8), 8] * (len(numbers) // 2)  # afterwards the number is what it was


def test_starting_numbas_threads_does_not_change_torchs_number(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(numba, "get_num_threads", lambda: torch.set_num_threads(before + 1))  # as on OpenMP
    try:
        load_again()
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)


def test_on_a_layer_that_is_not_thread_safe_kernels_take_turns(monkeypatch):
    monkeypatch.setattr(numba, "threading_layer", lambda: "workqueue")
    monkeypatch.setattr(numba, "njit", lambda **options: lambda kernel: kernel)
    running, most = [], []

    def kernel():
        running.append(None)
        most.append(len(running))
        time.sleep(0.01)
        running.pop()

    run = load_again().jit(kernel)
    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


# -------------------------------------------------------------------------------------------------- cache


def double(x):
    x[0] *= 2


def compiled():
    """Return `double`, compiled or loaded from the cache as in a new process."""
    found = numba.njit(double)
    found._cache = jit._cache_of(double)
    return found


def doubled(function, dtype):
    x = np.full(1, 21, dtype)
    function(x)
    return x[0]


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The folder of the cache."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return Path(compiled()._cache.cache_path)


@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
@pytest.mark.parametrize("kept", [0, 30])
def test_a_damaged_file_of_the_cache_is_replaced(ending, kept, folder):
    doubled(compiled(), np.float32)
    (damaged,) = folder.glob(f"*{ending}")
    damaged.write_bytes(damaged.read_bytes()[:kept])
    assert doubled(compiled(), np.float32) == 42
    again = compiled()
    assert doubled(again, np.float32) == 42
    assert sum(again.stats.cache_hits.values()) == 1


def test_code_for_another_dtype_is_not_run(folder):
    """Two processes that compile at the same time can both write to the first data file."""
    function = compiled()
    for dtype in (np.float32, np.int64):
        doubled(function, dtype)
    first, second = sorted(folder.glob("*.nbc"))
    shutil.copy(first, second)
    assert doubled(compiled(), np.int64) == 42
    again = compiled()
    assert doubled(again, np.int64) == 42
    assert sum(again.stats.cache_hits.values()) == 1


def test_a_process_that_compiles_says_so_once(folder, caplog):
    caplog.set_level("INFO", "resnet_bk")
    jit._say_that_it_compiles.cache_clear()
    for dtype in (np.float32, np.int64):
        doubled(compiled(), dtype)
    (record,) = caplog.records
    assert "compiling kernels for this machine" in record.message
    caplog.clear()
    jit._say_that_it_compiles.cache_clear()
    assert doubled(compiled(), np.float32) == 42
    assert not caplog.records  # it was kept


def test_a_full_disk_costs_the_cache_only(folder, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FunctionCache, "save_overload", full)
    assert doubled(compiled(), np.float32) == 42
    assert not list(folder.glob("*.nbi"))


def test_without_a_folder_for_the_cache_kernels_compile_and_one_line_says_so(folder, monkeypatch):
    monkeypatch.setattr(CompileResultCacheImpl, "_locator_classes", [])
    with pytest.warns(RuntimeWarning, match="^numba: no writable folder.*set NUMBA_CACHE_DIR") as warned:
        function = compiled()
    assert len(warned) == 1
    assert doubled(function, np.float32) == 42


def test_without_a_home_directory_no_folder_named_tilde_is_made(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(jit, "_Cache", lambda kernel: pytest.fail("the cache was made"))
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR"):
        assert doubled(compiled(), np.float32) == 42


# ----------------------------------------------------------------------------------------- unusable numba


def test_numba_that_cannot_run_the_kernels_is_an_import_error(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(numba, "version_info", (0, 62, 1))
        with pytest.raises(ImportError, match=r"numba .* is too old, 0\.63 is needed"):
            load_again()
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True, raising=False)
    with pytest.raises(ImportError, match="NUMBA_DISABLE_JIT is set"):
        load_again()
