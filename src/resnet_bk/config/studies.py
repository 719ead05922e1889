"""Settings of the commands that train several models, or one after another."""

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any, Literal

from resnet_bk.config.checks import (
    ConfigError,
    all_fields,
    check_choice,
    check_choices,
    check_fields,
    check_integer,
    check_range,
    check_text,
    in_words,
    number_kind,
    shown,
)
from resnet_bk.config.commands import TrainConfig
from resnet_bk.config.model import TECHNIQUES, ModelConfig


@dataclass(frozen=True)
class AblateConfig:
    """Settings of `resnet-bk ablate`."""

    base: str
    """YAML file with settings of `resnet-bk train`: the recipe. All techniques to be switched must be on in it. Set
    max_steps in it to train all models on equally many tokens, or max_seconds for equal time."""
    techniques: list[str] | None = None
    """Techniques to switch, at least two of memory, multiscale, length, depth, sparsity, experts. Default: all that are
    on in the recipe. With experts off, each token uses all experts."""
    plan: Literal["full", "half"] = "full"
    """'full': every combination of techniques. 'half': those with an even number of techniques off, and the one with
    all switched techniques off; needs at least four techniques."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of training. Each combination is trained once with each seed."""
    output_dir: str = "runs/ablate"
    """Folder for the runs, one for each combination and seed. Finished runs in it are not repeated."""

    def __post_init__(self) -> None:
        where = "ablate"
        check_choices(where, self)
        check_text(where, base=self.base, output_dir=self.output_dir)
        for name, values, least in (("techniques", self.techniques, "two"), ("seeds", self.seeds, "one")):
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ConfigError(f"{where}.{name}: got {shown(values)}, allowed at least {least}, without repetition")
        for technique in self.techniques or ():
            check_choice(where, tuple(TECHNIQUES), techniques=technique)
        check_integer(where, 0, 2**31 - 1, **{f"seeds[{i}]": seed for i, seed in enumerate(self.seeds)})


@dataclass(frozen=True)
class AdaptConfig:
    """Settings of `resnet-bk adapt`."""

    run: str
    """Folder of a run of `resnet-bk train`, or fast-python: the base. Its settings are those of the new run, but for
    those below."""
    techniques: dict[str, Any] = field(default_factory=dict)
    """Settings of the model that change: {depth: {policy: exit}}."""
    output_dir: str = "runs/adapt"
    """Folder for the new run, with its comparison in adapt.json and adapt.md."""
    thresholds: list[float] = field(default_factory=list)
    """Values of model.depth.threshold at which the new model is scored and measured. Default: the one that it is
    trained with, and for early exit 0.9, 0.95, 0.98 and 1."""
    trained: Literal["all", "new"] = "all"
    """Parameters that are trained: all, or only those that the base does not have."""
    distill: float = 0.5
    """Share of the loss that compares the model's predictions with those of the base, instead of with the text."""
    max_steps: int | None = None
    """Stop after this number of updates."""
    max_seconds: float | None = None
    """Stop after this number of seconds of training."""
    learning_rate: float | None = None
    """Peak learning rate. Default: a third of the base's."""
    seed: int = 0
    """Seed of new parameters and data order."""
    max_bytes: int | None = None
    """Score about this many bytes of the held-out text, in whole documents spread over it. Default: all."""

    def __post_init__(self) -> None:
        where = "adapt"
        check_choices(where, self)
        check_text(where, run=self.run, output_dir=self.output_dir)
        check_fields(f"{where}.techniques: model", ModelConfig, self.techniques)
        for value in self.thresholds:
            check_range(where, 0, 1, thresholds=value)
        if self.max_steps is None and self.max_seconds is None:
            raise ConfigError(f"{where}: got neither max_steps nor max_seconds, give one of them")

    def recipe(self, base: TrainConfig) -> TrainConfig:
        """Return the settings of the new run, given those of the base."""
        model = base.model.to_dict()
        for name, value in self.techniques.items():
            model[name] = {**model[name], **value} if isinstance(value, dict) else value
        return dataclasses.replace(
            base,
            model=ModelConfig.from_dict(model),
            output_dir=self.output_dir,
            init_from=self.run,
            resume=False,
            trained=self.trained,
            distill=self.distill,
            max_steps=self.max_steps,
            max_seconds=self.max_seconds,
            learning_rate=base.learning_rate / 3 if self.learning_rate is None else self.learning_rate,
            seed=self.seed,
        )


@dataclass(frozen=True)
class TuneConfig:
    """Settings of `resnet-bk tune`."""

    base: str
    """YAML file with settings of `resnet-bk train`: the recipe of every trial."""
    space: dict[str, list[float]] | None = None
    """Settings of the recipe to search, with the lowest and highest value: {model.depth.penalty: [0.01, 1.0]}. Any
    number can be searched. Integers stay integers. The scale is logarithmic if low > 0 and high >= 10 low. Default:
    threshold, penalty and target of model.depth; with its policy 'exit' the threshold only; with 'none' an error."""
    output_dir: str = "runs/tune"
    """Folder for the study and the runs of its trials. An existing study is continued."""
    trials: int = 20
    """Number of trials to reach, complete or stopped, including those of earlier calls."""
    objective: Literal["prefill", "decode"] = "prefill"
    """Time to minimise. 'prefill': of reading text in parallel. 'decode': of generating it one token at a time."""
    seed: int = 0
    """Seed of the search. Each trial trains with the recipe's own seed."""
    prune: bool = True
    """Stop a trial at a quarter or a half of training if its training bits per byte are more than 10% above the worst
    that complete trials had at that point. Needs four complete trials."""
    max_loss: float = 0.05
    """Tolerance: the chosen trial is the fastest one whose perplexity per byte is at most (1 + this) times the
    lowest."""

    def __post_init__(self) -> None:
        where = "tune"
        check_choices(where, self)
        check_text(where, base=self.base, output_dir=self.output_dir)
        check_integer(where, 1, 10**6, trials=self.trials)
        check_integer(where, 0, 2**31 - 1, seed=self.seed)
        check_range(where, 0, 1_000, max_loss=self.max_loss)
        if self.space is not None:
            if not isinstance(self.space, dict) or not self.space:
                raise ConfigError(f"{where}.space: got {shown(self.space)}, allowed {in_words(dict[str, list[float]])}")
            space = {name: _checked_range(name, bounds) for name, bounds in self.space.items()}
            object.__setattr__(self, "space", space)


def _checked_range(name: str, bounds: list[float]) -> list[float]:
    """Return [low, high] of a setting to search, as its own type. Raise ConfigError if it cannot be searched."""
    known, where = all_fields(TrainConfig), "tune.space"
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see resnet-bk train --help"
        raise ConfigError(f"{where}: unknown setting {shown(name)}; {hint}")
    kind = number_kind(known[name])
    if kind is None:
        raise ConfigError(f"{where}: {name} allows {in_words(known[name])}; only numbers can be searched")
    if not isinstance(bounds, list | tuple) or len(bounds) != 2:
        raise ConfigError(f"{where}.{name}: got {shown(bounds)}, allowed two numbers, [low, high]")
    check_range(where, -1e12, 1e12, **{name: bounds[0]})
    check_range(where, -1e12, 1e12, **{name: bounds[1]})
    if kind is int and any(bound != int(bound) for bound in bounds):
        raise ConfigError(f"{where}.{name}: got {shown(bounds)}, allowed two integers, [low, high]")
    if not bounds[0] < bounds[1]:
        raise ConfigError(f"{where}.{name}: got {shown(bounds)}, allowed low < high")
    return [kind(bound) for bound in bounds]
