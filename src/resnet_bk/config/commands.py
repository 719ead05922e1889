"""The settings of each command."""

import difflib
from dataclasses import dataclass, field
from typing import Literal

from resnet_bk.config.checks import (
    ConfigError,
    all_fields,
    check_boolean,
    check_choice,
    check_integer,
    check_range,
    check_text,
    in_words,
    number_kind,
    shown,
)
from resnet_bk.config.model import TECHNIQUES, ModelConfig


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    source: str = "stdlib"
    """'stdlib' (the running Python's own library), a file, a folder, or a hub dataset 'owner/name[:config]'."""
    val_source: str | None = None
    """Held-out text: a file or folder. Default: a part of the source, see val_fraction."""
    val_fraction: float = 0.05
    """Share held out: every (1 / val_fraction)-th file in sorted order; of a single file, its end."""
    tokenizer: str = "byte"
    """'byte', a folder with a Hugging Face tokenizer, or a hub name."""
    cache: str | None = None
    """Folder for token files. Default: $XDG_CACHE_HOME/resnet-bk, or ~/.cache/resnet-bk."""

    def __post_init__(self) -> None:
        check_range("data", 1e-6, 0.5, val_fraction=self.val_fraction)
        check_text("data", source=self.source, tokenizer=self.tokenizer)
        for name in ("val_source", "cache"):
            if getattr(self, name) is not None:
                check_text("data", **{name: getattr(self, name)})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `resnet-bk train`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output_dir: str = "runs/train"
    """Folder for checkpoints, metrics.jsonl and report.html."""
    resume: bool = False
    """Continue the unfinished run in output_dir. Beside a finished one a new run starts, in output_dir-2, -3, ...
    Without it a run that exists is an error. Nothing is ever overwritten."""
    batch_size: int = 12
    """Sequences a step, of model.n_seq tokens each, of all processes together."""
    accumulate: int = 1
    """Batches whose gradients are added before each update."""
    max_steps: int | None = None
    """Stop after so many updates."""
    max_seconds: float | None = None
    """Stop after so many seconds of training; the learning rate then follows the clock."""
    learning_rate: float = 3e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices."""
    beta2: float = 0.99
    """AdamW's second-moment decay."""
    warmup: float = 0.05
    """Share of the run in which the learning rate rises."""
    final_learning_rate: float = 0.05
    """Share of the peak learning rate left at the end of the cosine."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Autocast type of matrix products; the recurrence stays in float32. bfloat16 pays where the machine has it."""
    activation_checkpointing: bool = False
    """Compute the insides of blocks again in backward instead of keeping them: less memory, one more forward pass."""
    shard: bool = False
    """Of several processes, each keeps a part of weights and optimizer (FSDP2) instead of all of them."""
    seed: int = 0
    """Seeds initialisation and data order."""
    save_every: int = 200
    """Steps between checkpoints to resume from; the last two are kept."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    report_to: str = "none"
    """Trackers of transformers' Trainer beside metrics.jsonl, comma-separated: tensorboard, wandb, trackio, ..."""
    sample: str = "def "
    """Prompt of the sample shown at the end."""

    def __post_init__(self) -> None:
        where = "train"
        check_integer(where, 1, 1_048_576, batch_size=self.batch_size, accumulate=self.accumulate)
        check_integer(where, 1, 10**9, save_every=self.save_every, log_every=self.log_every)
        check_integer(where, 0, 2**31 - 1, seed=self.seed)
        check_range(where, 1e-8, 10, learning_rate=self.learning_rate)
        check_range(where, 0, 1, warmup=self.warmup, final_learning_rate=self.final_learning_rate)
        check_range(where, 0, 0.999999, beta2=self.beta2)
        check_range(where, 0, 10, weight_decay=self.weight_decay)
        check_range(where, 1e-6, 1e6, max_grad_norm=self.max_grad_norm)
        check_choice(where, ("float32", "bfloat16"), dtype=self.dtype)
        check_boolean(where, resume=self.resume, shard=self.shard)
        check_boolean(where, activation_checkpointing=self.activation_checkpointing)
        check_text(where, output_dir=self.output_dir, report_to=self.report_to, sample=self.sample)
        if not self.model.causal:
            raise ConfigError("model.causal: got False, allowed True: a bidirectional model has no next token to learn")
        if self.model.length.bins and self.model.window > self.model.n_seq:
            raise ConfigError(
                f"model.length.max_length: got {self.model.window} with model.n_seq = {self.model.n_seq}, allowed at "
                "most that: longer lengths would never be trained"
            )
        if self.model.length.spacing == "words" and self.model.length.bins and self.data.tokenizer != "byte":
            raise ConfigError(
                f"model.length.spacing: got 'words' with data.tokenizer = {shown(self.data.tokenizer)}, allowed with "
                "'byte'; else 'even'"
            )
        if self.model.multiscale.reads_bytes and self.data.tokenizer != "byte":
            raise ConfigError(
                f"model.multiscale.boundaries: got {self.model.multiscale.boundaries!r} with data.tokenizer = "
                f"{shown(self.data.tokenizer)}, allowed with 'byte'; else 'fixed' or 'learned'"
            )
        if self.max_steps is None and self.max_seconds is None:
            raise ConfigError("train: neither max_steps nor max_seconds is set; give one, so that training ends")
        if self.max_steps is not None:
            check_integer(where, 1, 10**9, max_steps=self.max_steps)
        if self.max_seconds is not None:
            check_range(where, 1, 10**8, max_seconds=self.max_seconds)


