"""The processes of one run, as torchrun and accelerate start them: who is first, and what all of them agree on.

What they tell each other here goes over a gloo group of its own, in CPU tensors: it waits for no device, and it waits
as long as it takes, since the first rank may read a large text while the others have nothing to do. A process that ends
closes its connections, so the others fail at once instead of waiting for it.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
from torch import distributed as dist

PATIENCE = timedelta(days=7)


def launched() -> int:
    """How many processes share this command's work; 1 where no launcher started it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@dataclass(frozen=True)
class Ranks:
    """rank: of this process, from 0; world: how many there are; group: None where there is one."""

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def start(cls) -> Self:
        """Meet the other processes that a launcher started; alone without one."""
        if launched() == 1:
            return cls()
        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=PATIENCE))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def largest(self, *values: float) -> list[float]:
        """Of each value the largest that any rank gives; none may be NaN."""
        table = torch.tensor(values, dtype=torch.float64)
        if self.group is not None:
            dist.all_reduce(table, dist.ReduceOp.MAX, group=self.group)
        return table.tolist()

    def mean(self, value: float) -> float:
        """Over all ranks."""
        total = torch.tensor(value / self.world, dtype=torch.float64)
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total.item()

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """The first rank goes through the block, then the others do. Where it raises, they leave without a word: the
        first one says why."""
        if not self.is_first and self.largest(0.0)[0]:
            raise SystemExit(1)
        try:
            yield
        except BaseException:
            if self.is_first:
                self.largest(1.0)
            raise
        if self.is_first:
            self.largest(0.0)

    def told(self, make: Callable[[], str]) -> str:
        """What `make` returns on the first rank; the others do not call it. Where it raises there, they leave."""
        text = b""
        with self.first():
            if self.is_first:
                text = make().encode(errors="surrogateescape")
        size = int(self.largest(len(text))[0])
        if self.group is None or size == 0:
            return text.decode(errors="surrogateescape")
        table = torch.frombuffer(bytearray(text.ljust(size)), dtype=torch.uint8)
        dist.broadcast(table, src=0, group=self.group)
        return bytes(table.tolist()).decode(errors="surrogateescape")

    def leave(self) -> None:
        """All together: what follows is done without the others, however long it takes."""
        if self.group is not None:
            dist.barrier(group=self.group)
            dist.destroy_process_group()
