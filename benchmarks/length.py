"""Learned length on mixed text (easy, medium and hard windows): speed and perplexity.

``python benchmarks/length.py --out benchmarks/results/...`` first runs every training cell that is not in the log yet
(two single-thread processes at a time), then times the models on the quiet machine.

Dimensions: B windows, N tokens.
"""

import contextlib
import dataclasses
import json
import math
import statistics
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from common import arguments, conditions, interleaved, publish, run_cells, spread, table, train
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.adaptive.length import LearnedLength, LengthRecord
from resnet_bk.data.tokens import byte_ids
from resnet_bk.model import LanguageModel

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SEEDS, BATCH, WINDOW, STEPS, LAYERS, TRUNK = (0, 1, 2), 24, 128, 300, 12, 2
SHAPE = {"d_model": 128, "n_seq": WINDOW, "num_experts": 1}
TRUNCATE = {"bins": 8, "trunk": TRUNK, "penalty": 0.09}
POOL = {"bins": 8, "trunk": TRUNK, "penalty": 0.01, "mode": "pool", "spacing": "words", "placement": "geometric"}
KINDS = ("easy", "medium", "hard")
MIXES = {"uniform": (1 / 3, 1 / 3, 1 / 3), "skewed-easy": (0.8, 0.1, 0.1), "skewed-hard": (0.1, 0.1, 0.8)}
PENALTIES = (0.0, 0.05, 0.07, 0.08, 0.09, 0.1)

# name -> fields of the model
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"n_layers": LAYERS},
    "plain, 4 blocks": {"n_layers": 4},
    "truncate": {"n_layers": LAYERS, "length": TRUNCATE},
    "pool": {"n_layers": LAYERS, "length": POOL},
    "truncate, from the longest": {"n_layers": LAYERS, "length": TRUNCATE},
    "truncate, from the shortest": {"n_layers": LAYERS, "length": TRUNCATE},
    "pool, from the longest": {"n_layers": LAYERS, "length": POOL},
    "pool, from the shortest": {"n_layers": LAYERS, "length": POOL},
}
EVERY_SEED = ("plain", "plain, 4 blocks", "truncate", "pool")


def texts() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return train and held-out ids of each kind: code-page tables, ordinary modules, certificates and keys in base64.

    Every tenth file is held out. Tables are similar, so held-out easy text is nearly known from training.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    tables = [p for p in root.glob("encodings/*.py") if b"decoding_table" in p.read_bytes()]
    files = {"easy": tables, "medium": list(root.glob("*.py")), "hard": list(root.glob("test/certdata/**/*.pem"))}
    found = {}
    for kind, paths in files.items():
        read = [path.read_bytes() for path in sorted(paths)]
        if not read:
            raise SystemExit(f"no {kind} text under {root}; this benchmark needs the standard library's tests")
        held_out = b"\n".join(read[::10])
        found[kind] = byte_ids(b"\n".join(t for i, t in enumerate(read) if i % 10)), byte_ids(held_out)
    return found


def windows(ids: np.ndarray, starts: np.ndarray) -> Tensor:
    """Return the windows that begin at `starts`, (B, N + 1) int64."""
    return torch.from_numpy(np.stack([ids[s : s + WINDOW + 1] for s in starts]).astype(np.int64))


def held_out(ids: np.ndarray, count: int) -> Tensor:
    """Return `count` evenly spread windows, (count, N + 1); they overlap where the text is short."""
    return windows(ids, np.linspace(0, len(ids) - WINDOW - 2, count).astype(np.int64))


def adaptive_layer(model: LanguageModel) -> LearnedLength | None:
    """Return the layer of learned length; None where the model has none."""
    layer = model.blocks[0]
    return layer if isinstance(layer, LearnedLength) else None


@torch.no_grad()
def nats(model: LanguageModel, rows: Tensor) -> Tensor:
    """Return the mean nats of each window, (B,)."""
    logits = model(rows[:, :-1]).logits
    return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1)


