"""Read tokens of one text and return the logits after them: by the engine alone, or by a model.

Dimensions: N tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from resnet_bk.engine.state import EngineState

if TYPE_CHECKING:
    from resnet_bk.engine.decoder import Decoder
    from resnet_bk.engine.engine import Engine
    from resnet_bk.model import LanguageModel


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
        """Read the next tokens of the text, (N,), N >= 1, and return the logits (V,) after the last one."""
        ...


class _Share:
    """Counts the blocks that the engine ran for tokens read one at a time."""

    def __init__(self) -> None:
        self.blocks = self.possible = 0

    def add(self, engine: "Engine", state: EngineState) -> None:
        self.blocks += int(engine.blocks(state)[0])
        self.possible += engine.code.blocks

    @property
    def value(self) -> float | None:
        return self.blocks / self.possible if self.possible else None


class EngineReader:
    """Reads with an engine, without torch."""

    def __init__(self, engine: "Engine", is_new: bool = False):
        """Begin a text. is_new: the engine was compiled for this text."""
        self.new_engine = engine if is_new else None
        self._engine, self._state, self._share = engine, engine.start(), _Share()
        self.vocabulary = engine.code.vocabulary

    @property
    def share(self) -> float | None:
        return self._share.value

    def read(self, ids: Sequence[int]) -> np.ndarray:
        for token in ids:
            logits = self._engine.step((token,), self._state)
        if len(ids) == 1:
            self._share.add(self._engine, self._state)
        return logits[0]


class ModelReader:
    """Reads with a model: several tokens in parallel, single ones by its decoder, which uses the engine if it can."""

    def __init__(self, model: "LanguageModel", decoder: "Decoder"):
        self._model, self._decoder, self._share = model, decoder, _Share()  # a decoder does not keep its model
        self._state: Sequence[Any] | EngineState | None = None
        self.vocabulary = model.config.vocab_size

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
        with torch.no_grad():
            tokens = torch.tensor([list(ids)], device=model.embed.weight.device)
            if self._state is not None and len(ids) == 1:
                logits, self._state = self._decoder.step(tokens, self._state)
            else:
                features = model.features(tokens, state=None if self._state is None else to_torch(self._state))
                logits, self._state = model.head(features.x[:, -1]), features.state
        if isinstance(self._state, EngineState):
            self._share.add(self._state.engine, self._state)
        return logits[0].float().cpu().numpy()
