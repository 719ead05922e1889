"""The two recurrences of the core as registered torch operators, with backends, autograd and FLOP formulas.

``resnet_bk::green``  ``g_t = 1 / (d_t - w_t g_{t-1})``                                   d real or complex, w real
``resnet_bk::scan``   ``S_t = alpha_t S_{t-1} + beta_t k_t v_t^T``,  ``y_t = q_t S_t``    all real

:func:`green` and :func:`scan` call the operators. A single step, as in decoding, they compute in a few torch calls.

A backend is a module with the functions ``green_*``, ``scan_*``, ``delta_scan_*``, ``conv_*`` and ``ngram_sum_*`` of
:mod:`resnet_bk.ops.chunked`, each ``*_forward`` and ``*_backward``, and with ``find_ngrams`` and ``recent_ngrams``. It
may have ``sparse_scan_forward`` and ``sparse_scan_backward``, see :mod:`resnet_bk.ops.sparse`. To add a backend, add
its row to ``_BACKENDS``.

Dimensions: B batch, N sites, H chains, K key width, V value width, M chunks of SCAN_CHUNK sites.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from resnet_bk.config import ConfigError
from resnet_bk.ops.chunked import SCAN_CHUNK
from resnet_bk.ops.flops import GREEN, GREEN_BACKWARD, SCAN, SCAN_BACKWARD

# name -> (module, package that it needs, device type that it runs on, None for any), in order of preference
_BACKENDS: dict[str, tuple[str, str, str | None]] = {
    "triton": ("resnet_bk.ops.triton_kernels", "triton", "cuda"),
    "numba": ("resnet_bk.ops.numba_kernels", "numba", "cpu"),
    "chunked": ("resnet_bk.ops.chunked", "torch", None),
}
_defects: dict[str, str] = {}  # name -> why the backend cannot be used, "" if it can


def _chosen() -> str | None:
    """Return the backend that the environment asks for, None if it does not."""
    name = os.environ.get("RESNET_BK_BACKEND") or None
    if name not in (None, *_BACKENDS):
        raise ConfigError(f"RESNET_BK_BACKEND: got {name!r}, allowed {', '.join(_BACKENDS)}; or unset it")
    return name


_forced = _chosen()


@functools.cache
def load_backend(name: str) -> ModuleType:
    return importlib.import_module(_BACKENDS[name][0])


@functools.cache
def _installed(device_type: str) -> tuple[str, ...]:
    specs = {name: importlib.util.find_spec(row[1]) for name, row in _BACKENDS.items()}
    # A folder that happens to have a package's name is found too, but has no location.
    installed = {name: _BACKENDS[name][2] for name, spec in specs.items() if spec is not None and spec.has_location}
    names = [name for name, device in installed.items() if device in (None, device_type)]
    if device_type == "cpu" and "triton" in installed and os.environ.get("TRITON_INTERPRET") == "1":
        names.append("triton")
    return tuple(names)


def _defect(name: str) -> str:
    """Return why an installed backend cannot be used, "" if it can."""
    if name not in _defects:
        try:
            load_backend(name)
            _defects[name] = ""
        except Exception as error:  # a broken package raises anything
            _defects[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return _defects[name]


def available_backends(device_type: str = "cpu") -> tuple[str, ...]:
    """Return the names of the backends that can run on a device type, in order of preference.

    On a CPU ``triton`` is the last one if TRITON_INTERPRET is 1. Its interpreter is for tests and must be asked for.
    """
    return tuple(name for name in _installed(device_type) if not _defect(name))


def _after_fork() -> None:
    """Let a forked child compute: only the parent has the threads of OpenMP and numba, and waiting for them hangs."""
    if load_backend.cache_info().currsize:  # a backend is loaded, so its threads may run
        torch.set_num_threads(1)
    with contextlib.suppress(KeyError, AttributeError, ValueError):  # numba has not been imported, or has no threads
        sys.modules["numba"].threading_layer()
        _defects["numba"] = "the process is a fork of one that ran numba; start it with multiprocessing's 'spawn'"


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside the context. The environment variable RESNET_BK_BACKEND does so for a whole process.

    A forced ``triton`` is used without the check that ``backend_for`` requires.
    """
    global _forced
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def preferred_backend(device_type: str) -> str:
    """Return the name of the forced backend, or of the first one that can be used; warn once about those before it.

    Raises:
        ConfigError: the forced backend cannot be used on the device type.
    """
    defect = f"not available on {device_type}"
    for name in _installed(device_type):
        if _forced in (None, name):
            if not (defect := _defect(name)):
                return name
            if _forced is None:
                _warn(f"backend {name!r} cannot be used ({defect}); a slower one is used instead")
    allowed = ", ".join(available_backends(device_type))
    raise ConfigError(
        f"RESNET_BK_BACKEND or use_backend: got {_forced!r}, which cannot be used ({defect}), allowed {allowed}; numba "
        "comes with pip install 'resnet-bk[cpu-fast]', triton with 'resnet-bk[gpu]'"
    )


def backend_for(x: Tensor) -> ModuleType:
    """Return the backend for the device of x.

    Before Triton is used on a device for the first time, its kernels are compared with the chunked backend there. If
    they differ, this warns once and returns the chunked backend. A forced backend is not checked.
    """
    name = preferred_backend(x.device.type)
    if name == "triton" and _forced is None:
        from resnet_bk.ops.triton_check import trusted  # not at the top: it imports Triton

        name = name if trusted(x.device) else "chunked"
    return load_backend(name)


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
    """Run the recurrence under autograd, for single steps and for second derivatives."""
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
    """Compute ``g_t = 1 / (d_t - w_t g_{t-1})`` along dimension 1.

    Args:
        d: (B, N, H) real or complex.
        w: (B, N, H) real.
        g0: (B, H) like d, g before the first site.
        mask: (B, N) bool, False where a position is not part of the chain; there g repeats the value before it.

    Returns:
        g, (B, N, H) like d.
    """
    return _green_by_steps(d, w, g0, mask) if d.shape[1] == 1 else green_op(d, w, g0, mask)