@torch.no_grad()
def full_length(model: LanguageModel, rows: Tensor, logits: bool = True) -> Any:
    """Run every position through all blocks, whatever its length; return logits (B, N, V) or features (B, N, D)."""
    layer, x = adaptive_layer(model), model.embed(rows[:, :-1])
    assert layer is not None
    for part in (layer.trunk, layer.deep):
        x, _, _ = part(x, rows[:, :-1], None, None)
    x = model.norm(x)
    return model.head(x) if logits else x


# ------------------------------------------------------------------------------------------------ training


def drawn(ids: dict[str, tuple[np.ndarray, np.ndarray]], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return a batch of training windows, a third of each kind, and their next tokens, (B, N) each."""
    starts = {kind: rng.integers(0, len(ids[kind][0]) - WINDOW - 1, BATCH // 3) for kind in KINDS}
    x = torch.cat([windows(ids[kind][0], starts[kind]) for kind in KINDS])
    return x[:, :-1], x[:, 1:]


def cell(spec: dict[str, Any]) -> dict[str, Any]:
    """Train one model; return bits per byte of each kind at chosen lengths, at full length and at each fixed length."""
    torch.set_num_threads(1)
    if "penalty" in spec:
        return predictor_alone(**spec)
    name, seed = spec["model"], spec["seed"]
    torch.manual_seed(seed)
    model = LanguageModel(259, **{**SHAPE, **MODELS[name]})
    layer, rng, ids = adaptive_layer(model), np.random.default_rng(seed), texts()
    if layer is not None and "from the" in name:
        layer.predictor.out.bias.data[-1 if name.endswith("longest") else 0] = 3.0

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return model(x, targets=y, logits=False).loss  # type: ignore[return-value]

    result: dict[str, Any] = dict(train(loss_of, model, lambda: drawn(ids, rng), steps=spec["steps"]))
    model.eval()
    save_model(model, str(saved(name, seed)))
    result["parameters"] = sum(p.numel() for p in model.parameters())
    rows = {kind: held_out(ids[kind][1], 192) for kind in KINDS}
    result |= {kind: {"bits_per_byte": bits(model, rows[kind])} for kind in KINDS}
    if layer is not None:
        for kind in KINDS:
            result[kind] |= lengths_of(model, layer, rows[kind])
    return result


def at_first(seed: int) -> dict[str, Tensor]:
    """Return the initial weights of the predictor of a seed's model."""
    torch.manual_seed(seed)
    layer = adaptive_layer(LanguageModel(259, **{**SHAPE, **MODELS["truncate"]}))
    assert layer is not None
    return layer.predictor.state_dict()


def bits(model: LanguageModel, rows: Tensor) -> float:
    return nats(model, rows).mean().item() / math.log(2)


def saved(name: str, seed: int) -> Path:
    folder = Path("runs/benchmarks/length")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}.safetensors"


def lengths_of(model: LanguageModel, layer: LearnedLength, rows: Tensor) -> dict[str, Any]:
    """Return the lengths chosen for one kind of text, and the bits per byte at each length."""
    logits = full_length(model, rows)
    full = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:]).item() / math.log(2)
    chosen = record_of(model, rows).predicted_lengths[:, 0]
    values, forced = layer.predictor.fixed, {}
    for value in values:
        with lengths_given(layer, torch.tensor(value)):
            forced[value] = bits(model, rows)
    return {
        "full": full,
        "length": chosen.double().mean().item(),
        "histogram": [(chosen == v).double().mean().item() for v in values],
        "forced": forced,
    }


@contextlib.contextmanager
def lengths_given(layer: LearnedLength, lengths: Tensor) -> Iterator[None]:
    """Give the first windows these lengths, (B,) or (), instead of the predictor's."""
    choose = layer.predictor.choose
    layer.predictor.choose = lambda values, scores: lengths.reshape(-1, 1).expand(scores.shape[:-1])  # type: ignore
    try:
        yield
    finally:
        layer.predictor.choose = choose  # type: ignore[method-assign]


@torch.no_grad()
def record_of(model: LanguageModel, rows: Tensor) -> LengthRecord:
    record = model(rows[:, :-1], logits=False).records[0]
    assert isinstance(record, LengthRecord)
    return record


