"""Score a model on text: bits per byte and perplexities."""

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
from resnet_bk.data.tokens import TokenFile
from resnet_bk.model import LanguageModel
from resnet_bk.training import cpu
from resnet_bk.training.guard import check_causal


@dataclass(frozen=True)
class Scores:
    """Scores of one text.

    Attributes:
        context: what each token was predicted from, in words.
        documents: number of documents scored.
        bytes: size of these documents.
        tokens: number of tokens scored.
        words: number of whitespace-separated words and line ends, as WikiText's perplexity counts them.
        nats: cross-entropy of all tokens together.
        seconds: wall-clock time of the scoring.
        blocks: mean number of blocks per token among those that adaptive depth decides about; None without
            adaptive depth.
    """

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
        """Return the fields and what follows from them, as results.json has them."""
        return asdict(self) | {
            "bits_per_byte": self.bits_per_byte,
            "perplexity_per_byte": math.exp(self.nats / self.bytes),
            "perplexity_per_token": _exp(self.nats / self.tokens),
            "perplexity_per_word": _exp(self.nats / max(1, self.words)),
            "bytes_per_second": self.bytes / self.seconds,
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return name and value of each row of a table of scores."""
        values = self.to_dict()
        rows = [
            ("held-out bits per byte", f"{self.bits_per_byte:.4f}"),
            ("held-out perplexity per byte", f"{values['perplexity_per_byte']:.4f}"),
            ("perplexity per token", f"{values['perplexity_per_token']:.4g}"),
            ("perplexity per word", f"{values['perplexity_per_word']:.4g}"),
            ("held-out text", f"{self.bytes:,} bytes in {count(self.documents, 'document')}"),
            ("context", self.context),
        ]
        return rows if self.blocks is None else [*rows, ("blocks per token", f"{self.blocks:.2f}")]


def count(number: int, name: str) -> str:
    """Return "1 run" or "2,000 runs"."""
    return f"{number:,} {name}" + "s" * (number != 1)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def chosen_documents(tokens: TokenFile, max_bytes: int | None) -> list[int]:
    """Return the indices of the documents to score: all, or every k-th, about `max_bytes` in all (at least one)."""
    step = 1 if max_bytes is None else max(1, math.ceil(tokens.bytes / max_bytes))
    return list(range(0, len(tokens.sizes), step))


def evaluate(model: LanguageModel, tokens: TokenFile, end: int, config: EvalConfig, words: int = 0) -> Scores:
    """Score a model on text, after a check that it is causal.

    Args:
        model: left in the mode, training or evaluation, that it was in.
        tokens: the text.
        end: id of the end-of-document token. A document's first token is predicted from it. It is not scored.
        config: context, window, stride, batch_size and max_bytes are read.
        words: number of words in the scored documents, for the perplexity per word.

    Raises:
        LeakError: a logit depends on a later token.
    """
    device = model.embed.weight.device
    was_training = model.training
    model.eval()
    check_causal(lambda ids: model(ids).logits, model.config.vocab_size, model.embed.weight.dtype, device)
    chosen = chosen_documents(tokens, config.max_bytes)
    started = time.perf_counter()
    batches = _document_scores if config.context == "document" else _sliding_scores
    total, count = 0.0, 0
    with torch.no_grad(), cpu.large_batches(), measured_depth(model) as blocks:
        for nats, scored_tokens in batches(model, tokens, chosen, end, config):
            total += float(nats)
            count += scored_tokens
    model.train(was_training)
    context = {
        "document": "all of the document so far; the state is reset at each document",
        "sliding": f"sliding window of {config.window} tokens, the last {config.stride} scored; reset at each document",
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
    """Return the summed cross-entropy of logits (B, N, V) and targets (B, N), -100 where nothing is scored."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum").double()


def _document_scores(
    model: LanguageModel, tokens: TokenFile, chosen: list[int], end: int, config: EvalConfig
) -> Iterator[tuple[Tensor, int]]:
    """Score documents of similar length side by side, from beginning to end, carrying their states.

    Yields:
        Cross-entropy in nats, and the number of tokens scored, for each window of each batch.
    """
    device = model.embed.weight.device
    lengths = {i: int(tokens.starts[i + 1] - tokens.starts[i]) - 1 for i in chosen}
    by_length = sorted(chosen, key=lambda i: -lengths[i])
    for first in range(0, len(by_length), config.batch_size):
        batch = by_length[first : first + config.batch_size]
        state = None
        for start in range(0, lengths[batch[0]], config.window):
            batch = [i for i in batch if lengths[i] > start]  # the longest documents, which are the first rows
            if state is not None:
                rows = len(batch)
                state = pytree.tree_map(lambda x, rows=rows: x[:rows], state)
            width = min(config.window, lengths[batch[0]] - start)
            inputs, targets = np.full((len(batch), width), end), np.full((len(batch), width), -100)
            for row, i in enumerate(batch):
                ids = np.asarray(tokens.document(i)[:-1], np.int64)
                piece = ids[start : start + width]
                targets[row, : len(piece)] = piece
                inputs[row, : len(piece)] = np.concatenate([[end], ids])[start : start + len(piece)]
            output = model(torch.from_numpy(inputs).to(device), state=state)
            state = output.state
            yield _nats(output.logits, torch.from_numpy(targets).to(device)), int((targets != -100).sum())


def _sliding_scores(
    model: LanguageModel, tokens: TokenFile, chosen: list[int], end: int, config: EvalConfig
) -> Iterator[tuple[Tensor, int]]:
    """Score windows of each document, each without a state.

    The first window scores all of its tokens. Each later one scores its last `stride` tokens, from a context of at
    least ``window - stride`` tokens.

    Yields:
        Cross-entropy in nats, and the number of tokens scored, for each batch of windows.
    """
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
    """Raise ConfigError unless every token id has a row in the model. digest: SHA-256 of the tokenizer."""
    if tokenizer_size > model.config.vocab_size:
        raise ConfigError(
            f"data.tokenizer: {tokenizer!r} has {tokenizer_size} ids (SHA-256 {digest[:16]}), "
            f"the model {model.config.vocab_size}; use the tokenizer the model was trained with"
        )
