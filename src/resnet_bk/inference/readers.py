"""Read tokens of one text and return the logits after them: by the engine alone, or by a model.

Dimensions: N tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from resnet_bk.engine.state import EngineState
from resnet_bk.inference.sampling import NOT_FINITE, Sampler

if TYPE_CHECKING:
    from resnet_bk.engine.decoder import Decoder
    from resnet_bk.engine.engine import Engine
    from resnet_bk.model import LanguageModel


PIECE = 64  # tokens of a prompt that one call of the engine reads


class Reader(Protocol):
    """Reads one text.

    Attributes:
        vocabulary: number of logits.
        share: share of the blocks that ran for tokens read one at a time; None if it is not known.
        new_engine: an engine that was compiled for this text.
    """

    vocabulary: int

    @property
    def share(self) -> float | None: ...
    @property
    def new_engine(self) -> "Engine | None": ...

    def read(self, ids: Sequence[int]) -> np.ndarray:
        """Read the next tokens of the text, (N,), and return the logits (V,) after the last token of the text.

        The next call may change them in place.
        """
        ...

    def write(self, ids: Sequence[int], sampler: Sampler, count: int, end: int) -> list[int]:
        """Read the next tokens of the text, (N,), choose others, and read all of these but the last one.

        Args:
            ids: to read first.
            sampler: chooses; its settings are plain.
            count: the most tokens to choose, at least 1.
            end: the token that ends a text. Nothing is chosen after it.

        Returns:
            The tokens that were chosen, at least one.

        Raises:
            ValueError: a logit is NaN, or none is finite.
        """
        ...


class _Share:
    """The share of the blocks that the engine ran for tokens read one at a time."""

    def __init__(self) -> None:
        self.blocks = self.possible = 0

    @property
    def value(self) -> float | None:
        return self.blocks / self.possible if self.possible else None


def _write(
    state: EngineState,
    logits: np.ndarray,
    share: _Share,
    ids: Sequence[int],
    sampler: Sampler | None = None,
    count: int = 0,
    end: int = -1,
) -> list[int]:
    """Read, and with a sampler also write, by the engine of a state, see :meth:`Reader.write`.

    State, logits and share change in place. Nothing interrupts a call of the engine, so prompts are read in pieces.
    """
    for first in range(0, len(ids) - 1, PIECE):
        state.engine.write(ids[first : min(first + PIECE, len(ids) - 1)], state, logits)
    random, temperature = ((), 0.0) if sampler is None else (sampler.random(count), sampler.settings.temperature)
    try:
        written = state.engine.write(ids[-1:], state, logits, random, temperature, end)
    except FloatingPointError as error:
        raise ValueError(NOT_FINITE) from error
    share.blocks += written.blocks
    share.possible += written.read * state.engine.code.blocks
    return written.tokens


class EngineReader:
    """Reads with an engine, without torch."""

    def __init__(self, engine: "Engine", is_new: bool = False):
        """Begin a text. is_new: the engine was compiled for this text."""
        self.new_engine = engine if is_new else None
        self.vocabulary = engine.code.vocabulary
        self._state, self._share = engine.start(), _Share()
        self._logits = np.zeros(self.vocabulary, engine.code.weights.dtype)

    @property
    def share(self) -> float | None:
        return self._share.value

    def read(self, ids: Sequence[int]) -> np.ndarray:
        _write(self._state, self._logits, self._share, ids)
        return self._logits

    def write(self, ids: Sequence[int], sampler: Sampler, count: int, end: int) -> list[int]:
        return _write(self._state, self._logits, self._share, ids, sampler, count, end)


class ModelReader:
    """Reads with a model: several tokens in parallel, single ones by its decoder, which uses the engine if it can."""

    def __init__(self, model: "LanguageModel", decoder: "Decoder"):
        self._model, self._decoder, self._share = model, decoder, _Share()  # a decoder does not keep its model
        self._state: Sequence[Any] | EngineState | None = None
        self.vocabulary = model.config.vocab_size
        self._logits = np.zeros(self.vocabulary, np.float32)

    @property
    def share(self) -> float | None:
        return self._share.value

    @property
    def new_engine(self) -> "Engine | None":
        """The engine that the decoder has compiled; None if there is none."""
        return self._decoder.engine

    def read(self, ids: Sequence[int]) -> np.ndarray:
        import torch

        from resnet_bk.engine.conversion import to_torch

        model = self._model
        if not ids:
            return self._logits
        with torch.no_grad():
            tokens = torch.tensor([list(ids)], device=model.embed.weight.device)
            if self._state is not None and len(ids) == 1:
                logits, self._state = self._decoder.step(tokens, self._state)
            else:
                features = model.features(tokens, state=None if self._state is None else to_torch(self._state))
                logits, self._state = model.head(features.x[:, -1]), features.state
        if isinstance(self._state, EngineState):
            engine = self._state.engine
            self._share.blocks += int(engine.blocks(self._state)[0])
            self._share.possible += engine.code.blocks
        self._logits = logits[0].to(torch.promote_types(logits.dtype, torch.float32)).cpu().numpy()
        return self._logits

    def write(self, ids: Sequence[int], sampler: Sampler, count: int, end: int) -> list[int]:
        if isinstance(self._state, EngineState) and len(ids) <= 1:
            return _write(self._state, self._logits, self._share, ids, sampler, count, end)
        return [sampler(self.read(ids))]
