"""Memory of token mixers: recall, copying, induction, selective copying, a needle in a haystack, bits by position.

``python benchmarks/recall.py --out benchmarks/results/...`` first chooses a learning rate for each mixer, by recall of
16 pairs, then runs every training cell that is not in the log yet. ``--tasks recall --sizes 8 --mixers ours --seeds 0
--rate 3e-3 --set --set energy=complex`` runs two cells, with the default and with another setting of our mixer.
``--estimate`` prints the time of the training, without the choice of rates and the scores. The model around the mixer
is the same; its feed-forward width makes parameters equal.

Keys are the ids 0 to 127, values are the ids 128 to 255, then come a filler and a mark. Only targets are trained and
scored. Each sequence has, for a task of some `size`:

- recall (Arora et al. 2023, arXiv:2312.04927): `size` distinct keys, each followed by a random value, then each key
  again, at random places among fillers; max(64, 4 size) tokens. Targets: the value, at each second key.
- copy: `size` random symbols of 32, a mark, the symbols again. Targets: the second copy.
- induction (Fu et al. 2022, arXiv:2212.14052): `size` tokens, random symbols of 16, a mark at a random place and a
  second mark at the end. Target: the symbol after the first mark, at the end.
- selective copying (Gu and Dao 2023, arXiv:2312.00752): `size` random symbols of 16 in random places among 16 size
  fillers, then `size` marks. Targets: the symbols in their order, at the marks.
- needle: a key and a value at a random place among random values, then the key again; `size` tokens. Target: the value,
  at the end. Scored with the pair at the beginning.

The task bytes trains on a corpus for --seconds, in windows of --window bytes. It scores pieces of long held-out
documents, from the first byte of a piece on, and reports bits per byte by position in the piece.

Dimensions: B sequences, N tokens.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import CORPORA, arguments, batches, conditions, publish, run_cells, spread, table, train
from peer_mixers import (
    GatedDeltaNet,
    GatedLinear,
    GatedLinearAttention,
    Mamba2,
    SoftmaxAttention,
    equal,
    parameters,
)
from torch import Generator, Tensor
from torch.nn import functional as F

from resnet_bk.config import BYTE_VOCABULARY, END_OF_DOCUMENT
from resnet_bk.layers.attention import AttentionState
from resnet_bk.model import LanguageModel

KEYS, VALUES, FILLER, MARK = 128, 128, 256, 257
SHAPE = {"vocab_size": BYTE_VOCABULARY, "d_model": 64, "n_layers": 2, "d_ff": 64, "n_heads": 2, "n_seq": 64}
OURS, SOFTMAX, BYTES = "ours", "softmax", "bytes"
PEERS = {
    "mamba2": Mamba2,
    "gated_deltanet": GatedDeltaNet,
    "gla": GatedLinearAttention,
    SOFTMAX: SoftmaxAttention,
}
STEPS, BATCH, SEEDS, RATES = 1500, 32, (1, 2, 3), (3e-3, 1e-2, 3e-2)
CHOOSING, CHOOSING_SEED = 16, 0  # pairs and seed of the recall that chooses learning rates
TOKENS_A_STEP = 4096  # of bytes
PIECE = 4096  # tokens that our mixer reads at a time; peers have no state here and read whole sequences
ROWS, TOKENS = 512, 2**20  # sequences and tokens that a score takes at most; 16 sequences at least
AT_ONCE = 2**16  # tokens of a pass of a score
SOFTMAX_REACH = 4096  # tokens of the longest sequences that softmax attention is scored on: its time is quadratic
EDGES = (0, 16, 64, 256, 1024, 4096, 16384)  # ranges of positions

Draw = Callable[[int, int, Generator], tuple[Tensor, Tensor]]


# ------------------------------------------------------------------------------------------------------- tasks


def places(batch: int, count: int, among: int, generator: Generator) -> Tensor:
    """Return `count` distinct random numbers below `among` in each row, (B, count)."""
    return torch.rand(batch, among, generator=generator).argsort(-1)[:, :count]


def recall(batch: int, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    length, pairs = max(64, 4 * size), 2 * size
    keys = places(batch, size, KEYS, generator)
    values = torch.randint(KEYS, KEYS + VALUES, (batch, size), generator=generator)
    ids = torch.full((batch, length), FILLER)
    ids[:, :pairs] = torch.stack([keys, values], dim=-1).flatten(1)
    second = pairs + places(batch, size, length - pairs, generator)
    targets = torch.full((batch, length), -100)
    return ids.scatter_(1, second, keys), targets.scatter_(1, second, values)


def symbols(batch: int, count: int, among: int, generator: Generator) -> Tensor:
    return torch.randint(among, (batch, count), generator=generator)


def at_end(ids: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids (B, N), and targets with the answers (B, A) at the last A places."""
    targets = torch.full_like(ids, -100)
    targets[:, ids.shape[1] - answers.shape[1] :] = answers
    return ids, targets


