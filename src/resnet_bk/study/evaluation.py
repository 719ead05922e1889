"""The command ``resnet-bk eval``: score a checkpoint on held-out text."""

import json
from pathlib import Path
from typing import Any

from resnet_bk.config import ConfigError, DataConfig, EvalConfig, check_fields, read_yaml
from resnet_bk.data import corpus
from resnet_bk.data.tokens import tokenizer_digest
from resnet_bk.folders import CONFIG, RESULTS, named_folder
from resnet_bk.hf import quiet_transformers, token_file
from resnet_bk.inference.loading import load
from resnet_bk.report.tables import Console, print_table
from resnet_bk.report.terminal import say
from resnet_bk.study.evaluate import check_vocabulary, chosen_documents, evaluate


def evaluate_checkpoint(config: EvalConfig, console: Console) -> dict[str, Any]:
    """Score a checkpoint and print a table. Returns its values.

    The text is config.source; without it, the text that the run held out from its training data.
    """
    quiet_transformers()
    model, tokenizer = load(config.checkpoint, config.depth_threshold)
    folder = named_folder(config.checkpoint)
    saved = folder / CONFIG
    data = _saved_data(saved) if saved.exists() else None
    if config.source is not None:
        rows = config.rows or (data or DataConfig()).rows
        text = corpus.held_out(config.source, "eval.source", rows)
    elif data is not None:
        text = corpus.split(data)
    else:
        raise ConfigError(
            f"eval.source: {config.checkpoint} is not a run folder, so it has no held-out text; give --source"
        )
    check_vocabulary(model.model, len(tokenizer), config.checkpoint, tokenizer_digest(tokenizer))
    tokens, sha256 = token_file(text.held_out, data or DataConfig(), tokenizer)
    if text.note:
        say(console, text.note)
    if config.source is None and _scored_text(folder) not in (None, sha256):
        say(console, "the held-out text has changed since the run ended; the model may have been trained on some of it")
    words = corpus.count_words([text.held_out[i] for i in chosen_documents(tokens, config.max_bytes)])
    scores = evaluate(model.model, tokens, tokenizer.eos_token_id, config, words)
    print_table(console, f"{config.checkpoint} on {config.source or 'its held-out text'}", scores.rows())
    return scores.to_dict()


def _saved_data(path: Path) -> DataConfig:
    """Return the section `data` of a run's saved settings."""
    values = read_yaml("eval.checkpoint", path)
    if not isinstance(values, dict) or "data" not in values:
        raise ConfigError(f"{path}: has no section 'data'; the file is damaged")
    check_fields(f"{path}: data", DataConfig, values["data"])
    return DataConfig(**values["data"])


def _scored_text(folder: Path) -> str | None:
    """Return the hash of the text on which a run was scored when it ended; None if it has not ended."""
    try:
        return json.loads((folder / RESULTS).read_bytes())["training"]["held_out_sha256"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