@dataclass(frozen=True)
class EvalConfig:
    """Settings of `resnet-bk eval`."""

    checkpoint: str
    """Folder of a run, or of a model."""
    source: str | None = None
    """Text to score: 'stdlib', a file, a folder, a hub dataset. Default: what the run held out of its own data."""
    context: Literal["document", "sliding"] = "document"
    """What each token is predicted from: all of its document before it, or a sliding window."""
    window: int = 1024
    """Sliding: tokens in the window. Document: tokens computed at a time, which changes nothing but memory."""
    stride: int = 512
    """Sliding: tokens each window scores, its last ones."""
    batch_size: int = 16
    """Documents or windows side by side."""
    max_bytes: int | None = None
    """Score only whole documents up to about so many bytes."""
    depth_threshold: float | None = None
    """Instead of model.depth.threshold as trained: where positions stop. 1 sends those of early exit all the way."""

    def __post_init__(self) -> None:
        check_text("eval", checkpoint=self.checkpoint)
        if self.source is not None:
            check_text("eval", source=self.source)
        check_choice("eval", ("document", "sliding"), context=self.context)
        check_integer("eval", 1, 2**24, window=self.window, batch_size=self.batch_size)
        check_integer("eval", 1, self.window, stride=self.stride)
        if self.max_bytes is not None:
            check_integer("eval", 1, 2**62, max_bytes=self.max_bytes)
        if self.depth_threshold is not None:
            check_range("eval", 0, 1, depth_threshold=self.depth_threshold)


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of `resnet-bk generate`."""

    checkpoint: str
    """Folder of a run, or of a model."""
    prompt: str
    """Text to continue; '-' reads standard input."""
    max_new_tokens: int = 200
    """Tokens to add at most."""
    temperature: float = 0.7
    """Sharpness of sampling; 0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that together have this probability. Below 1, runs of spaces may never end."""
    seed: int = 0
    """Seeds sampling."""
    depth_threshold: float | None = None
    """Instead of model.depth.threshold as trained: where positions stop. 1 sends those of early exit all the way."""
    speculate: int = 0
    """Tokens that a model with early exit drafts by its first blocks before all of them verify; the text is that of
    full depth. Needs temperature 0. 0: no drafts."""

    def __post_init__(self) -> None:
        check_text("generate", checkpoint=self.checkpoint, prompt=self.prompt)
        check_integer("generate", 1, 2**24, max_new_tokens=self.max_new_tokens)
        check_integer("generate", 0, 2**31 - 1, seed=self.seed)
        check_range("generate", 0, 100, temperature=self.temperature)
        check_range("generate", 1e-6, 1, top_p=self.top_p)
        if self.depth_threshold is not None:
            check_range("generate", 0, 1, depth_threshold=self.depth_threshold)
        check_integer("generate", 0, 1_024, speculate=self.speculate)
        if self.speculate and self.temperature:
            raise ConfigError(
                f"generate.speculate: got {self.speculate} with temperature = {self.temperature}, allowed with "
                "temperature 0: drafts are of the likeliest tokens"
            )


@dataclass(frozen=True)
class InspectConfig:
    """Settings of `resnet-bk inspect`."""

    checkpoint: str
    """Folder of a run, or of a model."""
    text: str
    """File to read; '-' is standard input."""
    max_tokens: int = 2000
    """Tokens to look at, from the beginning. What is left out is said."""
    output: str = "inspect.html"
    """The page to write; a file that is there is replaced only if it is such a page."""
    depth_threshold: float | None = None
    """Instead of model.depth.threshold as trained: where positions stop. 1 sends those of early exit all the way."""

    def __post_init__(self) -> None:
        check_text("inspect", checkpoint=self.checkpoint, text=self.text, output=self.output)
        check_integer("inspect", 1, 2**20, max_tokens=self.max_tokens)
        if self.depth_threshold is not None:
            check_range("inspect", 0, 1, depth_threshold=self.depth_threshold)


@dataclass(frozen=True)
class ReportConfig:
    """Settings of `resnet-bk report`."""

    runs: list[str]
    """Folders of finished runs of `resnet-bk train`, all scored on the same held-out text."""
    output: str = "report.html"
    """The page to write; a file that is there is replaced only if it is such a page."""
    text: str | None = None
    """File to color by what each model spends on it. Default: the first held-out document of the first run."""
    max_tokens: int = 600
    """Tokens of it to look at, from the beginning."""

    def __post_init__(self) -> None:
        check_text("report", output=self.output, **{f"runs[{i}]": run for i, run in enumerate(self.runs)})
        if not self.runs:
            raise ConfigError("report.runs: got [], allowed at least one")
        if self.text is not None:
            check_text("report", text=self.text)
        check_integer("report", 1, 2**20, max_tokens=self.max_tokens)


@dataclass(frozen=True)
class AblateConfig:
    """Settings of `resnet-bk ablate`."""

    base: str
    """YAML file with settings of `resnet-bk train`: the recipe with every technique on that is to be switched. Its
    max_steps gives all models equal tokens, its max_seconds equal time."""
    techniques: list[str] | None = None
    """Techniques to switch, of multiscale, length, depth, sparsity, experts. Default: all that the recipe has on.
    Experts off means that each token uses all of them."""
    plan: Literal["full", "half"] = "full"
    """Every combination; or, of four techniques or more, those with an even number off, and the plain model."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each combination is trained once with each."""
    output_dir: str = "runs/ablate"
    """Folder for a run of each combination and seed. Those that are there already count."""

    def __post_init__(self) -> None:
        where = "ablate"
        check_text(where, base=self.base, output_dir=self.output_dir)
        check_choice(where, ("full", "half"), plan=self.plan)
        for name, values in (("techniques", self.techniques), ("seeds", self.seeds)):
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ConfigError(f"{where}.{name}: got {shown(values)}, allowed at least one, each once")
        for technique in self.techniques or ():
            check_choice(where, tuple(TECHNIQUES), techniques=technique)
        check_integer(where, 0, 2**31 - 1, **{f"seeds[{i}]": seed for i, seed in enumerate(self.seeds)})


