"""The processes that share one training run, as torchrun and accelerate start them.

Control messages use their own gloo group and CPU tensors, so they never wait for a GPU. The timeout of that group is
long because rank 0 may read a large text while the others wait. A process that exits closes its connections, so the
others fail immediately rather than at the timeout.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
from torch import distributed as dist

TIMEOUT = timedelta(days=7)


def world_size() -> int:
    """Return the number of processes that a launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of a run.

    All methods are collective: all ranks must call them, in the same order. Only the property is_rank_zero is not.

    Attributes:
        rank: index of this process, from 0.
        world_size: number of processes.
        group: the gloo group for control messages; None if there is one process only.
    """

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def start(cls) -> Self:
        """Initialise the process group that a launcher's environment variables describe, unless that is done already.

        With one process, return its rank 0 without a group.
        """
        if world_size() == 1:
            return cls()
        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=TIMEOUT))

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def max(self, *values: float) -> list[float]:
        """Return the maximum over all ranks of each value. No value may be NaN."""
        table = torch.tensor(values, dtype=torch.float64)
        if self.group is not None:
            dist.all_reduce(table, dist.ReduceOp.MAX, group=self.group)
        return table.tolist()

    def mean(self, value: float) -> float:
        """Return the mean over all ranks."""
        total = torch.tensor(value / self.world_size, dtype=torch.float64)
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total.item()

    @contextlib.contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Run the block on rank 0, then on the other ranks. The block must not call a collective method.

        If the block raises on rank 0, the others exit with status 1 and print nothing: rank 0 reports the error.
        """
        if not self.is_rank_zero and self.max(0.0)[0]:
            raise SystemExit(1)
        try:
            yield
        except BaseException:
            if self.is_rank_zero:
                self.max(1.0)
            raise
        if self.is_rank_zero:
            self.max(0.0)

    def broadcast(self, make: Callable[[], str]) -> str:
        """Call `make` on rank 0 only and return its result on every rank. If it raises there, the others exit."""
        text = b""
        with self.rank_zero_first():
            if self.is_rank_zero:
                text = make().encode(errors="surrogateescape")
        size = int(self.max(len(text))[0])
        if self.group is None or size == 0:
            return text.decode(errors="surrogateescape")
        table = torch.frombuffer(bytearray(text.ljust(size)), dtype=torch.uint8)
        dist.broadcast(table, src=0, group=self.group)
        return bytes(table.tolist()).decode(errors="surrogateescape")

    def shutdown(self) -> None:
        """Wait for all ranks, then destroy the process groups, so that rank 0 can work on while the others exit."""
        if self.group is not None:
            dist.barrier(group=self.group)
            dist.destroy_process_group()
