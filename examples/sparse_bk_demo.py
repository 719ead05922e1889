"""Train learned sparsity in the BK core and color a text by how many mixers kept each byte.

    python examples/sparse_bk_demo.py [--steps 400] [--target 0.5]

Trains two small byte models on modules of the Python standard library. The chains of one have a site for every byte;
the other learns which sites to leave out. Shows held-out text: dark where every mixer left the byte out, bright where
all kept it. Then times a core with more and more sites left out.
"""

import argparse
import time

import torch
from coloring import LENGTH, by_level, fit, held_out_run, legend, stdlib
from rich.console import Console

from resnet_bk import LanguageModel
from resnet_bk.layers.mixer import Energies
from resnet_bk.layers.sparse import SparsityRecord
from resnet_bk.model import ModelOutput
from resnet_bk.ops import Sparsity, propagate


def reports(output: ModelOutput) -> list[SparsityRecord]:
    """Return the records of the sparse chains, one per mixer."""
    return [record for record in output.records if isinstance(record, SparsityRecord)]


def left_out(output: ModelOutput) -> str:
    """Return the mean share of sites left out, in words; empty without sparsity."""
    found = reports(output)
    return f"{sum(r.sparsity for r in found) / len(found):.2f} of sites left out" if found else ""


def clock(console: Console, length: int = 16_384, heads: int = 4, width: int = 32) -> None:
    """Print the time of forward and backward of one core, by the share of its sites that are left out."""
    a, z = Energies(heads * width, heads, "real")(torch.randn(1, length, heads * width))
    v = torch.randn(1, length, heads, width, requires_grad=True)
    for share in (0.0, 0.25, 0.5, 0.75):
        gate = (torch.rand(1, length) >= share).float()
        sparsity = Sparsity(gate, torch.full((heads,), 0.9), torch.full((heads,), 0.5)) if share else None
        sites = length if sparsity is None else int(gate.sum())
        q, k = (torch.randn(1, sites, heads, width, requires_grad=True) for _ in range(2))
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            y, _ = propagate(q, k, v, a.detach(), z.detach(), sparsity=sparsity)
            y.backward(torch.ones_like(y))
            seconds.append(time.perf_counter() - started)
        console.print(f"{length:,} sites, {share:.2f} left out: {1000 * min(seconds):.0f} ms forward and backward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="training steps of each model")
    parser.add_argument("--target", type=float, default=0.5, help="share of the sites to leave out")
    options = parser.parse_args()
    console, (train, held_out) = Console(), stdlib()
    layers = 4
    for target in (0.0, options.target):
        console.print(f"\nsparsity: {target}", style="bold")
        torch.manual_seed(0)
        model = LanguageModel(259, d_model=128, n_layers=layers, n_seq=LENGTH, sparsity={"target": target})
        fit(model, train, options.steps, console, left_out)
        x, output = held_out_run(model.eval(), held_out, console)
        if found := reports(output):
            console.print(left_out(output) + "; kept by", legend(0, layers, f"of {layers} mixers"))
            console.print(by_level(x[0], sum(r.kept[0].long() for r in found), layers))
    console.print()
    clock(console)


if __name__ == "__main__":
    main()
