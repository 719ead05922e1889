"""``resnet-bk report``: finished runs side by side on one HTML page."""

import math
import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from resnet_bk.checkpoint import CheckpointError, write_whole
from resnet_bk.config import ConfigError, ReportConfig
from resnet_bk.data import corpus
from resnet_bk.folders import CONFIG
from resnet_bk.hf import quiet_transformers
from resnet_bk.inference.loading import load
from resnet_bk.report import html
from resnet_bk.study.ablate import BITS, RESPONSES, spread
from resnet_bk.study.finished import FinishedRun, Group, grouped, read_runs
from resnet_bk.study.inspection import Spending, check_output, heated, legend, read_text, spend
from resnet_bk.study.run import versions
from resnet_bk.study.search import front

TITLE = "Runs compared"

# Columns of the table: name -> how it is read from results.json, and decimals.
MEASURES: dict[str, tuple[Callable[[dict[str, Any]], float], int]] = {
    "parameters": (lambda r: r["costs"]["parameters"], 0),
    f"held-out {BITS}": (RESPONSES[BITS], 3),
    "perplexity per byte": (lambda r: 2 ** RESPONSES[BITS](r), 3),
    "FLOPs a byte": (RESPONSES["FLOPs a byte"], 0),
    "prefill, us a byte": (RESPONSES["prefill, us a byte"], 1),
    "decode, us a byte": (RESPONSES["decode, us a byte"], 1),
    "training, s": (lambda r: r["training"]["seconds"], 1),
    "training, bytes/s": (lambda r: r["training"]["bytes_per_second"], 0),
}
COSTS = ("prefill, us a byte", "decode, us a byte", "training, s", "FLOPs a byte")


def report(config: ReportConfig, console: Console) -> list[Group]:
    """Reads the runs, writes the page; returns the runs as it groups them."""
    quiet_transformers()
    page = Path(config.output)
    check_output("report.output", page, TITLE)
    text = None if config.text is None else read_text("report.text", config.text)
    runs = read_runs("report.runs", config.runs)
    groups = grouped(runs)
    sections = [
        ("Runs", _table(groups) + _clocks(runs)),
        ("What quality costs", html.paired([_pareto(groups, cost) for cost in COSTS])),
        ("Training", _curves(groups)),
        ("What each byte costs", _colored(groups, text, config)),
    ]
    found = f"{_count(len(runs), 'run')} in {_count(len(groups), 'group')}"
    write_whole(page, html.page(f"{TITLE}: {found}", _facts(runs), sections, _footer(runs, config)))
    console.print(f"wrote {page}: {found}", markup=False)
    return groups


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + "s" * (number != 1)


def _facts(runs: Sequence[FinishedRun]) -> list[tuple[str, str]]:
    """What holds for all runs."""
    scored = runs[0].results["held_out"]
    timed = {name: sorted({run.results["costs"][f"{name}_setting"] for run in runs}) for name in ("prefill", "decode")}
    return [
        ("held-out text", f"{scored['bytes']:,} bytes in {scored['documents']:,} documents"),
        *((name, "; ".join(settings)) for name, settings in timed.items()),
        ("a group", "runs of the same settings but for the seed: median (least to greatest)"),
    ]


def _values(group: Group, name: str) -> list[float]:
    """A measure of each run of the group."""
    return [MEASURES[name][0](run.results) for run in group.runs]


def _table(groups: Sequence[Group]) -> str:
    rows = []
    for group in groups:
        row = [group.name, ", ".join(f"{run.folder} (seed {run.config.seed})" for run in group.runs)]
        for name, (_, digits) in MEASURES.items():
            known = [value for value in _values(group, name) if not math.isnan(value)]
            row.append(spread(known, digits) if known else "not logged")
        rows.append(row)
    return html.table_html(rows, ["techniques", "runs", *MEASURES])


def _clocks(runs: Sequence[FinishedRun]) -> str:
    """Where not all runs were timed alike, a sentence that says so."""
    if len({run.results["versions"].get("machine") for run in runs}) == 1:
        return ""
    return html.paragraph(
        "Machines or threads differ among the runs, as the end of this page tells: their times and speeds are not "
        "comparable."
    )


def _pareto(groups: Sequence[Group], cost: str) -> Figure:
    """Quality against one cost."""

    def spreads(name: str) -> list[html.Spread]:
        return [(statistics.median(v), min(v), max(v)) for v in (_values(group, name) for group in groups)]

    names = [group.name for group in groups]
    points = dict(zip(names, zip(spreads(f"held-out {BITS}"), spreads(cost), strict=True), strict=True))
    return html.pareto(points, front([(bits[0], own[0]) for bits, own in points.values()]), cost)


