"""Held-out scores: bits per byte and perplexities, with the context each token was predicted from.

Dimensions: B documents or windows side by side, N tokens.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from resnet_bk.adaptive.depth import measured_depth
from resnet_bk.config import ConfigError, EvalConfig
from resnet_bk.data.corpus import Document
from resnet_bk.data.tokens import TokenFile
from resnet_bk.model import LanguageModel
from resnet_bk.training.guard import check_causal


@dataclass(frozen=True)
class Scores:
    """Scores of one text. `words`: whitespace-separated words and line ends, as WikiText's perplexity counts them.
    `blocks`: those a token went through on average, of those that adaptive depth decides about, where there is any."""

    context: str
    documents: int
    bytes: int
    tokens: int
    words: int
    nats: float
    seconds: float
    blocks: float | None = None

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.bytes / math.log(2)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "bits_per_byte": self.bits_per_byte,
            "perplexity_per_byte": math.exp(self.nats / self.bytes),
            "perplexity_per_token": _exp(self.nats / self.tokens),
            "perplexity_per_word": _exp(self.nats / max(1, self.words)),
            "bytes_per_second": self.bytes / self.seconds,
        }


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def chosen_documents(tokens: TokenFile, max_bytes: int | None) -> list[int]:
    """Documents to score: all, or evenly spread ones of about `max_bytes` together (at least one)."""
    everything = list(range(len(tokens.sizes)))
    if max_bytes is None or max_bytes >= tokens.bytes:
        return everything
    every = math.ceil(tokens.bytes / max_bytes)
    return everything[::every]


def evaluate(model: LanguageModel, tokens: TokenFile, end: int, config: EvalConfig, words: int = 0) -> Scores:
    """Score `tokens` by `model`, after the causality guard has passed.

    end: id of the end-of-document token, which is also what the first token of a document is predicted from. The end
    marker itself is no text and is not scored.
    """
    device = model.embed.weight.device
    was_training = model.training
    model.eval()
    check_causal(lambda ids: model(ids).logits, model.config.vocab_size, model.embed.weight.dtype, device)
    chosen = chosen_documents(tokens, config.max_bytes)
    started = time.perf_counter()
    scored = _document_scores if config.context == "document" else _sliding_scores
    total, count = 0.0, 0
    with torch.no_grad(), measured_depth(model) as blocks:
        for losses, counted in scored(model, tokens, chosen, end, config):
            total += float(losses)
            count += counted
    model.train(was_training)
    context = {
        "document": "all of the document so far, state reset at each document",
        "sliding": f"sliding window of {config.window} tokens, the last {config.stride} scored, reset at each document",
    }[config.context]
    return Scores(
        context=context,
        documents=len(chosen),
        bytes=int(tokens.sizes[chosen].sum()),
        tokens=count,
        words=words,
        nats=total,
        seconds=time.perf_counter() - started,
        blocks=blocks(),
    )


def _nats(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum").double()


def _document_scores(
    model: LanguageModel, tokens: TokenFile, chosen: list[int], end: int, config: EvalConfig
) -> Iterator[tuple[Tensor, int]]:
    """Documents of similar length side by side, each from beginning to end with its state carried along."""
    device = model.embed.weight.device
    lengths = {i: int(tokens.starts[i + 1] - tokens.starts[i]) - 1 for i in chosen}
    by_length = sorted(chosen, key=lambda i: -lengths[i])
    for first in range(0, len(by_length), config.batch_size):
        batch = by_length[first : first + config.batch_size]
        state = None
        for start in range(0, lengths[batch[0]], config.window):
            batch = [i for i in batch if lengths[i] > start]  # the longest ones, so the first rows
            if state is not None:
                rows = len(batch)
                state = pytree.tree_map(lambda x, rows=rows: x[:rows], state)
            width = min(config.window, lengths[batch[0]] - start)
            inputs, targets = np.full((len(batch), width), end), np.full((len(batch), width), -100)
            for row, i in enumerate(batch):
                ids = np.asarray(tokens.document(i)[:-1], np.int64)
                here = ids[start : start + width]
                targets[row, : len(here)] = here
                before = np.concatenate([[end], ids])[start : start + len(here)]
                inputs[row, : len(here)] = before
            output = model(torch.from_numpy(inputs).to(device), state=state)
            state = output.state
            yield _nats(output.logits, torch.from_numpy(targets).to(device)), int((targets != -100).sum())


def _sliding_scores(
    model: LanguageModel, tokens: TokenFile, chosen: list[int], end: int, config: EvalConfig
) -> Iterator[tuple[Tensor, int]]:
    """Windows of each document; of each window only its last `stride` tokens count, so that all but the first see at
    least ``window - stride`` tokens before the ones they score."""
    device = model.embed.weight.device
    rows: list[tuple[np.ndarray, np.ndarray]] = []

    def score() -> tuple[Tensor, int]:
        width = max(len(inputs) for inputs, _ in rows)
        inputs, targets = np.full((len(rows), width), end), np.full((len(rows), width), -100)
        for row, (x, y) in enumerate(rows):
            inputs[row, : len(x)], targets[row, : len(y)] = x, y
        rows.clear()
        logits = model(torch.from_numpy(inputs).to(device)).logits
        return _nats(logits, torch.from_numpy(targets).to(device)), int((targets != -100).sum())

    for i in chosen:
        ids = np.concatenate([[end], np.asarray(tokens.document(i)[:-1], np.int64)])
        done = 0
        while done < len(ids) - 1:
            stop = min(len(ids) - 1, config.window if done == 0 else done + config.stride)
            start = max(0, stop - config.window)
            targets = ids[start + 1 : stop + 1].copy()
            targets[: done - start] = -100
            rows.append((ids[start:stop], targets))
            done = stop
            if len(rows) == config.batch_size:
                yield score()
    if rows:
        yield score()


def check_vocabulary(model: LanguageModel, tokenizer_size: int, tokenizer: str, digest: str) -> None:
    """Raise unless every token id of the tokenizer has a row in the model."""
    if tokenizer_size > model.config.vocab_size:
        raise ConfigError(
            f"data.tokenizer: {tokenizer!r} has {tokenizer_size} ids (SHA-256 {digest[:16]}), "
            f"the model {model.config.vocab_size}; use the tokenizer the model was trained with"
        )


def count_words(documents: list[Document]) -> int:
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
