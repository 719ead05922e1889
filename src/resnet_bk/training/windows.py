"""The training text: its windows, their order, and the tables of n-gram memory that leave out what is trained on.

Dimensions: N tokens of a window.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from resnet_bk.data.tokens import TokenFile
from resnet_bk.extras import extra
from resnet_bk.layers.embedding import NgramMemory

with extra("train"):
    from transformers import TrainerCallback

PARTS = 4  # of a text whose n-grams are counted: more of them cost more counting, fewer leave out more text
PIECE = 2**16  # tokens of the text that stay together in a part


class Windows(Dataset):
    """Non-overlapping windows of a token file; an incomplete last one is left out. Targets are the next tokens.

    The file may hold several sources, one after the other. A window belongs to the source of its first token.

    Attributes:
        bounds: index of the first window of each source; last, the number of windows.
        shares: of the sources in the windows to train on.
        bytes_per_token: mean over the windows to train on.
    """

    def __init__(self, tokens: TokenFile, length: int, starts: Sequence[int] = (0,), shares: Sequence[float] = (1.0,)):
        """Create the windows. starts: index of the first document of each source."""
        self.tokens, self.length, self.shares = tokens, length, tuple(shares)
        ends = [*starts[1:], len(tokens.sizes)]
        begins = [-(-int(tokens.starts[start]) // length) for start in starts]
        self.bounds = [*(min(begin, len(self)) for begin in begins), len(self)]
        self.bytes_per_token = sum(
            share * int(tokens.sizes[start:end].sum()) / int(tokens.starts[end] - tokens.starts[start])
            for share, start, end in zip(shares, starts, ends, strict=True)
        )

    def __len__(self) -> int:
        return (len(self.tokens.ids) - 1) // self.length

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        window = self.tokens.ids[i * self.length : (i + 1) * self.length + 1].astype(np.int64)
        return {"input_ids": window[:-1], "shift_labels": window[1:]}

    def parts(self, per_step: int) -> list[np.ndarray]:
        """Divide the windows in PARTS parts, pieces of the text in turn, and return the indices of each.

        Pieces have at most 65,536 tokens. In short texts they are shorter, so that each part has four, or fewer pieces
        or fewer parts, two at least, where a part would not have the `per_step` windows of an update, or none of a
        source. Each source is divided in the same way.
        """
        for count, least in itertools.product(range(PARTS, 1, -1), (4, 2, 1)):
            each = [self._in_turn(end - begin, count, least) for begin, end in itertools.pairwise(self.bounds)]
            windows = np.stack([np.bincount(part, minlength=count) for part in each])
            if windows.sum(0).min() >= per_step and windows.min() > 0:
                break
        part = np.concatenate(each)
        return [np.flatnonzero(part == i) for i in range(count)]

    def _in_turn(self, windows: int, count: int, least: int) -> np.ndarray:
        """Return the part of each window of a source, pieces of it in turn. least: number of pieces in each part."""
        pieces = count * max(least, math.ceil(windows * self.length / (PIECE * count)))
        return np.arange(windows) * min(pieces, windows) // max(1, windows) % count


class ShuffledSampler(Sampler):
    """All windows, part by part, in an order that depends on the seed and the epoch only.

    So the order is the same on every process and after every resumption. (accelerate's own sampler loses the epoch when
    a run of several processes resumes in the middle of an epoch.) Of several parts, each ends after a whole number of
    steps; the few windows that are left over differ in every epoch.
    """

    def __init__(self, parts: Sequence[np.ndarray], per_step: int, seed: int):
        """Create the sampler. per_step: number of windows of an update, those of all processes together."""
        self.indices, self.seed, self.epoch = parts, seed, 0
        whole = [len(part) // per_step * per_step for part in parts]
        self.sizes = whole if len(parts) > 1 else [len(parts[0])]
        self.ends = np.cumsum(self.sizes) // per_step  # the first step after each part

    def __len__(self) -> int:
        return sum(self.sizes)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        for part, size in zip(self.indices, self.sizes, strict=True):
            yield from rng.permutation(part)[:size].tolist()

    def part(self, step: int) -> int:
        """Return the part that a step trains on; steps are counted from 0 over all epochs."""
        return int(np.searchsorted(self.ends, step % max(1, self.ends[-1]), side="right"))


def collate(rows: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


class HeldBack(TrainerCallback):
    """Count the tables of n-gram memory: one of the whole text, and for each part one without it.

    The first is saved with the model. In training, the memory reads the table without the part that the step trains on.
    While the model trains on a part, a thread counts the table for the next one.
    """

    def __init__(self, memory: NgramMemory, windows: Windows, sampler: ShuffledSampler):
        self.memory, self.windows, self.sampler = memory, windows, sampler
        self.tables: dict[int, Future[Tensor]] = {}

    def count(self) -> None:
        """Count the whole text, and in the meantime the table for the first part."""
        self._begin(0)
        self.memory.count(self.windows.tokens.ids)

    def hold_back(self, step: int) -> None:
        """Let the memory read a table without the part of the text that a step trains on."""
        part = self.sampler.part(step)
        self._begin(part)
        self.memory.held_back = self.tables[part].result()
        self._begin((part + 1) % len(self.sampler.indices))

    def _begin(self, part: int) -> None:
        if part not in self.tables:
            table = self.tables[part] = Future[Tensor]()
            # a daemon: the end of the process does not wait for a table that nothing needs any more
            Thread(target=self._count_without, args=(part, table), daemon=True).start()

    def _count_without(self, part: int, table: "Future[Tensor]") -> None:
        try:
            table.set_result(self._without(part))
        except BaseException as error:  # for the thread that asks for the table
            table.set_exception(error)

    def _without(self, part: int) -> Tensor:
        """Return the table of the text without the targets of a part."""
        ids, length = self.windows.tokens.ids, self.windows.length
        chosen = np.ones(len(ids), bool)
        targets = chosen[1 : 1 + len(self.windows) * length].reshape(-1, length)  # a view: those of each window
        targets[self.sampler.indices[part]] = False
        return self.memory.counted(ids, chosen)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:  # a run that resumes has loaded its table
            self.count()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hold_back(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.memory.held_back = None
        self.tables.clear()
