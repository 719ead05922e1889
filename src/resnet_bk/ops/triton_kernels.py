"""GPU kernels in Triton (extra ``gpu``), preferred for CUDA tensors if Triton is installed and passes its check.

Signatures and results are those of :mod:`resnet_bk.ops.chunked`; ``triton_check.py`` compares the results on the card
before the kernels are used. With TRITON_INTERPRET=1, :func:`resnet_bk.ops.use_backend` can also run them, slowly, on
CPU tensors; tests without a GPU do so.
"""

import atexit
import contextlib
import os
import shutil
import tempfile
import warnings
from pathlib import Path

from triton import knobs

from resnet_bk.ops.chunked_ngrams import find_ngrams, ngram_sum_backward, ngram_sum_forward, recent_ngrams
from resnet_bk.ops.triton_conv import conv_backward, conv_forward
from resnet_bk.ops.triton_delta import delta_scan_backward, delta_scan_forward
from resnet_bk.ops.triton_green import green_backward, green_forward
from resnet_bk.ops.triton_scan import scan_backward, scan_forward

__all__ = [
    "conv_backward",
    "conv_forward",
    "delta_scan_backward",
    "delta_scan_forward",
    "find_ngrams",
    "green_backward",
    "green_forward",
    "ngram_sum_backward",
    "ngram_sum_forward",
    "recent_ngrams",
    "scan_backward",
    "scan_forward",
]


def _is_writable(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return True
    return False


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not in a fork, whose parent still uses it
        shutil.rmtree(folder, ignore_errors=True)


# Triton raises an error where it cannot save a kernel. Without a home directory its folder would be one named "~".
if knobs.cache.dir.startswith("~") or not _is_writable(Path(knobs.cache.dir)):
    warnings.warn(
        f"triton: {knobs.cache.dir} cannot be written, so each process compiles its kernels again; "
        "set TRITON_CACHE_DIR to a folder that can be written",
        RuntimeWarning,
        stacklevel=1,
    )
    knobs.cache.dir = tempfile.mkdtemp(prefix="triton-")
    atexit.register(_remove, knobs.cache.dir, os.getpid())