def predictor_alone(penalty: float, seed: int, steps: int) -> dict[str, Any]:
    """Train a new predictor for the trained network, at another penalty.

    The predictor does not shape the network: its features are detached, and the deep blocks and the bypass learn at
    every position. The result is therefore that of training all of it at that penalty, except for when the predictor
    learns.
    """
    model, ids, rng = load("truncate", seed), texts(), np.random.default_rng(seed + 100)
    layer = adaptive_layer(model)
    assert layer is not None
    model.requires_grad_(False)
    torch.manual_seed(seed)
    layer.predictor.load_state_dict(at_first(seed))
    layer.predictor.requires_grad_(True)
    model.train()

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        losses = model(x, targets=y, logits=False).losses
        certainty = model.config.length.entropy_weight * losses["certainty"]
        return losses["cross_entropy"] + penalty * losses["length"] + certainty

    result = train(loss_of, layer.predictor, lambda: drawn(ids, rng), steps=steps)
    save_model(layer.predictor, str(saved(f"penalty {penalty:g}", seed)))
    return result


# ------------------------------------------------------------------------------------------------ clock


def mixed(mix: str, ids: dict[str, tuple[np.ndarray, np.ndarray]], batch: int) -> Tensor:
    """Return held-out windows in the mix's proportions, shuffled, (B, N + 1)."""
    rng = np.random.default_rng(7)
    counts = [round(share * batch) for share in MIXES[mix]]
    counts[-1] = batch - sum(counts[:-1])
    starts = [rng.integers(0, len(ids[kind][1]) - WINDOW - 1, n) for kind, n in zip(KINDS, counts, strict=True)]
    rows = torch.cat([windows(ids[kind][1], s) for kind, s in zip(KINDS, starts, strict=True)])
    return rows[torch.from_numpy(rng.permutation(batch))]


@torch.no_grad()
def timed(model: LanguageModel, rows: Tensor, plain: LanguageModel, repeats: int) -> dict[str, list[float]]:
    """Return seconds of prefill in turn: full length, adaptive (grouped, batch_max), and the plain model."""
    layer = adaptive_layer(model)
    assert layer is not None
    settings = layer.settings

    def adaptive(execution: str) -> None:
        layer.settings = dataclasses.replace(settings, execution=execution)  # type: ignore[arg-type]
        model(rows[:, :-1], logits=False)

    runs = {
        "full": lambda: full_length(model, rows, logits=False),
        "grouped": lambda: adaptive("grouped"),
        "batch_max": lambda: adaptive("batch_max"),
        "plain": lambda: plain(rows[:, :-1], logits=False),
    }
    times = interleaved(runs, repeats)
    layer.settings = settings
    return times


def load(name: str, seed: int) -> LanguageModel:
    model = LanguageModel(259, **{**SHAPE, **MODELS[name]})
    load_model(model, str(saved(name, seed)))
    return model.eval()


def worse(bits: float, base: float) -> float:
    """Return by how many percent the perplexity per byte is above that of `base`."""
    return 100 * (2 ** (bits - base) - 1)


def against(model: LanguageModel, plain: LanguageModel, text: Tensor, repeats: int) -> dict[str, float]:
    """Return speed and quality of a model on one batch, against itself at full length and against the plain model."""
    times = timed(model, text, plain, repeats)

    def ratio(key: str, base: str) -> float:
        return statistics.median(b / t for b, t in zip(times[base], times[key], strict=True))

    full = F.cross_entropy(full_length(model, text).transpose(1, 2), text[:, 1:]).item() / math.log(2)
    own = bits(model, text)
    return {
        "length": record_of(model, text).avg_predicted_length,
        "grouped": ratio("grouped", "full"),
        "batch_max": ratio("batch_max", "full"),
        "worse": worse(own, full),
        "grouped, plain": ratio("grouped", "plain"),
        "worse, plain": worse(own, bits(plain, text)),
    }


DIGITS = {"length": 0, "grouped": 2, "batch_max": 2, "worse": 1, "grouped, plain": 2, "worse, plain": 1}
HEADER = [
    "mean length",
    "speedup, grouped",
    "speedup, batch-max",
    "perplexity worse than at full length, %",
    "speedup against plain",
    "perplexity worse than plain, %",
]


