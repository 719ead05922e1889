"""The two recurrences as registered torch operators: one entry each, a backend behind it, autograd, FLOP formulas.

A single step, as in decoding, is a handful of torch calls: :func:`green` and :func:`scan` make them directly.

``resnet_bk::green``  ``g_t = 1 / (d_t - w_t g_{t-1})``               d real or complex, w real
``resnet_bk::scan``   ``S_t = alpha_t S_{t-1} + beta_t k_t v_t^T``,  ``y_t = q_t S_t``   all real

A backend is a module with ``green_forward``, ``green_backward``, ``scan_forward`` and ``scan_backward`` of the
signatures in :mod:`resnet_bk.ops.chunked`, and, where it can skip sites, the pair that :mod:`resnet_bk.ops.sparse` asks
for. Another one plugs in by adding its row to ``_BACKENDS``.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from resnet_bk.ops.chunked import SCAN_CHUNK

# name -> (module, the package it needs, the device type it runs on or None for any), in order of preference
_BACKENDS: dict[str, tuple[str, str, str | None]] = {
    "triton": ("resnet_bk.ops.triton_kernels", "triton", "cuda"),
    "numba": ("resnet_bk.ops.numba_kernels", "numba", "cpu"),
    "chunked": ("resnet_bk.ops.chunked", "torch", None),
}
_forced = os.environ.get("RESNET_BK_BACKEND") or None


@functools.cache
def _load(name: str) -> ModuleType:
    return importlib.import_module(_BACKENDS[name][0])


@functools.cache
def available_backends(device_type: str = "cpu") -> tuple[str, ...]:
    """Names of the installed backends for a device type, preferred first.

    Last on a CPU is ``triton`` where TRITON_INTERPRET is 1: its interpreter is for tests, and never chosen unasked.
    """
    installed = {name: row[2] for name, row in _BACKENDS.items() if importlib.util.find_spec(row[1]) is not None}
    names = [name for name, device in installed.items() if device in (None, device_type)]
    if device_type == "cpu" and "triton" in installed and os.environ.get("TRITON_INTERPRET") == "1":
        names.append("triton")
    return tuple(names)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run everything inside on one backend (the environment variable RESNET_BK_BACKEND does so for a process)."""
    global _forced
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def backend_for(x: Tensor) -> ModuleType:
    names = available_backends(x.device.type)
    if _forced is not None and _forced not in names:
        raise ValueError(f"backend {_forced!r} is not available on {x.device.type}; available: {', '.join(names)}")
    return _load(_forced or names[0])


# ------------------------------------------------------------------------------------------------ green


@torch.library.custom_op("resnet_bk::green", mutates_args=())
def green_op(d: Tensor, w: Tensor, g0: Tensor, mask: Tensor | None) -> Tensor:
    return backend_for(d).green_forward(d, w, g0, mask)


