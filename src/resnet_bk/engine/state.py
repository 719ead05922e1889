"""States of sequences in the engine."""

from typing import TYPE_CHECKING, Any

import numpy as np

from resnet_bk.engine.code import Place

if TYPE_CHECKING:
    from resnet_bk.engine.engine import Engine


class EngineState:
    """States of B sequences.

    Attributes:
        numbers: (B, S), numbers of the states.
        wholes: (B, I) int64, whole numbers of the states; first the token to read, and the blocks that it ran.
        engine: that made it.
    """

    def __init__(self, numbers: np.ndarray, wholes: np.ndarray, engine: "Engine"):
        self.numbers, self.wholes, self.engine = numbers, wholes, engine

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self, index: np.ndarray) -> "EngineState":
        """Return copies of the states of some rows, such as those that a beam search goes on with."""
        return EngineState(self.numbers[index], self.wholes[index], self.engine)

    def copy(self) -> "EngineState":
        return EngineState(self.numbers.copy(), self.wholes.copy(), self.engine)

    def __deepcopy__(self, memo: Any) -> "EngineState":
        return self.copy()

    def part(self, place: Place) -> np.ndarray:
        """Return a view of a part, see :meth:`resnet_bk.engine.code.Place.part`."""
        return place.part(self.numbers, self.wholes)
