"""Train a learned length and show that simple and complex text get different lengths.

    python examples/learned_sequence_length_demo.py [--out runs/learned-length-demo] [--steps 300]

Trains a small byte model on code-page tables (simple) and on modules (complex) of the Python standard library; nothing
labels the two kinds. Prints which lengths the windows of each kind get, and writes lengths.svg.
"""

import argparse
import statistics
import sysconfig
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from resnet_bk import AdaptiveSequenceLengthWrapper, LanguageModel, LearnedSequenceLengthTrainer, encode

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WINDOW, BATCH = 128, 24
STDLIB = Path(sysconfig.get_paths()["stdlib"])
FILES = {"simple": "encodings/cp*.py", "complex": "*.py"}


def texts() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return byte ids to train on and held-out ones, for each kind; every tenth file is held out."""
    found = {}
    for kind, pattern in FILES.items():
        read = [path.read_bytes() for path in sorted(STDLIB.glob(pattern))]
        parts = b"".join(t for i, t in enumerate(read) if i % 10), b"".join(read[::10])
        found[kind] = tuple(encode(part).numpy() for part in parts)
    return found


def windows(text: np.ndarray, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random inputs and targets, (count, WINDOW) each."""
    starts = rng.integers(0, len(text) - WINDOW - 1, count)
    rows = torch.from_numpy(np.stack([text[s : s + WINDOW + 1] for s in starts]))
    return rows[:, :-1], rows[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/learned-length-demo"), help="folder to write")
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--penalty", type=float, default=0.1, help="weight of the mean length in the loss")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console, rng, ids = Console(), np.random.default_rng(0), texts()

    torch.manual_seed(0)
    base = LanguageModel(259, d_model=64, n_layers=8, n_seq=WINDOW)
    model = AdaptiveSequenceLengthWrapper(
        base_model=base, max_seq_len=WINDOW, num_length_bins=8, length_penalty=options.penalty
    )
    added = sum(p.numel() for p in model.parameters_added())
    console.print(f"{sum(p.numel() for p in base.parameters()):,} parameters, {added:,} more for learned length")
    trainer = LearnedSequenceLengthTrainer(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    started = time.perf_counter()
    for step in range(options.steps):
        parts = [windows(ids[kind][0], BATCH // 2, rng) for kind in FILES]
        report = trainer.train_step(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))
        if step % 25 == 0 or step == options.steps - 1:
            numbers = "  ".join(f"{name} {value:.3f}" for name, value in report.items())
            console.print(f"step {step:4d}  {time.perf_counter() - started:4.0f} s  {numbers}")

    columns = ("perplexity", "at full length", "speedup", "mean length")
    table = Table("held-out text", *columns, title="adaptive, against the same model at full length")
    figure, axes = plt.subplots(figsize=(6, 4))
    for i, kind in enumerate(FILES):
        loader = [windows(ids[kind][1], 64, rng) for _ in range(4)]
        scores = trainer.evaluate(loader)
        numbers = (f"{scores['perplexity']:.3f}", f"{scores['full_perplexity']:.3f}", f"{scores['avg_speedup']:.2f}x")
        table.add_row(kind, *numbers, f"{scores['avg_predicted_length']:.0f}")
        total = sum(scores["histogram"].values())
        bars = [(length + 5 * i, number / total) for length, number in scores["histogram"].items()]
        axes.bar([x for x, _ in bars], [y for _, y in bars], width=5, label=kind)
    console.print(table)

    with torch.no_grad():
        for kind in FILES:
            x, _ = windows(ids[kind][1], 32, rng)
            lengths = model(x, use_adaptive_length=True).length.predicted_lengths[:, 0]
            order = lengths.argsort()
            for name, row in (("shortest", order[0]), ("longest", order[-1])):
                shown = bytes((x[row] - 3).clamp(min=0).tolist()).decode(errors="replace")
                console.print(f"{kind}, the {name} of 32: {lengths[row]} of {WINDOW}", style="bold")
                console.print(shown, markup=False, highlight=False)
            console.print(f"{kind}: median {statistics.median(lengths.tolist()):.0f}")
    axes.set(xlabel="predicted length", ylabel="share of windows")
    axes.legend()
    figure.savefig(options.out / "lengths.svg", bbox_inches="tight")
    console.print(f"wrote {options.out / 'lengths.svg'}")


if __name__ == "__main__":
    main()
