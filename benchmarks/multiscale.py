"""Multi-scale against flat: bits per byte at equal steps and at equal training time, boundaries, and speed.

``python benchmarks/multiscale.py --out benchmarks/results/...`` first runs every training cell that is not in the log
yet (two single-thread processes at a time), then times the models on the quiet machine.

Dimensions: B sequences, N tokens.
"""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    SHARED,
    arguments,
    batches,
    conditions,
    interleaved,
    mean_nats,
    publish,
    run_cells,
    spread,
    stdlib_ids,
    table,
    train,
)

from resnet_bk.adaptive.boundaries import LONGEST, at_most, ends_of_words
from resnet_bk.adaptive.compose import build_stack
from resnet_bk.adaptive.multiscale import ChunkRecord
from resnet_bk.config import ModelConfig
from resnet_bk.data.corpus import split
from resnet_bk.data.tokens import byte_ids, encode
from resnet_bk.model import LanguageModel

SEEDS, BATCH, LENGTH, STEPS, WINDOW = (0, 1, 2), 12, 256, 200, 1024
SHAPE = {"d_model": 128, "n_seq": LENGTH, "num_experts": 1}


def scales(layers: list[int], boundaries: str = "fixed", factor: int = 4) -> dict[str, Any]:
    """Return the model field for one level of chunks."""
    return {"multiscale": {"factors": [factor], "layers": layers, "boundaries": boundaries}}


# name -> fields of the model. Eight blocks each (sixteen in DEEPER); parameters are equal except for the resampling.
MODELS: dict[str, dict[str, Any]] = {
    "flat": {"n_layers": 8},
    "stride 4, 1-6-1": scales([1, 6, 1]),
    "stride 6, 1-6-1": scales([1, 6, 1], factor=6),
    "learned, 1-6-1": scales([1, 6, 1], "learned", 5),
    "learned from words, 1-6-1": scales([1, 6, 1], "learned-words"),
    "words, 1-6-1": scales([1, 6, 1], "whitespace"),
    "words, 2-6-0": scales([2, 6, 0], "whitespace"),
    "words, 2-5-1": scales([2, 5, 1], "whitespace"),
}
DEEPER: dict[str, dict[str, Any]] = {
    "flat, 16 blocks": {"n_layers": 16, "d_model": 96},
    "words, 2-14-0": {**scales([2, 14, 0], "whitespace", 6), "d_model": 96},
}
BY_CORPUS = {
    "default corpus": tuple(MODELS),
    "Tiny Shakespeare": ("flat", "stride 4, 1-6-1", "words, 2-5-1"),
}
EQUAL_TIME = "words, 2-5-1"  # also trained for the time that the flat model's steps took (median of its runs)


