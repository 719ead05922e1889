"""Models that a benchmark trains once, with a resumable log, and loads again to measure.

Dimensions: B sequences, N tokens.
"""

import json
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from common import CORPORA, arguments, batches, conditions, interleaved, publish, run_cells, train
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.model import LanguageModel, ModelOutput
from resnet_bk.study.measure import rank_correlation

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HELD_OUT, WINDOW = 2**18, 1024  # bytes scored; bytes per window
Run = Callable[[LanguageModel], Any]
Page = Callable[[list[dict[str, Any]], Tensor, Path | None], str]


class Trained:
    """The models of one benchmark, trained on one of CORPORA.

    Args:
        benchmark: name of the script without ".py".
        shape: fields that all models share.
        models: name -> further fields of the model.
        batch: sequences per step.
        steps: training steps of models that are not in `timed`.
        seeds: each model is trained once with each.
        timed: name -> (other model, share). The model trains for this share of the processor time that the other one
            took (the median of its seeds), instead of for `steps`.
        only: corpus -> names of the models that are trained on it, where not all are.
    """

    def __init__(
        self,
        benchmark: str,
        shape: dict[str, Any],
        models: dict[str, dict[str, Any]],
        *,
        batch: int,
        steps: int,
        seeds: tuple[int, ...],
        timed: dict[str, tuple[str, float]] | None = None,
        only: dict[str, tuple[str, ...]] | None = None,
    ):
        self.benchmark, self.shape, self.models, self.timed = benchmark, shape, models, timed or {}
        self.batch, self.steps, self.seeds, self.corpus, self.only = batch, steps, seeds, "stdlib", only or {}

    def main(self, script: str, about: str | None, title: str, page: Page) -> None:
        """Run the whole command line.

        Args:
            script: path of the benchmark.
            about: its docstring, shown by --help.
            title: title of the page.
            page: returns the page below title and conditions, given the results of the training cells, the held-out
                rows (B, N + 1) and the path of the page (None: screen only).
        """
        parser = arguments(about)
        parser.add_argument("--cell", type=json.loads, help="internal: one training run, as JSON")
        parser.add_argument("--corpus", choices=CORPORA, default=self.corpus)
        parser.add_argument("--steps", type=int, default=self.steps, help="training steps of models without a time")
        parser.add_argument("--train-only", action="store_true", help="fill the log and stop before the timings")
        options = parser.parse_args()
        if options.cell is not None:
            self._choose(options.cell["corpus"])
            print(json.dumps(self._train(options.cell)))
            return
        self._choose(options.corpus)
        self.steps = options.steps
        log = self._folder.with_suffix(".jsonl")
        by_steps = self._cells({name: {"steps": self.steps} for name in self.models if name not in self.timed})
        results = run_cells(script, by_steps, workers=2, log=log)
        seconds: dict[str, dict[str, Any]] = {}
        for name, (other, share) in self.timed.items():
            taken = statistics.median(r["seconds"] for r in results if r["cell"]["model"] == other)
            seconds[name] = {"seconds": round(share * taken)}
        results += run_cells(script, self._cells(seconds), workers=2, log=log)
        if not options.train_only:
            command = f"python benchmarks/{self.benchmark}.py --corpus {self.corpus} --steps {self.steps}"
            if options.out is not None:
                options.out.parent.mkdir(parents=True, exist_ok=True)
            text = page(results, held_out(self.corpus), options.out)
            publish(f"# {title}\n\n" + conditions(command) + text, options.out)

    def _choose(self, corpus: str) -> None:
        self.corpus = corpus
        self.models = {
            name: fields for name, fields in self.models.items() if name in self.only.get(corpus, self.models)
        }
        self.timed = {name: timed for name, timed in self.timed.items() if name in self.models}

    def _cells(self, budgets: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """Return one cell per model and seed. budgets: name -> {"steps": ...} or {"seconds": ...}."""
        return [
            {
                "corpus": self.corpus,
                "model": name,
                "fields": {**self.shape, **self.models[name]},
                "seed": seed,
                **budget,
            }
            for name, budget in budgets.items()
            for seed in self.seeds
        ]

    def _train(self, spec: dict[str, Any]) -> dict[str, Any]:
        torch.set_num_threads(1)
        torch.manual_seed(spec["seed"])
        model = LanguageModel(259, **spec["fields"])

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            return model(x, targets=y, logits=False).loss  # type: ignore[return-value]

        ids, _ = CORPORA[self.corpus][0]()
        draw = batches(ids, self.batch, self.shape["n_seq"], spec["seed"])
        budget = spec.get("steps"), spec.get("seconds")
        result: dict[str, Any] = dict(train(loss_of, model, draw, *budget, clock=time.process_time))
        result["parameters"] = sum(p.numel() for p in model.parameters())
        save_model(model, str(self._path(spec["model"], spec["seed"])))
        return result

    @property
    def _folder(self) -> Path:
        return Path("runs/benchmarks") / f"{self.benchmark}-{self.corpus}"

    def _path(self, name: str, seed: int) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{name.replace(' ', '-').replace(',', '')}-{seed}.safetensors"

    def load(self, name: str, seed: int) -> LanguageModel:
        model = LanguageModel(259, **{**self.shape, **self.models[name]})
        load_model(model, str(self._path(name, seed)))
        return model.eval()

    def speeds(
        self, runs: dict[str, Run], reference: Callable[[str], str], repeats: int = 7
    ) -> dict[str, dict[str, list[float]]]:
        """Time all models in turn, for every seed.

        Args:
            runs: name -> what to time.
            reference: returns the name of the reference model of a model.
            repeats: timed runs per seed.

        Returns:
            model -> run -> how many times as fast as the reference model, for each pair of runs; under "RUN ms", the
            median milliseconds of each seed.
        """
        found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in self.models}
        for seed in self.seeds:
            models = {name: self.load(name, seed) for name in self.models}
            for what, run in runs.items():
                times = interleaved({name: partial(run, model) for name, model in models.items()}, repeats)
                for name, seconds in times.items():
                    pairs = zip(times[reference(name)], seconds, strict=True)
                    found[name][what] += [base / own for base, own in pairs]
                    found[name][f"{what} ms"].append(1000 * statistics.median(seconds))
        return found

    def described(self) -> str:
        """Return how the models were trained, in words."""
        return (
            f"D = {self.shape['d_model']}, {CORPORA[self.corpus][1]}, {self.steps} steps of {self.batch} x "
            f"{self.shape['n_seq']} bytes, AdamW 3e-3 cosine, one thread a run, two runs at a time; up to {HELD_OUT:,} "
            f"held-out bytes in windows of {WINDOW:,}. Median (least to greatest) of {len(self.seeds)} seeds."
        )


