"""The command ``resnet-bk report``: compare finished runs on one HTML page."""

import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from resnet_bk.checkpoint import CheckpointError
from resnet_bk.config import ConfigError, ReportConfig
from resnet_bk.data import corpus
from resnet_bk.files import write_whole
from resnet_bk.folders import CONFIG, train_command
from resnet_bk.hf import quiet_transformers
from resnet_bk.inference.loading import load
from resnet_bk.report import figures, html
from resnet_bk.report.figures import Figure
from resnet_bk.report.terminal import Console, say
from resnet_bk.study.ablate import BITS, RESPONSES, spread
from resnet_bk.study.evaluate import count
from resnet_bk.study.finished import FinishedRun, Group, grouped, read_runs
from resnet_bk.study.inspection import HINT, Spending, check_output, heated, legend, read_beginning, spend
from resnet_bk.study.search import front
from resnet_bk.study.versions import version_lines

TITLE = "Runs compared"

# Columns of the table: name -> how to read it from results.json, and its decimals.
MEASURES: dict[str, tuple[Callable[[dict[str, Any]], float], int]] = {
    "parameters": (lambda r: r["costs"]["parameters"], 0),
    f"held-out {BITS}": (RESPONSES[BITS], 3),
    "perplexity per byte": (lambda r: 2 ** RESPONSES[BITS](r), 3),
    "FLOPs per byte": (RESPONSES["FLOPs per byte"], 0),
    "prefill, us per byte": (RESPONSES["prefill, us per byte"], 1),
    "decode, us per byte": (RESPONSES["decode, us per byte"], 1),
    "training, s": (lambda r: r["training"]["seconds"], 1),
    "training, bytes/s": (lambda r: r["training"]["bytes_per_second"], 0),
}
COSTS = ("prefill, us per byte", "decode, us per byte", "training, s", "FLOPs per byte")


def report(config: ReportConfig, console: Console) -> list[Group]:
    """Read the runs and write the page. Returns the groups of runs."""
    quiet_transformers()
    page = Path(config.output)
    check_output("report.output", page, TITLE)
    text = None if config.text is None else read_beginning("report.text", config.text, config.max_tokens)
    runs = read_runs("report.runs", config.runs)
    groups = grouped(runs)
    sections = [
        ("Conditions", html.table_html(_facts(runs), "Settings that all runs have in common.")),
        ("Runs", _table(groups) + _timing_note(runs)),
        ("Quality and cost", figures.figures_html([_pareto(groups, cost) for cost in COSTS])),
        ("Training", _curves(groups)),
        ("Cost of each byte", _colored(groups, text, config)),
    ]
    found = f"{count(len(runs), 'run')} in {count(len(groups), 'group')}"
    intro = "Quality, costs and training of finished runs. A group is all runs whose settings differ in the seed only."
    write_whole(page, html.page(f"{TITLE}: {found}", intro, sections, _footer(runs, config)))
    say(console, f"wrote {page}: {found}")
    return groups


def _facts(runs: Sequence[FinishedRun]) -> list[tuple[str, str]]:
    """Return name and value of what all runs have in common."""
    scored = runs[0].results["held_out"]
    timed = {name: sorted({run.results["costs"][f"{name}_setting"] for run in runs}) for name in ("prefill", "decode")}
    return [
        ("held-out text", f"{scored['bytes']:,} bytes in {count(scored['documents'], 'document')}"),
        *((name, "; ".join(settings)) for name, settings in timed.items()),
    ]


def _values(group: Group, name: str) -> list[float]:
    """Return a measure of each run of a group."""
    return [MEASURES[name][0](run.results) for run in group.runs]


def _table(groups: Sequence[Group]) -> str:
    """Return the table of all measures as HTML, one row per group."""
    rows = []
    for group in groups:
        row = [group.name, ", ".join(f"{run.folder} (seed {run.config.seed})" for run in group.runs)]
        for name, (_, digits) in MEASURES.items():
            row.append(spread(_values(group, name), digits))
        rows.append(row)
    caption = "One row for each group: the median, and the range in parentheses where a group has several runs."
    return html.table_html(rows, caption, ["techniques", "runs", *MEASURES])


def _timing_note(runs: Sequence[FinishedRun]) -> str:
    """Return a paragraph that says so if the runs were timed on different machines, else nothing."""
    if len({run.results["versions"].get("machine") for run in runs}) == 1:
        return ""
    return html.paragraph(
        "The runs were timed on different machines or with different numbers of threads (see the end of this page): "
        "their times and speeds are not comparable."
    )