def copy(batch: int, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    text = symbols(batch, size, 32, generator)
    return at_end(torch.cat([text, torch.full((batch, 1), MARK), text[:, :-1]], dim=1), text)


def induction(batch: int, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    ids = symbols(batch, size, 16, generator)
    place = torch.randint(size - 2, (batch, 1), generator=generator)
    answers = ids.gather(1, place + 1)
    ids = ids.scatter(1, place, MARK)
    ids[:, -1] = MARK
    return at_end(ids, answers)


def selective(batch: int, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
    answers = symbols(batch, size, 16, generator)
    where = places(batch, size, 17 * size, generator).sort(-1).values
    text = torch.full((batch, 17 * size), FILLER).scatter_(1, where, answers)
    return at_end(torch.cat([text, torch.full((batch, size), MARK)], dim=1), answers)


def needle(batch: int, size: int, generator: Generator, far: bool = False) -> tuple[Tensor, Tensor]:
    ids = KEYS + symbols(batch, size, VALUES, generator)
    key = symbols(batch, 1, KEYS, generator)
    place = torch.randint(1 if far else size - 2, (batch, 1), generator=generator)
    answers = ids.gather(1, place + 1)
    ids = ids.scatter(1, place, key)
    ids[:, -1:] = key
    return at_end(ids, answers)


class Task(NamedTuple):
    """A task: draw(B, size, generator) returns ids and targets (B, N).

    sizes: each is trained in runs of its own. beyond: factors on the size at which a run is scored. far: the draw of
    the scores, if it is another one.
    """

    draw: Draw
    sizes: tuple[int, ...]
    beyond: tuple[int, ...] = (1,)
    far: Draw | None = None


TASKS = {
    "recall": Task(recall, (4, 8, 16, 32, 64)),
    "copy": Task(copy, (32,), (1, 2, 4)),
    "induction": Task(induction, (64,), (1, 4, 16, 64)),
    "selective": Task(selective, (16,)),
    "needle": Task(needle, (256,), (1, 4, 16, 64, 256), partial(needle, far=True)),
}


# ------------------------------------------------------------------------------------------------------- models


def model_of(spec: dict[str, Any]) -> LanguageModel:
    """Return the model of a cell, as large as ours with default settings."""
    return equal(SHAPE, spec["seed"], {**SHAPE, **spec["fields"]}, PEERS.get(spec["mixer"]))


def state_floats(model: LanguageModel) -> int | str:
    """Return the floats of the recurrent state of all blocks, without those of short convolutions.

    With bonds, g of the last site does not count: it is -1.
    """
    total = 0
    for block in model.blocks:
        if isinstance(block.mixer, SoftmaxAttention):
            return "2 D N a block"
        if isinstance(block.mixer, GatedLinear):
            total += block.mixer.state_floats
            continue
        state = block.mixer.layout(torch.empty(1, 1, SHAPE["d_model"]))
        parts = state._asdict() if isinstance(state, AttentionState) else state.core._asdict()
        changing = [part for name, part in parts.items() if name != "g" or model.config.energy_kind != "bonds"]
        total += sum(part.numel() * (2 if part.is_complex() else 1) for part in changing)
    return total


def read(model: LanguageModel, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits (T, V) at the T targets of ids (B, N), and these targets (T,).

    Our mixer reads pieces and passes its state on. Peers have no state here and read whole sequences.
    """
    ours = not isinstance(model.blocks[0].mixer, (GatedLinear, SoftmaxAttention))
    piece, state, logits = PIECE if ours else ids.shape[1], None, []
    for part, wanted in zip(ids.split(piece, 1), targets.split(piece, 1), strict=True):
        features = model.features(part, state=state)
        state = features.state if ours else None
        logits.append(model.head(features.x[wanted != -100]))
    wanted = [part[part != -100] for part in targets.split(piece, 1)]
    return torch.cat(logits), torch.cat(wanted)


# ---------------------------------------------------------------------------------------------------- training


def loss_of(model: LanguageModel) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of ids and targets (B, N): the mean nats at targets. Other places skip the head."""

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        counted = targets != -100
        return F.cross_entropy(model.head(model.features(ids).x[counted]), targets[counted])

    return loss


@torch.no_grad()
def score(model: LanguageModel, draw: Draw, size: int, rows: int) -> tuple[float, float]:
    """Return accuracy and mean nats at the targets of sequences that no training saw: of 16 to `rows` of them."""
    generator = Generator().manual_seed(10_000)
    length = draw(1, size, generator)[0].shape[1]
    rows, at_once = max(16, min(rows, TOKENS // length)), max(1, AT_ONCE // length)
    right, nats = [], []
    for first in range(0, rows, at_once):
        logits, wanted = read(model, *draw(min(at_once, rows - first), size, generator))
        right.append((logits.argmax(-1) == wanted).double())
        nats.append(F.cross_entropy(logits, wanted, reduction="none"))
    return torch.cat(right).mean().item(), torch.cat(nats).mean().item()


def answer(spec: dict[str, Any], model: LanguageModel) -> dict[str, Any]:
    """Train on a task with targets, and return the scores by size."""
    task, generator = TASKS[spec["task"]], Generator().manual_seed(spec["seed"])
    draw = partial(task.draw, BATCH, spec["size"], generator)
    record = train(loss_of(model), model, draw, spec["steps"], learning_rate=spec["rate"], clock=time.process_time)
    rows = spec.get("rows", ROWS)
    sizes = [factor * spec["size"] for factor in task.beyond if rows]
    if spec["mixer"] == SOFTMAX:
        sizes = [size for size in sizes if size <= SOFTMAX_REACH]
    scores = {size: score(model.eval(), task.far or task.draw, size, rows) for size in sizes}
    return {
        "accuracy": {size: round(found[0], 4) for size, found in scores.items()},
        "nats": {size: round(found[1], 5) for size, found in scores.items()},
        **record,
    }


def documents(corpus: str) -> Tensor:
    """Return pieces (B, N + 1) of the held-out documents of N + 1 bytes or more, cut from their beginnings."""
    _, ids = CORPORA[corpus][0]()
    size = EDGES[-1] + 1
    ends = np.flatnonzero(ids == END_OF_DOCUMENT)
    parts = [document[: len(document) // size * size] for document in np.split(ids, ends + 1)]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)).view(-1, size)


@torch.no_grad()
def bits_by_position(model: LanguageModel, rows: Tensor) -> dict[int, float]:
    """Return the mean bits per byte of rows (B, N + 1) in each range of EDGES, by its last position."""
    bits = []
    for row in rows.split(1):
        logits, wanted = read(model, row[:, :-1], row[:, 1:])
        bits.append(F.cross_entropy(logits, wanted, reduction="none") / math.log(2))
    means = torch.stack(bits).mean(0)
    return {last: round(means[first:last].mean().item(), 4) for first, last in pairwise(EDGES)}


def read_bytes(spec: dict[str, Any], model: LanguageModel) -> dict[str, Any]:
    """Train on a corpus, and return the bits per byte of long documents by position."""
    window = spec["size"]
    draw = batches(CORPORA[spec["corpus"]][0]()[0], max(1, TOKENS_A_STEP // window), window, spec["seed"])
    budget = {"seconds": spec["seconds"], "clock": time.process_time}
    record = train(loss_of(model), model, draw, learning_rate=spec["rate"], **budget)
    return {"bits": bits_by_position(model.eval(), documents(spec["corpus"])[: spec.get("rows")]), **record}


def cell(spec: dict[str, Any]) -> dict[str, Any]:
    """Train one model and score it."""
    torch.set_num_threads(1)
    model = model_of(spec)
    found = (read_bytes if spec["task"] == BYTES else answer)(spec, model)
    return {**found, "parameters": parameters(model), "state": state_floats(model)}


# ------------------------------------------------------------------------------------------------------- study


def describe(options: argparse.Namespace, task: str, size: int, seed: int) -> list[dict[str, Any]]:
    """Return the cells of a task, a size and a seed, one for each mixer, without their learning rates."""
    budget: dict[str, Any] = {"steps": options.steps}
    if task == BYTES:
        budget = {"corpus": options.corpus, "seconds": options.seconds}
    variants = [dict(fields) for fields in options.set or [[]]]
    return [
        {"task": task, "size": size, "mixer": mixer, "fields": fields, **budget, "seed": seed}
        for mixer in options.mixers
        for fields in (variants if mixer == OURS else [{}])
    ]


def plan(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the cells of the study, without their learning rates, seed by seed."""
    sizes = {task: options.sizes or TASKS[task].sizes for task in options.tasks if task != BYTES}
    sizes |= {task: [options.window] for task in options.tasks if task == BYTES}
    return [
        spec
        for seed in options.seeds
        for task in options.tasks
        for size in sizes[task]
        for spec in describe(options, task, size, seed)
    ]


def choose(options: argparse.Namespace) -> dict[str, float]:
    """Return the learning rate by label: `--rate`, or the best of RATES at recall with a seed of its own."""
    specs = describe(options, "recall", CHOOSING, CHOOSING_SEED)
    if options.rate is not None:
        return {label(spec): options.rate for spec in specs}
    grid = [spec | {"rate": rate} for spec in specs for rate in RATES]
    results = run_cells(__file__, grid, options.workers, options.log)

    def nats(result: dict[str, Any]) -> float:
        found = result["nats"][str(CHOOSING)]
        return found if math.isfinite(found) else math.inf

    results.sort(key=nats, reverse=True)
    return {label(r["cell"]): r["cell"]["rate"] for r in results}  # the last of each mixer is the best


def estimate(cells: Sequence[dict[str, Any]]) -> str:
    """Return a table of milliseconds a training step, and the core-hours of all training."""
    torch.set_num_threads(1)
    found: dict[tuple[str, int, str], float] = {}
    for spec in cells:
        kind = spec["task"], spec["size"], label(spec)
        if "steps" in spec and kind not in found:
            record = answer(spec | {"steps": 6, "rate": RATES[0], "rows": 0}, model_of(spec))
            found[kind] = record["seconds"] / record["steps"]
    seconds = sum(
        found[spec["task"], spec["size"], label(spec)] * spec["steps"] if "steps" in spec else spec["seconds"]
        for spec in cells
    )
    rows = [[*kind, f"{1000 * step:.0f}"] for kind, step in found.items()]
    total = f"\n{len(cells)} cells: {seconds / 3600:.2f} core-hours of training\n"
    return table(["task", "size", "mixer", "ms a step"], rows) + total


def label(cell: dict[str, Any]) -> str:
    return " ".join([cell["mixer"], *(f"{name}={json.dumps(value)}" for name, value in cell["fields"].items())])


def results_of(task: str, runs: Sequence[dict[str, Any]]) -> str:
    """Return the table of one task: a row for each mixer, a column for each size or range of positions."""
    what = "bits" if task == BYTES else "accuracy"
    columns = sorted({column for r in runs for column in r[what]}, key=int)
    rows = []
    for name in dict.fromkeys(label(r["cell"]) for r in runs):
        own = [r for r in runs if label(r["cell"]) == name]
        row = [name, f"{own[0]['parameters']:,}", own[0]["state"], own[0]["cell"]["rate"]]
        row.append(spread([1000 * r["seconds"] / r["steps"] for r in own], 0))
        for column in columns:
            values = [r[what][column] for r in own if column in r[what]]
            row.append(spread(values) if values else "-")
        rows.append(row)
    header = ["mixer", "parameters", "floats of state", "learning rate", "ms a step"]
    return table([*header, *(f"{int(column):,}" for column in columns)], rows)


def page(results: Sequence[dict[str, Any]]) -> str:
    width = SHAPE["d_model"] // SHAPE["n_heads"]
    seeds = len({r["cell"]["seed"] for r in results})
    text = (
        f"\n{SHAPE['n_layers']} blocks, D = {SHAPE['d_model']}, {SHAPE['n_heads']} heads of {width}, "
        f"feed-forwards about {SHAPE['d_ff']} wide, {BATCH} sequences a step, AdamW, cosine, one thread a run. "
        f"Learning rates: the best of {', '.join(map(str, RATES))} at recall of {CHOOSING} pairs with seed "
        f"{CHOOSING_SEED}, or that of --rate. Each linear mixer has a convolution of width 4. Floats of state: the "
        "recurrent state of all blocks, without the convolutions'. Median (least to greatest) of "
        f"{seeds} seeds. benchmarks/recall.py defines the tasks.\n"
        f"\nThe state of a head has room for {width} values under orthogonal keys, that of a block for "
        f"{SHAPE['n_heads'] * width}. More writes disturb what is stored. Recall of 64 pairs takes all of that room. A "
        "needle takes room for one value, if the mixer does not write the text around it.\n"
    )
    for task in dict.fromkeys(r["cell"]["task"] for r in results):
        runs = [r for r in results if r["cell"]["task"] == task]
        first, trained = runs[0]["cell"], sorted({r["cell"]["size"] for r in runs})
        if task == BYTES:
            text += (
                f"\n## Bits per byte by position\n\nTrained for {first['seconds']} s of a core on {first['corpus']}, "
                f"windows of {first['size']} bytes. {len(documents(first['corpus']))} held-out texts of {EDGES[-1]:,} "
                "bytes, from documents of that length or more. A column holds the positions up to its number.\n\n"
            )
        else:
            text += (
                f"\n## {task.capitalize()}\n\nAccuracy by size; {first['steps']} steps at size "
                f"{', '.join(map(str, trained))}.\n\n"
            )
        text += results_of(task, runs)
    return text


def setting(text: str) -> tuple[str, Any]:
    """Return name and value of "name=value"; the value is JSON, or else a string."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cell", type=json.loads, help="internal: one training run, as JSON")
    parser.add_argument("--tasks", nargs="+", choices=(*TASKS, BYTES), default=[*TASKS, BYTES])
    parser.add_argument("--sizes", nargs="+", type=int, help="sizes to train at; default: those of each task")
    parser.add_argument("--mixers", nargs="+", choices=(OURS, *PEERS), default=[OURS, *PEERS])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    fields = "model fields of ours; repeated, each is one more row; without a field: the default model"
    parser.add_argument("--set", nargs="*", type=setting, action="append", metavar="FIELD=VALUE", help=fields)
    parser.add_argument("--rate", type=float, help="learning rate of every mixer; default: each its best of three")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2, help="training runs at a time")
    parser.add_argument("--corpus", choices=CORPORA, default="stdlib", help="of the task bytes")
    parser.add_argument("--window", type=int, default=256, help="bytes of a window of the task bytes")
    parser.add_argument("--seconds", type=float, default=120, help="training time of the task bytes, of one core")
    parser.add_argument("--quick", action="store_true", help="a smoke run without a log: a few small steps of one seed")
    parser.add_argument("--estimate", action="store_true", help="print the time of the cells, and stop")
    parser.add_argument("--log", type=Path, default=Path("runs/benchmarks/recall.jsonl"))
    options = parser.parse_args()
    if options.cell is not None:
        print(json.dumps(cell(options.cell)))
        return
    if options.quick:
        options.steps, options.seconds, options.seeds, options.rate = 10, 1, [0], 3e-3
        options.sizes = options.sizes or [4]
    cells = plan(options)
    if options.estimate:
        print(estimate(cells))
        return
    rates = choose(options)
    cells = [spec | {"rate": rates[label(spec)]} for spec in cells]
    if options.quick:
        results = [json.loads(json.dumps({"cell": spec, **cell(spec | {"rows": 1})})) for spec in cells]
    else:
        results = run_cells(__file__, cells, options.workers, options.log)
    command = " ".join(["python benchmarks/recall.py", *sys.argv[1:]])
    publish("# Memory of token mixers\n\n" + conditions(command) + page(results), options.out)


if __name__ == "__main__":
    main()