def corpus(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name == "default corpus":
        return stdlib_ids()
    ids = byte_ids((SHARED / "data" / "tinyshakespeare" / "input.txt").read_bytes())
    return ids[: int(0.9 * len(ids))], ids[int(0.9 * len(ids)) :]


def closes(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor | None:
    """Return where chunks end, (B, N) bool; None for a flat model."""
    with torch.no_grad():
        records = [r for r in model(ids, logits=False).records if isinstance(r, ChunkRecord)]
    return records[0].closes if records else None


# ------------------------------------------------------------------------------------------------ quality


def cell(spec: dict[str, Any]) -> dict[str, Any]:
    """Train one model; return its score, its seconds, and where its chunks end."""
    torch.set_num_threads(1)
    train_ids, val_ids = corpus(spec["corpus"])
    torch.manual_seed(spec["seed"])
    model = LanguageModel(259, **{**SHAPE, **(MODELS | DEEPER)[spec["model"]]})

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return model(x, targets=y, logits=False).loss  # type: ignore[return-value]

    def cross_entropy(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return model(x, targets=y, logits=False).losses["cross_entropy"]

    budget = {key: spec[key] for key in ("steps", "seconds") if key in spec}
    record = train(loss_of, model, batches(train_ids, BATCH, LENGTH, spec["seed"]), **budget)
    model.eval()
    nats = mean_nats(cross_entropy, val_ids, WINDOW, limit=2**18)
    parameters = sum(p.numel() for p in model.parameters())
    result = {"bits_per_byte": nats / math.log(2), "parameters": parameters, **record}
    if "multiscale" in (MODELS | DEEPER)[spec["model"]]:
        result["chunks"] = {name: chunks_of(model, text) for name, text in texts().items()}
        sample = torch.from_numpy(val_ids[None, : 2**16].astype(np.int64))
        result["chunk"] = 1 / closes(model, sample).float().mean().item()  # type: ignore[union-attr]
    return result


def texts() -> dict[str, bytes]:
    """Return up to 64 KiB each of code and tables, held out of the default corpus, and of prose if it is there."""
    held_out = [b"".join(d.pieces()) for d in split("stdlib", None, 0.05)[1]]
    tables = [text for text in held_out if b"decoding_table" in text or b"decoding_map" in text]
    found = {"code": b"".join(t for t in held_out if t not in tables), "tables": b"".join(tables)}
    prose = SHARED / "data" / "wikitext-2" / "wiki.valid.raw"
    if prose.exists():
        found["prose"] = prose.read_bytes()
    return {name: text[: 2**16] for name, text in found.items() if text}


def chunks_of(model: LanguageModel, text: bytes) -> dict[str, Any]:
    """Return mean and quantiles of the chunk lengths of a text, and an excerpt with "|" where chunks end."""
    ids = encode(text)[None]
    ends_here = closes(model, ids)[0]  # type: ignore[index]
    ends = ends_here.nonzero().flatten()
    lengths = ends.diff(prepend=torch.tensor([-1])).double()
    start = text.index(b"\n", len(text) // 2) + 1
    marks = set(ends.tolist())
    excerpt = "".join(chr(b) + ("|" if start + i in marks else "") for i, b in enumerate(text[start : start + 240]))
    nothing = torch.zeros(1, dtype=torch.int64)
    words = at_most(ends_of_words(ids, nothing), nothing, LONGEST * 4)
    agreement = (words[0] == ends_here).float().mean().item()
    tenths = [int(lengths.quantile(q)) for q in (0.1, 0.5, 0.9)]
    return {
        "mean": lengths.mean().item(),
        "tenths": [*tenths, int(lengths.max())],
        "agreement": agreement,
        "excerpt": excerpt,
    }


# ------------------------------------------------------------------------------------------------- clock


def ratios(times: dict[str, list[float]], base: str) -> dict[str, str]:
    """Return the times of `base` divided by those of each, pair by pair: median (least to greatest)."""
    return {n: spread([b / t for b, t in zip(times[base], ts, strict=True)], 2) for n, ts in times.items()}


def inner_stack_ratio(repeats: int = 7) -> str:
    """Return the time of six blocks on 2,048 positions divided by that on 512, forward and backward."""
    torch.manual_seed(0)
    stack = build_stack(ModelConfig(d_model=160, n_layers=6, num_experts=1), torch.nn.Identity())

    def step(n: int) -> Callable[[], None]:
        x = torch.randn(4, n, 160, requires_grad=True)
        return lambda: stack(x, None, None, None)[0].sum().backward()

    return ratios(interleaved({"N": step(2048), "N/4": step(512)}, repeats), "N")["N/4"]


def clock(ids: np.ndarray, width: int, batch: int, length: int, repeats: int = 5) -> list[list[str]]:
    """Return the table rows of training step, prefill and decoding of every model, against the flat one.

    Args:
        ids: held-out text.
        width: model width of all models.
        batch, length: sequences and tokens of a training step.
        repeats: timed runs.
    """
    models = {}
    for name, fields in MODELS.items():
        torch.manual_seed(0)
        models[name] = LanguageModel(259, **{**SHAPE, **fields, "d_model": width})
    draw = batches(ids, batch, length, 0)
    x, y = draw()
    long, _ = batches(ids, 8, 2048, 1)()

    def step(model: LanguageModel) -> Callable[[], None]:
        def run() -> None:
            model(x, targets=y, logits=False).loss.backward()
            model.zero_grad()

        return run

    def prefill(model: LanguageModel) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                model(long, logits=False)

        return run

    def decode(model: LanguageModel) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                state = model(long[:1, :64]).state
                for t in range(64, 264):
                    state = model(long[:1, t : t + 1], state=state).state

        return run

    trained = interleaved({n: step(m) for n, m in models.items()}, repeats)
    filled = interleaved({n: prefill(m) for n, m in models.items()}, repeats)
    decoded = interleaved({n: decode(m.eval()) for n, m in models.items()}, repeats)
    rows = []
    for name, model in models.items():
        ends = closes(model, long)
        chunk = "" if ends is None else f"{1 / ends.float().mean().item():.2f}"
        rows.append([name, f"{sum(p.numel() for p in model.parameters()):,}", chunk])
        rows[-1] += [ratios(times, "flat")[name] for times in (trained, filled, decoded)]
        rows[-1].append(f"{1e3 * statistics.median(decoded[name]) / 200:.2f}")
    return rows


# -------------------------------------------------------------------------------------------------- page


def quality_table(results: list[dict[str, Any]], name: str) -> str:
    """Return the table of every model on one corpus, against the flat one, seed by seed."""
    here = [r for r in results if r["cell"]["corpus"] == name]
    by_cell = {(r["cell"]["model"], r["cell"]["seed"]): r for r in here if "steps" in r["cell"]}
    rows = []
    for key in dict.fromkeys((r["cell"]["model"], "seconds" in r["cell"]) for r in here):
        chosen = [r for r in here if (r["cell"]["model"], "seconds" in r["cell"]) == key]
        base = [by_cell["flat, 16 blocks" if key[0] in DEEPER else "flat", r["cell"]["seed"]] for r in chosen]
        bits = [r["bits_per_byte"] for r in chosen]
        worse = [100 * (2 ** (b - f["bits_per_byte"]) - 1) for b, f in zip(bits, base, strict=True)]
        faster = [(f["seconds"] / f["steps"]) / (r["seconds"] / r["steps"]) for r, f in zip(chosen, base, strict=True)]
        rows.append([key[0], "time" if key[1] else "steps", spread([r["steps"] for r in chosen], 0)])
        rows[-1] += [f"{chosen[0]['parameters']:,}", f"{chosen[0].get('chunk', 1):.2f}", spread(bits, 4)]
        rows[-1] += [spread(worse, 1), spread(faster, 2)]
    header = ["model", "equal", "steps", "parameters", "bytes a chunk", "held-out bits per byte"]
    return table([*header, "perplexity per byte against flat, %", "steps/s against flat"], rows)


def boundary_pages(results: list[dict[str, Any]]) -> str:
    """Return chunk lengths and excerpts of the first seed, for boundaries that depend on content."""
    shown = ("words, 1-6-1", "learned, 1-6-1", "learned from words, 1-6-1")
    rows, pictures = [], ""
    for r in results:
        spec = r["cell"]
        if spec["model"] not in shown or spec["seed"] or "seconds" in spec or spec["corpus"] != "default corpus":
            continue
        for name, found in r["chunks"].items():
            rows.append([spec["model"], name, f"{found['mean']:.2f}", " / ".join(map(str, found["tenths"]))])
            rows[-1].append(f"{100 * found['agreement']:.1f}")
            pictures += f"\n{spec['model']}, {name}:\n\n```\n{found['excerpt']}\n```\n"
    header = ["model", "text", "mean bytes a chunk", "10% / median / 90% / longest", "decisions as words', %"]
    return table(header, rows) + pictures


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cell", type=json.loads, help="internal: one training run, as JSON")
    parser.add_argument("--log", type=Path, default=Path("runs/benchmarks/multiscale.jsonl"))
    parser.add_argument("--deeper", action="store_true", help="also train the models of 16 blocks")
    parser.add_argument("--train-only", action="store_true", help="fill the log and stop before the timings")
    options = parser.parse_args()
    if options.cell is not None:
        print(json.dumps(cell(options.cell)))
        return
    corpora = [c for c in BY_CORPUS if c == "default corpus" or (SHARED / "data").exists()]
    common = {"batch": BATCH, "length": LENGTH}
    plan = [(c, m) for c in corpora for m in BY_CORPUS[c]]
    cells = [{"corpus": c, "model": m, "seed": s, "steps": STEPS, **common} for s in SEEDS for c, m in plan]
    results = run_cells(__file__, cells, workers=2, log=options.log)
    seconds = round(statistics.median(r["seconds"] for r in results if r["cell"]["model"] == "flat"))
    cells = [
        {"corpus": c, "model": EQUAL_TIME, "seed": s, "seconds": seconds, **common} for s in SEEDS for c in corpora
    ]
    if options.deeper:
        cells += [
            {"corpus": "default corpus", "model": m, "seed": s, "steps": STEPS, **common} for s in SEEDS for m in DEEPER
        ]
    results += run_cells(__file__, cells, workers=2, log=options.log)
    if options.train_only:
        return
    text = "# Multi-scale\n\n" + conditions("python benchmarks/multiscale.py")
    text += (
        "\nNames: where chunks end, then blocks before - on chunks - after. Median (least to greatest).\n"
        "\n## The clock\n\n"
        f"Six blocks, D = 160, at N = 2,048 against N = 512, forward and backward: {inner_stack_ratio()} times.\n\n"
        "Whole untrained models, D = 160, as ratios to the flat one, in turn. Training step: 4 x 2,048 bytes of the "
        "default corpus; prefill: 8 x 2,048; decode: one sequence, 200 bytes.\n\n"
    )
    header = ["model", "parameters", "bytes a chunk", "training steps/s", "prefill", "decode", "decode, ms a byte"]
    text += table(header, clock(stdlib_ids()[1], 160, 4, 2048))
    for name in corpora:
        text += f"\n## {name}\n\nD = 128 (96 with 16 blocks), {BATCH} x {LENGTH} bytes a step, AdamW 3e-3 "
        text += f"cosine, one thread a run, two runs at a time, {len(SEEDS)} seeds; 256 KiB held out, windows of "
        text += f"{WINDOW:,}. Ratios seed by seed; a training step's time is rough here.\n\n"
        text += quality_table(results, name)
    text += "\n## Where chunks end\n\n" + boundary_pages(results)
    publish(text, options.out)


if __name__ == "__main__":
    main()