def _pareto(groups: Sequence[Group], cost: str) -> Figure:
    """Draw quality against one cost."""

    def spreads(name: str) -> list[figures.Spread]:
        return [(statistics.median(v), min(v), max(v)) for v in (_values(group, name) for group in groups)]

    names = [group.name for group in groups]
    points = dict(zip(names, zip(spreads(f"held-out {BITS}"), spreads(cost), strict=True), strict=True))
    return figures.pareto(points, front([(bits[0], own[0]) for bits, own in points.values()]), cost)


def _curves(groups: Sequence[Group]) -> str:
    """Return the figure of the training curves as HTML."""
    lines = {group.name: [_curve(run) for run in group.runs if run.metrics] for group in groups}
    unlogged = [run.folder for group in groups for run in group.runs if not run.metrics]
    note = html.paragraph(f"Too short for a log line: {', '.join(unlogged)}.") if unlogged else ""
    if not any(lines.values()):
        return note
    in_bytes = all(run.config.data.tokenizer == "byte" for group in groups for run in group.runs)
    drawn = figures.compared_curves(lines, f"million {'bytes' if in_bytes else 'tokens'} read")
    return figures.figures_html(drawn) + note


def _curve(run: FinishedRun) -> list[tuple[float, float, float]]:
    """Return seconds, million tokens read, and bits per byte at each log line."""
    tokens_per_step = run.config.batch_size * run.config.accumulate * run.config.model.n_seq
    return [(line["seconds"], line["step"] * tokens_per_step / 1e6, line["bits_per_byte"]) for line in run.metrics]


# ------------------------------------------------------------------------------------------ texts in colors


def _colored(groups: Sequence[Group], text: str | None, config: ReportConfig) -> str:
    """Return a text as HTML, colored by what the first run of each group spends on it, all on one scale.

    Args:
        groups: the groups.
        text: the text; None for the first run's held-out text.
        config: settings of the report.
    """
    name, source = str(config.text), ""
    if text is None:
        source = " It was read again from the run's data source, as that is now."
        try:
            name, text = _held_out(groups[0].runs[0])
        except (ConfigError, OSError) as error:
            return html.paragraph(f"No text to color: {error}. Give one with --text FILE.")
    costs: dict[str, tuple[list[tuple[str, float, str]], str]] = {}  # pieces and summary; models are not kept
    failures = ""
    for group in groups:
        folder = group.runs[0].folder
        try:
            model, tokenizer = load(folder)
        except (CheckpointError, ConfigError) as error:
            failures += html.paragraph(f"{group.name}: no colors, the model of {folder} cannot be loaded: {error}")
            continue
        spending = spend(model, tokenizer, text, config.max_tokens, f"report.text: {name}")
        costs[folder] = (spending.pieces(), _summary(spending))
        text = spending.text  # all runs have one tokenizer, so the others would cut it here too
    if not costs:
        return failures
    flops = [cost for pieces, _ in costs.values() for _, cost, _ in pieces]
    low, high = min(flops), max(flops)
    intro = f"The beginning of {name}, on one scale for all models. {HINT}"
    parts = [html.paragraph(intro + source), legend(low, high)]
    for group in groups:
        if found := costs.get(group.runs[0].folder):
            pieces, summary = found
            heat = html.heat_map(heated(pieces, low, high))
            parts.append(html.titled(group.name, html.paragraph(summary) + heat))
    return "".join(parts) + failures


def _held_out(run: FinishedRun) -> tuple[str, str]:
    """Return name and beginning, at most a megabyte, of the first document that a run held out."""
    data = run.config.data
    document = corpus.split(data).held_out[0]
    return document.name, next(document.pieces()).decode(errors="replace")


def _summary(spending: Spending) -> str:
    """Return the mean costs of a text in one sentence."""
    bits = f", {spending.bits.mean().item():.3f} bits per token" if len(spending.bits) else ""
    mean = spending.cost.mean().item() / 1e6
    return f"{mean:.3f} MFLOPs per token, {spending.share:.0%} of the same model without techniques{bits}"


# --------------------------------------------------------------------------------------------------- footer


def _footer(runs: Sequence[FinishedRun], config: ReportConfig) -> list[str]:
    """Return versions, with the runs that have them where they differ, and commands."""
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
    lines += [train_command(Path(run.folder) / CONFIG) for run in runs]
    options = ["--output", config.output, "--max_tokens", str(config.max_tokens)]
    options += [] if config.text is None else ["--text", config.text]
    lines.append("This page: " + ", ".join(version_lines()))
    lines.append(shlex.join(["resnet-bk", "report", *config.runs, *options]))
    return lines
