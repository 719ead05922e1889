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

    def span(self, first: int, end: int) -> "EngineState":
        """Return the states of some rows in a row. They are not copied: steps change them here too."""
        return EngineState(self.numbers[first:end], self.wholes[first:end], self.engine)

    def put(self, row: int, other: "EngineState") -> None:
        """Replace the state of a row by the only one of another state."""
        self.numbers[row], self.wholes[row] = other.numbers[0], other.wholes[0]

    def set_threshold(self, value: float) -> None:
        """Let adaptive depth use another threshold in the steps of these rows."""
        for place in self.engine.code.thresholds:
            self.part(place)[...] = value

    def copy(self) -> "EngineState":
        return EngineState(self.numbers.copy(), self.wholes.copy(), self.engine)

    def __deepcopy__(self, memo: Any) -> "EngineState":
        return self.copy()

    def part(self, place: Place) -> np.ndarray:
        """Return a view of a part, see :meth:`resnet_bk.engine.code.Place.part`."""
        return place.part(self.numbers, self.wholes)
