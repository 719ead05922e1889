"""Train experts by difficulty and color a text by how many experts each byte used.

    python examples/conditional_moe_demo.py [--steps 400] [--target 1.5] [--zero 0] [--identity 0]

Trains two small byte models on modules of the Python standard library. In one, each byte uses four of eight experts; in
the other the router takes more experts where it is less sure. Shows held-out text: dark where one expert was enough.
"""

import argparse

import torch
from coloring import LENGTH, by_level, fit, held_out_run, legend, stdlib
from rich.console import Console

from resnet_bk import LanguageModel
from resnet_bk.layers.feedforward import ExpertsRecord
from resnet_bk.model import ModelOutput


def reports(output: ModelOutput) -> list[ExpertsRecord]:
    """Return the records of the experts, one per feed-forward."""
    return [record for record in output.records if isinstance(record, ExpertsRecord)]


def used(output: ModelOutput) -> str:
    """Return the mean number of experts per byte and the load of the busiest one, in words."""
    found = reports(output)
    load = sum(record.load for record in found)
    busiest = load.max().item() / load.double().mean().item()
    mean = sum(record.mean_used for record in found) / len(found)
    return f"{mean:.2f} experts per byte, the busiest {busiest:.2f}x the mean"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="training steps of each model")
    parser.add_argument("--target", type=float, default=1.5, help="computing experts per byte on average")
    parser.add_argument("--zero", type=int, default=0, help="experts that return nothing")
    parser.add_argument("--identity", type=int, default=0, help="experts that return their input")
    options = parser.parse_args()
    console, (train, held_out) = Console(), stdlib()
    conditional = {"policy": "top_p", "target": options.target, "zero": options.zero, "identity": options.identity}
    layers = 4
    for name, settings in (("always four", {}), ("by difficulty", conditional)):
        console.print(f"\n{name}", style="bold")
        torch.manual_seed(0)
        model = LanguageModel(
            259, d_model=64, n_layers=layers, num_experts=8, top_k=4, d_ff=88, n_seq=LENGTH, experts=settings
        )
        fit(model, train, options.steps, console, used)
        x, output = held_out_run(model.eval(), held_out, console)
        console.print(used(output))
        mean = torch.stack([record.used[0] for record in reports(output)]).double().mean(0)
        console.print("experts per byte, mean over the layers:", legend(0, 4, ""))
        console.print(by_level(x[0], mean.round().long(), 4))


if __name__ == "__main__":
    main()
