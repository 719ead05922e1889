"""Which parameters of the layers hold matrices, for optimizers that update a matrix as a whole.

A layer that maps hidden features to hidden features has a method ``matrices() -> list[Matrices]``. All parameters that
no layer names this way are not hidden matrices: embeddings, the head, convolutions, routers, gains, biases.
"""

from typing import NamedTuple

from torch import Tensor, nn


class Matrices(NamedTuple):
    """One matrix or several, side by side in one parameter.

    parameter: (rows, columns), or (number, rows, columns) for matrices of experts.
    sizes: the sizes of the matrices along `dim`. Empty: the whole parameter is one matrix (of each expert).
    dim: the dimension along which they lie side by side; the last one is -1.
    """

    parameter: Tensor
    sizes: tuple[int, ...] = ()
    dim: int = 0


def matrices(model: nn.Module) -> list[Matrices]:
    """Return the matrices that the layers of a model name."""
    found: list[Matrices] = []
    for module in model.modules():
        if hasattr(module, "matrices"):
            found += module.matrices()  # type: ignore[operator]
    return found
