"""The decorator that compiles numba kernels, and the conversion of their arguments."""

import numpy as np
import torch
from numba import njit
from torch import Tensor

# fastmath allows vectorised reductions and fused multiply-add; NaN, infinity and division stay IEEE.
jit = njit(parallel=True, cache=True, nogil=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    """Return contiguous numpy views; a complex number becomes a last axis of (real, imaginary)."""
    return [(torch.view_as_real(x) if x.is_complex() else x).contiguous().numpy() for x in tensors]
