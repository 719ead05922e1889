"""Versions of what produced a result."""

import os
import platform
from importlib import metadata

import torch

from resnet_bk import __version__


def versions() -> dict[str, str]:
    """Return the versions of the packages, and the machine with the cores and threads that the process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "resnet-bk": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _installed("transformers"),
        "machine": f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads",
    }


def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def version_lines() -> list[str]:
    """Return each version after its name."""
    return [f"{name} {version}" for name, version in versions().items()]
