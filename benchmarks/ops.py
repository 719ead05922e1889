"""The kernels of the core: speed against the step-by-step loop, scaling with N, share of a mixer layer's time.

Dimensions: B batch, N sites, H chains, D model width.
"""

from collections.abc import Callable

import numpy as np
import torch
from common import arguments, conditions, publish, seconds_of, spread, table
from torch import Tensor

from resnet_bk.config import ModelConfig
from resnet_bk.layers.mixer import PropagatorMixer
from resnet_bk.ops import available_backends, propagate, use_backend
from resnet_bk.ops.kernels import _green_by_steps, green

LANES, LENGTH = 256, 2048


def loop_against_kernels() -> str:
    """Return the table of forward + backward of g on 256 lanes x 2,048 sites, complex64."""
    d = (torch.rand(1, LENGTH, LANES) * 6 - 3 - 1j).requires_grad_()
    w = torch.rand(1, LENGTH, LANES).requires_grad_()
    g0, upstream = torch.zeros(1, LANES, dtype=torch.complex64), torch.randn(1, LENGTH, LANES, dtype=torch.complex64)

    def both(function: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(d, w, g0, None), (d, w), upstream)

    loop = seconds_of(both(_green_by_steps), repeats=5, warmup=1)
    rows = [["step-by-step autograd loop", spread([1e3 * s for s in loop], 1), "1"]]
    for name in available_backends():
        with use_backend(name):
            times = seconds_of(both(green), repeats=15)
        ratios = [a / b for a in loop for b in times]
        rows.append([name, spread([1e3 * s for s in times], 1), spread(ratios, 0)])
    return "\n## Green's function, 256 lanes x 2,048, complex64, forward + backward\n\n" + table(
        ["method", "ms", "times faster than the loop"], rows
    )


def scaling() -> str:
    """Return the table of `propagate`, forward + backward, for N = 1K to 1M, with the slope of log time over log N."""
    rows = []
    for name in available_backends():
        lengths, times = [2**i for i in range(10, 21, 2)], []
        for n in lengths:
            a = (-2 - torch.rand(1, n, 2)).requires_grad_()
            q, k, v = (torch.randn(1, n, 2, 16).requires_grad_() for _ in range(3))

            def step(a: Tensor = a, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> object:
                return torch.autograd.grad(propagate(q, k, v, a, 0.0)[0].sum(), (q, k, v, a))

            with use_backend(name):
                times.append(min(seconds_of(step, repeats=3, warmup=1)))
        slope = np.polyfit(np.log(lengths), np.log(times), 1)[0]
        rows.append([name, *(f"{1e3 * t:.1f}" for t in times), f"{slope:.2f}"])
    header = ["backend", *(f"N = {n:,}" for n in lengths), "slope of log time / log N"]
    return "\n## propagate, 2 chains of width 16, forward + backward: ms\n\n" + table(header, rows)


def share_of_a_layer() -> str:
    """Return the table of one mixer layer at D = 256, N = 2,048: its core against its linear projections."""
    mixer = PropagatorMixer(ModelConfig(d_model=256, num_experts=1))
    x = torch.randn(1, 2048, 256, requires_grad=True)
    q, k, v = (torch.randn(1, 2048, mixer.heads, mixer.width).requires_grad_() for _ in range(3))
    a, z = (t.detach().requires_grad_() for t in mixer.energies(x))
    linears = (mixer.in_proj, mixer.out_proj, mixer.energies.potential)
    upstream = [torch.randn(1, 2048, layer.out_features) for layer in linears]
    y = torch.randn_like(v)

    def projections() -> object:
        return torch.autograd.grad([layer(x) for layer in linears], (x, *(m.weight for m in linears)), upstream)

    def core() -> object:
        return torch.autograd.grad(propagate(q, k, v, a, z)[0], (q, k, v, a, z), y)

    rows = []
    for name in available_backends():
        with use_backend(name):
            pairs = [(seconds_of(core, 1, 1)[0], seconds_of(projections, 1, 1)[0]) for _ in range(15)]
        rows.append(
            [name, *(spread([1e3 * p[i] for p in pairs], 1) for i in (0, 1)), spread([p[0] / p[1] for p in pairs], 2)]
        )
    header = ["backend", "core, ms", "linear projections, ms", "core / projections"]
    return f"\n## One mixer layer, D = 256, N = 2,048, {mixer.heads} heads, forward + backward\n\n" + table(
        header, rows
    )


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.manual_seed(0)
    text = "# Kernels\n\n" + conditions("python benchmarks/ops.py") + "\nMedian (least to greatest).\n"
    publish(text + loop_against_kernels() + scaling() + share_of_a_layer(), options.out)


if __name__ == "__main__":
    main()
