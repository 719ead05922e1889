"""Train adaptive computation time and color a text by how many blocks each byte ran.

    python examples/act_demo.py [--steps 400] [--target 0.5]

Trains two small byte models on modules of the Python standard library. In one all bytes run eight blocks; in the other
a byte may stop early. Shows held-out text: dark where few blocks were enough, bright where many ran.
"""

import argparse

import numpy as np
import torch
from coloring import LENGTH, by_level, fit, held_out_run, legend, stdlib
from rich.console import Console

from resnet_bk import LanguageModel
from resnet_bk.adaptive.depth import DepthRecord
from resnet_bk.model import ModelOutput


def depth_record(output: ModelOutput) -> DepthRecord | None:
    """Return the record of adaptive depth; None where the model has none."""
    return next((record for record in output.records if isinstance(record, DepthRecord)), None)


def blocks(output: ModelOutput) -> str:
    """Return the mean number of blocks per byte in words; empty without adaptive depth."""
    record = depth_record(output)
    return "" if record is None else f"{record.mean_blocks:.2f} blocks per byte"


def report(model: LanguageModel, held_out: np.ndarray, console: Console) -> None:
    """Print perplexity, blocks and time on held-out windows, then one of them in color."""
    x, output = held_out_run(model, held_out, console)
    if record := depth_record(output):
        console.print(
            f"{record.mean_blocks:.2f} of {record.available} blocks per byte:", legend(1, record.available, "blocks")
        )
        console.print(by_level(x[0], record.blocks[0] - 1, record.available - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="training steps of each model")
    parser.add_argument("--target", type=float, default=0.5, help="share of the blocks to run on average")
    options = parser.parse_args()
    console, (train, held_out) = Console(), stdlib()
    for depth in ({"policy": "none"}, {"policy": "act", "target": options.target}):
        console.print(f"\ndepth: {depth}", style="bold")
        torch.manual_seed(0)
        model = LanguageModel(259, d_model=64, n_layers=8, n_seq=LENGTH, depth=depth)
        fit(model, train, options.steps, console, blocks)
        report(model.eval(), held_out, console)


if __name__ == "__main__":
    main()
