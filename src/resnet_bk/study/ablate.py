"""What each technique buys, measured: a factorial plan over a recipe's techniques, each cell a run of `train`.

Main effects and pairwise interactions come from a least-squares fit of the logarithm of a time, or of bits per byte, to
the cells: savings are measured together, never multiplied on paper.

Dimensions: C runs, K techniques.
"""

import dataclasses
import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from resnet_bk import folders
from resnet_bk.checkpoint import write_whole
from resnet_bk.config import AblateConfig, ConfigError, TrainConfig, shown
from resnet_bk.hf import load_tokenizer
from resnet_bk.study import run
from resnet_bk.training.run import StoppedError, with_vocabulary

HALVES_FROM = 4  # techniques: main effects of half a plan of fewer are mixed up with interactions
TABLE, DATA = "ablation.md", "ablation.json"

# What is reported of a run: name -> from results.json. Ratios are of logarithms, bits per byte are differences.
RESPONSES: dict[str, Callable[[dict[str, Any]], float]] = {
    "bits per byte": lambda r: r["held_out"]["bits_per_byte"],
    "FLOPs a byte": lambda r: r["costs"]["flops_per_byte"],
    "prefill, us a byte": lambda r: 1e6 / r["costs"]["prefill"],
    "decode, us a byte": lambda r: 1e6 / r["costs"]["decode"],
    "training, us a byte": lambda r: 1e6 / r["training"]["bytes_per_second"],
}
BITS = "bits per byte"


@dataclass(frozen=True)
class Effect:
    """Effect of switching one technique on; of two, how much the effect of one differs where the other is on.

    value: bits per byte, or the logarithm of a factor; error: its standard error, NaN where no seeds are left to
    tell."""

    techniques: tuple[str, ...]
    value: float
    error: float


def plan(techniques: Sequence[str], kind: str) -> list[tuple[str, ...]]:
    """The techniques that are on in each cell, all of them first."""
    cells = [on for size in range(len(techniques), -1, -1) for on in itertools.combinations(techniques, size)]
    if kind == "full":
        return cells
    return [on for on in cells if (len(techniques) - len(on)) % 2 == 0 or not on]


def effects(techniques: Sequence[str], cells: Sequence[tuple[str, ...]], values: Sequence[float]) -> list[Effect]:
    """Main effects, then pairwise interactions, as far as the cells tell them apart.

    cells, values: of each run. A technique is coded as -1/2 or 1/2, so a main effect is a mean over the others' states.
    """
    terms = [(technique,) for technique in techniques] + list(itertools.combinations(techniques, 2))
    coded = np.array([[0.5 if technique in on else -0.5 for technique in techniques] for on in cells])
    columns = [coded[:, i] for i in range(len(techniques))]
    columns += [coded[:, i] * coded[:, j] for i, j in itertools.combinations(range(len(techniques)), 2)]
    design = np.stack([np.ones(len(cells)), *columns], axis=1)
    if np.linalg.matrix_rank(design) < design.shape[1]:
        design, terms = design[:, : 1 + len(techniques)], terms[: len(techniques)]
    y = np.array(values)
    found, *_ = np.linalg.lstsq(design, y, rcond=None)
    left = len(y) - design.shape[1]
    residual = y - design @ found
    variance = float(residual @ residual) / left if left > 0 else math.nan
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    return [Effect(term, float(found[1 + i]), float(errors[1 + i])) for i, term in enumerate(terms)]


def ablate(config: AblateConfig, recipe: TrainConfig, console: Console) -> dict[str, list[Effect]]:
    """Train what is missing of the plan, then write and print the tables. Returns the effects by response.

    recipe: the settings in the file config.base.
    """
    techniques = config.techniques or recipe.model.techniques
    missing = [technique for technique in techniques if technique not in recipe.model.techniques]
    if missing or len(techniques) < 2:
        has = ", ".join(recipe.model.techniques) or "none"
        raise ConfigError(
            f"ablate.techniques: got {techniques}, allowed at least two of those that {config.base} has on: {has}"
        )
    if config.plan == "half" and len(techniques) < HALVES_FROM:
        raise ConfigError(
            f"ablate.plan: got 'half' for {len(techniques)} techniques, allowed from {HALVES_FROM} on: of fewer it "
            "would take interactions for effects; use 'full'"
        )
    recipe = with_vocabulary(recipe, len(load_tokenizer(recipe.data.tokenizer)))
    plans = [
        tuple(r for r in recipe.model.techniques if r in on or r not in techniques)
        for on in plan(techniques, config.plan)
    ]
    cells = [(on, seed) for seed in config.seeds for on in plans]
    for on, _ in cells:
        recipe.model.without(
            *(technique for technique in techniques if technique not in on)
        )  # raises before anything is trained
    results = []
    for i, (on, seed) in enumerate(cells):
        console.print(f"\n[bold]Run {i + 1} of {len(cells)}[/bold]: {name_of(on)}, seed {seed}")
        results.append(_run(config, recipe, techniques, on, seed, console))
        _check_same_text(results, Path(config.output_dir) / name_of(on) / f"seed-{seed}")
    return _conclude(config, techniques, cells, results, console)


