"""Processes that wait for work: imports take seconds, so all tests share them. They meet through a file, no port."""

import gc
import importlib
import multiprocessing
import os
import sys
import traceback
from datetime import timedelta

PATIENCE = 180  # seconds that a job may take, the first one compiling kernels


def _work(rank, world, connection):
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    import torch

    torch.set_num_threads(1)
    while True:
        module, name, arguments, size, meeting = connection.recv()
        try:
            connection.send((True, _job(module, name, arguments, rank, size, meeting)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


def _job(module, name, arguments, rank, size, meeting):
    import torch
    from torch import distributed as dist

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    for variable, value in place.items():  # as a launcher says it; it says nothing to a process that is alone
        os.environ.pop(variable, None)
        if size > 1:
            os.environ[variable] = str(value)
    function = getattr(importlib.import_module(module), name)
    torch.manual_seed(0)
    if size > 1:
        limit = timedelta(seconds=PATIENCE)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=limit)
        dist.barrier()  # so that none is done and gone before another has met it
    try:
        return function(rank, *arguments)
    finally:
        _forget()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # a trainer that failed holds its group, and connections close with the last that does


def _forget():
    """accelerate, where a job used it, remembers the job's processes."""
    if state := sys.modules.get("accelerate.state"):
        for remembered in (state.AcceleratorState, state.GradientState, state.PartialState):
            remembered._reset_state()


class Crew:
    """Runs a function of a test module, ``function(rank, *arguments)``, in several processes at once."""

    def __init__(self, folder, world):
        context = multiprocessing.get_context("spawn")
        self.folder, self.jobs, self.members = folder, 0, []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, world, there), daemon=True)
            process.start()
            self.members.append((process, here))

    def run(self, size, function, *arguments):
        """What `function` returns on each of `size` ranks. A failure or a wait of PATIENCE seconds fails the test."""
        self.jobs += 1
        meeting = self.folder / f"meeting-{self.jobs}"
        for _, connection in self.members[:size]:
            connection.send((function.__module__, function.__name__, arguments, size, str(meeting)))
        results, errors = [], []
        for rank, (_, connection) in enumerate(self.members[:size]):
            if not connection.poll(PATIENCE + 10):
                self.dismiss()
                raise TimeoutError(f"rank {rank} of {function.__name__} did not answer; all are dismissed")
            good, result = connection.recv()
            (results if good else errors).append(result)
        assert not errors, "\n".join(errors)
        return results

    def dismiss(self):
        for process, _ in self.members:
            process.kill()
            process.join()
