"""One text that the server decodes, and the pieces of it that go to its client.

Dimensions: V vocabulary.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from resnet_bk.inference.continuation import Continuation, TextIds
from resnet_bk.inference.sampling import Sampling


@dataclass(frozen=True)
class Wanted:
    """How a text is to go on.

    Attributes:
        sampling: how tokens are chosen.
        limit: largest number of tokens; with 0 the prompt is only read.
        stop: the text ends before the first of these strings.
        seed: of the choices.
        threshold: replaces that of adaptive depth.
        logprobs: number of likeliest tokens to list for each token; None lists nothing.
        scores_prompt: list the log-probabilities of the prompt's tokens too.
        blocks: count the blocks that ran for each token.
    """

    sampling: Sampling
    limit: int
    stop: tuple[str, ...] = ()
    seed: int = 0
    threshold: float | None = None
    logprobs: int | None = None
    scores_prompt: bool = False
    blocks: bool = False


class Token(NamedTuple):
    """A token of a text.

    id: in the vocabulary. text: that it completed. logprob: natural, before the temperature; None where nothing came
    before. top: log-probabilities of the likeliest tokens. blocks: that ran to predict it.
    """

    id: int
    text: str
    logprob: float | None
    top: dict[int, float] | None
    blocks: int


class Piece(NamedTuple):
    """A part of a text that goes to its client. tokens: those of the part, if the client asked about them."""

    text: str
    tokens: list[Token]
    finished: str | None = None
    error: str | None = None


class Text:
    """A text, from the prompt on. The scheduler's thread writes to it, the client's task takes pieces out of `news`.

    Attributes:
        error: why the text ends early; None while nothing is wrong.
        continuation: the text after the prompt.
        news: pieces for the client.
        wake: to be called, in the thread of the client's task, when there are news.
        is_cancelled: nobody waits for it any more.
        since: when it came, by time.monotonic().
    """

    def __init__(self, ids: TextIds, prompt: list[int], vocabulary: int, wanted: Wanted, wake: Callable[[], None]):
        self.wanted, self.prompt, self.wake = wanted, prompt, wake
        self._next, self._read = prompt, 0  # tokens for the model, and how many of them it has read
        self.error: str | None = None
        self.continuation = Continuation(
            ids, prompt, vocabulary, wanted.sampling, limit=wanted.limit, stop=wanted.stop, seed=wanted.seed
        )
        self.news: deque[Piece] = deque()
        self.is_cancelled, self.since = False, time.monotonic()
        self._asks_for_tokens = wanted.logprobs is not None or wanted.blocks
        self._prompt_stream = ids.stream([])
        self._tokens: list[Token] = []
        self._shown: list[str] = []  # pieces of the text in `_tokens`
        if wanted.scores_prompt:
            self._tokens.append(Token(prompt[0], self._next_of_prompt(), None, None, 0))

    @property
    def is_reading(self) -> bool:
        """True until the prompt has been read."""
        return self.unread > 1

    @property
    def unread(self) -> int:
        """Number of tokens that the model has not read yet."""
        return len(self._next) - self._read

    def take(self, most: int) -> list[int]:
        """Return at most this many unread tokens, as the model is about to read them."""
        if self.wanted.scores_prompt:
            most = 1
        piece = self._next[self._read : self._read + most]
        self._read += len(piece)
        return piece

    def score(self, logits: np.ndarray, blocks: int) -> None:
        """Score the next token of the prompt, given the logits (V,) for it."""
        self._tokens.append(self._scored(self._next[self._read], self._next_of_prompt(), logits, blocks))

    def _next_of_prompt(self) -> str:
        """Return the text of the next token of the prompt; with the last one, what is left within a character."""
        text = self._prompt_stream.add(self._next[self._read])
        return text + self._prompt_stream.finish() if self.unread == 1 else text

    def accept(self, token: int, logits: np.ndarray, blocks: int) -> None:
        """Add a chosen token, and read it next. logits: (V,), that it was chosen by."""
        text, before = self.continuation, len(self.continuation.tokens)
        text.accept(token)
        self._next, self._read = [token], 0
        if self._asks_for_tokens:
            self._shown.append(text.take())
            if len(text.tokens) > before:
                self._tokens.append(self._scored(token, self._shown[-1], logits, blocks))

    def _scored(self, token: int, text: str, logits: np.ndarray, blocks: int) -> Token:
        count = self.wanted.logprobs
        if count is None:
            return Token(token, text, None, None, blocks)
        x = logits.astype(np.float64)
        x -= x.max()
        x -= np.log(np.exp(x).sum())
        best = (-x).argsort(kind="stable")[:count].tolist()
        return Token(token, text, float(x[token]), {i: float(x[i]) for i in (*best, token)} if count else None, blocks)

    @property
    def finished(self) -> str | None:
        """ "stop" or "length" if the text is at its end, else None."""
        return self.continuation.finished or ("length" if not self.wanted.limit and not self.unread else None)

    def publish(self) -> bool:
        """Put what is new into `news`. Returns True if there is something."""
        piece = Piece("".join([*self._shown, self.continuation.take()]), self._tokens, self.finished, self.error)
        if not (piece.text or piece.tokens or piece.finished or piece.error):
            return False
        self._tokens, self._shown = [], []
        self.news.append(piece)
        return True

    def fail(self, error: str) -> None:
        """End the text with an error, as the last of its news."""
        self.error = error
        self.publish()
