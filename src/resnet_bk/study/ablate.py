"""The command ``resnet-bk ablate``: measure what each technique saves and costs.

A factorial plan switches the techniques of a recipe on and off. Each of its cells, a combination of techniques, is
trained once per seed, as ``resnet-bk train`` does. A least-squares fit to these runs gives the main effect of each
technique and the interaction of each pair, on bits per byte and on the logarithm of each cost. So savings are measured
in combination instead of multiplied on paper.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from resnet_bk.config import AblateConfig, ConfigError, TrainConfig
from resnet_bk.files import json_text, lock, remove_scratch, write_whole
from resnet_bk.hf import load_tokenizer
from resnet_bk.report.tables import Console, markdown_table, print_table
from resnet_bk.report.terminal import say
from resnet_bk.study import run
from resnet_bk.study.finished import check_one_text, results_of, text_of
from resnet_bk.study.versions import version_lines
from resnet_bk.training.errors import StoppedError
from resnet_bk.training.run import resolved

LEAST_FOR_HALF = 4  # techniques: with fewer, half a plan cannot separate main effects from interactions
TABLE, DATA = "ablation.md", "ablation.json"

# The responses: name -> function that reads it from results.json. Effects on bits per byte are differences, effects on
# costs are factors.
RESPONSES: dict[str, Callable[[dict[str, Any]], float]] = {
    "bits per byte": lambda r: r["held_out"]["bits_per_byte"],
    "FLOPs per byte": lambda r: r["costs"]["flops_per_byte"],
    "prefill, us per byte": lambda r: 1e6 / r["costs"]["prefill"],
    "decode, us per byte": lambda r: 1e6 / r["costs"]["decode"],
    "training, us per byte": lambda r: 1e6 / r["training"]["bytes_per_second"],
}
BITS = "bits per byte"


@dataclass(frozen=True)
class Effect:
    """Main effect of a technique, or interaction of two: how much the effect of one differs where the other is on.

    Attributes:
        techniques: one name or two.
        value: bits per byte added, or the logarithm of the factor that multiplies a cost.
        error: standard error of the value; NaN if the runs are too few to estimate it.
    """

    techniques: tuple[str, ...]
    value: float
    error: float


def plan(techniques: Sequence[str], kind: str) -> list[tuple[str, ...]]:
    """Return the techniques that are on in each cell; the first cell has all of them, the last one none.

    Args:
        techniques: names of the techniques to switch.
        kind: "full" for every combination; "half" for those with an even number of techniques off, and the one with all
            techniques off.
    """
    cells = [on for size in range(len(techniques), -1, -1) for on in itertools.combinations(techniques, size)]
    if kind == "full":
        return cells
    return [on for on in cells if (len(techniques) - len(on)) % 2 == 0 or not on]


def effects(techniques: Sequence[str], cells: Sequence[tuple[str, ...]], values: Sequence[float]) -> list[Effect]:
    """Fit main effects and pairwise interactions together, or main effects only if these runs cannot separate the rest.

    Main effects come first in the result.

    A technique is coded as -1/2 or 1/2, so its main effect is a mean over the states of the others.

    Args:
        techniques: names of the techniques that the cells switch.
        cells: the techniques that are on in each run.
        values: the response of each run.
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
    freedom = len(y) - design.shape[1]
    residual = y - design @ found
    variance = float(residual @ residual) / freedom if freedom > 0 else math.nan
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    return [Effect(term, float(found[1 + i]), float(errors[1 + i])) for i, term in enumerate(terms)]


def ablate(config: AblateConfig, recipe: TrainConfig, console: Console) -> dict[str, list[Effect]]:
    """Train those runs of the plan that have no results yet. Write and print the tables.

    Args:
        config: settings of the ablation.
        recipe: settings of a run with all techniques on, from the file config.base.
        console: prints progress and tables.

    Returns:
        The effects on each response.

    Raises:
        ConfigError: a technique is not on in the recipe, the plan does not fit the number of techniques, a combination
            is not possible; another process works in the folder; a finished run is damaged, or had other settings,
            another budget or another text.
        StoppedError: a signal stopped the training of a run.
    """
    techniques = config.techniques or recipe.model.techniques
    if not set(techniques) <= set(recipe.model.techniques) or len(techniques) < 2:
        has = ", ".join(recipe.model.techniques) or "none"
        raise ConfigError(
            f"ablate.techniques: got {techniques}, allowed at least two of those that are on in {config.base}: {has}"
        )
    if config.plan == "half" and len(techniques) < LEAST_FOR_HALF:
        raise ConfigError(
            f"ablate.plan: got 'half' for {len(techniques)} techniques, allowed for {LEAST_FOR_HALF} or more, since "
            "with fewer it cannot separate main effects from interactions; use 'full'"
        )
    recipe = resolved(recipe, len(load_tokenizer(recipe.data.tokenizer)))
    models = {}
    # Build the settings of all cells before the first run, because a combination may be impossible.
    for on in plan(techniques, config.plan):
        model = recipe.model.without(*(technique for technique in techniques if technique not in on))
        models[tuple(model.techniques)] = model  # named by all techniques that are on, also those that are not switched
    cells = [(on, seed) for seed in config.seeds for on in models]
    results: list[dict[str, Any]] = []
    with lock(Path(config.output_dir), "ablate.output_dir"):
        remove_scratch(Path(config.output_dir))
        for i, (on, seed) in enumerate(cells):
            say(console, f"\nRun {i + 1} of {len(cells)}: {name_of(on)}, seed {seed}", "bold")
            folder = Path(config.output_dir) / name_of(on) / f"seed-{seed}"
            settings = dataclasses.replace(recipe, model=models[on], seed=seed, output_dir=str(folder), resume=True)
            results.append(_trained(settings, console))
            check_one_text("ablate.base", folder, text_of(results[-1]), text_of(results[0]))
        return _conclude(config, techniques, cells, results, console)


