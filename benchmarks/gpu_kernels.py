"""Kernels and mixer layers on a GPU: first that their numbers are right, then how fast they are.

Dimensions: B batch, N sites, H chains (heads), K = V head width, D model width.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import table, table_row
from gpu_page import Machine
from peer_mixers import SoftmaxAttention
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_bk.config import ModelConfig
from resnet_bk.layers.mixer import PropagatorMixer
from resnet_bk.ops import naive, propagate, use_backend
from resnet_bk.ops.delta import delta_scan
from resnet_bk.ops.kernels import green, scan

SHIFTS = {"real": 0.1, "complex": 0.3 + 0.2j}
REGIMES = (*SHIFTS, "bonds")
# Largest relative error allowed for an output or a gradient, by the precision of the inputs.
ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-4}


def copy_bandwidth(machine: Machine) -> float:
    """Return the bytes per second that a copy within the card's memory reads and writes."""
    source = torch.empty(2**20 if machine.quick else 2**29, dtype=torch.bfloat16, device=machine.device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / machine.seconds(lambda: target.copy_(source))


# ------------------------------------------------------------------------------------------------ right


def chain(regime: str, batch: int, n: int, heads: int, width: int) -> list[Tensor]:
    """Return random q, k, v (B, N, H, K), energies and hoppings (B, N, H), float64.

    Bonds have keys of length 1, and strengths of the delta rule in place of energies.
    """
    generator = torch.Generator().manual_seed(n)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, n, heads, generator=generator, dtype=torch.float64)

    q, k, v = torch.randn(3, batch, n, heads, width, generator=generator, dtype=torch.float64)
    if regime == "bonds":
        return [q, F.normalize(k, dim=-1), v, uniform(0, 1), uniform(0.2, 1)]
    energies, hoppings = ((-3, -2), (0.2, 1)) if regime == "real" else ((-3, 3), (0, 2))
    return [q, k, v, uniform(*energies), uniform(*hoppings)]