def clock(batch: int = 96, repeats: int = 5) -> str:
    """Return the table of speed and quality for every mix and both modes."""
    ids, rows = texts(), []
    for mix in MIXES:
        text = mixed(mix, ids, batch)
        for name in ("truncate", "pool"):
            found = [against(load(name, seed), load("plain", seed), text, repeats) for seed in SEEDS]
            rows.append([mix, name, *(spread([f[key] for f in found], DIGITS[key]) for key in DIGITS)])
            if name == "pool":  # it never trained at full length
                rows[-1][2 + list(DIGITS).index("worse")] = ""
    return table(["mix", "mode", *HEADER], rows)


def by_penalty(out: Path | None, repeats: int = 3) -> str:
    """Return the table by penalty: all on the uniform mix, the two highest on the others too. Plot the former."""
    ids, rows, points = texts(), [], []
    for mix in MIXES:
        text = mixed(mix, ids, 96)
        for penalty in PENALTIES if mix == "uniform" else PENALTIES[-2:]:
            found = []
            for seed in SEEDS:
                model = load("truncate", seed)
                load_model(model.blocks[0].predictor, str(saved(f"penalty {penalty:g}", seed)))  # type: ignore[arg-type]
                found.append(against(model, load("plain", seed), text, repeats) | {"bits": bits(model, text)})
            rows.append([mix, f"{penalty:g}", *(spread([f[key] for f in found], DIGITS[key]) for key in DIGITS)])
            if mix == "uniform":
                points.append([statistics.median(f[key] for f in found) for key in ("grouped", "bits")])
    if out is not None:
        figure, axes = plt.subplots(figsize=(6, 4))
        axes.plot([x for x, _ in points], [y for _, y in points], marker="o")
        for penalty, point in zip(PENALTIES, points, strict=True):
            axes.annotate(f"{penalty:g}", point, textcoords="offset points", xytext=(4, 4))
        axes.set(xlabel="speedup of prefill over full length", ylabel="held-out bits per byte, uniform mix")
        axes.set_title("truncate, by penalty (median of three seeds)")
        figure.savefig(out.with_suffix(".svg"), bbox_inches="tight")
    return table(["mix", "penalty", *HEADER], rows)


# ------------------------------------------------------------------------------------------------- page


def quality_table(results: list[dict[str, Any]]) -> str:
    rows = []
    for name in MODELS:
        here = [r for r in results if r["cell"]["model"] == name]
        row = [name, len(here), f"{here[0]['parameters']:,}", spread([r["seconds"] / r["steps"] for r in here], 2)]
        for kind in KINDS:
            row.append(spread([r[kind]["bits_per_byte"] for r in here], 3))
            row.append(spread([r[kind]["full"] for r in here], 3) if name.startswith("truncate") else "")
            row.append(spread([r[kind]["length"] for r in here], 0) if "length" in here[0][kind] else "")
        rows.append(row)
    header = ["model", "seeds", "parameters", "s a step"]
    header += [f"{kind}: {what}" for kind in KINDS for what in ("bits per byte", "at full length", "mean length")]
    return table(header, rows)


def forced_table(results: list[dict[str, Any]]) -> str:
    """Return the table of truncate and pool with every window at the same length."""
    rows = []
    for name in ("truncate", "pool"):
        here = [r for r in results if r["cell"]["model"] == name]
        for length in here[0]["easy"]["forced"]:
            pooled = 16 * 16 // WINDOW + (WINDOW - 16) * int(length) // WINDOW  # the prefix as the shortest has it
            row = [name, length, length if name == "truncate" else pooled]
            row += [spread([r[kind]["forced"][length] for r in here]) for kind in KINDS]
            row.append(spread([statistics.mean(r[kind]["forced"][length] for kind in KINDS) for r in here]))
            rows.append(row)
    return table(["mode", "length of every window", "positions that go deep", *KINDS, "mean"], rows)


