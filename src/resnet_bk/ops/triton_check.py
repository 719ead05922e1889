"""Check of the Triton kernels on the card that they run on, before they are used there.

Tests on other machines cannot see an error that the compiler makes for one card only. Triton 3.4.0 to 3.7.0 is reported
to compute wrong gradients of gated scans on Hopper (github.com/fla-org/flash-linear-attention, issue 640 and pull
request 983), and GPU builds of torch 2.11 bring Triton 3.6.0.
"""

import functools
import warnings
from types import ModuleType

import torch
import triton
from torch import Tensor

from resnet_bk.ops import chunked, triton_kernels, triton_scan

LENGTH, WIDTH = 141, 64  # five chunks of the scan, the last one not full; two blocks of keys and of values


@functools.cache
def trusted(device: torch.device) -> bool:
    """Return True if the Triton kernels in float32 agree with the chunked backend in float64; warn if they do not.

    The kernels run once for each device of a process.
    """
    with torch.autocast(device.type, enabled=False):
        exact, found = _outputs(chunked, torch.float64, device), _outputs(triton_kernels, torch.float32, device)
    allowed = 1e-2 if torch.backends.cuda.matmul.fp32_precision == "tf32" else 1e-4
    for name in exact:
        errors = [(x - y).norm() / y.norm() for x, y in zip(found[name], exact[name], strict=True)]
        error = float(torch.stack(errors).max())  # NaN if one of them is
        if not error <= allowed:
            versions = f"Triton {triton.__version__} and torch {torch.__version__} on {device}"
            warnings.warn(
                f"{name} kernel of {versions}: got a relative error of {error:.1e}, allowed {allowed:.0e}; the slower "
                "backend 'chunked' is used instead of 'triton'",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
    return True


def _outputs(kernels: ModuleType, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Tensor, ...]]:
    """Return the outputs and gradients of each kernel on fixed inputs; the incoming gradients are the outputs."""
    normal = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), device="cpu")
    heads = max(1, triton_scan.PROGRAMS // 2)  # cuts each chain into two segments, of more than one chunk each
    q, k, v, s0 = *normal(3, 1, LENGTH, heads, WIDTH), normal(1, heads, WIDTH, WIDTH)
    w, alpha, beta = normal(3, 1, LENGTH, heads).sigmoid()
    x, taps = normal(1, LENGTH + 3, 2 * WIDTH), normal(4, 2 * WIDTH)
    mask = (alpha > 0.3)[..., 0].to(device)
    q, k, v, s0, w, alpha, beta, x, taps = (each.to(device, dtype) for each in (q, k, v, s0, w, alpha, beta, x, taps))
    found = {}
    for name, d in (("green", -2.2 - beta), ("complex green", torch.complex(-beta, -w))):
        g = kernels.green_forward(d, w, d[:, 0], mask)
        found[name] = (g, *kernels.green_backward(g, g, w, d[:, 0], mask))
    y, last, states = kernels.scan_forward(q, k, v, alpha, beta, s0)
    found["scan"] = (y, last, *kernels.scan_backward(y, last, q, k, v, alpha, beta, states))
    k = torch.nn.functional.normalize(k, dim=-1)  # or the delta rule is not stable
    y, last, states, error = kernels.delta_scan_forward(q, k, v, alpha, beta, s0)
    gradients = kernels.delta_scan_backward(y, last, q, k, alpha, beta, states, error)
    found["delta_scan"] = (y, last, error, *gradients)
    y = kernels.conv_forward(x, taps)
    found["convolution"] = (y, *kernels.conv_backward(y, x, taps))
    return found