def name_of(on: Sequence[str]) -> str:
    return "+".join(on) or "plain"


def spread(values: Sequence[float], digits: int) -> str:
    """Median (least to greatest), the latter where they differ as shown."""
    middle, low, high = (f"{f(values):,.{digits}f}" for f in (statistics.median, min, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def _run(
    config: AblateConfig,
    recipe: TrainConfig,
    techniques: Sequence[str],
    on: tuple[str, ...],
    seed: int,
    console: Console,
) -> dict[str, Any]:
    """results.json of a cell, trained in its folder or found there."""
    folder = Path(config.output_dir) / name_of(on) / f"seed-{seed}"
    model = recipe.model.without(*(technique for technique in techniques if technique not in on))
    settings = dataclasses.replace(recipe, model=model, seed=seed, output_dir=str(folder), resume=True)
    if (folder / folders.RESULTS).exists():
        folders.check_same_run(settings, folder)
        _check_same_budget(settings, folder)
        return dict(json.loads((folder / folders.RESULTS).read_text()))
    try:
        return run.train(settings, console)
    except StoppedError as stopped:
        raise StoppedError(stopped.number, "the same command") from stopped


def _check_same_budget(settings: TrainConfig, folder: Path) -> None:
    """Finished runs may go on with a larger budget; those of one table must not differ in it."""
    saved = folders.saved_settings("ablate.output_dir", folder)
    for name in ("max_steps", "max_seconds"):
        if saved.get(name) != (now := getattr(settings, name)):
            raise ConfigError(
                f"ablate.base: {name} is {now}, the finished run in {folder} had {shown(saved.get(name))}; set it to "
                "that, or choose another output_dir"
            )


def _check_same_text(results: Sequence[dict[str, Any]], folder: Path) -> None:
    for name in ("train_sha256", "held_out_sha256"):
        if results[-1]["training"][name] != results[0]["training"][name]:
            raise ConfigError(
                f"ablate.base: the run in {folder} has other text ({name}) than the first one; restore the text, or "
                "choose another output_dir"
            )


def _conclude(
    config: AblateConfig,
    techniques: Sequence[str],
    cells: Sequence[tuple[tuple[str, ...], int]],
    results: Sequence[dict[str, Any]],
    console: Console,
) -> dict[str, list[Effect]]:
    folder = Path(config.output_dir)
    values = {name: [read(result) for result in results] for name, read in RESPONSES.items()}
    found = {}
    for name, column in values.items():
        fitted = column if name == BITS else [math.log(value) for value in column]
        found[name] = effects(techniques, [on for on, _ in cells], fitted)
    tables = {
        "Combinations": _combinations(cells, values),
        "Effects and interactions": _effects(found),
    }
    made_with = "; ".join(f"{name} {version}" for name, version in run.versions().items())
    text = f"# Ablation of {config.base}\n\n{len(config.seeds)} seeds: median (least to greatest). {made_with}.\n"
    for title, rows in tables.items():
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|" + "---|" * len(rows[0]))
        text += f"\n## {title}\n\n" + "\n".join(lines) + "\n"
        table = Table(title=title)
        for head in rows[0]:
            table.add_column(head, overflow="fold")
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    text += (
        "\nEffects: of switching a technique on, averaged over the others' states: bits per byte added, or the factor "
        "that a cost is multiplied by; in brackets two standard errors either way, where there are enough runs. "
    )
    if len(found[BITS]) > len(techniques):
        text += (
            "a x b: how much a's effect differs where b is on; below 1 they help each other, above 1 they save the "
            "same work.\n"
        )
    else:
        text += "These runs do not tell the interactions of pairs apart; the full plan does.\n"
    write_whole(folder / TABLE, text)
    data = [{"on": on, "seed": seed, "results": r} for (on, seed), r in zip(cells, results, strict=True)]
    write_whole(folder / DATA, json.dumps(data, indent=1) + "\n")
    console.print(f"wrote {folder}: {TABLE}, {DATA}", markup=False)
    return found


def _combinations(cells: Sequence[tuple[tuple[str, ...], int]], values: dict[str, list[float]]) -> list[list[str]]:
    """A line for each combination, its head first."""
    rows = [["on", *values]]
    for on in dict.fromkeys(on for on, _ in cells):
        own = [i for i, (other, _) in enumerate(cells) if other == on]
        row = [name_of(on)]
        for name, column in values.items():
            found = [column[i] for i in own]
            row.append(spread(found, 3 if name == BITS else 1 if max(found) < 100 else 0))
        rows.append(row)
    return rows


def _effects(found: dict[str, list[Effect]]) -> list[list[str]]:
    rows = [["", *(name.partition(",")[0] for name in found)]]
    for i, effect in enumerate(found[BITS]):
        row = [" x ".join(effect.techniques)]
        for name, column in found.items():
            value, error = column[i].value, 2 * column[i].error
            shown = "{:+.3f}".format if name == BITS else lambda x: f"{math.exp(x):.2f}x"
            between = "" if math.isnan(error) else f" ({shown(value - error)} to {shown(value + error)})"
            row.append(shown(value) + between)
        rows.append(row)
    return rows
