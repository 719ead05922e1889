"""A training run, from its configuration to a trained model in its run folder."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from resnet_bk import __version__
from resnet_bk.checkpoint import RUN_FILES, newest_valid, replacing, step_of
from resnet_bk.config import ConfigError, TrainConfig, shown
from resnet_bk.data import corpus, tokens
from resnet_bk.extras import extra
from resnet_bk.files import write_whole
from resnet_bk.folders import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    METRICS,
    MODEL,
    RESULTS,
    TEXT_HASH,
    check_same_run,
    check_same_text,
    flat,
    model_folder,
    run_folder,
    train_command,
)
from resnet_bk.hf import (
    ResNetBKConfig,
    ResNetBKForCausalLM,
    Tokenizer,
    load_tokenizer,
    on_device,
    quiet_transformers,
    token_file,
)
from resnet_bk.model import LanguageModel
from resnet_bk.report.terminal import say
from resnet_bk.training import cpu
from resnet_bk.training.errors import StoppedError
from resnet_bk.training.held_out import HeldOut
from resnet_bk.training.mixture import check_sources, mixture_hash, mixture_note, sampler
from resnet_bk.training.ranks import Ranks
from resnet_bk.training.recorder import ProgressCallback, Recorder
from resnet_bk.training.sharded import recompute, shard
from resnet_bk.training.states import gather_weights
from resnet_bk.training.trainer import BKTrainer
from resnet_bk.training.transfer import Teacher, transfer
from resnet_bk.training.windows import Windows

with extra("train"):
    from rich.console import Console


@dataclass(frozen=True)
class TrainedRun:
    """A finished training: everything that scoring and the report need.

    Attributes:
        config: the settings, with the actual folder and vocabulary size.
        folder: the run folder.
        model: the trained model.
        tokenizer: its tokenizer.
        held_out: the held-out text, tokenised.
        held_out_words: number of its words and line ends.
        held_out_sha256: hash of it and the tokenizer.
        steps: number of updates made, including those before the run was resumed.
        seconds: training time, including that before the run was resumed.
        bytes_per_token: mean over the training text.
        processes: number of processes that shared each batch.
        train_sha256: hash of the training text and its tokenizer.
    """

    config: TrainConfig
    folder: Path
    model: ResNetBKForCausalLM
    tokenizer: Tokenizer
    held_out: tokens.TokenFile
    held_out_words: int
    held_out_sha256: str
    steps: int
    seconds: float
    bytes_per_token: float
    processes: int
    train_sha256: str


@dataclass(frozen=True)
class _Data:
    """The texts of a run.

    Attributes:
        tokenizer: of the model.
        windows: the training text.
        sha256: hash of the training text and its tokenizer.
        held_out, held_out_words, held_out_sha256: those of :class:`TrainedRun`.
        notes: lines about copies of the same text and about the shares of several sources.
    """

    tokenizer: Tokenizer
    windows: Windows
    sha256: str
    held_out: tokens.TokenFile
    held_out_words: int
    held_out_sha256: str
    notes: list[str]


@contextlib.contextmanager
def trained(
    config: TrainConfig, console: Console, on_progress: ProgressCallback | None = None
) -> Iterator[TrainedRun | None]:
    """Train a model and save it in its run folder. The folder stays locked until the end of the block.

    Under torchrun or accelerate the processes share each batch. Only rank 0 chooses the folder, prints and writes the
    run's files; another rank writes token files only if it does not find rank 0's. The block gets None on the other
    ranks.

    Args:
        config: settings of the run.
        console: where rank 0 prints.
        on_progress: called on rank 0 at each log line; an exception that it raises ends the training.

    Raises:
        ConfigError: the settings, the text or the folder cannot be used, do not fit each other, or differ between the
            processes; or another process works in the folder.
        CheckpointError: the checkpoint to resume from, or the model to start from, cannot be loaded.
        StoppedError: a signal arrived: the run saved a checkpoint and stopped.
        NonFiniteError: a loss or a gradient was NaN or infinite.
        OSError: the disk is full or fails. It names the file.
    """
    quiet_transformers()
    ranks = Ranks.start()
    settings = {f"train.{name}": value for name, value in flat(dataclasses.asdict(config)).items()}
    settings |= {"version of resnet-bk": __version__, "train.data.cache": None}  # each machine may have its own cache
    ranks.check_same(settings, "start every process with the same settings")
    console = console if ranks.is_rank_zero else Console(quiet=True)
    with contextlib.ExitStack() as held:
        report = functools.partial(say, console)
        folder = ranks.broadcast(lambda: str(held.enter_context(run_folder(config, report))))
        yield _train(dataclasses.replace(config, output_dir=folder), ranks, console, on_progress)


def _train(
    config: TrainConfig, ranks: Ranks, console: Console, on_progress: ProgressCallback | None
) -> TrainedRun | None:
    """Train in the folder config.output_dir, whose lock rank 0 holds."""
    folder = Path(config.output_dir)
    with ranks.rank_zero_first():  # errors are reported once; the other ranks find the token files written
        config, data = _prepare_data(config, ranks)
    ranks.check_same({config.data.setting: data.sha256}, "give every process the same text and tokenizer")
    torch.manual_seed(config.seed)
    model = ResNetBKForCausalLM(_transformers_config(config, data))
    checkpoint, teacher = _begin(config, model, data.tokenizer, console, ranks)
    _print_sizes(console, data, model, ranks)
    _prepare_model(model, config, ranks)
    with ranks.rank_zero_first():
        try:
            trainer = BKTrainer(model, config, data.windows, data.tokenizer, ranks)
            trainer.teacher = teacher
        # transformers checks the trackers and their packages, and whether the GPU can compute in bfloat16
        except (ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "requires" not in str(error):
                raise
            name = "dtype" if "bf16" in str(error) else "report_to"
            raise ConfigError(f"train.{name}: got {getattr(config, name)!r}: {error}") from error
    recorder = _add_records(trainer, data, step_of(checkpoint) if checkpoint else 0, console, on_progress)
    try:
        with cpu.large_batches():
            trainer.run_training(checkpoint)
    finally:
        recorder.close()
        model.model.taught = None
    weights = gather_weights(model, ranks.is_rank_zero)
    ranks.shutdown()
    if trainer.stopped_by is not None:
        raise StoppedError(trainer.stopped_by, train_command(folder / CONFIG, "--resume", "true"))
    if not ranks.is_rank_zero:
        return None
    if config.shard and ranks.world_size > 1:
        model = on_device(ResNetBKForCausalLM(model.config))
        model.load_state_dict(weights)
    with trainer.naming_the_last_checkpoint(), replacing(folder / MODEL) as scratch:
        model.save_pretrained(scratch)
        data.tokenizer.save_pretrained(scratch)
    return TrainedRun(
        config=config,
        folder=folder,
        model=model,
        tokenizer=data.tokenizer,
        held_out=data.held_out,
        held_out_words=data.held_out_words,
        held_out_sha256=data.held_out_sha256,
        steps=trainer.state.global_step,
        seconds=trainer.clock.seconds,
        bytes_per_token=data.windows.bytes_per_token,
        processes=ranks.world_size,
        train_sha256=data.sha256,
    )


def _begin(
    config: TrainConfig, model: ResNetBKForCausalLM, tokenizer: Tokenizer, console: Console, ranks: Ranks
) -> tuple[Path | None, Teacher | None]:
    """Return the checkpoint to resume from and the model to learn from; None where there is none.

    Without a checkpoint, copy the weights of config.init_from. Freeze what is not to be trained.

    Raises:
        ConfigError: the run is finished but has no checkpoint; or as for `_start_from`.
        CheckpointError: as for `_start_from`.
    """
    folder = Path(config.output_dir)
    checkpoint = ranks.broadcast(
        lambda: str(newest_valid(folder / CHECKPOINTS, functools.partial(say, console), RUN_FILES) or "")
    )
    with ranks.rank_zero_first():
        if not checkpoint and (folder / RESULTS).exists():
            raise ConfigError(
                f"train.output_dir: {folder} is finished and has no intact checkpoint to continue from; choose "
                f"another, with --init_from {folder} to start from its weights"
            )
        teacher = None
        if config.init_from is not None and not (checkpoint and config.trained == "all" and not config.distill):
            teacher = _start_from(config, model, tokenizer)
    return Path(checkpoint) if checkpoint else None, teacher


def _start_from(config: TrainConfig, model: ResNetBKForCausalLM, tokenizer: Tokenizer) -> Teacher | None:
    """Copy the weights of config.init_from, freeze them if only new ones are trained, and return the teacher, if any.

    Raises:
        CheckpointError: the folder has no model, or it is damaged.
        ConfigError: the model has other shapes or another tokenizer, or all is frozen.
    """
    source = str(config.init_from)
    folder = model_folder(source).absolute()
    base = LanguageModel.from_pretrained(folder)
    first, second = base.config, model.model.config
    there, here = (flat(dataclasses.asdict(settings)) for settings in (first, second))
    there.pop("memory.rows")  # the table is not copied
    differing = ", ".join(f"{name} ({shown(there[name])})" for name in there if there[name] != here.get(name))
    refused = f"train.init_from: {source!r} is another model, the settings of model that differ are {differing}"
    remedy = "train with its settings, as in --config RUN/config.yaml, but for techniques"
    grams = (first.memory.orders, second.memory.orders), (first.memory.recent, second.memory.recent)
    if first.energy_kind != second.energy_kind or any(old and old != new for old, new in grams):
        raise ConfigError(f"{refused}; {remedy}")
    if tokens.tokenizer_digest(load_tokenizer(str(folder))) != tokens.tokenizer_digest(tokenizer):
        raise ConfigError(f"train.init_from: {source!r} has another tokenizer than data.tokenizer; use its tokenizer")
    try:
        new = transfer(base, model.model)  # not the table of n-gram memory, which is counted from the run's own text
    except ValueError as error:
        raise ConfigError(f"{refused}: {error}; {remedy}") from error
    if config.trained == "new":
        if not new:
            raise ConfigError(f"train.trained: got 'new', but {source!r} has all parameters of this model; use 'all'")
        model.requires_grad_(False)
        for parameter in new:
            parameter.requires_grad_(True)
    if torch.cuda.is_available():
        base.cuda()
    return Teacher(base, model.model) if config.distill else None


def _add_records(
    trainer: BKTrainer, data: _Data, step: int, console: Console, on_progress: ProgressCallback | None
) -> Recorder:
    """Add what writes metrics.jsonl and scores held-out text; rank 0 writes the settings and the hash of the text.

    step: the step after which the run begins.
    """
    config, folder = trainer.config, Path(trainer.config.output_dir)
    recorder = Recorder(trainer, folder / METRICS, console, on_progress)
    with trainer.ranks.rank_zero_first():
        if trainer.ranks.is_rank_zero:
            trainer.add_callback(recorder)
            recorder.remove_after(step)
            (folder / RESULTS).unlink(missing_ok=True)  # of a finished run that goes on; before its settings change
            write_whole(folder / CONFIG, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
            write_whole(folder / TEXT_HASH, data.sha256 + "\n")
        if config.eval_every is not None:
            trainer.add_callback(HeldOut(trainer, data.held_out, folder / BEST, folder / METRICS))
    return recorder


def _prepare_data(config: TrainConfig, ranks: Ranks) -> tuple[TrainConfig, _Data]:
    """Split the text and tokenise both parts, so that a fault of the held-out text is found before the training.

    If the folder holds a run already, compare its settings and training text with these.

    Returns:
        `config` with the actual vocabulary size, and the texts.

    Raises:
        ConfigError: the settings, the text or the run in the folder do not fit each other.
    """
    folder = Path(config.output_dir)
    tokenizer = load_tokenizer(config.data.tokenizer)
    config = resolved(config, len(tokenizer))
    check_same_run(config, folder)
    if not tokenizer(config.sample)["input_ids"]:
        raise ConfigError(f"train.sample: {shown(config.sample)} has no tokens; give another text")
    text, starts = corpus.split_by_source(config.data)
    train_tokens, sha256 = token_file(text.train, config.data, tokenizer)
    shares = config.data.shares
    windows = Windows(train_tokens, config.model.n_seq, starts, tuple(shares.values()))
    sha256 = mixture_hash(sha256, windows)
    check_same_text(", ".join(shares), sha256, folder, config.data.setting)
    _check_batch(config, windows, ranks)
    held_out_tokens, held_out_sha256 = token_file(text.held_out, config.data, tokenizer)
    words = corpus.count_words(text.held_out)
    notes = [note for note in (text.note, mixture_note(config.data, windows)) if note]
    return config, _Data(tokenizer, windows, sha256, held_out_tokens, words, held_out_sha256, notes)


def _check_batch(config: TrainConfig, windows: Windows, ranks: Ranks) -> None:
    """Raise ConfigError if the text is too short, or batch_size is not a multiple of the ranks' number.

    Without n-gram memory it must have one batch, with it two parts of one update each. Every part of an epoch must have
    windows of each source.
    """
    size = f"{len(windows.tokens.ids)} tokens make {len(windows)} windows of {config.model.n_seq}"
    if len(windows) < config.batch_size:
        raise ConfigError(
            f"{config.data.setting}: {size}, fewer than one batch of {config.batch_size}; give more text, or lower "
            "model.n_seq or batch_size"
        )
    per_step = config.batch_size * config.accumulate
    if config.model.memory.orders and min(map(len, windows.parts(per_step))) < per_step:
        raise ConfigError(
            f"{config.data.setting}: {size}; with model.memory, two parts need the {per_step} windows of an update "
            "each (batch_size x accumulate); give more text, lower model.n_seq or batch_size, or leave the memory out "
            "with --model.memory.orders '[]'"
        )
    order = sampler(windows, per_step, config.seed, in_parts=bool(config.model.memory.orders))
    check_sources(config.data, windows, order)
    if config.batch_size % ranks.world_size:
        raise ConfigError(
            f"train.batch_size: got {config.batch_size}, allowed a multiple of {ranks.world_size}, the number of "
            "processes that share each batch"
        )


def resolved(config: TrainConfig, size: int) -> TrainConfig:
    """Return the settings as a run saves them, for a tokenizer with `size` ids.

    The kind of energies is that of the model. The vocabulary size is that of the tokenizer if it was the default, 259;
    a larger one is kept.

    Raises:
        ConfigError: it is neither the default nor large enough for the tokenizer.
    """
    asked = config.model.vocab_size
    if asked != tokens.BYTE_VOCABULARY and asked < size:
        raise ConfigError(
            f"model.vocab_size: got {asked}, the tokenizer {config.data.tokenizer!r} has {size} ids; "
            "leave it out or raise it"
        )
    vocab_size = size if asked == tokens.BYTE_VOCABULARY else asked
    model = dataclasses.replace(config.model, vocab_size=vocab_size, energy=config.model.energy_kind)
    return dataclasses.replace(config, model=model)


def _print_sizes(console: Console, data: _Data, model: ResNetBKForCausalLM, ranks: Ranks) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    memory = model.model.memory
    entries = "" if memory is None else f"n-grams in {memory.entries.nbytes / 1e6:.0f} MB, which are counted first; "
    processes = f"{ranks.world_size} processes of " if ranks.world_size > 1 else ""
    for note in data.notes:
        say(console, note)
    say(
        console,
        f"{len(data.windows.tokens.names)} documents, {data.windows.tokens.bytes / 1e6:.1f} MB to train on; "
        f"{len(data.held_out.names)} documents held out; {parameters / 1e6:.2f} M parameters; {entries}"
        f"{processes}{torch.get_num_threads()} threads",
    )


def _prepare_model(model: ResNetBKForCausalLM, config: TrainConfig, ranks: Ranks) -> None:
    """Compile the CPU kernels before the clock starts, then apply the settings that save memory.

    The state of the random number generator does not change.
    """
    ids = torch.ones(1, 2, dtype=torch.long)
    with torch.random.fork_rng(devices=[]):
        model(ids, shift_labels=ids, skip_logits=True).loss.backward()
    model.zero_grad(set_to_none=True)
    if config.activation_checkpointing:
        recompute(model)
    if config.shard and ranks.world_size > 1:
        shard(on_device(model))


def _transformers_config(config: TrainConfig, data: _Data) -> ResNetBKConfig:
    """Return the settings of the model. Its n-gram memory has no more rows than the training text has tokens."""
    ids = {"pad_token_id": data.tokenizer.pad_token_id, "eos_token_id": data.tokenizer.eos_token_id}
    model = config.model
    if model.memory.orders:
        rows = min(model.memory.rows, len(data.windows.tokens.ids))
        model = dataclasses.replace(model, memory=dataclasses.replace(model.memory, rows=rows))
    return ResNetBKConfig.from_model_config(model, **ids)