def with_gradients(propagator: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return y and the gradients of its sum, weighted by fixed random numbers."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = propagator(*inputs)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(y)
    return [y.detach(), *torch.autograd.grad(y, inputs, weight)]


def dense(regime: str) -> Callable[..., Tensor]:
    """Return the dense definition, computed for one sequence, chain by chain."""

    def one(q: Tensor, k: Tensor, v: Tensor, a: Tensor, hop: Tensor) -> Tensor:
        if regime == "bonds":
            return naive.propagate(q, k, v, naive.energies_of_hopping(hop), 0, hop, write_N=a)
        return naive.propagate(q, k, v, a, SHIFTS[regime], hop)

    def run(*inputs: Tensor) -> Tensor:
        return torch.stack([one(*(x[0, :, h] for x in inputs)) for h in range(inputs[0].shape[2])], dim=1).unsqueeze(0)

    return run


def fast(regime: str, backend: str) -> Callable[..., Tensor]:
    """Return the propagator on one backend."""

    def run(q: Tensor, k: Tensor, v: Tensor, a: Tensor, hop: Tensor) -> Tensor:
        with use_backend(backend):
            if regime == "bonds":
                return propagate(q, k, v, None, 0, hop, write=a)[0]
            return propagate(q, k, v, a, SHIFTS[regime], hop)[0]

    return run


def worst(got: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest relative root-mean-square error of the tensors."""
    errors = []
    for x, y in zip(got, expected, strict=True):
        y = y.to(x.device, torch.float64)
        errors.append(((x.double() - y).square().mean() / y.square().mean()).sqrt().item())
    return max(errors)


class WrongNumbersError(AssertionError):
    """A backend computes wrong numbers; its speed is not measured."""


def checked(machine: Machine, backend: str) -> Iterator[str]:
    """Compare outputs and all gradients with the dense float64 definition; at larger sizes with chunked float64.

    Raises:
        WrongNumbersError: an error is above what ALLOWED permits.
    """
    short, long = (2, 33) if machine.quick else (2, 33, 130), 100 if machine.quick else 4097
    wrong = []
    yield table(["regime", "N", "against", *(f"{kind}: relative error" for kind in ("float64", "float32"))], [])
    for regime in REGIMES:
        cases: list[tuple[int, str, list[Tensor], list[Tensor]]] = []
        for n in short:
            inputs = chain(regime, 1, n, 2, 16)
            cases.append((n, "the definition", inputs, with_gradients(dense(regime), inputs)))
        inputs = [x.to(machine.device) for x in chain(regime, 2, long, 4, 64)]
        cases.append((long, "chunked, float64", inputs, with_gradients(fast(regime, "chunked"), inputs)))
        for n, against, inputs, expected in cases:
            errors = {}
            for dtype, allowed in ALLOWED.items():
                got = with_gradients(fast(regime, backend), [x.to(machine.device, dtype) for x in inputs])
                errors[dtype] = worst(got, expected)
                if not errors[dtype] <= allowed:
                    wrong.append(f"{regime}, N = {n}, {dtype}: {errors[dtype]:.1e} where {allowed:.0e} is allowed")
            yield table_row([regime, f"{n:,}", against, *(f"{error:.1e}" for error in errors.values())])
    if wrong:
        raise WrongNumbersError("; ".join(wrong))


# ------------------------------------------------------------------------------------------------- fast


def kernels(machine: Machine, backend: str, bandwidth: float) -> Iterator[str]:
    """Check the backend, then time each kernel against a copy of the bytes that the kernel must move."""
    yield from checked(machine, backend)
    tokens, heads, width = (256, 2, 16) if machine.quick else (2**18, 16, 64)
    yield "\n" + table(["kernel", "B x N x H (x K)", "direction", "ms", "GB/s", "% of a copy's"], [])
    for n in (64, 256) if machine.quick else (2_048, 65_536):
        sites = (tokens // n, n, heads)
        for name, kernel, inputs in (
            ("green, real", lambda d, w, g: green(d, w, g, None), _green_inputs(machine, sites, torch.float32)),
            ("green, complex", lambda d, w, g: green(d, w, g, None), _green_inputs(machine, sites, torch.complex64)),
            ("scan", lambda *x: scan(*x)[0], _scan_inputs(machine, sites, width)),
            ("scan, delta rule", lambda *x: delta_scan(*x)[0], _scan_inputs(machine, sites, width)),
        ):
            shape = f"{sites[0]} x {n:,} x {heads}" + (f" x {width}" if name.startswith("scan") else "")
            if machine.late:
                yield table_row([name, shape, "left out: out of time", "", "", ""])
                continue
            with use_backend(backend):
                for direction, seconds, moved in _both_ways(machine, kernel, inputs):
                    rate = moved / seconds
                    cells = [f"{1e3 * seconds:.3f}", f"{rate / 1e9:,.0f}", f"{100 * rate / bandwidth:.0f}"]
                    yield table_row([name, shape, direction, *cells])


def _both_ways(
    machine: Machine, kernel: Callable[..., Tensor], inputs: list[Tensor]
) -> Iterator[tuple[str, float, int]]:
    """Yield direction, seconds, and bytes that must be read and written: each input, output and gradient once.

    The last input, the state before the first site, is too small to count.
    """
    y = kernel(*inputs)
    upstream = torch.randn_like(y)
    given = sum(x.numel() * x.element_size() for x in inputs[:-1])
    returned = y.numel() * y.element_size()
    with torch.no_grad():
        yield "forward", machine.seconds(lambda: kernel(*inputs)), given + returned
    backward = machine.seconds(lambda: torch.autograd.grad(y, inputs, upstream, retain_graph=True))
    yield "backward", backward, 2 * given + returned


def _green_inputs(machine: Machine, sites: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    d = -2.1 - torch.rand(sites, device=machine.device)
    d = (d + 0.2j if dtype.is_complex else d).to(dtype)
    w = torch.rand(sites, device=machine.device)
    return [x.requires_grad_() for x in (d, w, d.new_zeros(sites[0], sites[2]))]


def _scan_inputs(machine: Machine, sites: tuple[int, int, int], width: int) -> list[Tensor]:
    q, k, v = torch.randn(3, *sites, width, device=machine.device).unbind()
    k = F.normalize(k, dim=-1)  # or the delta rule's state would grow
    alpha, beta = torch.rand(2, *sites, device=machine.device).unbind()
    state = q.new_zeros(sites[0], sites[2], width, width)
    return [x.detach().requires_grad_() for x in (q, k, v, alpha, beta, state)]


# ----------------------------------------------------------------------------------------------- layers


class First(nn.Module):
    """A layer (B, N, D) -> (B, N, D) that hides its further inputs and outputs."""

    def __init__(self, layer: nn.Module, *others: Any):
        super().__init__()
        self.layer, self.others = layer, others

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x, *self.others)
        return y[0] if isinstance(y, tuple) else y


def _ours(config: ModelConfig) -> nn.Module:
    return First(PropagatorMixer(config), None, None)


def _attention(config: ModelConfig) -> nn.Module:
    return First(SoftmaxAttention(config), None, None)


def _gated_linear(config: ModelConfig) -> nn.Module:
    from fla.layers import SimpleGatedLinearAttention

    layer = SimpleGatedLinearAttention(
        hidden_size=config.d_model, num_heads=config.heads, expand_k=1.0, expand_v=1.0, use_short_conv=True
    )
    return First(layer)


def _mamba2(config: ModelConfig) -> nn.Module:
    from mamba_ssm import Mamba2

    return First(Mamba2(d_model=config.d_model, headdim=config.d_model // config.heads))


# name -> function that makes the layer; package it needs
MIXERS: dict[str, tuple[Callable[[ModelConfig], nn.Module], str]] = {
    "propagator (ours)": (_ours, "torch"),
    "softmax attention, RoPE, SDPA": (_attention, "torch"),
    "simple GLA (flash-linear-attention)": (_gated_linear, "fla"),
    "Mamba-2 (mamba_ssm)": (_mamba2, "mamba_ssm"),
}


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def mixers(machine: Machine) -> Iterator[str]:
    """Time forward and backward of one layer of each kind, at a constant number of tokens."""
    width, tokens = (32, 128) if machine.quick else (1_024, 65_536)
    config = ModelConfig(d_model=width, n_heads=max(1, width // 64), num_experts=1)
    lengths = (32, 128) if machine.quick else (1_024, 4_096, 16_384, 65_536)
    missing = [f"{name}: {package} is not installed" for name, (_, package) in MIXERS.items() if not installed(package)]
    yield f"D = {width:,}, {config.heads} heads, bfloat16 by autocast, {tokens:,} tokens in rows of N; forward and "
    yield "backward. Ours and softmax attention are compiled; the others use the kernels of their packages. "
    yield "Left out: " + ("; ".join(missing) or "none") + ".\n\n"
    yield table(["layer", "parameters", "N", "ms", "thousand tokens/s"], [])
    present = {name: make for name, (make, package) in MIXERS.items() if installed(package)}
    for n in lengths:
        for name, make in present.items():
            if machine.late:
                yield table_row([name, "", f"{n:,}", "left out: out of time", ""])
                continue
            torch.manual_seed(0)
            layer = make(config).to(machine.device)
            if make in (_ours, _attention):
                machine.compile(layer)
            x = torch.randn(tokens // n, n, width, device=machine.device, requires_grad=True)
            wanted = [x, *layer.parameters()]

            def step(layer: nn.Module = layer, x: Tensor = x, wanted: list[Tensor] = wanted) -> None:
                with machine.autocast():
                    y = layer(x)
                torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)

            seconds = machine.seconds(step)
            count = sum(p.numel() for p in layer.parameters())
            yield table_row([name, f"{count:,}", f"{n:,}", f"{1e3 * seconds:.2f}", f"{tokens / seconds / 1e3:,.0f}"])
