"""A run from configuration to report: what it trains on, what is measured at the end; and its models used."""

import dataclasses
import json
import math
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase, set_seed

from resnet_bk import __version__
from resnet_bk.adaptive.depth import AdaptiveDepth
from resnet_bk.checkpoint import CheckpointError, newest_valid, replacing, write_whole
from resnet_bk.config import (
    ConfigError,
    DataConfig,
    EvalConfig,
    GenerateConfig,
    TrainConfig,
    check_fields,
    check_text,
    read_yaml,
)
from resnet_bk.data import corpus, tokens
from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM, byte_tokenizer, load_tokenizer
from resnet_bk.speculative import speculate
from resnet_bk.training.evaluate import Scores, check_vocabulary, chosen_documents, evaluate
from resnet_bk.training.folders import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    MODEL,
    REPORT,
    RESULTS,
    TEXT_HASH,
    check_same_run,
    check_same_text,
    model_folder,
    run_folder,
)
from resnet_bk.training.measure import Costs, measure
from resnet_bk.training.ranks import Ranks
from resnet_bk.training.sharded import recompute, shard
from resnet_bk.training.states import whole_weights
from resnet_bk.training.trainer import BKTrainer, Budget, Recorder, Watch, Windows, quiet_transformers


class StoppedError(RuntimeError):
    """The run was interrupted by a signal after a checkpoint was saved."""

    def __init__(self, number: int, go_on: str):
        """go_on: the command that continues."""
        super().__init__(f"stopped by signal {number}; saved. Go on with: {go_on}")
        self.number, self.exit_code = number, 128 + number


def load(path: str, threshold: float | None = None) -> tuple[ResNetBKForCausalLM, PreTrainedTokenizerBase]:
    """The model and its tokenizer. threshold: of its adaptive depth, instead of that it was trained with."""
    folder = model_folder(path)
    try:
        model = ResNetBKForCausalLM.from_pretrained(folder)
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # transformers and safetensors raise whatever they find
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder}: cannot be loaded as a ResNet-BK model ({reason})") from error
    if threshold is not None:
        rooms = [module for module in model.modules() if isinstance(module, AdaptiveDepth)]
        if not rooms:
            raise ConfigError(f"depth_threshold: got {threshold}, but {folder} has no adaptive depth; leave it out")
        for room in rooms:
            room.threshold = threshold
    return on_device(model).eval(), load_tokenizer(str(folder))


def on_device(model: ResNetBKForCausalLM) -> ResNetBKForCausalLM:
    """On this process's GPU, where there is one."""
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model


