"""Shared by all tests: deterministic seeds, kernel backends."""

import os
from pathlib import Path

# Small tensors: a second thread would cost more than it brings. Before torch is imported; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels on the CPU

from resnet_bk.ops import available_backends, use_backend

hypothesis.settings.register_profile("ci", max_examples=500, derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("ci")

SHARED = Path(os.environ.get("RESNET_BK_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=[name for name in available_backends() if name != "triton"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=available_backends())
def every_backend(request):
    """Triton's interpreter, too, a thousand times slower: for tests of a few calls."""
    with use_backend(request.param):
        yield request.param
