"""The BK core as functions. ``naive.py`` defines them; README.md derives their fast forms."""

from resnet_bk.ops.chain import PropagatorState, SparseState, Sparsity
from resnet_bk.ops.core import left_green, propagate, resolvent_diagonal
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