def name_of(on: Sequence[str]) -> str:
    """Return the name of a cell, which is also that of its folder."""
    return "+".join(on) or "plain"


def spread(values: Sequence[float], digits: int) -> str:
    """Return the median and, in parentheses, the range. Leave the range out if its two ends print the same.

    A run that was too short to log its speed has NaN; it is left out.
    """
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "not logged"
    middle, low, high = (f"{f(values):,.{digits}f}" for f in (statistics.median, min, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def _trained(settings: TrainConfig, console: Console) -> dict[str, Any]:
    """Return the results of a run: those in its folder, or train the run first if the folder has none."""
    results = results_of("ablate.output_dir", settings)
    if results is None:
        try:
            run.train(settings, console)
        except StoppedError as stopped:
            raise StoppedError(stopped.number, "the same command") from stopped  # not `train`, to continue the ablation
        results = results_of("ablate.output_dir", settings)  # with the checks that the next call would make
    assert results is not None
    return results


def _conclude(
    config: AblateConfig,
    techniques: Sequence[str],
    cells: Sequence[tuple[tuple[str, ...], int]],
    results: Sequence[dict[str, Any]],
    console: Console,
) -> dict[str, list[Effect]]:
    """Fit the effects, write and print the tables. cells: the techniques that are on in each run, and its seed."""
    folder = Path(config.output_dir)
    values = {name: [read(result) for result in results] for name, read in RESPONSES.items()}
    found = {}
    for name, column in values.items():
        if any(map(math.isnan, column)):  # a run was too short to log its speed
            continue
        response = column if name == BITS else [math.log(value) for value in column]
        found[name] = effects(techniques, [on for on, _ in cells], response)
    text = f"# Ablation of {config.base}\n\n"
    text += f"Median (range) over the seeds {', '.join(map(str, config.seeds))}. {'; '.join(version_lines())}.\n"
    for title, rows in (("Combinations", _combinations(cells, values)), ("Effects and interactions", _effects(found))):
        text += f"\n## {title}\n\n{markdown_table(rows)}"
        print_table(console, title, rows[1:], rows[0])
    text += (
        "\nEffect of a technique: the bits per byte that it adds, or the factor that it multiplies a cost by, averaged "
        "over the states of the other techniques. In parentheses: two standard errors either way, if there are enough "
        "runs. "
    )
    if len(found[BITS]) > len(techniques):
        text += (
            "a x b: how much the effect of a differs where b is on. Of a cost: below 1 they help each other, above 1 "
            "they save the same work.\n"
        )
    else:
        text += "These runs cannot separate the interactions of pairs; the full plan can.\n"
    write_whole(folder / TABLE, text)
    data = [{"on": on, "seed": seed, "results": r} for (on, seed), r in zip(cells, results, strict=True)]
    write_whole(folder / DATA, json_text(data))
    say(console, f"wrote {folder}: {TABLE}, {DATA}")
    return found


def _combinations(cells: Sequence[tuple[tuple[str, ...], int]], values: dict[str, list[float]]) -> list[list[str]]:
    """Return the rows of the table of the combinations, header row first. values: response -> its value in each run."""
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
    """Return the rows of the table of the effects, header row first."""
    rows = [["", *(name.partition(",")[0] for name in found)]]
    for i, effect in enumerate(found[BITS]):
        row = [" x ".join(effect.techniques)]
        for name, column in found.items():
            value, margin = column[i].value, 2 * column[i].error
            format_value = "{:+.3f}".format if name == BITS else lambda x: f"{math.exp(x):.2f}x"
            between = f" ({format_value(value - margin)} to {format_value(value + margin)})"
            row.append(format_value(value) + ("" if math.isnan(margin) else between))
        rows.append(row)
    return rows
