"""What n-gram memory gives: bits per byte at equal training time, with tables of several sizes, without, and alone.

``python benchmarks/memory.py --out benchmarks/results/...`` runs every training cell that is not in the log yet, then
times pairs on the quiet machine. ``--long 1200`` adds a longer training with the largest table.

The counting of the tables is part of the training time. "Memory alone" is a model without blocks: the embedding, the
memory and the head. Dimensions: B sequences, N tokens.
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import CORPORA, arguments, conditions, interleaved, mean_nats, publish, run_cells, spread, table, train
from energies import REPEATS, work
from torch import Tensor

from resnet_bk.config import preset
from resnet_bk.data.tokens import TokenFile
from resnet_bk.layers.block import Stack
from resnet_bk.layers.embedding import NgramMemory
from resnet_bk.model import LanguageModel
from resnet_bk.training.windows import HeldBack, ShuffledSampler, Windows, collate

ORDERS, SUCCESSORS = [1, 2, 3, 4, 6, 8, 12, 16], 4
SECONDS, TOKENS, WINDOW, SHORT_WINDOW = 240, 3072, 1024, 256
RATES = {"adamw": 0.01, "muon": 0.01}
ROWS = (0, 2**18, 2**20, 2**22)  # 0: no memory
LARGEST = ROWS[-1]
SCORED = 2**18  # held-out bytes


def build(rows: int, window: int, alone: bool = False) -> LanguageModel:
    memory = {"orders": ORDERS, "rows": rows, "successors": SUCCESSORS} if rows else {}
    model = LanguageModel(259, **{**preset("fast"), "n_seq": window, "memory": memory})
    if alone:
        model.blocks = Stack([model.blocks[0]])
    return model


def batches(
    memory: NgramMemory | None, ids: np.ndarray, window: int, seed: int, seconds: dict[str, float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets (B, N) of each step, in the order of `resnet-bk train`, and give a memory its tables.

    Before the first batch, which is for the compilation of kernels, nothing is counted. seconds: gets "counting".
    """
    windows = Windows(TokenFile(ids, np.array([0, len(ids)]), np.array([len(ids)]), ("",)), window)
    per_step = TOKENS // window
    parts = [np.arange(len(windows))] if memory is None else windows.parts(per_step)
    sampler, seconds["counting"], step = ShuffledSampler(parts, per_step, seed), 0.0, 0
    held_back = None if memory is None else HeldBack(memory, windows, sampler)

    def batch(chosen: list[int]) -> tuple[Tensor, Tensor]:
        rows = collate([windows[i] for i in chosen])
        return rows["input_ids"], rows["shift_labels"]

    yield batch([0])
    for sampler.epoch in itertools.count():
        for chosen in zip(*[iter(sampler)] * per_step, strict=False):
            started = time.process_time()
            if held_back is not None:
                if step == 0:
                    held_back.count()
                held_back.hold_back(step)
            seconds["counting"] += time.process_time() - started
            yield batch(list(chosen))
            step += 1


def cell(spec: dict[str, Any]) -> dict[str, Any]:
    """Train one model for seconds of a core, and score it."""
    torch.set_num_threads(1)
    torch.manual_seed(spec["seed"])
    window = spec["window"]
    model = build(spec["rows"], window, spec["alone"])
    training, held_out = CORPORA[spec["corpus"]][0]()

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return model(x, targets=y, logits=False).loss

    counting: dict[str, float] = {}
    draw = partial(next, batches(model.memory, training, window, spec["seed"], counting))
    budget = {"seconds": spec["seconds"], "clock": time.process_time}
    kind = spec["optimizer"]
    record = train(loss_of, model, draw, learning_rate=RATES[kind], optimizer=kind, **budget)
    model.eval()  # reads the table of the whole training text
    nats = mean_nats(loss_of, held_out, window, SCORED)
    parameters = sum(p.numel() for p in model.parameters())
    return {"bits_per_byte": nats / math.log(2), "parameters": parameters, **counting, **record}