def starts_table(results: list[dict[str, Any]]) -> str:
    """Return the table of the lengths at which predictors arrive that began at opposite ends."""
    rows = []
    for mode in ("truncate", "pool"):
        ends = {
            r["cell"]["model"].rpartition(" ")[2]: [r[kind]["histogram"] for kind in KINDS]
            for r in results
            if r["cell"]["model"].startswith(f"{mode}, from the")
        }
        for i, kind in enumerate(KINDS):
            a, b = ends["shortest"][i], ends["longest"][i]
            far = sum(abs(x - y) for x, y in zip(a, b, strict=True)) / 2
            rows.append([mode, kind, *(" ".join(f"{100 * x:.0f}" for x in h) for h in (a, b)), f"{far:.2f}"])
    header = ["mode", "text", "from the shortest: % at each length", "from the longest", "total variation distance"]
    return table(header, rows)


def controls_table() -> str:
    """Return the table of controls for truncate on the uniform mix.

    Compared are the model's choices, the same choices dealt to windows at random, and an untrained predictor.
    """
    text, rows = mixed("uniform", texts(), 384), []
    for seed in SEEDS:
        model = load("truncate", seed)
        layer = adaptive_layer(model)
        assert layer is not None
        chosen = record_of(model, text).predicted_lengths[:, 0]
        own = bits(model, text)
        shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(len(chosen)))
        with lengths_given(layer, chosen[shuffled]):
            dealt = bits(model, text)
        layer.predictor.load_state_dict(at_first(seed))
        first = record_of(model, text).avg_predicted_length
        rows.append([seed, f"{chosen.double().mean():.0f}", f"{own:.4f}", f"{dealt:.4f}", f"{first:.0f}"])
        rows[-1].append(f"{bits(model, text):.4f}")
    header = ["seed", "mean length", "bits per byte", "its choices dealt at random", "as it began: mean length"]
    return table([*header, "bits per byte"], rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cell", type=json.loads, help="internal: one training run, as JSON")
    parser.add_argument("--log", type=Path, default=Path("runs/benchmarks/length.jsonl"))
    parser.add_argument("--train-only", action="store_true", help="fill the log and stop before the timings")
    options = parser.parse_args()
    if options.cell is not None:
        print(json.dumps(cell(options.cell)))
        return
    plan = [(m, s) for s in SEEDS for m in EVERY_SEED] + [(m, 0) for m in MODELS if m not in EVERY_SEED]
    cells = [{"model": m, "fields": {**SHAPE, **MODELS[m]}, "seed": s, "steps": STEPS} for m, s in plan]
    results = run_cells(__file__, cells, workers=2, log=options.log)
    cells = [{"penalty": p, "seed": s, "steps": 60} for s in SEEDS for p in PENALTIES]
    run_cells(__file__, cells, workers=2, log=options.log)
    if options.train_only:
        return
    text = "# Learned length\n\n" + conditions("python benchmarks/length.py")
    text += (
        f"\n{LAYERS} blocks, D = 128, {TRUNK} of them the trunk; windows of {WINDOW} bytes, eight lengths, a prefix "
        f"of 16. {STEPS} steps of {BATCH} windows, a third each of code-page tables (easy), ordinary modules (medium), "
        "certificates and keys (hard) of the standard library, AdamW 3e-3 cosine, one thread a run, two runs at a "
        f"time; every tenth file held out. Penalties: truncate {TRUNCATE['penalty']}, pool {POOL['penalty']}. Median "
        "(least to greatest) of three seeds.\n\n## The clock\n\nPrefill of 96 held-out windows, in turn, against the "
        "same model with every position through every block, and against a plain model of as many blocks trained as "
        "long. Perplexity is per byte, over all positions.\n\n" + clock()
    )
    text += "\n## Quality\n\nEqual steps, as chosen and at full length.\n\n" + quality_table(results)
    text += "\n## Truncate and pool at equal length\n\nBits per byte.\n\n" + forced_table(results)
    text += "\n## By penalty\n\nTruncate: the trained network, its predictor trained anew for 60 steps.\n\n"
    text += by_penalty(options.out)
    text += "\n## From opposite ends\n\nOne seed, all of it trained.\n\n" + starts_table(results)
    text += "\n## What the predictor is worth\n\nTruncate, uniform mix, the same networks.\n\n" + controls_table()
    publish(text, options.out)


if __name__ == "__main__":
    main()
