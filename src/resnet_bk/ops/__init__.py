"""The BK core as functions. ``naive`` is the definition; README.md has the derivations."""

from resnet_bk.ops.core import PropagatorState, SparseState, Sparsity, left_green, propagate, resolvent_diagonal
from resnet_bk.ops.kernels import available_backends, use_backend

__all__ = [
    "PropagatorState",
    "SparseState",
    "Sparsity",
    "available_backends",
    "left_green",
    "propagate",
    "resolvent_diagonal",
    "use_backend",
]