# ------------------------------------------------------------------------------------------------- scan


@torch.library.custom_op("resnet_bk::scan", mutates_args=())
def scan_op(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run :func:`scan` and return also the states that enter each chunk, (B, H, M, K, V) flattened, for the backward.

    They are flattened because torch.export would tell apart M = 1 and M > 1, and so export for a range of N only.
    """
    with torch.autocast(q.device.type, enabled=False):  # autocast would round the inputs of the products
        y, last, states = backend_for(q).scan_forward(q, k, v, alpha, beta, s0)
    return y, last, states.flatten()


@torch.library.custom_op("resnet_bk::scan_backward", mutates_args=())
def scan_backward(
    grad_y: Tensor, grad_last: Tensor, q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        states = states.view(*grad_last.shape[:2], -1, *grad_last.shape[2:])
        return backend_for(q).scan_backward(grad_y, grad_last, q, k, v, alpha, beta, states)


@scan_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return v.new_empty(v.shape), s0.new_empty(s0.shape), empty_states(q, s0)


def empty_states(q: Tensor, s0: Tensor) -> Tensor:
    """Return an uninitialised tensor for the states that enter each chunk, flattened."""
    return s0.new_empty((q.shape[1] + SCAN_CHUNK - 1) // SCAN_CHUNK * s0.numel())


@scan_backward.register_fake
def _(grad_y, grad_last, q, k, v, alpha, beta, states):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, alpha, beta, grad_last))


def _scan_by_steps(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor) -> tuple[Tensor, Tensor]:
    """Run the recurrence under autograd, for single steps and for second derivatives."""
    s, out = s0, []
    with torch.autocast(q.device.type, enabled=False):  # as in the operator
        for t in range(q.shape[1]):
            u = beta[:, t, :, None] * v[:, t]
            s = alpha[:, t, :, None, None] * s + k[:, t].unsqueeze(-1) * u.unsqueeze(-2)
            out.append((q[:, t].unsqueeze(-2) @ s).squeeze(-2))
    return torch.stack(out, dim=1), s


def given(grad: Tensor | None, like: Tensor) -> Tensor:
    """Return the gradient of an output, zeros like `like` if none arrived."""
    return torch.zeros_like(like) if grad is None else grad


def _scan_setup(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # no zeros for the states, which nothing differentiates
    ctx.save_for_backward(*inputs, output[2])


def _scan_autograd(ctx, grad_y: Tensor | None, grad_last: Tensor | None, grad_states: None):
    *inputs, states = ctx.saved_tensors
    grad_y, grad_last = given(grad_y, inputs[2]), given(grad_last, inputs[5])
    if torch.is_grad_enabled():
        return differentiable_vjp(_scan_by_steps, tuple(inputs), (grad_y, grad_last))
    q, k, v, alpha, beta, _ = inputs
    return scan_backward(grad_y, grad_last, q, k, v, alpha, beta, states)


scan_op.register_autograd(_scan_autograd, setup_context=_scan_setup)


def scan(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, s0: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``S_t = alpha_t S_{t-1} + beta_t k_t v_t^T`` and ``y_t = q_t S_t`` along dimension 1.

    All inputs are real and of one dtype.

    Args:
        q: (B, N, H, K).
        k: (B, N, H, K).
        v: (B, N, H, V).
        alpha: (B, N, H).
        beta: (B, N, H).
        s0: (B, H, K, V), the state before the first site.

    Returns:
        y (B, N, H, V) and the last state (B, H, K, V).
    """
    return _scan_by_steps(q, k, v, alpha, beta, s0) if q.shape[1] == 1 else scan_op(q, k, v, alpha, beta, s0)[:2]


def differentiable_vjp(function, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the vector-Jacobian product of `function` as a graph that can be differentiated again.

    Args:
        function: maps the inputs to a tensor or a tuple of tensors.
        inputs: tensors; those that do not require a gradient get None.
        grads: gradients of the outputs.
    """
    with torch.enable_grad():
        outputs = function(*inputs)
        needed = [x for x in inputs if x.requires_grad]
        found = iter(torch.autograd.grad(outputs, needed, grads, create_graph=True, materialize_grads=True))
        return tuple(next(found) if x.requires_grad else None for x in inputs)  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------- FLOPs


@register_flop_formula(torch.ops.resnet_bk.green)
def _green_flops(d_shape, w_shape, g0_shape, mask_shape=None, *args, out_shape=None, **kwargs) -> int:
    return GREEN * _product(d_shape)


@register_flop_formula(torch.ops.resnet_bk.green_backward)
def _green_backward_flops(grad_shape, *args, out_shape=None, **kwargs) -> int:
    return GREEN_BACKWARD * _product(grad_shape)


@register_flop_formula(torch.ops.resnet_bk.scan)
def _scan_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return SCAN * _product(k_shape) * v_shape[-1]


@register_flop_formula(torch.ops.resnet_bk.scan_backward)
def _scan_backward_flops(grad_y_shape, grad_last_shape, q_shape, *args, out_shape=None, **kwargs) -> int:
    return SCAN_BACKWARD * _product(q_shape) * grad_y_shape[-1]


def _product(shape) -> int:
    return torch.Size(shape).numel()
