"""A training run: from its configuration to a trained model in its folder."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from rich.console import Console

from resnet_bk.checkpoint import newest_valid, replacing
from resnet_bk.config import ConfigError, TrainConfig
from resnet_bk.data import corpus, tokens
from resnet_bk.folders import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    MODEL,
    TEXT_HASH,
    check_same_run,
    check_same_text,
    run_folder,
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
from resnet_bk.training.ranks import Ranks
from resnet_bk.training.sharded import recompute, shard
from resnet_bk.training.states import whole_weights
from resnet_bk.training.trainer import BKTrainer, Budget, Recorder, Watch, Windows


class StoppedError(RuntimeError):
    """The run was interrupted by a signal after a checkpoint was saved."""

    def __init__(self, number: int, go_on: str):
        """go_on: the command that continues."""
        super().__init__(f"stopped by signal {number}; saved. Go on with: {go_on}")
        self.number, self.exit_code = number, 128 + number


@dataclass(frozen=True)
class TrainedRun:
    """A run whose training has ended: what is needed to score it and to report on it.

    config: with the folder and the vocabulary that the run really has. documents held out: not tokenised yet.
    seconds: of training, all sessions together. bytes_per_token: mean over the training text. processes: how many
    shared each batch. train_sha256: fingerprint of the training text and its tokenizer.
    """

    config: TrainConfig
    folder: Path
    model: ResNetBKForCausalLM
    tokenizer: Tokenizer
    held_out: list[corpus.Document]
    steps: int
    seconds: float
    bytes_per_token: float
    processes: int
    train_sha256: str


def train(config: TrainConfig, console: Console, watch: Watch | None = None) -> TrainedRun | None:
    """Train a model and save it in its run folder.

    Under torchrun or accelerate the processes share each batch. Rank 0 alone chooses the folder, prints and writes; the
    other ranks return None once training has ended.

    Args:
        watch: called at each log line; an exception it raises ends the training.

    Raises:
        ConfigError: settings, text and folder do not fit each other.
        StoppedError: a signal ended the run after a checkpoint.
        NonFiniteError: a loss or gradient was NaN or infinite.
    """
    quiet_transformers()
    ranks = Ranks.start()
    console = console if ranks.is_first else Console(quiet=True)
    folder = Path(ranks.told(lambda: str(run_folder(config, console))))
    config = dataclasses.replace(config, output_dir=str(folder))
    with ranks.first():  # what it finds wrong ends the run for all; the token files it makes are there for the others
        tokenizer = load_tokenizer(config.data.tokenizer)
        config = with_vocabulary(config, len(tokenizer))
        check_same_run(config, folder)
        train_documents, held_out = corpus.split(config.data.source, config.data.val_source, config.data.val_fraction)
        train_tokens, train_hash = token_file(train_documents, config.data, tokenizer)
        check_same_text(config.data.source, train_hash, folder)
        windows = Windows(train_tokens, config.model.n_seq)
        _check_batch(config, windows, ranks)
        folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    model = ResNetBKForCausalLM(_hub_config(config, tokenizer))
    bytes_per_token = train_tokens.bytes / len(train_tokens.ids)
    console.print(
        f"{len(train_tokens.names)} documents, {train_tokens.bytes / 1e6:.1f} MB to train on; "
        f"{len(held_out)} documents held out; {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; "
        + (f"{ranks.world} processes of " if ranks.world > 1 else "")
        + f"{torch.get_num_threads()} threads"
    )
    _warm_up(model)
    if config.activation_checkpointing:
        recompute(model)
    if config.shard and ranks.world > 1:
        shard(on_device(model))
    with ranks.first():
        try:
            trainer = BKTrainer(model, config, windows, bytes_per_token, tokenizer, ranks)
        except ValueError as error:  # of all settings, only a tracker's name is checked there and not here
            raise ConfigError(f"train.report_to: got {config.report_to!r}: {error}") from error
    trainer.add_callback(Budget(trainer))
    checkpoint = ranks.told(lambda: str(newest_valid(folder / CHECKPOINTS, console.print) or ""))
    recorder = Recorder(trainer, folder / METRICS, console, watch)
    if ranks.is_first:
        trainer.add_callback(recorder)
        (folder / CONFIG).write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))
        (folder / TEXT_HASH).write_text(train_hash + "\n")
    try:
        trainer.run_training(Path(checkpoint) if checkpoint else None)
    finally:
        recorder.close()
    weights = whole_weights(model, ranks.is_first)
    ranks.leave()
    if trainer.stopped_by is not None:
        raise StoppedError(trainer.stopped_by, f"resnet-bk train --config {folder / CONFIG} --resume true")
    if not ranks.is_first:
        return None
    if config.shard and ranks.world > 1:
        model = on_device(ResNetBKForCausalLM(model.config))
        model.load_state_dict(weights)
    with replacing(folder / MODEL) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    return TrainedRun(
        config=config,
        folder=folder,
        model=model,
        tokenizer=tokenizer,
        held_out=held_out,
        steps=trainer.state.global_step,
        seconds=trainer.clock.seconds,
        bytes_per_token=bytes_per_token,
        processes=ranks.world,
        train_sha256=train_hash,
    )


def _check_batch(config: TrainConfig, windows: Windows, ranks: Ranks) -> None:
    """Raise ConfigError where there are not enough windows for a batch, or a batch cannot be shared out evenly."""
    if len(windows) < config.batch_size:
        raise ConfigError(
            f"data.source: {len(windows.ids)} tokens make {len(windows)} windows of {config.model.n_seq}, "
            f"fewer than one batch of {config.batch_size}; give more text, or lower model.n_seq or batch_size"
        )
    if config.batch_size % ranks.world:
        raise ConfigError(
            f"train.batch_size: got {config.batch_size}, allowed a multiple of {ranks.world}, the number of processes "
            "that share each batch"
        )


def with_vocabulary(config: TrainConfig, size: int) -> TrainConfig:
    """The tokenizer's vocabulary size, unless a larger one was set."""
    asked = config.model.vocab_size
    if asked != tokens.BYTE_VOCABULARY and asked < size:
        raise ConfigError(
            f"model.vocab_size: got {asked}, the tokenizer {config.data.tokenizer!r} has {size} ids; "
            "leave it out or raise it"
        )
    vocab_size = size if asked == tokens.BYTE_VOCABULARY else asked
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=vocab_size))


def _hub_config(config: TrainConfig, tokenizer: Tokenizer) -> ResNetBKConfig:
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return ResNetBKConfig.from_model_config(config.model, **ids)


def _warm_up(model: ResNetBKForCausalLM) -> None:
    """Compile the kernels before the clock starts. Leaves no trace: no random numbers, no gradients."""
    ids = torch.ones(1, 2, dtype=torch.long)
    with torch.random.fork_rng(devices=[]):
        output = model(ids, shift_labels=ids)
    output.loss.backward()
    model.zero_grad(set_to_none=True)
