"""Processes shared by all tests of this folder, since imports take seconds. They meet through a file, not a port."""

import gc
import importlib
import multiprocessing
import os
import sys
import traceback
from datetime import timedelta

TIMEOUT = 180  # seconds per job; the first one compiles kernels


def _work(rank, world, connection):
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    import torch

    torch.set_num_threads(1)
    while True:
        module, name, arguments, size, rendezvous = connection.recv()
        try:
            connection.send((True, _job(module, name, arguments, rank, size, rendezvous)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


def _job(module, name, arguments, rank, size, rendezvous):
    import torch
    from torch import distributed as dist

    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    for variable, value in environment.items():  # as a launcher sets it; a single process has none
        os.environ.pop(variable, None)
        if size > 1:
            os.environ[variable] = str(value)
    function = getattr(importlib.import_module(module), name)
    torch.manual_seed(0)
    if size > 1:
        limit = timedelta(seconds=TIMEOUT)
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=limit)
        dist.barrier()  # no rank finishes before all have joined
    try:
        return function(rank, *arguments)
    finally:
        _reset_accelerate()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # a failed trainer still holds its group; connections close with the last reference


def _reset_accelerate():
    """Clear the process state that accelerate keeps, if a job used it."""
    if state := sys.modules.get("accelerate.state"):
        for singleton in (state.AcceleratorState, state.GradientState, state.PartialState):
            singleton._reset_state()


class Workers:
    """Run a function of a test module, ``function(rank, *arguments)``, in several processes at a time."""

    def __init__(self, folder, world):
        context = multiprocessing.get_context("spawn")
        self.folder, self.jobs, self.processes = folder, 0, []
        for rank in range(world):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, world, there), daemon=True)
            process.start()
            self.processes.append((process, here))

    def run(self, size, function, *arguments):
        """Return what `function` returns on each of `size` ranks. A failure or a timeout fails the test."""
        self.jobs += 1
        rendezvous = self.folder / f"rendezvous-{self.jobs}"
        for _, connection in self.processes[:size]:
            connection.send((function.__module__, function.__name__, arguments, size, str(rendezvous)))
        results, errors = [], []
        for rank, (_, connection) in enumerate(self.processes[:size]):
            if not connection.poll(TIMEOUT + 10):
                self.terminate()
                raise TimeoutError(f"rank {rank} of {function.__name__} did not answer; all are terminated")
            succeeded, result = connection.recv()
            (results if succeeded else errors).append(result)
        assert not errors, "\n".join(errors)
        return results

    def terminate(self):
        for process, _ in self.processes:
            process.kill()
            process.join()