def token_cache(data: DataConfig) -> Path:
    if data.cache is not None:
        return Path(data.cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet-bk"


def _is_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.get_vocab() == byte_tokenizer().get_vocab()


def token_file(
    documents: list[corpus.Document], data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[tokens.TokenFile, str]:
    """The documents as tokens, from the cache or made now, and the fingerprint of text and tokenizer."""
    name = "byte" if _is_bytes(tokenizer) else tokens.tokenizer_digest(tokenizer)
    return tokens.cached(documents, token_cache(data), name, None if name == "byte" else tokenizer)


# ---------------------------------------------------------------------------------------------- train


def train(config: TrainConfig, console: Console, watch: Watch | None = None) -> dict[str, Any]:
    """Train, evaluate, measure, report. Returns what results.json holds.

    Started by torchrun or accelerate, its processes share each batch; the first one alone decides about folders, prints
    and writes, and ends the run without the others, for which this returns nothing: {}.

    watch: called at each log line; what it raises ends the training.
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
    set_seed(config.seed)
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
        return {}
    if config.shard and ranks.world > 1:
        model = on_device(ResNetBKForCausalLM(model.config))
        model.load_state_dict(weights)
    with replacing(folder / MODEL) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
    return _conclude(config, console, folder, trainer, model, tokenizer, held_out, train_hash)


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


def _hub_config(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> ResNetBKConfig:
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return ResNetBKConfig.from_model_config(config.model, **ids)


def _warm_up(model: ResNetBKForCausalLM) -> None:
    """Compile the kernels before the clock starts. Leaves no trace: no random numbers, no gradients."""
    ids = torch.ones(1, 2, dtype=torch.long)
    with torch.random.fork_rng(devices=[]):
        output = model(ids, shift_labels=ids)
    output.loss.backward()
    model.zero_grad(set_to_none=True)


def _conclude(
    config: TrainConfig,
    console: Console,
    folder: Path,
    trainer: BKTrainer,
    model: ResNetBKForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    held_out: list[corpus.Document],
    train_hash: str,
) -> dict[str, Any]:
    model.eval()
    console.print("scoring held-out text ...")
    val_tokens, val_hash = token_file(held_out, config.data, tokenizer)
    scoring = EvalConfig(checkpoint=str(folder))
    scores = evaluate(model.model, val_tokens, tokenizer.eos_token_id, scoring, _words(held_out))
    console.print("measuring speed ...")
    costs = measure(model.model, val_tokens.ids, trainer.bytes_per_token)
    settings = GenerateConfig(str(folder), config.sample, 400, seed=config.seed)
    sample = generate_text(model, tokenizer, config.sample, settings)
    # a run shorter than log_every has logged nothing
    logged = (folder / METRICS).read_text() if (folder / METRICS).exists() else ""
    metrics = [json.loads(line) for line in logged.splitlines()]
    speed = float(np.median([line["bytes_per_second"] for line in metrics])) if metrics else math.nan
    results = {
        "held_out": scores.to_dict(),
        "costs": costs.to_dict(),
        "training": {
            "steps": trainer.state.global_step,
            "seconds": trainer.clock.seconds,
            "bytes_per_second": speed,
            "processes": trainer.ranks.world,
            "train_sha256": train_hash,
            "held_out_sha256": val_hash,
        },
        "versions": versions(),
        "sample": sample,
    }
    rows = table_rows(scores, costs, speed, trainer.state.global_step, trainer.clock.seconds)
    print_table(console, f"Run {folder}", rows)
    console.print("\n[bold]Sample[/bold]")
    console.print(sample, markup=False, highlight=False)
    write_whole(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    from resnet_bk.report import html  # matplotlib takes a second to import

    footer = [f"{name} {version}" for name, version in versions().items()]
    footer.append(f"resnet-bk train --config {folder / CONFIG}")
    curves = html.figures_html([html.training_curves(metrics)] if metrics else [])
    sections = [("Training", curves), ("Sample", html.preformatted(sample))]
    (folder / REPORT).write_text(html.page(f"ResNet-BK run {folder.name}", rows, sections, footer))
    console.print(f"\nwrote {folder}: {MODEL}/, {METRICS}, {RESULTS}, {REPORT}")
    return results


def _words(documents: list[corpus.Document]) -> int:
    """Whitespace-separated words and line ends."""
    count = 0
    for document in documents:
        held = b""
        for piece in document.pieces():
            count += piece.count(b"\n")
            words = (held + piece).split()
            held = words.pop() if words and not piece[-1:].isspace() else b""
            count += len(words)
        count += bool(held)
    return count


def versions() -> dict[str, str]:
    import transformers

    return {
        "resnet-bk": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
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


# ------------------------------------------------------------------------------------- eval and generate


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
    check_vocabulary(model.model, len(tokenizer), config.checkpoint, tokens.tokenizer_digest(tokenizer))
    tokenised, _ = token_file(documents, data, tokenizer)
    words = _words([documents[i] for i in chosen_documents(tokenised, config.max_bytes)])
    scores = evaluate(model.model, tokenised, tokenizer.eos_token_id, config, words)
    print_table(console, f"{config.checkpoint} on {config.source or 'its held-out text'}", table_rows(scores))
    return scores.to_dict()


def generate_text(
    model: ResNetBKForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, config: GenerateConfig
) -> str:
    """Prompt and continuation."""
    if not prompt:
        raise ConfigError("generate.prompt: is empty; give at least one character")
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    if config.speculate:
        try:
            drafts = speculate(model.model, encoded["input_ids"], config.max_new_tokens, config.speculate)
        except ValueError as error:
            raise ConfigError(f"generate.speculate: {error}") from error
        ids = torch.cat([encoded["input_ids"], drafts.tokens], dim=1)[0].tolist()
        end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
        return str(tokenizer.decode(ids[:end], skip_special_tokens=True))
    set_seed(config.seed)
    sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    output = model.generate(
        **encoded, max_new_tokens=config.max_new_tokens, **(sampling if config.temperature else {"do_sample": False})
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def generate(config: GenerateConfig, console: Console) -> str:
    """Continue a prompt; prints prompt and continuation."""
    quiet_transformers()
    model, tokenizer = load(config.checkpoint, config.depth_threshold)
    prompt = sys.stdin.read() if config.prompt == "-" else config.prompt
    check_text("generate", prompt=prompt)
    text = generate_text(model, tokenizer, prompt, config)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return text
