"""The conversion of a kernel's arguments."""

import numpy as np
import torch
from torch import Tensor


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    """Return numpy views, of copies where tensors are not contiguous; complex numbers get an axis (real, imaginary)."""
    return [(torch.view_as_real(x) if x.is_complex() else x).contiguous().numpy() for x in tensors]
