"""Every technique beside smaller plain models: bits per byte against the time of reading and of decoding.

``python benchmarks/fronts.py --seconds 1200 --out benchmarks/results/...`` trains each model for the same seconds of a
core (two at a time; cells that are in the log are not run again), then times all of them in turn on the quiet machine.
Adapted models start from the plain model of eight blocks, trained for BASE_SHARE of the seconds, learn from it, and
get the rest. All have n-gram memory, counted within their seconds.

A technique pays on a clock if it has a model, at some threshold, that is faster than every model without the technique
that predicts as well. Dimensions: B sequences, N tokens.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from common import (
    CORPORA,
    arguments,
    conditions,
    interleaved,
    mean_nats,
    publish,
    run_cells,
    spread,
    state_file,
    table,
    train,
)
from learning import MEMORY
from memory import SCORED, TOKENS, batches
from safetensors.torch import load_file, save_file
from torch import Tensor

from resnet_bk.adaptive.depth import AdaptiveDepth
from resnet_bk.model import LanguageModel
from resnet_bk.study.measure import one_by_one
from resnet_bk.training.transfer import Teacher, transfer

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WINDOW, RATE, BASE_SHARE, DISTILLED = 1024, 0.01, 0.75, 0.5
SHAPE: dict[str, Any] = {"d_model": 64, "n_seq": WINDOW, "num_experts": 1, "memory": MEMORY}
BASE, DEPTH = "base", 8
THRESHOLDS = (0.8, 0.9, 0.95, 0.98, 1.0)  # of early exit
REPEATS, READ, DECODED = 7, (8, 2048), 1000
CLOCKS = ("reading", "decoding")
MARGIN = 1.05  # times as fast as anything as good, on each seed; less is within the noise of the clock


class Kind(NamedTuple):
    """A model of the study. technique: what it has, "" for none; adapted: from the base, instead of from nothing."""

    fields: dict[str, Any]
    technique: str = ""
    adapted: bool = False


def words(before: int, inner: int, after: int) -> dict[str, Any]:
    return {"multiscale": {"factors": [4], "layers": [before, inner, after], "boundaries": "whitespace"}}


KINDS: dict[str, Kind] = {
    **{f"plain, {n}": Kind({"n_layers": n}) for n in (1, 2, 3, 4, 6, DEPTH)},
    "words, 0-1-0": Kind(words(0, 1, 0), "multi-scale"),
    "words, 0-2-0": Kind(words(0, 2, 0), "multi-scale"),
    "words, 1-2-0": Kind(words(1, 2, 0), "multi-scale"),
    "words, 2-2-0": Kind(words(2, 2, 0), "multi-scale"),
    "words, 1-4-1": Kind(words(1, 4, 1), "multi-scale"),
    "words, 2-6-0": Kind(words(2, 6, 0), "multi-scale"),
    "early exit": Kind({"depth": {"policy": "exit", "first": 0, "every": 2}}, "early exit", adapted=True),
    "act": Kind({"depth": {"policy": "act", "target": 0.5}}, "adaptive computation time", adapted=True),
    "skip": Kind({"depth": {"policy": "skip", "target": 0.5}}, "mixture of depths", adapted=True),
    "sparsity": Kind({"sparsity": {"target": 0.5}}, "learned sparsity"),
    "length": Kind({"length": {"bins": 8, "max_length": 128, "training": "sampled"}}, "learned length", adapted=True),
    "experts": Kind(
        {"num_experts": 4, "top_k": 4, "d_ff": 88, "experts": {"policy": "top_p", "target": 1.3, "zero": 1}},
        "conditional experts",
    ),
}


class Point(NamedTuple):
    """A model at a threshold; threshold: of its early exit, None without."""

    name: str
    threshold: float | None

    def __str__(self) -> str:
        return self.name if self.threshold is None else f"{self.name}, {self.threshold:g}"


POINTS = [Point(name, t) for name in KINDS for t in (THRESHOLDS if name == "early exit" else (None,))]


def build(name: str) -> LanguageModel:
    fields = {"n_layers": DEPTH} if name == BASE else {"n_layers": DEPTH} | KINDS[name].fields
    if "multiscale" in fields:
        del fields["n_layers"]
    return LanguageModel(259, **{**SHAPE, **fields})


def path_of(spec: dict[str, Any]) -> Path:
    folder = Path("runs/benchmarks") / f"fronts-{spec['corpus']}-{spec['budget']}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{spec['model'].replace(', ', '-').replace(' ', '-')}-{spec['seed']}.safetensors"


def load(spec: dict[str, Any]) -> LanguageModel:
    """Return a trained model, whose table is empty."""
    model = build(spec["model"])
    missing, unexpected = model.load_state_dict(load_file(path_of(spec)), strict=False)
    assert not unexpected
    assert all(name == "head.weight" or name.endswith("entries") for name in missing)  # tied; the table
    return model.eval()


def cell(spec: dict[str, Any]) -> dict[str, Any]:
    """Train one model for seconds of a core, and save it without its table, which is counted again in seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(spec["seed"])
    model, teacher = build(spec["model"]), None
    adapted = spec["model"] != BASE and KINDS[spec["model"]].adapted
    if adapted:
        base = load(spec | {"model": BASE})
        transfer(base, model)
        teacher = Teacher(base, model)
    training, held_out = CORPORA[spec["corpus"]][0]()

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        model.taught = (teacher(x), DISTILLED) if teacher is not None and model.training else None
        return model(x, targets=y, logits=False).loss  # type: ignore[return-value]

    counting: dict[str, float] = {}
    draw = partial(next, batches(model.memory, training, WINDOW, spec["seed"], counting))
    rate = RATE / 3 if adapted else RATE
    budget = {"seconds": spec["seconds"], "clock": time.process_time}
    recipe = {"learning_rate": rate, "optimizer": "muon", "state": state_file(__file__, spec)}
    record: dict[str, Any] = train(loss_of, model, draw, **recipe, **budget)
    model.eval()
    save_file({name: x.detach().contiguous() for name, x in model.named_parameters()}, path_of(spec))
    scores = {str(point): bits(model, point, held_out) for point in POINTS if point.name == spec["model"]}
    return {"bits_per_byte": scores, "parameters": sum(p.numel() for p in model.parameters()), **counting, **record}


