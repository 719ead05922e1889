"""The engine: the code of a model, and steps of sequences. It needs numba, not torch.

Dimensions: B rows, V vocabulary.
"""

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numba
import numpy as np

from resnet_bk.engine.code import Code
from resnet_bk.engine.instructions import Op
from resnet_bk.engine.interpreter import BLOCKS, run, write_one, write_one_on_threads
from resnet_bk.engine.layers import SHARED
from resnet_bk.engine.state import EngineState

LONGEST_PAUSE = 4096
_NONE = np.empty(0)


class _Faster:
    """One of two functions with the same results: the faster one, which is measured again now and then.

    Threads halve the time of large matrices where they are free, and wait for each other where other programs run.
    """

    def __init__(self, *functions: Callable[..., None]):
        self._functions, self._seconds = functions, [math.inf] * len(functions)
        self._best, self._calls, self._pause = 0, 0, 2  # _pause: calls between two measurements of the other function

    def __call__(self, *args: Any) -> None:
        """Call a function. The last argument is an array, whose second number the function sets to the steps it ran."""
        self._calls += 1
        tried = self._best if self._calls % self._pause else 1 - self._best
        started = time.perf_counter()
        self._functions[tried](*args)
        self._seconds[tried] = (time.perf_counter() - started) / max(1, args[-1][1])
        if tried == self._best:
            return
        if self._seconds[tried] < self._seconds[self._best]:
            self._best, self._pause = tried, 2
        else:
            self._pause = min(2 * self._pause, LONGEST_PAUSE)


class Written(NamedTuple):
    """Result of :meth:`Engine.write`.

    Attributes:
        tokens: the chosen ones.
        read: number of tokens that were read.
        blocks: number of blocks that ran for them.
    """

    tokens: list[int]
    read: int
    blocks: int


