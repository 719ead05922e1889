"""Adaptive computation time, from training to text coloured by how many blocks each byte went through.

    python examples/act_demo.py [--steps 400] [--target 0.5]

Trains two small byte models on modules of the Python standard library: one whose bytes all go through eight blocks, one
whose bytes may stop early. Shows held-out text: dark where few blocks were enough, bright where the model went on.
"""

import argparse
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from resnet_bk import LanguageModel
from resnet_bk.adaptive.depth import DepthRecord

LENGTH, BATCH = 256, 12
COLORS = ("grey35", "blue", "cyan", "green", "yellow", "orange1", "red", "bright_magenta")


def stdlib() -> tuple[np.ndarray, np.ndarray]:
    """Byte ids to train on and held-out ones: every tenth module is held out."""
    read = [path.read_bytes() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    parts = b"".join(text for i, text in enumerate(read) if i % 10), b"".join(read[::10])
    held_out, train = (np.frombuffer(part, np.uint8).astype(np.int64) + 3 for part in parts[::-1])
    return train, held_out


def windows(text: np.ndarray, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, (count, LENGTH) each."""
    starts = rng.integers(0, len(text) - LENGTH - 1, count)
    rows = torch.from_numpy(np.stack([text[s : s + LENGTH + 1] for s in starts]))
    return rows[:, :-1], rows[:, 1:]


def fit(model: LanguageModel, text: np.ndarray, steps: int, console: Console) -> None:
    """AdamW, cosine; prints loss and mean blocks."""
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    started = time.perf_counter()
    for step in range(steps):
        x, y = windows(text, BATCH, rng)
        output = model(x, targets=y, logits=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            loss, seconds = output.losses["cross_entropy"].item(), time.perf_counter() - started
            record = output.records[0]
            blocks = f"{record.mean_blocks:.2f} blocks a byte" if isinstance(record, DepthRecord) else ""
            console.print(f"step {step:4d}  {seconds:4.0f} s  loss {loss:.3f}  {blocks}")


def colored(ids: torch.Tensor, blocks: torch.Tensor, available: int) -> Text:
    """Bytes ids (N,) as text, each in the color of its number of blocks (N,)."""
    text = Text()
    for token, count in zip(ids.tolist(), blocks.tolist(), strict=True):
        shade = COLORS[(count - 1) * (len(COLORS) - 1) // max(1, available - 1)]
        text.append(chr(token - 3) if token - 3 < 127 else "\N{MIDDLE DOT}", style=shade)
    return text


def legend(available: int) -> Text:
    text = Text()
    for count in range(1, available + 1):
        text.append(f" {count} ", style=COLORS[(count - 1) * (len(COLORS) - 1) // max(1, available - 1)])
    return text.append("blocks")


@torch.no_grad()
def report(model: LanguageModel, held_out: np.ndarray, console: Console) -> None:
    """Perplexity, blocks and time on held-out windows, then one of them in color."""
    x, y = windows(held_out, 64, np.random.default_rng(1))
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        output = model(x, targets=y)
        seconds.append(time.perf_counter() - started)
    perplexity = output.losses["cross_entropy"].exp().item()
    console.print(
        f"held out: perplexity per byte {perplexity:.3f}, {1000 * min(seconds):.0f} ms for {x.numel():,} bytes"
    )
    if isinstance(record := output.records[0], DepthRecord):
        console.print(f"{record.mean_blocks:.2f} of {record.available} blocks a byte:", legend(record.available))
        console.print(colored(x[0], record.blocks[0], record.available))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--target", type=float, default=0.5, help="share of the blocks to aim at")
    options = parser.parse_args()
    console, (train, held_out) = Console(), stdlib()
    for depth in ({"policy": "none"}, {"policy": "act", "target": options.target}):
        console.print(f"\ndepth: {depth}", style="bold")
        torch.manual_seed(0)
        model = LanguageModel(259, d_model=64, n_layers=8, num_experts=1, n_seq=LENGTH, depth=depth)
        fit(model, train, options.steps, console)
        model.eval()
        report(model, held_out, console)


if __name__ == "__main__":
    main()