def _curves(groups: Sequence[Group]) -> str:
    lines = {group.name: [_curve(run) for run in group.runs if run.metrics] for group in groups}
    unlogged = [run.folder for group in groups for run in group.runs if not run.metrics]
    note = html.paragraph(f"Too short for a log line: {', '.join(unlogged)}.") if unlogged else ""
    if not any(lines.values()):
        return note
    in_bytes = all(run.config.data.tokenizer == "byte" for group in groups for run in group.runs)
    figure = html.compared_curves(lines, f"million {'bytes' if in_bytes else 'tokens'} read")
    return html.figures_html([figure]) + note


def _curve(run: FinishedRun) -> list[tuple[float, float, float]]:
    """Seconds, million tokens read, and bits per byte at each log line."""
    a_step = run.config.batch_size * run.config.accumulate * run.config.model.n_seq
    return [(line["seconds"], line["step"] * a_step / 1e6, line["bits_per_byte"]) for line in run.metrics]


# ------------------------------------------------------------------------------------------ texts in colors


def _colored(groups: Sequence[Group], text: str | None, config: ReportConfig) -> str:
    """A text colored by what the first run of each group spends on it, all on one scale. text: None for held-out."""
    name, source = str(config.text), ""
    if text is None:
        source = " It was read from the run's data again and is shown as the source is now."
        try:
            name, text = _held_out(groups[0].runs[0])
        except (ConfigError, OSError) as error:
            return html.paragraph(f"No text to color: {error}. Give one with --text FILE.")
    spent: dict[str, tuple[list[tuple[str, float, str]], str]] = {}  # pieces and summary: no model is kept
    left_out = ""
    for group in groups:
        folder = group.runs[0].folder
        try:
            model, tokenizer = load(folder)
        except (CheckpointError, ConfigError) as error:
            left_out += html.paragraph(f"{group.name}: no colors, the model of {folder} cannot be loaded: {error}")
            continue
        found = spend(model, tokenizer, text, config.max_tokens, f"report.text: {name}")
        spent[folder] = (found.pieces(), _summary(found))
        text = found.text  # runs on one held-out text have one tokenizer: the rest would be cut off again
    if not spent:
        return left_out
    costs = [cost for pieces, _ in spent.values() for _, cost, _ in pieces]
    low, high = min(costs), max(costs)
    intro = f"The beginning of {name}, on one scale for all models. A pointer that rests on a character is told more."
    parts = [html.paragraph(intro + source), legend(low, high)]
    for group in groups:
        if own := spent.get(group.runs[0].folder):
            pieces, summary = own
            heat = html.heat_map(heated(pieces, low, high))
            parts.append(html.titled(group.name, html.paragraph(summary) + heat))
    return "".join(parts) + left_out


def _held_out(run: FinishedRun) -> tuple[str, str]:
    """Name and beginning, a megabyte at most, of the first document that the run held out."""
    data = run.config.data
    document = corpus.split(data.source, data.val_source, data.val_fraction)[1][0]
    return document.name, next(document.pieces()).decode(errors="replace")


def _summary(spent: Spending) -> str:
    bits = f", {spent.bits.mean().item():.3f} bits a token" if len(spent.bits) else ""
    mean = spent.cost.mean().item() / 1e6
    return f"{mean:.3f} MFLOPs a token, {spent.share:.0%} of the same model's without any technique{bits}"


# --------------------------------------------------------------------------------------------------- footer


def _footer(runs: Sequence[FinishedRun], config: ReportConfig) -> list[str]:
    """Versions, where they differ with whose they are, and commands."""
    names = dict.fromkeys(name for run in runs for name in run.results["versions"])
    lines = []
    for name in names:
        users: dict[str, list[str]] = {}
        for run in runs:
            users.setdefault(run.results["versions"].get(name, "unknown"), []).append(run.folder)
        same = len(users) == 1
        lines.append(
            "; ".join(f"{name} {version}" + f" ({', '.join(of)})" * (not same) for version, of in users.items())
        )
    lines += [shlex.join(["resnet-bk", "train", "--config", str(Path(run.folder) / CONFIG)]) for run in runs]
    options = ["--output", config.output, "--max_tokens", str(config.max_tokens)]
    options += [] if config.text is None else ["--text", config.text]
    lines.append("This page: " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    lines.append(shlex.join(["resnet-bk", "report", *config.runs, *options]))
    return lines
