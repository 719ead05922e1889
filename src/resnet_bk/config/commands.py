"""The settings of each command."""

from dataclasses import dataclass, field
from typing import Literal

from resnet_bk.config.checks import (
    ConfigError,
    check_choices,
    check_integer,
    check_range,
    check_text,
    shown,
)
from resnet_bk.config.data import DataConfig
from resnet_bk.config.model import ModelConfig


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `resnet-bk train`."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    output_dir: str = "runs/train"
    """Folder for checkpoints, metrics.jsonl and report.html."""
    resume: bool = False
    """Continue the run in output_dir, or in output_dir-2, -3, ... if the ones before are finished. A finished run
    continues if max_steps or max_seconds is larger than what it has used; the learning rate then follows the schedule
    of the new budget. If all runs are finished, or there is none, start a new one. Without this setting, an existing
    run is an error."""
    init_from: str | None = None
    """Folder of a trained run, of a checkpoint or of a saved model, whose weights are the first ones. Its
    model must have the same shapes and its tokenizer be the same: pass its config.yaml to --config. The optimizer
    starts anew, and the table of n-gram memory is counted from this run's text. With other techniques, which
    `resnet-bk adapt` gives a model, their parameters start as in a new model."""
    trained: Literal["all", "new"] = "all"
    """Parameters that are trained: all, or only those that the model of init_from does not have."""
    distill: float = 0.0
    """Share of the loss that compares the model's predictions with those of the model of init_from, instead of with
    the text (Hinton et al. 2015, arXiv:1503.02531)."""
    batch_size: int = 12
    """Sequences in a batch, of model.n_seq tokens each, all processes together."""
    accumulate: int = 1
    """Batches per update; their gradients are accumulated."""
    max_steps: int | None = None
    """Stop after this number of updates."""
    max_seconds: float | None = None
    """Stop after this number of seconds of training, all sessions together. The learning rate then follows the clock.
    With max_steps too, whichever is reached first ends the run, and the learning rate follows the one that is further
    along."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """'muon' or 'adamw'. Muon makes the momentum of each matrix of the blocks, and between levels, orthogonal. It
    updates all other parameters by AdamW, at the same rate."""
    learning_rate: float = 0.01
    """Peak learning rate. With Muon 0.01 serves widths of 32 to 128; AdamW needs less for wide models."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices. Vectors have none."""
    beta2: float = 0.99
    """Decay rate of AdamW's second moment."""
    warmup: float = 0.05
    """Share of the run in which the learning rate rises to its peak."""
    final_learning_rate: float = 0.05
    """Learning rate at the end of the run, as a share of the peak."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to this norm."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Autocast type of matrix products. The recurrence stays in float32. bfloat16 is faster only on hardware that has
    it."""
    activation_checkpointing: bool = False
    """Recompute the activations inside blocks in the backward pass: less memory, one more forward pass."""
    shard: bool = False
    """Shard weights and optimizer over the processes of a run (FSDP2). Otherwise each process holds all of them."""
    seed: int = 0
    """Seed of initialisation and data order."""
    save_every: int = 200
    """Updates between checkpoints. The last two are kept."""
    log_every: int = 10
    """Updates between lines of metrics.jsonl."""
    eval_every: int | None = None
    """Updates between scores of held-out text, for metrics.jsonl, the report and best/, the model with the best score
    so far. They read windows of model.n_seq tokens, so they differ a little from the final scores, and they do not
    count as training time. Default: only the final scores."""
    eval_bytes: int = 65_536
    """Bytes of held-out text that each of these scores reads, about, in whole batches; or all if there are fewer. With
    data.sources they are spread over all of it, otherwise they are its beginning."""
    report_to: str = "none"
    """Trackers to report to, besides metrics.jsonl: tensorboard, wandb, trackio, ... (comma-separated)."""
    sample: str = "def "
    """Prompt of the sample text at the end of the run."""

    def __post_init__(self) -> None:
        where = "train"
        check_choices(where, self)
        check_integer(where, 1, 1_048_576, batch_size=self.batch_size, accumulate=self.accumulate)
        check_integer(where, 1, 10**9, save_every=self.save_every, log_every=self.log_every)
        check_integer(where, 1, 10**12, eval_bytes=self.eval_bytes)
        if self.eval_every is not None:
            check_integer(where, 1, 10**9, eval_every=self.eval_every)
        check_integer(where, 0, 2**31 - 1, seed=self.seed)
        check_range(where, 1e-8, 10, learning_rate=self.learning_rate)
        check_range(where, 0, 1, warmup=self.warmup, final_learning_rate=self.final_learning_rate)
        check_range(where, 0, 0.999999, beta2=self.beta2)
        check_range(where, 0, 10, weight_decay=self.weight_decay)
        check_range(where, 1e-6, 1e6, max_grad_norm=self.max_grad_norm)
        check_text(where, output_dir=self.output_dir, report_to=self.report_to, sample=self.sample)
        check_range(where, 0, 1, distill=self.distill)
        if self.init_from is not None:
            check_text(where, init_from=self.init_from)
        elif self.distill or self.trained != "all":
            name, value = ("distill", self.distill) if self.distill else ("trained", self.trained)
            raise ConfigError(
                f"{where}.{name}: got {shown(value)} without init_from, allowed with the model to start from"
            )
        if not self.model.causal:
            raise ConfigError(
                "model.causal: got False, allowed True: a bidirectional model cannot learn to predict the next token"
            )
        if self.model.length.bins and self.model.window > self.model.n_seq:
            raise ConfigError(
                f"model.length.max_length: got {self.model.window} with model.n_seq = {self.model.n_seq}, allowed at "
                "most n_seq: longer lengths would never be trained"
            )
        if self.model.length.spacing == "words" and self.model.length.bins and self.data.tokenizer != "byte":
            raise ConfigError(
                f"model.length.spacing: got 'words' with data.tokenizer = {shown(self.data.tokenizer)}, allowed with "
                "'byte'; otherwise use 'even'"
            )
        if self.model.multiscale.reads_bytes and self.data.tokenizer != "byte":
            raise ConfigError(
                f"model.multiscale.boundaries: got {self.model.multiscale.boundaries!r} with data.tokenizer = "
                f"{shown(self.data.tokenizer)}, allowed with 'byte'; otherwise use 'fixed' or 'learned'"
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
    """Folder of a run or of a model, or fast-python, a model that comes with this package."""
    source: str | None = None
    """Text to score: 'stdlib', a file, a folder or a hub dataset. Default: the text that the run held out."""
    rows: Literal["documents", "lines"] | None = None
    """With a hub dataset as source, see data.rows of training. Default: that of the run, or 'documents'."""
    context: Literal["document", "sliding"] = "document"
    """Context of each token. 'document': all of its document so far. 'sliding': a sliding window."""
    window: int = 1024
    """With context 'sliding': tokens in the window. With 'document': tokens computed at a time, which affects memory,
    but not results (up to rounding)."""
    stride: int = 512
    """With context 'sliding': number of tokens scored at the end of each window. A document's first window scores all
    of its tokens."""
    batch_size: int = 16
    """Documents or windows in a batch."""
    max_bytes: int | None = None
    """Score only some whole documents, evenly spread, with about this number of bytes in total. Default: all."""
    depth_threshold: float | None = None
    """Replaces model.depth.threshold, as set for training; only for models with adaptive depth. With early exit, 1 runs
    every position through all blocks."""

    def __post_init__(self) -> None:
        check_choices("eval", self)
        check_text("eval", checkpoint=self.checkpoint)
        if self.source is not None:
            check_text("eval", source=self.source)
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
    """Folder of a run or of a model, or fast-python, a model that comes with this package."""
    prompt: str
    """Text to continue. '-' reads standard input."""
    max_new_tokens: int = 200
    """Largest number of tokens to add."""
    temperature: float = 0.7
    """Temperature of sampling. 0 always takes the most likely token."""
    top_k: int = 0
    """Sample from this many of the most likely tokens. 0: from all."""
    top_p: float = 1.0
    """Sample from the most likely tokens whose probabilities add up to this. Below 1, the model may go on repeating
    spaces."""
    min_p: float = 0.0
    """Leave out tokens less likely than this share of the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that the text already has become less likely."""
    stop: list[str] = field(default_factory=list)
    """Strings that end the text; it ends before the first of them."""
    seed: int = 0
    """Seed of sampling."""
    weights: Literal["float32", "int8"] = "float32"
    """Numbers in which matrices are read while decoding on a CPU. int8 takes a quarter of the memory, is faster for
    models larger than the CPU's caches, and rounds; a prompt is read one token at a time."""
    depth_threshold: float | None = None
    """Replaces model.depth.threshold, as set for training; only for models with adaptive depth. With early exit, 1 runs
    every position through all blocks."""
    speculate: int = 0
    """Only for models with early exit: largest number of tokens that the first blocks draft before the later blocks
    verify them. The text is that of greedy decoding through all blocks, up to rounding; depth_threshold has no effect.
    Needs temperature 0. Where the engine decodes, drafts would be slower, so there are none. 0: off."""
    interactive: bool = False
    """Afterwards read a line from standard input, add it to the text, continue it, and so on until the input ends."""

    def __post_init__(self) -> None:
        check_choices("generate", self)
        check_text("generate", checkpoint=self.checkpoint, prompt=self.prompt)
        check_integer("generate", 1, 2**24, max_new_tokens=self.max_new_tokens)
        check_integer("generate", 0, 2**31 - 1, seed=self.seed)
        check_range("generate", 0, 100, temperature=self.temperature)
        if 0 < self.temperature < 1e-6:  # logits divided by it could overflow
            raise ConfigError(f"generate.temperature: got {self.temperature}, allowed 0, or 1e-06 to 100")
        check_range("generate", 1e-6, 1, top_p=self.top_p)
        check_integer("generate", 0, 2**31 - 1, top_k=self.top_k)
        check_range("generate", 0, 1, min_p=self.min_p)
        check_range("generate", 0.01, 100, repetition_penalty=self.repetition_penalty)
        for text in self.stop:
            check_text("generate", stop=text)
            if not text:
                raise ConfigError("generate.stop: got an empty string, allowed strings of one character or more")
        if self.interactive and self.prompt == "-":
            raise ConfigError(
                "generate.interactive: got true with the prompt '-', allowed with a prompt as text: standard input has "
                "the lines that follow"
            )
        if self.depth_threshold is not None:
            check_range("generate", 0, 1, depth_threshold=self.depth_threshold)
        check_integer("generate", 0, 1_024, speculate=self.speculate)
        if self.speculate and (self.stop or self.repetition_penalty != 1 or self.interactive):
            raise ConfigError(
                f"generate.speculate: got {self.speculate}, allowed without stop, repetition_penalty and interactive"
            )
        if self.speculate and self.temperature:
            raise ConfigError(
                f"generate.speculate: got {self.speculate} with temperature = {self.temperature}, allowed with "
                "temperature = 0: drafts are the most likely tokens"
            )


@dataclass(frozen=True)
class ServeConfig:
    """Settings of `resnet-bk serve`."""

    checkpoint: str
    """Folder of a run or of a model, or fast-python, a model that comes with this package."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 is every IPv4 address of this machine; then give clients a key."""
    port: int = 8000
    """Port to listen on. 0 takes any free one."""
    name: str | None = None
    """Name of the model for clients. Default: the name of the folder."""
    api_key_file: str | None = None
    """File with the key that clients must send as 'Authorization: Bearer KEY'. Default: the environment variable
    RESNET_BK_API_KEY; without it, no key is needed."""
    rows: int = 64
    """Texts that are decoded at the same time."""
    queue: int = 256
    """Texts that may wait for a place. Requests beyond that get the status 429."""
    threads: int | None = None
    """Threads that decode. Default: one fewer than the CPU has cores, as the answers are sent by another one."""
    max_tokens: int = 4_096
    """Largest max_tokens of a request."""
    max_prompt_tokens: int = 65_536
    """Largest number of tokens of a prompt."""
    max_body_bytes: int = 1_048_576
    """Largest body of a request, in bytes."""
    timeout: float = 600.0
    """Seconds after which a request ends with an error, waiting included."""
    grace: float = 10.0
    """Seconds that running texts have to end after Ctrl-C or SIGTERM. A second signal ends them at once."""
    weights: Literal["float32", "int8"] = "float32"
    """Numbers in which matrices are read. int8 takes a quarter of the memory, is faster for models larger than the
    CPU's caches, and rounds."""
    depth_threshold: float | None = None
    """Replaces model.depth.threshold, as set for training, for requests that do not give their own; only for models
    with adaptive depth. With early exit, 1 runs every position through all blocks."""

    def __post_init__(self) -> None:
        where = "serve"
        check_choices(where, self)
        check_text(where, checkpoint=self.checkpoint, host=self.host)
        check_integer(where, 0, 65_535, port=self.port)
        for name in ("name", "api_key_file"):
            if getattr(self, name) is not None:
                check_text(where, **{name: getattr(self, name)})
        check_integer(where, 1, 4_096, rows=self.rows)
        check_integer(where, 0, 2**20, queue=self.queue)
        if self.threads is not None:
            check_integer(where, 1, 1_024, threads=self.threads)
        check_integer(where, 1, 2**24, max_tokens=self.max_tokens, max_prompt_tokens=self.max_prompt_tokens)
        check_integer(where, 1, 2**30, max_body_bytes=self.max_body_bytes)
        check_range(where, 0.1, 1e6, timeout=self.timeout)
        check_range(where, 0, 3_600, grace=self.grace)
        if self.depth_threshold is not None:
            check_range(where, 0, 1, depth_threshold=self.depth_threshold)


@dataclass(frozen=True)
class InspectConfig:
    """Settings of `resnet-bk inspect`."""

    checkpoint: str
    """Folder of a run or of a model, or fast-python, a model that comes with this package."""
    text: str
    """Text file to read. '-' reads standard input."""
    max_tokens: int = 2000
    """Number of tokens to look at, from the beginning. If there are more, a note says so."""
    output: str = "inspect.html"
    """HTML page to write. An existing file is replaced only if this command has written it."""
    depth_threshold: float | None = None
    """Replaces model.depth.threshold, as set for training; only for models with adaptive depth. With early exit, 1 runs
    every position through all blocks."""

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
    """HTML page to write. An existing file is replaced only if this command has written it."""
    text: str | None = None
    """Text file to color by the FLOPs that each model executes for it. '-' reads standard input. Default: the first
    held-out document of the first run."""
    max_tokens: int = 600
    """Largest number of tokens of that text to color, from the beginning."""

    def __post_init__(self) -> None:
        check_text("report", output=self.output, **{f"runs[{i}]": run for i, run in enumerate(self.runs)})
        if not self.runs:
            raise ConfigError("report.runs: got [], allowed at least one")
        if self.text is not None:
            check_text("report", text=self.text)
        check_integer("report", 1, 2**20, max_tokens=self.max_tokens)


@dataclass(frozen=True)
class SealConfig:
    """Settings of `resnet-bk seal`."""

    folder: str
    """Folder of a model or of a checkpoint."""

    def __post_init__(self) -> None:
        check_text("seal", folder=self.folder)
