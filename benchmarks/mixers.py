"""Token mixers at equal parameters on the default corpus: bits per byte at equal tokens and equal time, throughput.

``python benchmarks/mixers.py --out benchmarks/results/...`` runs every cell that is not in the log yet (two
single-thread processes at a time), then measures throughput on the quiet machine.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from common import (
    arguments,
    batches,
    conditions,
    mean_nats,
    publish,
    run_cells,
    seconds_of,
    spread,
    stdlib_ids,
    table,
    train,
)
from peer_mixers import SigmoidGated, SoftmaxAttention, equal, parameters

from resnet_bk.model import LanguageModel

OURS = {
    "propagator, bonds": {"readout": "propagator", "energy": "bonds"},
    "propagator, real": {"readout": "propagator", "energy": "real"},
    "propagator, complex": {"readout": "propagator", "energy": "complex"},
    "diagonal, real": {"readout": "diagonal", "energy": "real"},
    "diagonal, complex": {"readout": "diagonal", "energy": "complex"},
}
PEERS = {"softmax attention": SoftmaxAttention, "sigmoid-gated linear": SigmoidGated}
SHAPE = {"d_model": 128, "n_layers": 4, "n_seq": 256, "num_experts": 1}
BATCH, STEPS, SECONDS, SEEDS = 12, 150, 45, (0, 1, 2)
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
TOKENS_A_STEP = 16384  # tokens per step of the throughput sweep


def model_of(name: str, seed: int) -> LanguageModel:
    """Return a model with the mixer of this name, as large as ours."""
    reference, fields = ({**SHAPE, **OURS.get(which, {})} for which in ("propagator, bonds", name))
    return equal(reference, seed, fields, PEERS.get(name))


def cell(spec: dict[str, Any]) -> dict[str, Any]:
    """Train one model and score it."""
    torch.set_num_threads(1)
    train_ids, val_ids = stdlib_ids()
    model = model_of(spec["mixer"], spec["seed"])

    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return model(x, targets=y, logits=False).loss

    budget = {"steps": STEPS} if spec["budget"] == "tokens" else {"seconds": SECONDS}
    record = train(loss_of, model, batches(train_ids, BATCH, SHAPE["n_seq"], spec["seed"]), **budget)  # type: ignore[arg-type]
    nats = mean_nats(loss_of, val_ids, spec["window"], limit=2**18)
    return {"bits_per_byte": nats / math.log(2), "parameters": parameters(model), **record}


def throughput(name: str, length: int) -> list[float]:
    """Return thousand tokens per second of forward and backward, one value per run."""
    model = model_of(name, 0)
    ids = torch.randint(SHAPE["d_model"], (TOKENS_A_STEP // length, length + 1))

    def step() -> None:
        model(ids[:, :-1], targets=ids[:, 1:], logits=False).loss.backward()
        model.zero_grad()

    return [TOKENS_A_STEP / s / 1000 for s in seconds_of(step, repeats=5, warmup=1)]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cell", type=json.loads, help="internal: one training run, as JSON")
    parser.add_argument("--log", type=Path, default=Path("runs/benchmarks/mixers.jsonl"))
    options = parser.parse_args()
    if options.cell is not None:
        print(json.dumps(cell(options.cell)))
        return
    names = [*OURS, *PEERS]
    # Also at the training length: the peers do not extrapolate, and ours is their reference there.
    plan = [(name, "tokens", 1024) for name in names] + [(name, "time", 1024) for name in OURS]
    plan += [(name, "tokens", SHAPE["n_seq"]) for name in ("propagator, bonds", *PEERS)]
    cells = [{"mixer": n, "budget": b, "window": w, "seed": seed} for seed in SEEDS for n, b, w in plan]
    results = run_cells(__file__, cells, workers=2, log=options.log)
    text = "# Token mixers\n\n" + conditions("python benchmarks/mixers.py")
    text += (
        f"\nDefault corpus, bytes. {SHAPE['n_layers']} blocks, D = {SHAPE['d_model']}, "
        f"batches of {BATCH} x {SHAPE['n_seq']}, AdamW 3e-3 cosine, one thread a run, two runs at a time. "
        "Feed-forward widths make parameters equal. Held-out bits per byte on 256 KiB in windows of the length given: "
        f"median (least to greatest) of {len(SEEDS)} seeds.\n"
    )
    for budget, title in (("tokens", f"Equal tokens: {STEPS} steps"), ("time", f"Equal time: {SECONDS} s")):
        rows = []
        for name, _, window in (entry for entry in plan if entry[1] == budget):
            wanted = {"mixer": name, "budget": budget, "window": window}
            chosen = [r for r in results if r["cell"].items() >= wanted.items()]
            values = [("bits_per_byte", 4), ("steps", 0), ("seconds", 0), ("first_gradient_norm", 1)]
            spreads = [spread([r[key] for r in chosen], digits) for key, digits in values]
            rows.append([name, f"{chosen[0]['parameters']:,}", window, *spreads])
        header = ["mixer", "parameters", "window", "held-out bits per byte", "steps", "seconds", "first gradient norm"]
        text += f"\n## {title}\n\n" + table(header, rows)
    rows = [
        [name, *(spread(throughput(name, n), 1) for n in LENGTHS)]
        for name in ("propagator, bonds", "propagator, real", *PEERS)
    ]
    text += f"\n## Throughput, forward + backward, {TOKENS_A_STEP:,} tokens a step: thousand tokens per second\n\n"
    text += table(["mixer", *(f"N = {n:,}" for n in LENGTHS)], rows)
    publish(text, options.out)


if __name__ == "__main__":
    main()
