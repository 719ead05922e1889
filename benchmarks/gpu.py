"""The library on one GPU, in about ten minutes: kernels, layers, training, decoding, memory.

``python benchmarks/gpu.py --out benchmarks/results/...`` rewrites the page after every number, so a run that is cut off
keeps its results. If a part fails, the page says so and the other parts run. ``--device cpu --quick`` runs everything
in miniature. The exit status is 1 if a part failed.
"""

import argparse
import sys

import torch
from common import arguments, conditions
from gpu_kernels import copy_bandwidth, kernels, mixers
from gpu_models import MODELS, cached_decoding, decoding, memory, training
from gpu_page import Machine, Page

from resnet_bk.ops import available_backends

# Share of the time that each part may take; compilation before training comes on top.
SHARES = {"kernels": 0.12, "mixers": 0.18, "training": 0.45, "decoding": 0.15, "memory": 0.1}
COMPILING = 20  # seconds per trained model


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu")
    parser.add_argument("--quick", action="store_true", help="run everything in miniature")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all parts together")
    parser.add_argument("--train-seconds", type=float, help="training time of each model; default: from --minutes")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="compile blocks")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --quick runs all parts in miniature")
    machine = Machine(options.device, options.quick, options.compile)
    minutes = float("inf") if options.quick else options.minutes
    seconds = {part: 60 * minutes * share for part, share in SHARES.items()}
    each = options.train_seconds or (2 if options.quick else max(5, seconds["training"] / len(MODELS) - COMPILING))
    page = Page(options.out)
    page.add("# On one GPU\n\n" + conditions("python benchmarks/gpu.py " + " ".join(sys.argv[1:])))
    on_gpu = f" CUDA {torch.version.cuda}." if machine.on_gpu else ""
    backends = available_backends(machine.device.type)
    page.add(f"\nDevice: {machine.name}.{on_gpu} Backends: {', '.join(backends)}. Medians.\n")
    bandwidth = copy_bandwidth(machine)
    page.add(f"\nA copy within its memory reads and writes {bandwidth / 1e9:,.0f} GB/s.\n")
    for backend in backends:
        part = kernels(machine, backend, bandwidth)
        page.section(f"Kernels: {backend}", machine, seconds["kernels"] / len(backends), part)
    page.section("Mixer layers", machine, seconds["mixers"], mixers(machine))
    page.section("Training", machine, seconds["training"], training(machine, each))
    page.section("Decoding", machine, seconds["decoding"] / 2, decoding(machine))
    page.section("Decoding: a Transformer", machine, seconds["decoding"] / 2, cached_decoding(machine))
    page.section("A million tokens", machine, seconds["memory"], memory(machine))
    sys.exit(int(page.failed))


if __name__ == "__main__":
    main()
