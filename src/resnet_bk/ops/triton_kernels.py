"""GPU kernels in Triton (extra ``gpu``): chosen for CUDA tensors where Triton is installed.

Same signatures and results as :mod:`resnet_bk.ops.chunked`. With TRITON_INTERPRET=1 they also run, slowly, on CPU
tensors when asked for by :func:`resnet_bk.ops.use_backend`: that is how they are tested without a GPU.
"""

from resnet_bk.ops.triton_conv import conv_backward, conv_forward
from resnet_bk.ops.triton_green import green_backward, green_forward
from resnet_bk.ops.triton_scan import scan_backward, scan_forward

__all__ = ["conv_backward", "conv_forward", "green_backward", "green_forward", "scan_backward", "scan_forward"]
