"""Versions of what produced a result."""

import os

import torch

from resnet_bk.study.versions import versions


def test_only_the_cores_that_the_process_may_use_are_counted(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5}, raising=False)
    assert versions()["machine"].endswith(f", 2 cores, {torch.get_num_threads()} threads")
