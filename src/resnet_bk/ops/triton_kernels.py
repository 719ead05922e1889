"""GPU kernels in Triton (extra ``gpu``), preferred for CUDA tensors if Triton is installed and passes its check.

Signatures and results are those of :mod:`resnet_bk.ops.chunked`; ``triton_check.py`` compares the results on the card
before the kernels are used. With TRITON_INTERPRET=1, :func:`resnet_bk.ops.use_backend` can also run them, slowly, on
CPU tensors; tests without a GPU do so.
"""

from resnet_bk.ops.triton_conv import conv_backward, conv_forward
from resnet_bk.ops.triton_green import green_backward, green_forward
from resnet_bk.ops.triton_scan import scan_backward, scan_forward

__all__ = ["conv_backward", "conv_forward", "green_backward", "green_forward", "scan_backward", "scan_forward"]
