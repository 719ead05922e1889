"""The command ``resnet-bk train``: train, score, measure, and report."""

import json
import math
import shlex
from typing import Any

import numpy as np

from resnet_bk.config import EvalConfig, GenerateConfig, TrainConfig
from resnet_bk.files import json_text, write_whole
from resnet_bk.folders import BEST, CONFIG, HELD_OUT, METRICS, MODEL, REPORT, RESULTS, train_command
from resnet_bk.inference.generation import generate_text, keep_engine
from resnet_bk.report import figures, html
from resnet_bk.report.tables import Console, print_table
from resnet_bk.report.terminal import say
from resnet_bk.study.card import CARD, model_card
from resnet_bk.study.evaluate import evaluate
from resnet_bk.study.measure import measure
from resnet_bk.study.versions import version_lines, versions
from resnet_bk.training import run as training
from resnet_bk.training.held_out import best_line
from resnet_bk.training.recorder import ProgressCallback
from resnet_bk.training.run import TrainedRun

# Commands to go on with, given a run folder and the beginning of a text, and what they do.
_NEXT = {
    "resnet-bk generate {0} {1}": "writes a text",
    "resnet-bk inspect {0} FILE": "shows what each byte of a file costs",
    "resnet-bk serve {0}": "answers OpenAI's clients, and has a page",
    "resnet-bk adapt {0} --help": "gives the model techniques",
}
SAMPLE = 400  # tokens of the text that the model writes


def train(config: TrainConfig, console: Console, on_progress: ProgressCallback | None = None) -> dict[str, Any]:
    """Train as :func:`resnet_bk.training.run.trained` does; then score, measure and report.

    Returns:
        The content of results.json on rank 0, an empty dictionary on the others.
    """
    with training.trained(config, console, on_progress) as run:
        return {} if run is None else conclude(run, console)


def conclude(run: TrainedRun, console: Console) -> dict[str, Any]:
    """Score and measure a trained model. Write report.html, a model card and results.json, then print what is in them.

    Returns:
        The content of results.json.
    """
    model, config, folder = run.model.eval(), run.config, run.folder
    say(console, "scoring held-out text ...")
    scoring = EvalConfig(checkpoint=str(folder))
    scores = evaluate(model.model, run.held_out, run.tokenizer.eos_token_id, scoring, run.held_out_words)
    say(console, "measuring speed ...")
    costs = measure(model.model, run.held_out.ids, run.bytes_per_token)
    settings = GenerateConfig(str(folder), config.sample, SAMPLE, seed=config.seed)
    sample = generate_text(model.model, run.tokenizer, config.sample, settings)
    keep_engine(model.model, run.tokenizer, folder / MODEL)
    # A run of fewer steps than log_every has logged nothing.
    logged = (folder / METRICS).read_text() if (folder / METRICS).exists() else ""
    metrics = [json.loads(line) for line in logged.splitlines()]
    speed = float(np.median([line["bytes_per_second"] for line in metrics])) if metrics else math.nan
    results = {
        "held_out": scores.to_dict(),
        "costs": costs.to_dict(),
        "training": {
            "steps": run.steps,
            "seconds": run.seconds,
            "bytes_per_second": speed,
            "processes": run.processes,
            "train_sha256": run.train_sha256,
            "held_out_sha256": run.held_out_sha256,
        },
        "versions": versions(),
        "sample": sample,
    }
    best = best_line(metrics)
    pace = f", {speed:,.0f} bytes/s" if metrics else ""
    rows = [*scores.rows(), ("training", f"{run.steps:,} steps in {run.seconds:.0f} s{pace}"), *costs.rows()]
    if best:
        rows.append(
            (f"best score while training, {BEST}/", f"{best[HELD_OUT]:.4f} bits per byte after {best['step']:,} steps")
        )
    _write_report(run, rows, metrics, sample)
    write_whole(folder / MODEL / CARD, model_card(folder.name, config, rows))
    write_whole(folder / RESULTS, json_text(results))  # last: it marks the run as finished
    print_table(console, f"Run {folder}", rows)
    say(console, "\nSample", style="bold")
    say(console, sample)
    written = [f"{MODEL}/", *([f"{BEST}/"] if best else []), *([METRICS] if metrics else []), RESULTS, REPORT]
    say(console, f"\nwrote {folder}: {', '.join(written)}")
    for command, purpose in _NEXT.items():
        say(console, f"  {command.format(shlex.quote(str(folder)), shlex.quote(config.sample)):<48} {purpose}")
    return results


def _write_report(run: TrainedRun, rows: list[tuple[str, str]], metrics: list[dict[str, float]], sample: str) -> None:
    """Write report.html. rows: name and value of each result; metrics: lines of metrics.jsonl."""
    folder = run.folder
    intro = (
        "One model: its scores on text that it was not trained on, its costs, the curves of its training, and a text."
    )
    timed = "Times were measured on the machine that the end of this page names."
    written = html.paragraph(f"The model wrote at most {SAMPLE} tokens after the prompt {run.config.sample!r}.")
    sections = [
        ("Scores and costs", html.table_html(rows, timed)),
        ("Training", figures.figures_html(figures.training_curves(metrics) if metrics else [])),
        ("Sample", written + html.preformatted(sample)),
    ]
    footer = [*version_lines(), train_command(folder / CONFIG)]
    write_whole(folder / REPORT, html.page(f"ResNet-BK run {folder.name}", intro, sections, footer))
