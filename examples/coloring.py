"""Text, a training loop and colored text, shared by the demos of per-byte decisions."""

import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from resnet_bk import LanguageModel, encode
from resnet_bk.layers.sparse import anneal
from resnet_bk.model import ModelOutput
from resnet_bk.report.terminal import colored

LENGTH, BATCH = 256, 12


def stdlib() -> tuple[np.ndarray, np.ndarray]:
    """Return byte ids to train on and held-out ones, int64 each; every tenth module is held out."""
    read = [path.read_bytes() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    parts = b"".join(text for i, text in enumerate(read) if i % 10), b"".join(read[::10])
    return encode(parts[0]).numpy(), encode(parts[1]).numpy()


def windows(text: np.ndarray, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random inputs and targets, (count, LENGTH) each."""
    starts = rng.integers(0, len(text) - LENGTH - 1, count)
    rows = torch.from_numpy(np.stack([text[s : s + LENGTH + 1] for s in starts]))
    return rows[:, :-1], rows[:, 1:]


def fit(
    model: LanguageModel, text: np.ndarray, steps: int, console: Console, describe: Callable[[ModelOutput], str]
) -> None:
    """Train with AdamW and a cosine schedule; print every 25 steps.

    Args:
        model: the model to train, in place.
        text: byte ids to draw windows from.
        steps: number of updates.
        console: where to print.
        describe: returns what to print of a step's output after its loss.
    """
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    started = time.perf_counter()
    for step in range(steps):
        anneal(model, step / steps)
        x, y = windows(text, BATCH, rng)
        output = model(x, targets=y, logits=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 25 == 0 or step == steps - 1:
            loss, seconds = output.losses["cross_entropy"].item(), time.perf_counter() - started
            console.print(f"step {step:4d}  {seconds:4.0f} s  loss {loss:.3f}  {describe(output)}")


@torch.no_grad()
def held_out_run(model: LanguageModel, held_out: np.ndarray, console: Console) -> tuple[torch.Tensor, ModelOutput]:
    """Print perplexity and time on 64 held-out windows; return their ids and the model's output."""
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
    return x, output


def by_level(ids: torch.Tensor, levels: torch.Tensor, highest: int) -> Text:
    """Return byte ids (N,) as text, each in the color of its level: levels (N,), integers from 0 to `highest`."""
    shown = (chr(token - 3) if token - 3 < 127 else "\N{MIDDLE DOT}" for token in ids.tolist())
    return colored(zip(shown, (levels / max(1, highest)).tolist(), strict=True))


def legend(lowest: int, highest: int, what: str) -> Text:
    """Return the numbers from `lowest` to `highest` in their colors; `lowest` has the color of level 0."""
    span = max(1, highest - lowest)
    return colored((f" {count} ", (count - lowest) / span) for count in range(lowest, highest + 1)).append(what)
