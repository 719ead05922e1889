"""The thread that decodes all texts together: they join and leave between two steps.

The states of running texts are the first rows of one state. A text that ends leaves its row to the last one, so a step
never computes for nobody.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from resnet_bk.extras import extra
from resnet_bk.inference.sampling import NOT_FINITE, choose
from resnet_bk.serve.metrics import Metrics
from resnet_bk.serve.texts import Text

with extra("serve"):
    import numba

if TYPE_CHECKING:
    from resnet_bk.engine.engine import Engine

PROMPT = 256  # tokens of prompts in a step, shared by the texts that read theirs: what others wait for in addition
PAUSE = 0.02  # seconds between two pieces of a text: sending one costs as much as decoding several tokens
STOPPED = "the server is stopping; send the request again later"


class BusyError(Exception):
    """There is no place left for a text."""


class StoppingError(Exception):
    """The server takes no more texts."""


class Scheduler:
    """Decodes texts in a thread of its own, which alone uses the engine's state.

    Attributes:
        engine: decodes.
        rows, queue: numbers of texts that are decoded at the same time, and that may wait.
        metrics: counts them.
    """

    def __init__(self, engine: "Engine", rows: int, queue: int, threads: int, metrics: Metrics):
        """Create a scheduler. threads: that the engine uses."""
        self.rows, self.queue, self.metrics = rows, queue, metrics
        self.engine, self._threads = engine, threads
        self._state, self._blank = engine.start(rows), engine.start()
        self._running: list[Text] = []  # a row each
        self._waiting: deque[Text] = deque()
        self._changed = threading.Condition()  # guards _waiting and _deadline, and wakes the thread
        self._deadline: float | None = None  # by time.monotonic(), set when the server stops
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._published = 0.0
        self._notify: Callable[[Sequence[Text]], None]
        metrics.waiting.set_function(lambda: len(self._waiting))
        metrics.running.set_function(lambda: len(self._running))

    def start(self, notify: Callable[[Sequence[Text]], None]) -> None:
        """Start the thread. notify: called in it with texts that have news."""
        self._notify = notify
        self._thread.start()

    def submit(self, texts: Sequence[Text]) -> None:
        """Begin texts, all of them or none.

        Raises:
            BusyError: they have no place in the queue.
            StoppingError: the server is about to stop.
        """
        with self._changed:
            if self._deadline is not None:
                raise StoppingError(STOPPED)
            if len(self._waiting) + len(self._running) + len(texts) > self.rows + self.queue:
                raise BusyError
            self._waiting.extend(texts)
            self.metrics.texts.inc(len(texts))
            self._changed.notify()

    def cancel(self, texts: Sequence[Text]) -> None:
        """Drop the texts that have not ended yet."""
        with self._changed:
            for text in texts:
                text.is_cancelled = True
            if any(text.is_cancelled for text in self._waiting):
                kept = [text for text in self._waiting if not text.is_cancelled]
                self.metrics.cancelled.inc(len(self._waiting) - len(kept))
                self._waiting = deque(kept)

    def stop(self, seconds: float) -> None:
        """Take no more texts. Those that have not ended after some seconds end with an error, and then the thread."""
        with self._changed:
            self._deadline = min(time.monotonic() + seconds, self._deadline or math.inf)
            self._changed.notify()

    def join(self) -> None:
        """Wait until the thread has ended, see :meth:`stop`."""
        self._thread.join()

    # -------------------------------------------------------------------------------------- in the thread

    def _run(self) -> None:
        numba.set_num_threads(min(self._threads, numba.get_num_threads()))
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._deadline is not None):
                    self._changed.wait()
                if not (self._waiting or self._running):
                    return
                late = self._deadline is not None and time.monotonic() > self._deadline
                left = list(self._waiting) if late else []
                if late:
                    self._waiting.clear()
                else:
                    self._admit()
            if late:
                self._fail([*self._running, *left], STOPPED)
            try:
                self._step()
            except Exception as error:  # of the model, such as NaN, or of the machine: the server goes on
                logging.getLogger(__name__).exception("a step of %d texts failed", len(self._running))
                self._fail(self._running, f"decoding failed: {error}")

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.rows:
            row, text = len(self._running), self._waiting.popleft()
            self._state.put(row, self._blank)
            if text.wanted.threshold is not None:
                self._state.span(row, row + 1).set_threshold(text.wanted.threshold)
            self._running.append(text)
            self.metrics.prompt_tokens.inc(len(text.prompt))

    def _step(self) -> None:
        """Let every running text read its next tokens, and choose one if it has read all."""
        gone = [row for row, text in enumerate(self._running) if text.is_cancelled]
        self.metrics.cancelled.inc(len(gone))
        self._remove(gone)
        texts = self._running
        if not texts:
            return
        started = time.monotonic()
        most = max(1, PROMPT // max(1, sum(text.is_reading for text in texts)))
        state = self._state.span(0, len(texts))
        logits = self.engine.read([text.take(most) for text in texts], state)
        blocks = self.engine.blocks(state).tolist()
        ready, failed = [], np.flatnonzero(~np.isfinite(logits.max(1))).tolist()
        for row in failed:  # such as one whose state has overflowed: the others go on
            texts[row].error = f"decoding failed: {NOT_FINITE}"
            logging.getLogger(__name__).error("a text failed: %s", NOT_FINITE)
        for row, text in enumerate(texts):
            if text.error is not None:
                continue
            if not text.unread:
                ready.append(row)
            elif text.wanted.scores_prompt:
                text.score(logits[row], blocks[row])
        first = self._choose([row for row in ready if texts[row].wanted.limit], logits, blocks)
        now = time.monotonic()
        for text in first:
            self.metrics.first_token.observe(now - text.since)
        self.metrics.step.observe(now - started)
        self._publish(first, sorted([*failed, *(row for row in ready if texts[row].finished is not None)]), now)

    def _choose(self, rows: list[int], logits: np.ndarray, blocks: list[int]) -> list[Text]:
        """Choose the next tokens of the texts in some rows; return the texts whose first tokens these are."""
        if not rows:
            return []
        texts = [self._running[row] for row in rows]
        logits = logits if len(rows) == len(logits) else logits[rows]
        first = [text for text in texts if not text.continuation.tokens]
        tokens = choose([text.continuation.sampler for text in texts], logits)
        for text, token, row, x in zip(texts, tokens, rows, logits, strict=True):
            text.accept(token, x, blocks[row])
        self.metrics.tokens.inc(len(tokens))
        return first

    def _publish(self, first: list[Text], ended: list[int], now: float) -> None:
        """Give clients what is new of texts that begin or end, and now and then of all."""
        texts = {id(text): text for text in (*first, *(self._running[row] for row in ended))}
        if now - self._published > PAUSE:
            texts, self._published = {id(text): text for text in self._running}, now
        for row in ended:
            if self._running[row].error is None:
                self.metrics.text.observe(now - self._running[row].since)
            else:
                self.metrics.failed.inc()
        news = [text for text in texts.values() if text.publish()]
        self._remove(ended)  # first: a client may send its next request at once
        if news:
            self._notify(news)

    def _remove(self, rows: list[int]) -> None:
        """Let texts leave. The last rows move into the places of theirs."""
        for row in reversed(rows):
            last = len(self._running) - 1
            if row < last:
                self._state.put(row, self._state.span(last, last + 1))
                self._running[row] = self._running[last]
            self._running.pop()

    def _fail(self, texts: Sequence[Text], error: str) -> None:
        texts = list(texts)
        self._running.clear()
        self.metrics.failed.inc(len(texts))
        for text in texts:
            text.fail(error)
        self._notify(texts)