def held_out(corpus: str = "stdlib") -> Tensor:
    """Return held-out windows of WINDOW tokens and their next token, (B, N + 1) ids, without gaps."""
    _, ids = CORPORA[corpus][0]()
    count = min(HELD_OUT, len(ids) - 1) // WINDOW
    return torch.from_numpy(np.stack([ids[i * WINDOW : (i + 1) * WINDOW + 1] for i in range(count)]).astype(np.int64))


@torch.no_grad()
def scored(model: LanguageModel, rows: Tensor) -> tuple[Tensor, list[ModelOutput]]:
    """Return the nats of every token, (B, N), and the model's outputs for 16 rows at a time, without logits."""
    nats, outputs = [], []
    for x in rows.split(16):
        output = model(x[:, :-1])
        nats.append(F.cross_entropy(output.logits.transpose(1, 2), x[:, 1:], reduction="none"))
        output.logits = None
        outputs.append(output)
    return torch.cat(nats), outputs


def prefill(rows: Tensor) -> Run:
    """Return a run that reads 8 x 2,048 tokens of the rows."""
    ids = long_rows(rows)

    def run(model: LanguageModel) -> None:
        with torch.no_grad():
            model.eval()(ids, logits=False)

    return run


def long_rows(rows: Tensor) -> Tensor:
    """Return (8, 2048) ids of the rows, two windows each."""
    return rows[:16, :WINDOW].reshape(8, 2 * WINDOW)


def training_step(rows: Tensor) -> Run:
    """Return a run of forward and backward of 12 x 256 tokens."""

    def run(model: LanguageModel) -> None:
        model.train()(rows[:12, :256], targets=rows[:12, 1:257], logits=False).loss.backward()
        model.zero_grad()

    return run


def bits(nats: Tensor) -> float:
    """Return the mean in bits."""
    return nats.mean().item() / math.log(2)


def worse(bpb: float, reference: float) -> float:
    """Return by how many percent the perplexity per byte is above that of the reference."""
    return 100 * (2 ** (bpb - reference) - 1)


def by_tenth(loss: Tensor, what: Tensor) -> tuple[list[float], float]:
    """Return the mean of `what` in each tenth of the tokens by loss, and their rank correlation. Any equal shapes."""
    loss, what = loss.flatten(), what.flatten().double()
    tenths = [tenth.mean().item() for tenth in what[loss.argsort()].tensor_split(10)]
    return tenths, rank_correlation(loss, what)


def plot_tenths(curves: dict[str, list[list[float]]], of_whom: str, what: str, out: Path | None) -> None:
    """Plot medians over the seeds and their spread, as an SVG with the name of the page.

    Args:
        curves: name -> for each seed, ten means.
        of_whom: name of the model whose loss orders the bytes.
        what: label of the y axis.
        out: path of the page; None writes nothing.
    """
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, seeds in curves.items():
        axes.plot(range(1, 11), middle(seeds), marker="o", label=name)
        axes.fill_between(range(1, 11), *(list(map(f, zip(*seeds, strict=True))) for f in (min, max)), alpha=0.2)
    axes.set(xlabel=f"tenth of held-out bytes by the loss of the {of_whom} model", ylabel=what, xticks=range(1, 11))
    axes.legend(frameon=False)
    if out is not None:
        figure.savefig(out.with_suffix(".svg"), bbox_inches="tight")


def middle(curves: list[list[float]]) -> list[float]:
    """Return the median of the curves, point by point."""
    return [statistics.median(values) for values in zip(*curves, strict=True)]
