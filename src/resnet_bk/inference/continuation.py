"""One text that is generated: its tokens, the text that can be shown so far, and its end."""

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from resnet_bk.inference.sampling import Sampler, Sampling


class TextStream(Protocol):
    """See :class:`resnet_bk.data.byte_text.ByteStream`."""

    def add(self, token: int) -> str: ...
    def finish(self) -> str: ...


class TextIds(Protocol):
    """Texts as ids and back, see :class:`resnet_bk.data.byte_text.ByteText`."""

    end: int

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def stream(self, prompt: list[int]) -> TextStream: ...


class Continuation:
    """The text that follows a prompt.

    Attributes:
        sampler: chooses the tokens.
        limit, end: largest number of tokens, and the one that ends a text.
        is_plain: nothing but the temperature changes which token follows, and no text but `end` ends it.
        tokens: chosen so far, without the one that ends a text.
        finished: "stop" at the end of the text or before a stop string, "length" at the limit; None before.
    """

    def __init__(
        self,
        ids: TextIds,
        prompt: list[int],
        vocabulary: int,
        settings: Sampling,
        *,
        limit: int,
        stop: Sequence[str] = (),
        seed: int = 0,
    ):
        """Begin the text after a prompt.

        Args:
            ids: of the model.
            prompt: token ids.
            vocabulary: number of logits.
            settings: how tokens are chosen.
            limit: largest number of tokens.
            stop: the text ends before the first of these strings.
            seed: of the choices.
        """
        self.end, self._stream = ids.end, ids.stream(prompt)
        self.sampler = Sampler(settings, vocabulary, prompt, seed)
        self.limit, self._stop = limit, [text for text in stop if text]
        self.is_plain = settings.is_plain and not self._stop
        self._held = ""  # the end of the text, which may be the beginning of a stop string
        self._ready = ""
        self.tokens: list[int] = []
        self.finished: Literal["stop", "length"] | None = None

    def add(self, logits: np.ndarray) -> int:
        """Choose and return the next token, given its logits (V,)."""
        token = self.sampler(logits)
        self.accept(token)
        return token

    def accept(self, token: int) -> None:
        """Add a token that the sampler has chosen."""
        if token == self.end:
            self._close("stop")
            return
        self.tokens.append(token)
        self._show(self._stream.add(token))
        if self.finished is None and len(self.tokens) >= self.limit:
            self._close("length")

    def take(self) -> str:
        """Return the text that can be shown and was not yet."""
        text, self._ready = self._ready, ""
        return text

    def _show(self, piece: str) -> None:
        text = self._held + piece
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self._ready, self._held, self.finished = self._ready + text[: min(found)], "", "stop"
            return
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._ready, self._held = self._ready + text[: len(text) - held], text[len(text) - held :]

    def _close(self, reason: Literal["stop", "length"]) -> None:
        self._show(self._stream.finish())
        if self.finished is None:
            self._ready, self._held, self.finished = self._ready + self._held, "", reason


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
