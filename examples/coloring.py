"""What the demos of per-byte decisions share: text, a training loop, and text colored by what each byte was given."""

import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from resnet_bk import LanguageModel
from resnet_bk.layers.sparse import anneal
from resnet_bk.model import ModelOutput
from resnet_bk.report.terminal import colored

LENGTH, BATCH = 256, 12


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


def fit(
    model: LanguageModel, text: np.ndarray, steps: int, console: Console, spent: Callable[[ModelOutput], str]
) -> None:
    """AdamW, cosine; prints loss and what `spent` says of a step."""
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
            console.print(f"step {step:4d}  {seconds:4.0f} s  loss {loss:.3f}  {spent(output)}")


@torch.no_grad()
def held_out_run(model: LanguageModel, held_out: np.ndarray, console: Console) -> tuple[torch.Tensor, ModelOutput]:
    """Prints perplexity and time on held-out windows; their ids, and what the model returned."""
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
    """Bytes ids (N,) as text, each in the color of its level (N,), integers from 0 to `highest`."""
    shown = (chr(token - 3) if token - 3 < 127 else "\N{MIDDLE DOT}" for token in ids.tolist())
    return colored(zip(shown, (levels / max(1, highest)).tolist(), strict=True))


def legend(lowest: int, highest: int, what: str) -> Text:
    """The colors of `lowest` to `highest`, the first being that of level 0."""
    span = max(1, highest - lowest)
    return colored((f" {count} ", (count - lowest) / span) for count in range(lowest, highest + 1)).append(what)