def quality(results: list[dict[str, Any]]) -> str:
    """Return a table: a row for each corpus, budget and memory."""
    rows = []
    names = ("corpus", "seconds", "rows", "alone", "optimizer", "window")
    for wanted in dict.fromkeys(tuple(r["cell"][name] for name in names) for r in results):
        own = [r for r in results if tuple(r["cell"][name] for name in names) == wanted]
        corpus, seconds, entries, alone, optimizer, window = wanted
        size = f"{entries:,} ({entries * 4 * (1 + SUCCESSORS) / 1e6:.0f} MB)" if entries else "none"
        scores = [spread([r[name] for r in own], digits) for name, digits in (("bits_per_byte", 4), ("steps", 0))]
        counted = spread([r["counting"] for r in own], 1) if entries else ""
        shape = "memory alone" if alone else "`fast`"
        rows.append(
            [
                corpus,
                f"{seconds:,}",
                shape,
                optimizer,
                window,
                size,
                f"{own[0]['parameters']:,}",
                len(own),
                *scores,
                counted,
            ]
        )
    header = [
        "corpus",
        "core-s",
        "model",
        "optimizer",
        "windows",
        "entries",
        "parameters",
        "seeds",
        "bits per byte",
        "steps",
        "s counting",
    ]
    return table(header, rows)


def speed() -> str:
    """Return a table: the time with memory over that without, by pairs."""
    torch.manual_seed(0)
    ids = CORPORA["stdlib"][0]()[0]
    with_memory = build(LARGEST, WINDOW)
    assert with_memory.memory is not None
    with_memory.memory.count(ids)
    both = {"without": work(build(0, WINDOW)), "with": work(with_memory)}
    ratios = []
    for what in both["with"]:
        times = interleaved({name: runs[what] for name, runs in both.items()}, REPEATS)
        ratios.append(spread([b / a for a, b in zip(times["without"], times["with"], strict=True)]))
    return table(["training step", "prefill", "decoding"], [ratios])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cell", type=json.loads, help="internal: one training run, as JSON")
    parser.add_argument("--log", type=Path, default=Path("runs/benchmarks/memory.jsonl"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--optimizers", nargs="+", choices=RATES, default=list(RATES), help="the last one for all else")
    parser.add_argument("--long", type=int, default=0, help="core-seconds of one long training; 0: none")
    options = parser.parse_args()
    if options.cell is not None:
        print(json.dumps(cell(options.cell)))
        return
    names = ("corpus", "rows", "alone", "seed", "optimizer", "window")
    best = options.optimizers[-1]
    short = [
        (corpus, rows, False, seed, optimizer, window)
        for seed in options.seeds
        for optimizer in options.optimizers
        for corpus in CORPORA
        for rows, window in ((0, SHORT_WINDOW), (LARGEST, WINDOW))
    ]
    short += [("stdlib", rows, False, 0, best, WINDOW) for rows in ROWS[1:-1]]
    short += [("stdlib", LARGEST, True, 0, "adamw", WINDOW)]  # without blocks there are no matrices for Muon
    long = [("stdlib", LARGEST, False, 0, best, WINDOW)] if options.long else []
    cells = [{"seconds": options.long, **dict(zip(names, values, strict=True))} for values in long]
    cells += [{"seconds": SECONDS, **dict(zip(names, values, strict=True))} for values in short]
    results = run_cells(__file__, cells, workers=2, log=options.log)
    torch.set_num_threads(1)
    text = "# N-gram memory\n\n" + conditions(" ".join(["python benchmarks/memory.py", *sys.argv[1:]]))
    text += (
        f"\nThe preset `fast` without recent n-grams, {TOKENS} bytes a step, learning rates {RATES}, cosine, "
        f"one thread a run, two runs at a "
        f"time. Memory of {', '.join(map(str, ORDERS))} bytes, {SUCCESSORS} successors an entry; its "
        f"counting is part of the time. Bits per byte on {SCORED // 1024} KiB of held-out text in windows as "
        "long as those of the training: median (least to greatest).\n\n"
    )
    text += quality(results)
    text += (
        f"\n## Time with memory / time without\n\nOne thread, {REPEATS} pairs in turn: median (least to greatest).\n\n"
    )
    publish(text + speed(), options.out)


if __name__ == "__main__":
    main()