@torch.library.custom_op("resnet_bk::green_backward", mutates_args=())
def green_backward(
    grad: Tensor, g: Tensor, w: Tensor, g0: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return backend_for(g).green_backward(grad, g, w, g0, mask)


@green_op.register_fake
def _(d: Tensor, w: Tensor, g0: Tensor, mask: Tensor | None) -> Tensor:
    return torch.empty_like(d, memory_format=torch.contiguous_format)


@green_backward.register_fake
def _(grad: Tensor, g: Tensor, w: Tensor, g0: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    d, w, g0 = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (g, w, g0))
    return d, w, g0


def _green_by_steps(d: Tensor, w: Tensor, g0: Tensor, mask: Tensor | None) -> Tensor:
    """The recurrence under autograd: for single steps, and for derivatives of the gradient."""
    g, out = g0, []
    for t in range(d.shape[1]):
        here = 1 / (d[:, t] - w[:, t] * g)
        g = here if mask is None else torch.where(mask[:, t, None], here, g)
        out.append(g)
    return torch.stack(out, dim=1)


def _green_setup(ctx, inputs, output) -> None:
    d, w, g0, mask = inputs
    ctx.save_for_backward(d, w, g0, mask, output)


def _green_autograd(ctx, grad: Tensor):
    d, w, g0, mask, g = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
        return *differentiable_vjp(lambda d, w, g0: (_green_by_steps(d, w, g0, mask),), (d, w, g0), (grad,)), None
    return *green_backward(grad, g, w, g0, mask), None


green_op.register_autograd(_green_autograd, setup_context=_green_setup)


def green(d: Tensor, w: Tensor, g0: Tensor, mask: Tensor | None) -> Tensor:
    """``g_t = 1 / (d_t - w_t g_{t-1})`` along dimension 1.

    d: (B, N, H) real or complex, w: (B, N, H) real, g0: (B, H) like d, mask: (B, N) bool, False where the site is not
    part of the chain (there g repeats its predecessor). Returns g, (B, N, H) like d.
    """
    return _green_by_steps(d, w, g0, mask) if d.shape[1] == 1 else green_op(d, w, g0, mask)


# ------------------------------------------------------------------------------------------------- scan


@torch.library.custom_op("resnet_bk::scan", mutates_args=())
def scan_op(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`scan`, and the states entering each chunk, (B, H, M, K, V), which the backward starts from."""
    with torch.autocast(q.device.type, enabled=False):  # inside an operator it would round the products' inputs
        return backend_for(q).scan_forward(q, k, v, alpha, beta, s0)


@torch.library.custom_op("resnet_bk::scan_backward", mutates_args=())
def scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return backend_for(q).scan_backward(grad_y, grad_last, q, k, v, alpha, beta, states)


@scan_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chunks = (q.shape[1] + SCAN_CHUNK - 1) // SCAN_CHUNK
    states = s0.new_empty(s0.shape[0], s0.shape[1], chunks, s0.shape[2], s0.shape[3])
    return v.new_empty(v.shape), s0.new_empty(s0.shape), states


@scan_backward.register_fake
def _(
    grad_y: Tensor,
    grad_last: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: Tensor,
    beta: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, alpha, beta, grad_last))  # type: ignore[return-value]


def _scan_by_steps(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence under autograd: for single steps, and for derivatives of the gradient."""
    s, out = s0, []
    for t in range(q.shape[1]):
        u = beta[:, t, :, None] * v[:, t]
        s = alpha[:, t, :, None, None] * s + k[:, t].unsqueeze(-1) * u.unsqueeze(-2)
        out.append((q[:, t].unsqueeze(-2) @ s).squeeze(-2))
    return torch.stack(out, dim=1), s


def _scan_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[2])


def _scan_autograd(ctx, grad_y: Tensor, grad_last: Tensor, grad_states: Tensor):
    *inputs, states = ctx.saved_tensors
    if torch.is_grad_enabled():
        return differentiable_vjp(_scan_by_steps, tuple(inputs), (grad_y, grad_last))
    q, k, v, alpha, beta, _ = inputs
    return scan_backward(grad_y, grad_last, q, k, v, alpha, beta, states)


scan_op.register_autograd(_scan_autograd, setup_context=_scan_setup)


def scan(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor) -> tuple[Tensor, Tensor]:
    """``S_t = alpha_t S_{t-1} + beta_t k_t v_t^T``, ``y_t = q_t S_t`` along dimension 1.

    q, k: (B, N, H, K), v: (B, N, H, V), alpha, beta: (B, N, H), s0: (B, H, K, V), all real and of one dtype.
    Returns y (B, N, H, V) and the last state (B, H, K, V).
    """
    return _scan_by_steps(q, k, v, alpha, beta, s0) if q.shape[1] == 1 else scan_op(q, k, v, alpha, beta, s0)[:2]


def differentiable_vjp(function, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The vector-Jacobian product of `function` as a graph that can be differentiated again."""
    with torch.enable_grad():
        outputs = function(*inputs)
        needed = [x for x in inputs if x.requires_grad]
        found = iter(torch.autograd.grad(outputs, needed, grads, create_graph=True, materialize_grads=True))
        return tuple(next(found) if x.requires_grad else None for x in inputs)  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------- FLOPs
# Multiply-adds as two operations, as torch counts a matrix product; one division as one.


@register_flop_formula(torch.ops.resnet_bk.green)
def _green_flops(d_shape, w_shape, g0_shape, mask_shape=None, *args, out_shape=None, **kwargs) -> int:
    return 3 * _product(d_shape)


@register_flop_formula(torch.ops.resnet_bk.green_backward)
def _green_backward_flops(grad_shape, *args, out_shape=None, **kwargs) -> int:
    return 6 * _product(grad_shape)


@register_flop_formula(torch.ops.resnet_bk.scan)
def _scan_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return 5 * _product(k_shape) * v_shape[-1]  # decay 1, write 2, read 2, per entry of the state


@register_flop_formula(torch.ops.resnet_bk.scan_backward)
def _scan_backward_flops(grad_y_shape, grad_last_shape, q_shape, *args, out_shape=None, **kwargs) -> int:
    return 14 * _product(q_shape) * grad_y_shape[-1]  # recompute 3 + dq 2, then adjoint 3, dk 2, dv 2, dalpha 2


def _product(shape) -> int:
    return torch.Size(shape).numel()
