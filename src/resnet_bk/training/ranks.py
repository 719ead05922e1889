"""The processes that share one training run, as torchrun and accelerate start them.

Control messages use their own gloo group and CPU tensors, so they never wait for a GPU. The timeout of that group is
long because rank 0 may read a large text while the others wait. A process that exits closes its connections, so the
others fail immediately rather than at the timeout.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, Self

import torch
from torch import distributed as dist

from resnet_bk.checkpoint import CheckpointError
from resnet_bk.config import ConfigError, shown
from resnet_bk.extras import MissingExtraError
from resnet_bk.training.launcher import world_size

TIMEOUT = timedelta(days=7)


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

        Raises:
            ConfigError: the processes cannot meet.
        """
        if world_size() == 1:
            return cls()
        if not dist.is_initialized():
            try:
                if torch.cuda.is_available():
                    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
                dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            except (ValueError, RuntimeError) as error:
                names = "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
                raise ConfigError(f"{names}: the processes cannot meet: {error}; start them with torchrun") from error
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=TIMEOUT))

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def max(self, *values: float) -> list[float]:
        """Return each value's maximum over all ranks. No value may be NaN."""
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

    def gather(self, text: str) -> list[str]:
        """Return the text of every rank."""
        if self.group is None:
            return [text]
        data = text.encode(errors="surrogateescape")
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = len(data)
        dist.all_reduce(sizes, group=self.group)
        table = torch.zeros(self.world_size, int(sizes.max()), dtype=torch.uint8)
        table[self.rank, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
        dist.all_reduce(table, group=self.group)
        texts = [bytes(row[:size].tolist()) for row, size in zip(table, sizes.tolist(), strict=True)]
        return [found.decode(errors="surrogateescape") for found in texts]

    def report(self, failure: str, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return {"failure": ..., "values": ...} of every rank, for :meth:`check_same` and :func:`fail_together`."""
        return [json.loads(text) for text in self.gather(json.dumps({"failure": failure, "values": dict(values)}))]

    def check_same(self, values: Mapping[str, Any], advice: str) -> None:
        """End all ranks unless each has the same values and none has called :func:`fail_together`.

        Args:
            values: settings by name, of types that JSON has.
            advice: end of the error message.

        Raises:
            ConfigError: on rank 0. The other ranks exit with status 2.
        """
        reports = self.report("", values)
        failures = {rank: each["failure"] for rank, each in enumerate(reports) if each["failure"]}
        if failures:
            self._end("; ".join(f"rank {rank}: {text}" for rank, text in failures.items()))
        for rank, each in enumerate(reports):
            for name in reports[0]["values"] | each["values"]:
                first, other = (reports[i]["values"].get(name) for i in (0, rank))
                if first != other:
                    self._end(f"{name}: got {shown(other)} on rank {rank}, {shown(first)} on rank 0; {advice}")

    def _end(self, message: str) -> NoReturn:
        self.shutdown()
        if self.is_rank_zero:
            raise ConfigError(message)
        raise SystemExit(2)

    @contextlib.contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Run the block on rank 0, then on the other ranks. The block must not call a collective method.

        If the block raises on any rank, the ranks on which it did not raise exit and print nothing. Their status is 2
        if the input is at fault, else 1.
        """
        if not self.is_rank_zero:
            self._exit_if(self.max(0.0)[0])
        try:
            yield
        except BaseException as error:
            self.max(2.0 if isinstance(error, ConfigError | CheckpointError | MissingExtraError) else 1.0)
            raise
        if self.is_rank_zero:
            self.max(0.0)
        self._exit_if(self.max(0.0)[0])

    def _exit_if(self, status: float) -> None:
        if status:
            raise SystemExit(int(status))

    def broadcast(self, make: Callable[[], str]) -> str:
        """Call `make` on rank 0 only and return its result on every rank. If it raises there, the others exit."""
        text = ""
        with self.rank_zero_first():
            if self.is_rank_zero:
                text = make()
        return self.gather(text)[0]

    def shutdown(self) -> None:
        """Wait for all ranks, then destroy the process groups, so that rank 0 can continue alone."""
        if self.group is not None:
            dist.barrier(group=self.group)
            dist.destroy_process_group()


def fail_together(message: str) -> str:
    """Report to the other ranks that this one cannot start.

    Returns:
        On rank 0 the message of all ranks. The other ranks exit with status 2.
    """
    ranks = Ranks.start()
    failures = [each["failure"] for each in ranks.report(message, {})]
    ranks.shutdown()
    if not ranks.is_rank_zero:
        raise SystemExit(2)
    others = [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text not in ("", message)]
    return "; ".join([message, *others])
