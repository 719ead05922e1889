"""``resnet-bk train`` and ``resnet-bk eval``: held-out scores and costs as a table, results.json and report.html."""

import json
import math
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from resnet_bk import __version__
from resnet_bk.checkpoint import write_whole
from resnet_bk.config import ConfigError, DataConfig, EvalConfig, GenerateConfig, TrainConfig, check_fields, read_yaml
from resnet_bk.data import corpus
from resnet_bk.data.tokens import tokenizer_digest
from resnet_bk.folders import CONFIG, METRICS, MODEL, REPORT, RESULTS
from resnet_bk.hf import quiet_transformers, token_file
from resnet_bk.inference.generation import generate_text
from resnet_bk.inference.loading import load
from resnet_bk.study.evaluate import Scores, check_vocabulary, chosen_documents, count_words, evaluate
from resnet_bk.study.measure import Costs, measure
from resnet_bk.training import run as training
from resnet_bk.training.run import TrainedRun
from resnet_bk.training.trainer import Watch


def train(config: TrainConfig, console: Console, watch: Watch | None = None) -> dict[str, Any]:
    """Train as :func:`resnet_bk.training.run.train` does, then score, measure and report.

    Returns:
        What results.json holds; an empty dictionary on the ranks that end with the training.
    """
    run = training.train(config, console, watch)
    return {} if run is None else conclude(run, console)


def conclude(run: TrainedRun, console: Console) -> dict[str, Any]:
    """Score and measure a trained model, show a sample, write results.json and report.html into its folder."""
    model, config, folder = run.model.eval(), run.config, run.folder
    console.print("scoring held-out text ...")
    tokens, held_out_sha256 = token_file(run.held_out, config.data, run.tokenizer)
    scoring = EvalConfig(checkpoint=str(folder))
    scores = evaluate(model.model, tokens, run.tokenizer.eos_token_id, scoring, count_words(run.held_out))
    console.print("measuring speed ...")
    costs = measure(model.model, tokens.ids, run.bytes_per_token)
    settings = GenerateConfig(str(folder), config.sample, 400, seed=config.seed)
    sample = generate_text(model, run.tokenizer, config.sample, settings)
    # A run shorter than log_every has logged nothing.
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
            "held_out_sha256": held_out_sha256,
        },
        "versions": versions(),
        "sample": sample,
    }
    rows = table_rows(scores, costs, speed, run.steps, run.seconds)
    print_table(console, f"Run {folder}", rows)
    console.print("\n[bold]Sample[/bold]")
    console.print(sample, markup=False, highlight=False)
    write_whole(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    _write_report(folder, rows, metrics, sample)
    console.print(f"\nwrote {folder}: {MODEL}/, {METRICS}, {RESULTS}, {REPORT}")
    return results


def _write_report(folder: Path, rows: list[tuple[str, str]], metrics: list[dict[str, float]], sample: str) -> None:
    from resnet_bk.report import html  # matplotlib takes a second to import

    footer = [f"{name} {version}" for name, version in versions().items()]
    footer.append(f"resnet-bk train --config {folder / CONFIG}")
    curves = html.figures_html([html.training_curves(metrics)] if metrics else [])
    sections = [("Training", curves), ("Sample", html.preformatted(sample))]
    (folder / REPORT).write_text(html.page(f"ResNet-BK run {folder.name}", rows, sections, footer))


def versions() -> dict[str, str]:
    return {
        "resnet-bk": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
    }


def table_rows(
    scores: Scores, costs: Costs | None = None, speed: float | None = None, steps: int = 0, seconds: float = 0.0
) -> list[tuple[str, str]]:
    """Name and value of each line of the final table."""
    values = scores.to_dict()
    rows = [
        ("held-out bits per byte", f"{scores.bits_per_byte:.4f}"),
        ("held-out perplexity per byte", f"{values['perplexity_per_byte']:.4f}"),
        ("perplexity per token", f"{values['perplexity_per_token']:.4g}"),
        ("perplexity per word", f"{values['perplexity_per_word']:.4g}"),
        ("held-out text", f"{scores.bytes:,} bytes in {scores.documents} documents"),
        ("context", scores.context),
    ]
    if scores.blocks is not None:
        rows.append(("blocks a token", f"{scores.blocks:.2f}"))
    if costs is not None:
        rows += [
            ("training", f"{steps:,} steps in {seconds:.0f} s, {speed or 0:,.0f} bytes/s"),
            ("prefill", f"{costs.prefill:,.0f} bytes/s ({costs.prefill_setting})"),
            ("decode", f"{costs.decode:,.0f} bytes/s ({costs.decode_setting})"),
            ("parameters", f"{costs.parameters:,}"),
            ("FLOPs per byte", f"{costs.flops_per_byte:,.0f} (forward)"),
        ]
    return rows


def print_table(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _saved_data(path: Path) -> DataConfig:
    values = read_yaml("eval.checkpoint", path)
    if not isinstance(values, dict) or "data" not in values:
        raise ConfigError(f"{path}: has no section 'data'; the file is damaged")
    check_fields(f"{path}: data", DataConfig, values["data"])
    return DataConfig(**values["data"])


def evaluate_checkpoint(config: EvalConfig, console: Console) -> dict[str, Any]:
    """Score a checkpoint on held-out text; prints a table, returns its values."""
    quiet_transformers()
    model, tokenizer = load(config.checkpoint, config.depth_threshold)
    saved = Path(config.checkpoint) / CONFIG
    data = _saved_data(saved) if saved.exists() else DataConfig()
    if config.source is not None:
        is_hub = corpus.is_hub_name(config.source)
        documents = corpus.hub_splits(config.source)[1] if is_hub else corpus.documents(config.source)
    elif saved.exists():
        documents = corpus.split(data.source, data.val_source, data.val_fraction)[1]
    else:
        raise ConfigError(
            f"eval.source: {config.checkpoint} is no run folder, so it has no held-out text; give --source"
        )
    check_vocabulary(model.model, len(tokenizer), config.checkpoint, tokenizer_digest(tokenizer))
    tokenised, _ = token_file(documents, data, tokenizer)
    words = count_words([documents[i] for i in chosen_documents(tokenised, config.max_bytes)])
    scores = evaluate(model.model, tokenised, tokenizer.eos_token_id, config, words)
    print_table(console, f"{config.checkpoint} on {config.source or 'its held-out text'}", table_rows(scores))
    return scores.to_dict()