class Engine:
    """A causal model on a CPU, compiled for decoding. It computes what the model does, one token at a time.

    Several threads may run steps, of states of their own.
    """

    def __init__(self, code: Code, nested: Any = None):
        """Create the engine of a compiled model. nested: the places of its state, nested as the model's state is."""
        self.code, self.nested, self._arrays = code, nested, code.arrays
        self._threads = threading.local()
        matrices = [row for row in code.instructions if row[0] in (Op.LINEAR, Op.LINEAR_OF_BYTES)]
        large = max((row[3] * row[4] for row in matrices), default=0) >= SHARED
        self._alone = _Faster(write_one, write_one_on_threads) if large else write_one

    def start(self, rows: int = 1) -> EngineState:
        """Return the states of `rows` sequences before their first token."""
        numbers = np.zeros((rows, self.code.numbers), self.code.weights.dtype)
        state = EngineState(numbers, np.zeros((rows, self.code.wholes), np.int64), self)
        for place in (*self.code.places, *self.code.thresholds):
            state.part(place)[...] = place.first
        return state

    def step(self, ids: np.ndarray | Sequence[int], state: EngineState) -> np.ndarray:
        """Read one token of each row, (B,), and return the logits (B, V). The state changes in place.

        The logits of several rows are in memory that the next step of this thread overwrites.

        Raises:
            IndexError: a token is outside the vocabulary.
            ValueError: the number of ids is not that of the rows, or the state is one of another model.
        """
        if np.shape(ids) != (len(state),):
            raise ValueError(
                f"ids: expected shape ({len(state)},), one token for each row of the state, got {np.shape(ids)}"
            )
        if len(state) > 1:
            return self._read(np.ascontiguousarray(ids, np.int64), np.arange(len(state) + 1), state)
        scratch = self._scratch(ids[0], ids[0], state)
        logits, counts = np.empty(self.code.vocabulary, self.code.weights.dtype), np.empty(3, np.int64)
        places = (*self._arrays, state.numbers, state.wholes, scratch, self.code.logits, logits)
        self._alone(*places, np.array(ids, np.int64), 1, _NONE, 0.0, -1, counts)
        return logits[None]

    def read(self, pieces: Sequence[Sequence[int]], state: EngineState) -> np.ndarray:
        """Read the next tokens of each row, any number of them, and return the logits (B, V) after the last ones.

        The logits of a row that reads no token have no meaning. Otherwise as :meth:`step`.

        Args:
            pieces: tokens of each row, (B,).
            state: of the rows; it changes in place.
        """
        if len(pieces) != len(state):
            raise ValueError(f"pieces: expected {len(state)}, one for each row of the state, got {len(pieces)}")
        if len(pieces) == len(pieces[0]) == 1:
            return self.step(pieces[0], state)
        ids = np.fromiter(itertools.chain.from_iterable(pieces), np.int64)
        return self._read(ids, np.fromiter(itertools.accumulate(map(len, pieces), initial=0), np.int64), state)

    def write(
        self,
        ids: Sequence[int] | np.ndarray,
        state: EngineState,
        logits: np.ndarray,
        random: Sequence[float] | np.ndarray = (),
        temperature: float = 0.0,
        end: int = -1,
    ) -> Written:
        """Read tokens of the only row, then choose one for each number in `random`, and read all but the last one.

        Args:
            ids: tokens to read first.
            state: of one row; it changes in place.
            logits: (V,) like the weights in dtype, after the last token that the row has read; they change in place.
            random: numbers from 0 to below 1, by which tokens are chosen.
            temperature: 0 takes the likeliest token.
            end: the token that ends a text. Nothing is chosen after it.

        Raises:
            FloatingPointError: a logit is NaN, or none is finite.
            IndexError: a token is outside the vocabulary.
            ValueError: the state is one of another model, or has several rows.
        """
        if len(state) != 1:
            raise ValueError(f"state: expected one row, got {len(state)}")
        tokens = np.empty(len(ids) + len(random), np.int64)
        tokens[: len(ids)] = ids
        scratch = self._scratch(tokens[: len(ids)].min(initial=0), tokens[: len(ids)].max(initial=0), state)
        counts = np.empty(3, np.int64)
        settings = len(ids), np.asarray(random, np.float64), float(temperature), end
        places = (*self._arrays, state.numbers, state.wholes, scratch, self.code.logits, logits, tokens)
        self._alone(*places, *settings, counts)
        made, read, blocks = counts.tolist()
        if made < 0:
            raise FloatingPointError("logits: one is NaN or infinite")
        return Written(tokens[len(ids) : len(ids) + made].tolist(), read, blocks)

    def _read(self, ids: np.ndarray, ends: np.ndarray, state: EngineState) -> np.ndarray:
        scratch = self._scratch(ids.min(initial=0), ids.max(initial=0), state)
        groups = min(numba.get_num_threads(), len(state))
        run(*self._arrays, state.numbers, state.wholes, scratch, ids, ends, groups)
        return scratch[: len(state), self.code.logits : self.code.logits + self.code.vocabulary]

    def _scratch(self, least: int, greatest: int, state: EngineState) -> np.ndarray:
        """Return the scratch memory of this thread, after the checks of a state and of the tokens to read."""
        code = self.code
        if not self.fits(state):
            raise ValueError("state: is one of another model; pass a state of this model")
        if least < 0 or greatest >= code.vocabulary:
            raise IndexError(f"ids: got {least} to {greatest}, allowed 0 to {code.vocabulary - 1}")
        scratch: np.ndarray | None = getattr(self._threads, "scratch", None)
        if scratch is None or len(scratch) < len(state):
            scratch = self._threads.scratch = np.zeros((len(state), code.most), code.weights.dtype)
        return scratch

    def fits(self, state: EngineState) -> bool:
        """Return whether a state is one of this model."""
        own, other = self.code, state.engine.code
        same = own is other or (own.places == other.places and own.weights.dtype == other.weights.dtype)
        return same and state.numbers.shape[1] == own.numbers

    def blocks(self, state: EngineState) -> np.ndarray:
        """Return how many blocks the last step ran for each row, (B,)."""
        return state.wholes[:, BLOCKS]
