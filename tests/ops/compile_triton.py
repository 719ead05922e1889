"""Compile all kernels of the Triton backend for an H100, without one; print each name and its bytes of shared memory.

The backend is called as usual, on CPU tensors of the dtypes named on the command line. Its kernels are compiled for
their arguments and not launched.
"""

import sys
import warnings
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from resnet_bk.ops import triton_kernels


def compile_only(kernel, grid):
    def launch(*args, **options):
        compiled = kernel.run(*args, grid=grid, warmup=True, **options)
        print(kernel.__name__, compiled.metadata.shared)

    return launch


warnings.simplefilter("error")
target = GPUTarget("cuda", 90, 32)
driver.set_active(
    SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
)
JITFunction.__getitem__ = compile_only

for dtype, mask in ((torch.float32, None), (torch.complex64, torch.ones(2, 64, dtype=torch.bool))):
    d, w = torch.zeros(2, 64, 4, dtype=dtype), torch.zeros(2, 64, 4)
    triton_kernels.green_forward(d, w, d[:, 0], mask)
    triton_kernels.green_backward(d, d, w, d[:, 0], mask)

for dtype in (getattr(torch, name) for name in sys.argv[1:]):
    q, v = torch.zeros(2, 128, 4, 64, dtype=dtype), torch.zeros(2, 128, 4, 40, dtype=dtype)
    alpha, s0 = torch.zeros(2, 128, 4, dtype=dtype), torch.zeros(2, 4, 64, 40, dtype=dtype)
    y, last, states = triton_kernels.scan_forward(q, q, v, alpha, alpha, s0)
    triton_kernels.scan_backward(y, last, q, q, v, alpha, alpha, states)
    y, last, states, error = triton_kernels.delta_scan_forward(q, q, v, alpha, alpha, s0)
    triton_kernels.delta_scan_backward(y, last, q, q, alpha, alpha, states, error)
    x, weight = v.flatten(2), torch.zeros(4, 160, dtype=dtype)
    triton_kernels.conv_backward(triton_kernels.conv_forward(x, weight), x, weight)
