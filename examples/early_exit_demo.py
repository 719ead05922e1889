"""Train early exit, decode at several thresholds, and decode with drafts by the first two blocks.

    python examples/early_exit_demo.py [--steps 400] [--threshold 0.9]

Trains a small byte model on modules of the Python standard library. A byte stops after two, four or six of eight blocks
once the model is sure enough. Shows held-out text colored by the block after which each byte stopped, then decoding
speed and perplexity at several thresholds. Self-speculative decoding writes the same text as at full depth, in fewer
runs of the later blocks.
"""

import argparse
import time
from collections.abc import Callable

import torch
from act_demo import blocks as blocks_of
from act_demo import report
from coloring import LENGTH, fit, stdlib
from rich.console import Console
from rich.table import Table

from resnet_bk import LanguageModel, encode
from resnet_bk.inference.decoding import generate
from resnet_bk.inference.speculation import speculate

PROMPT, NEW = "def read(self, size=-1):\n", 300


def timed(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Return the result of `run` and its milliseconds per token, the best of three runs."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - started)
    return result, 1000 * min(seconds) / NEW


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="training steps")
    parser.add_argument("--threshold", type=float, default=0.9, help="confidence at which a byte stops")
    options = parser.parse_args()
    console, (train, held_out) = Console(), stdlib()
    torch.manual_seed(0)
    depth = {"policy": "exit", "first": 2, "every": 2, "threshold": options.threshold}
    model = LanguageModel(259, d_model=64, n_layers=8, n_seq=LENGTH, depth=depth)
    fit(model, train, options.steps, console, blocks_of)
    model.eval()
    prompt = encode(PROMPT)[None]
    table = Table("decoding", "ms per byte", "blocks per byte", title=f"{NEW} bytes, greedy")
    exits = model.blocks[0]
    for threshold in (1.0, 0.95, options.threshold, 0.7, 0.5):
        exits.threshold = threshold
        console.print(f"\nthreshold {threshold}", style="bold")
        report(model, held_out, console)
        text, milliseconds = timed(lambda: generate(model, prompt, NEW))
        with torch.no_grad():
            blocks = model(torch.cat([prompt, text], dim=1)).records[0].mean_blocks
        table.add_row(f"threshold {threshold}", f"{milliseconds:.2f}", f"{blocks:.2f}")
        if threshold == 1.0:
            full = text
    drafts, milliseconds = timed(lambda: speculate(model, prompt, NEW))
    same = torch.equal(drafts.tokens, full)
    accepted = f"{drafts.accepted} of {drafts.drafted} drafts accepted"
    table.add_row("speculation", f"{milliseconds:.2f}", f"{accepted}; {'same' if same else 'NOT the same'} text")
    console.print(table)


if __name__ == "__main__":
    main()