@dataclass(frozen=True)
class TuneConfig:
    """Settings of `resnet-bk tune`."""

    base: str
    """YAML file with settings of `resnet-bk train`: the recipe that every trial starts from."""
    space: dict[str, list[float]] | None = None
    """Which settings of the recipe to search, and where: {model.depth.penalty: [0.01, 1.0]}. Any number can be
    searched; integers stay integers; where high is at least 10 times low > 0, on a log scale. Default:
    threshold, penalty and target of model.depth; of policy 'exit', which reads no others, threshold."""
    output_dir: str = "runs/tune"
    """Folder for the study and the run of each trial. A study that is there already goes on."""
    trials: int = 20
    """Trials to finish, those of earlier calls included."""
    objective: Literal["prefill", "decode"] = "prefill"
    """The measured time: reading text, or writing it one token at a time."""
    seed: int = 0
    """Seeds the search. Each trial trains with the recipe's own seed."""
    prune: bool = True
    """Stop trials, a quarter or half of the way through training, that are far worse than all finished ones were."""
    max_loss: float = 0.05
    """Chosen is the fastest trial whose perplexity per byte is at most this share above the best one's."""

    def __post_init__(self) -> None:
        where = "tune"
        check_text(where, base=self.base, output_dir=self.output_dir)
        check_integer(where, 1, 10**6, trials=self.trials)
        check_choice(where, ("prefill", "decode"), objective=self.objective)
        check_integer(where, 0, 2**31 - 1, seed=self.seed)
        check_boolean(where, prune=self.prune)
        check_range(where, 0, 1_000, max_loss=self.max_loss)
        if self.space is not None:
            if not isinstance(self.space, dict) or not self.space:
                raise ConfigError(f"{where}.space: got {shown(self.space)}, allowed {in_words(dict[str, list[float]])}")
            space = {name: _checked_range(name, bounds) for name, bounds in self.space.items()}
            object.__setattr__(self, "space", space)


def _checked_range(name: str, bounds: list[float]) -> list[float]:
    """[low, high] of a setting to be searched, as integers where it is one; ConfigError where it cannot be searched."""
    known, where = all_fields(TrainConfig), "tune.space"
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "see resnet-bk train --help"
        raise ConfigError(f"{where}: unknown setting {shown(name)}; {hint}")
    kind = number_kind(known[name])
    if kind is None:
        raise ConfigError(f"{where}: {name} is no number but {in_words(known[name])}; only numbers are searched")
    if not isinstance(bounds, list | tuple) or len(bounds) != 2:
        raise ConfigError(f"{where}.{name}: got {shown(bounds)}, allowed two numbers, [low, high]")
    check_range(where, -1e12, 1e12, **{name: bounds[0]})
    check_range(where, -1e12, 1e12, **{name: bounds[1]})
    if kind is int and any(bound != int(bound) for bound in bounds):
        raise ConfigError(f"{where}.{name}: got {shown(bounds)}, allowed two integers, [low, high]")
    if not bounds[0] < bounds[1]:
        raise ConfigError(f"{where}.{name}: got {shown(bounds)}, allowed low < high")
    return [kind(bound) for bound in bounds]