def at(model: LanguageModel, point: Point) -> LanguageModel:
    """Set the threshold of the point and return the model."""
    for module in model.modules():
        if isinstance(module, AdaptiveDepth) and point.threshold is not None:
            module.threshold = point.threshold
    return model


def bits(model: LanguageModel, point: Point, held_out: np.ndarray) -> float:
    at(model, point)
    return mean_nats(lambda x, y: model(x, targets=y, logits=False).loss, held_out, WINDOW, SCORED) / math.log(2)


def clocks(specs: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return microseconds per byte of reading and of decoding for each point, all of them in turn. specs: by model."""
    torch.set_num_threads(1)
    training, held_out = CORPORA[next(iter(specs.values()))["corpus"]][0]()
    ids = torch.from_numpy(np.resize(held_out, READ).astype(np.int64))
    tokens = held_out[: DECODED + 64].tolist()
    models = {name: load(spec) for name, spec in specs.items()}
    whole = next(model.memory for model in models.values() if model.memory is not None)
    whole.count(training)
    for model in models.values():
        assert model.memory is not None
        model.memory.entries = whole.entries

    @torch.no_grad()
    def read(point: Point) -> None:
        at(models[point.name], point)(ids, logits=False)

    def decode(point: Point) -> float:
        return one_by_one(at(models[point.name], point), tokens) / DECODED

    points = [point for point in POINTS if point.name in models]
    read_seconds = interleaved({str(point): partial(read, point) for point in points}, REPEATS)
    found: dict[str, dict[str, list[float]]] = {
        "reading": {name: [1e6 * s / ids.numel() for s in seconds] for name, seconds in read_seconds.items()},
        "decoding": {str(point): [] for point in points},
    }
    for repeat in range(REPEATS + 1):
        for point in points:
            seconds = decode(point)
            if repeat:  # the first compiles
                found["decoding"][str(point)].append(1e6 * seconds)
    return found


def advantage(technique: str, bits_of: dict[str, float], time_of: dict[str, float]) -> tuple[float, str]:
    """Return how many times as fast the best point of a technique is as the fastest point without it that is as good.

    Also the name of that point. Where nothing else is as good, infinity.
    """
    points = [point for point in POINTS if str(point) in bits_of]
    others = [str(point) for point in points if KINDS[point.name].technique != technique]

    def over(name: str) -> float:
        as_good = [time_of[other] for other in others if bits_of[other] <= bits_of[name]]
        return min(as_good, default=math.inf) / time_of[name]

    own = (str(point) for point in points if KINDS[point.name].technique == technique)
    return max((over(name), name) for name in own)


def verdicts(bits_of: list[dict[str, float]], times: list[dict[str, dict[str, list[float]]]]) -> str:
    """Return the table of techniques: how much faster than anything as good, on each clock. A list has each seed."""
    rows = []
    for technique in dict.fromkeys(KINDS[p.name].technique for p in POINTS if str(p) in bits_of[0]):
        if not technique:
            continue
        row, pays = [technique], []
        for clock in CLOCKS:
            medians = ({name: statistics.median(x) for name, x in found[clock].items()} for found in times)
            ratios = [advantage(technique, b, time_of) for b, time_of in zip(bits_of, medians, strict=True)]
            row += [spread([ratio for ratio, _ in ratios], 2), ratios[0][1]]
            if min(ratios)[0] > MARGIN:
                pays.append(clock)
        rows.append([*row, "pays in " + " and ".join(pays) if pays else "does not pay here"])
    return table(["technique", *(x for clock in CLOCKS for x in (f"{clock}, x", "at")), "verdict"], rows)


def draw(bits_of: dict[str, float], times: dict[str, dict[str, list[float]]], clock: str, path: Path) -> None:
    """Draw bits per byte against the time on a clock, with the front of the plain models."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for technique in dict.fromkeys(kind.technique for kind in KINDS.values()):
        points = [str(p) for p in POINTS if KINDS[p.name].technique == technique and str(p) in bits_of]
        place = [(statistics.median(times[clock][name]), bits_of[name]) for name in points]
        joined = "o-" if technique in ("", "early exit") else "s"
        axes.plot(*zip(*sorted(place), strict=True), joined, label=technique or "plain, 1 to 8 blocks")
    axes.set(xlabel=f"microseconds per byte, {clock}, one thread", ylabel="held-out bits per byte", xscale="log")
    axes.legend(frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "fronts"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cell", type=json.loads, help="internal: one training run, as JSON")
    parser.add_argument("--corpus", choices=CORPORA, default="stdlib")
    parser.add_argument("--seconds", type=int, default=1200, help="of a core, for each model")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time")
    parser.add_argument("--train-only", action="store_true", help="fill the log and stop before the timings")
    options = parser.parse_args()
    if options.cell is not None:
        print(json.dumps(cell(options.cell)))
        return
    log = Path("runs/benchmarks/fronts.jsonl")

    def specs(names: list[str], share: float, seeds: list[int] = options.seeds) -> list[dict[str, Any]]:
        common = {"corpus": options.corpus, "budget": options.seconds, "seconds": round(share * options.seconds)}
        return [{**common, "model": name, "seed": seed} for name in names for seed in seeds]

    adapted = [name for name in options.only if KINDS[name].adapted]
    run: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = partial(
        run_cells, __file__, workers=options.workers, log=log
    )
    first = ([BASE] if adapted else []), [name for name in options.only if name not in adapted]
    results = run([*specs(first[0], BASE_SHARE), *specs(first[1], 1)]) + run(specs(adapted, 1 - BASE_SHARE))
    if options.train_only:
        return
    publish(page(options, results, specs), options.out)


def page(options: Any, results: list[dict[str, Any]], specs: Callable[..., list[dict[str, Any]]]) -> str:
    """Time the models, draw the figures and return the page."""
    bits_of, times = [], []
    for seed in options.seeds:
        own = [r for r in results if r["cell"]["seed"] == seed]
        bits_of.append({name: value for r in own for name, value in r["bits_per_byte"].items()})
        times.append(clocks({spec["model"]: spec for spec in specs(options.only, 1, [seed])}))
    rows = []
    for point in (p for p in POINTS if p.name in options.only):
        runs = [r for r in results if r["cell"]["model"] == point.name]
        speeds = [spread([x for found in times for x in found[clock][str(point)]], 1) for clock in CLOCKS]
        scores = spread([b[str(point)] for b in bits_of], 4)
        rows.append([str(point), f"{runs[0]['parameters']:,}", *speeds, scores, spread([r["steps"] for r in runs], 0)])
    header = ["model", "parameters", *(f"{clock}, us a byte" for clock in CLOCKS), "bits per byte", "steps"]
    text = "# Techniques and smaller plain models\n\n" + conditions(
        " ".join(["python benchmarks/fronts.py", *sys.argv[1:]])
    )
    text += (
        f"\nD = 64, {CORPORA[options.corpus][1]}, {TOKENS} bytes a step in windows of {WINDOW}, Muon {RATE}, "
        f"{options.seconds} seconds of a core each, seeds {options.seeds}. Adapted: {BASE_SHARE} of the time for the "
        f"base. Reading: torch, {READ[0]} x {READ[1]} bytes; decoding: the engine, {DECODED} held-out bytes one by "
        "one; one thread.\n\n"
    )
    text += table(header, rows) + "\n## Verdicts\n\nTimes as fast as the fastest other model that is as good.\n\n"
    text += verdicts(bits_of, times)
    if options.out is not None:
        for clock in CLOCKS:
            path = options.out.with_name(f"{options.out.stem}-{clock}.svg")
            draw(bits_of[0], times[0], clock, path)
            text += f"\n![Bits per byte against the time of {clock}]({path.name})\n"
    return text


if __name__ == "__main__":
    main()
