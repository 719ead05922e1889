"""Compare untrained multi-scale models with a flat one: speed by length, stability, where chunks end.

    python examples/multi_scale_demo.py [--out runs/multi-scale-demo] [--longest 8192]

Writes speed.svg and boundaries.txt. The models are untrained, because their cost does not depend on their weights.
"""

import argparse
import statistics
import time
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

from resnet_bk import LanguageModel, count_flops_multi_scale, encode

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TOKENS, REPEATS = 8192, 5  # tokens per measurement; measurements
MODELS = {
    "flat": {},
    "N/4, fixed stride": {"multiscale": {"factors": [4], "layers": [1, 6, 1]}},
    "N/2, N/4": {"multiscale": {"factors": [2, 2], "layers": [1, 1, 4, 1, 1]}},
    "after words": {"multiscale": {"factors": [4], "layers": [1, 6, 1], "boundaries": "whitespace"}},
}


def build(fields: dict) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(259, d_model=128, n_layers=8, **fields).eval()


def text_ids(length: int) -> torch.Tensor:
    """Return (1, length) byte ids of this script, repeated."""
    text = Path(__file__).read_bytes()
    return encode((text * (length // len(text) + 1))[:length])[None]


@torch.no_grad()
def prefill_seconds(model: LanguageModel, length: int) -> list[float]:
    ids = text_ids(length).expand(max(1, TOKENS // length), -1)
    model(ids, logits=False)
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        model(ids, logits=False)
        times.append(time.perf_counter() - started)
    return times


def first_gradient_norm(model: LanguageModel) -> float:
    ids = text_ids(513)
    model(ids[:, :-1], targets=ids[:, 1:]).loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
    model.zero_grad()
    return norm


@torch.no_grad()
def rounding(model: LanguageModel, length: int) -> float:
    """Return the largest float32 error of the features before the head, relative to their root mean square."""
    ids = text_ids(length)
    low = model.features(ids)[0].double()
    high = model.double().features(ids)[0]
    model.float()
    return ((low - high).abs().max() / high.square().mean().sqrt()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/multi-scale-demo"), help="folder to write")
    parser.add_argument("--longest", type=int, default=8192, help="longest sequence to time")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    lengths = [n for n in (128, 256, 512, 1024, 2048, 4096, 8192) if n <= options.longest]
    models = {name: build(fields) for name, fields in MODELS.items()}

    speeds: dict[str, list[float]] = {name: [] for name in models}
    table = Table("N", *models, title=f"prefill, thousand tokens/s (median of {REPEATS})")
    for length in lengths:
        for name, model in models.items():
            tokens = max(1, TOKENS // length) * length
            speeds[name].append(tokens / statistics.median(prefill_seconds(model, length)) / 1e3)
        flat = speeds["flat"][-1]
        table.add_row(str(length), *(f"{s[-1]:.1f} ({s[-1] / flat:.2f}x)" for s in speeds.values()))
    console.print(table)

    table = Table("model", "first gradient norm", f"float32 rounding at N = {lengths[-1]}", title="stability")
    for name, model in models.items():
        table.add_row(name, f"{first_gradient_norm(model):.2f}", f"{rounding(model, lengths[-1]):.1e}")
    console.print(table)

    flops = count_flops_multi_scale(64, 128, 4)
    console.print(
        f"One multi-scale block against a plain one (64, 128, 4): {flops.speedup:.2f}x by the simple model, "
        f"{flops.exact_speedup:.2f}x by exact FLOPs. The saving comes from whole stacks at the coarse level."
    )
    ids = text_ids(1000)
    closes = models["after words"](ids).records[0].closes[0].tolist()
    shown = "".join(chr(i - 3) + ("|" if close else "") for i, close in zip(ids[0].tolist(), closes, strict=True))
    (options.out / "boundaries.txt").write_text(shown + "\n")

    figure, axes = plt.subplots(figsize=(6, 4))
    for name, values in speeds.items():
        axes.plot(lengths, values, marker="o", label=name)
    axes.set(xscale="log", ylim=(0, None), xlabel="sequence length N", ylabel="prefill, thousand tokens/s")
    axes.set_xticks(lengths, [str(n) for n in lengths])
    axes.legend()
    figure.savefig(options.out / "speed.svg", bbox_inches="tight")
    console.print(f"wrote {options.out}: speed.svg, boundaries.txt")


if __name__ == "__main__":
    main()
