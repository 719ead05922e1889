"""The command ``resnet-bk inspect``: show the FLOPs of each token of a text, in the terminal and on an HTML page.

Dimensions: B sequences, N tokens.
"""

import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.adaptive.depth import DepthRecord, measured_depth
from resnet_bk.adaptive.length import LengthRecord
from resnet_bk.adaptive.multiscale import ChunkRecord
from resnet_bk.config import ConfigError, InspectConfig, read_text
from resnet_bk.files import write_whole
from resnet_bk.hf import ResNetBKForCausalLM, Tokenizer, quiet_transformers
from resnet_bk.inference.loading import load
from resnet_bk.layers.feedforward import ExpertsRecord
from resnet_bk.layers.sparse import SparsityRecord
from resnet_bk.record import Record
from resnet_bk.report import html
from resnet_bk.report.tables import Console, print_table
from resnet_bk.report.terminal import colored, say
from resnet_bk.study.ledger import Ledger, plain_flops
from resnet_bk.study.measure import rank_correlation
from resnet_bk.study.versions import version_lines

TITLE = "What the model spends"
HINT = "The pointer on a character shows its figures; the table below the text has them all."
_BYTES_PER_TOKEN, _LEAST_BYTES = 256, 1 << 16  # read of a text for each token to look at, and in all at least


@dataclass(frozen=True)
class Spending:
    """Costs of a text of N tokens.

    Attributes:
        text: the text that the tokens cover.
        spans: first character and end of each token.
        cost: (N,) float64, FLOPs of each token.
        bits: (N - 1,) cross-entropy in bits of each token except the first.
        records: what the model's layers reported.
        ledger: FLOPs by layer.
        blocks: mean number of blocks per token; None without adaptive depth.
    """

    text: str
    spans: list[tuple[int, int]]
    cost: Tensor
    bits: Tensor
    records: list[Record]
    ledger: Ledger
    blocks: float | None

    @property
    def share(self) -> float:
        """FLOPs divided by those of the plain model, in which every token runs all experts."""
        return self.ledger.total / len(self.cost) / plain_flops(self.ledger.model.config)

    def pieces(self) -> list[tuple[str, float, str]]:
        """Return text, mean FLOPs and note of each character, or of each token that covers several."""
        return _pieces(self.text, self.spans, self.cost, self.bits, _decided(self.records, len(self.cost)))


def spend(model: ResNetBKForCausalLM, tokenizer: Tokenizer, text: str, max_tokens: int, name: str) -> Spending:
    """Run a model on the beginning of a text and count its FLOPs.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        text: the text.
        max_tokens: number of tokens to run, at most.
        name: name of the text in the error message.

    Raises:
        ConfigError: the text has no token.
    """
    ids, spans = _tokens(text, tokenizer, max_tokens, name)
    with torch.no_grad(), measured_depth(model.model) as blocks, Ledger(model.model) as ledger:
        output = model.model(ids.to(model.device))
    assert output.logits is not None
    bits = F.cross_entropy(output.logits[0, :-1], ids[0, 1:].to(model.device), reduction="none") / math.log(2)
    covered = text[: spans[-1][1]]
    return Spending(covered, spans, ledger.by_token[0].cpu(), bits.cpu(), output.records, ledger, blocks())


def inspect(config: InspectConfig, console: Console) -> dict[str, float]:
    """Print the text in colors and two tables, and write the page. Returns the values of the first table."""
    quiet_transformers()
    page = Path(config.output)
    check_output("inspect.output", page, TITLE)
    text = read_beginning("inspect.text", config.text, config.max_tokens)
    model, tokenizer = load(config.checkpoint, config.depth_threshold)
    spending = spend(model, tokenizer, text, config.max_tokens, f"inspect.text: {config.text}")
    cost, bits, ledger = spending.cost, spending.bits, spending.ledger
    low, high = cost.min().item(), cost.max().item()
    values = {
        "FLOPs per token": ledger.total / len(cost),
        "share of the plain model's FLOPs": spending.share,
        "FLOPs of the cheapest token": low,
        "FLOPs of the most expensive token": high,
        "share of FLOPs on unused rows": ledger.unused / ledger.total,
        "bits per token": bits.mean().item() if len(bits) else math.nan,
        "rank correlation of cost and bits": rank_correlation(cost[1:], bits),
        **decisions(spending.records),
    }
    if spending.blocks is not None:
        values["blocks per token"] = spending.blocks
    rows = [(name, f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}") for name, value in values.items()]
    stages = _stages(ledger)
    pieces = heated(spending.pieces(), low, high)
    words = ["resnet-bk", "inspect", config.checkpoint, config.text, "--max_tokens", str(config.max_tokens)]
    seen = html.paragraph(f"The stronger the color, the more the model computes there. {HINT}")
    whole = f"All {len(cost):,} tokens together, in the order of the computation."
    sections = [
        ("Costs and decisions", html.table_html(rows, "Means over the tokens below, where nothing else is said.")),
        ("Byte by byte", seen + legend(low, high) + html.heat_map(pieces)),
        ("FLOPs by layer", html.table_html(stages, whole, ["layer", "FLOPs", "share"])),
    ]
    intro = "FLOPs (floating-point operations) that the model executes to predict a text, for each of its tokens."
    title = f"{TITLE}: {config.checkpoint} on {config.text}"
    write_whole(page, html.page(title, intro, sections, [*version_lines(), shlex.join(words)]))
    console.print(colored((piece, heat) for piece, heat, _ in pieces))
    print_table(console, f"{config.checkpoint} on {config.text}", rows)
    print_table(console, "FLOPs by layer", stages)
    if len(spending.text) < len(text):
        say(console, f"looked at the first {len(cost):,} tokens; give --max_tokens to see more")
    say(console, f"wrote {page}")
    return values


def decisions(records: list[Record]) -> dict[str, float]:
    """Return the means of the decisions in `records`, by name; `Spending.blocks` has those of adaptive depth."""
    found: dict[str, list[float]] = {}
    for record in records:
        if isinstance(record, LengthRecord):
            found.setdefault("share of positions in the deep blocks", []).append(record.kept.double().mean().item())
        elif isinstance(record, ChunkRecord):
            share = record.closes.double().mean().item()
            found.setdefault("tokens per chunk", []).append(1 / share if share else math.inf)
        elif isinstance(record, SparsityRecord):
            found.setdefault("share of sites left out", []).append(record.sparsity)
        elif isinstance(record, ExpertsRecord):
            found.setdefault("computing experts per token", []).append(record.mean_used)
    return {name: sum(values) / len(values) for name, values in found.items()}


def check_output(where: str, page: Path, title: str) -> None:
    """Raise ConfigError unless the page can be written: it does not exist, or is an earlier page of the same command.

    Args:
        where: the setting that names the page.
        page: the page.
        title: beginning of the titles of the command's pages.
    """
    if page.is_dir():
        raise ConfigError(f"{where}: {page} is a folder; name a file")
    if page.exists() and not page.is_file():  # opening a pipe would wait for its other end
        raise ConfigError(f"{where}: {page} is a device or a pipe; name a file")
    if page.exists():
        with page.open(errors="replace") as file:
            if f"<title>{title}" not in file.read(500):
                raise ConfigError(f"{where}: {page} exists and is not a page of this command; choose another")
    if not page.parent.is_dir():
        raise ConfigError(f"{where}: folder {page.parent} does not exist; create it, or choose another")


def read_beginning(where: str, name: str, max_tokens: int) -> str:
    """Return as much of a text as `max_tokens` tokens can need. where: the setting that names it; name: file or "-"."""
    return read_text(where, name, max(_LEAST_BYTES, max_tokens * _BYTES_PER_TOKEN))


def _tokens(text: str, tokenizer: Tokenizer, max_tokens: int, name: str) -> tuple[Tensor, list[tuple[int, int]]]:
    """Return ids (1, N), and first character and end of each token; several bytes may cover the same character."""
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids, spans = encoded["input_ids"][:max_tokens], encoded["offset_mapping"][:max_tokens]
    if not ids:
        raise ConfigError(f"{name} has no token; give a longer text")
    return torch.tensor([ids]), spans


def _pieces(
    text: str, spans: list[tuple[int, int]], cost: Tensor, bits: Tensor, decided: list[list[str]]
) -> list[tuple[str, float, str]]:
    """Return text, mean FLOPs and note of each character, or of each token that covers several.

    Args:
        text: the text.
        spans: first character and end of each of N tokens.
        cost: (N,) FLOPs.
        bits: (N - 1,) of each token except the first.
        decided: phrases for the note, for each token.
    """
    mean = cost.mean().item()
    pieces: list[tuple[str, float, str]] = []
    first = end = 0
    while first < len(spans):
        last = first
        while last + 1 < len(spans) and spans[last + 1] == spans[first]:
            last += 1
        own = cost[first : last + 1].mean().item()
        note = f"{own / 1e6:.3f} MFLOPs, {own / mean:.2f} of the mean"
        if first > 0:
            note += f"; {bits[first - 1 : last].sum().item():.2f} bits"
        phrases = [phrase for token in decided[first : last + 1] for phrase in token]
        note = "; ".join(dict.fromkeys([note, *phrases]))
        pieces.append((text[end : spans[first][1]], own, note))  # includes text before it that no token covers
        first, end = last + 1, spans[first][1]
    return pieces


def heated(pieces: list[tuple[str, float, str]], low: float, high: float) -> list[tuple[str, float, str]]:
    """Turn the FLOPs of pieces into heat, 0 at `low` and 1 at `high`."""
    return [(text, (own - low) / (high - low) if high > low else 0.0, note) for text, own, note in pieces]


def _decided(records: list[Record], length: int) -> list[list[str]]:
    """Return phrases that say what the techniques decided for each token.

    Records of packed rows are left out, because they do not say which tokens they are about. Blocks of chunks are shown
    at the tokens of the chunk.
    """
    phrases: list[list[str]] = [[] for _ in range(length)]

    def say(each: Iterable[str]) -> None:
        for own, phrase in zip(phrases, each, strict=True):
            own += [phrase] if phrase else []

    levels = [r.closes[0].long().cpu() for r in records if isinstance(r, ChunkRecord)]
    chunks = levels[0] if levels and len(levels[0]) == length else None
    kept = [r.kept[0] for r in records if isinstance(r, SparsityRecord) and r.kept.shape[1] == length]
    used = [r.used[0] for r in records if isinstance(r, ExpertsRecord) and r.used.shape[1] == length]
    for record in records:
        if isinstance(record, LengthRecord):
            say("runs the deep blocks" if kept_here else "takes the bypass" for kept_here in record.kept[0])
        elif isinstance(record, DepthRecord) and record.blocks.shape[1] == length:
            say(f"{n} of {record.available} blocks" for n in record.blocks[0].tolist())
        elif isinstance(record, DepthRecord) and chunks is not None and len(levels) == 1:
            own = [*record.blocks[0, : chunks.sum()].tolist(), 0]  # the last chunk may still be open
            chunk_of = (chunks.cumsum(0) - chunks).tolist()
            say(f"chunk: {own[i]} of {record.available} blocks" if own[i] else "" for i in chunk_of)
    if kept:
        say(f"kept in {n} of {len(kept)} mixers" for n in torch.stack(kept).sum(0).tolist())
    if used:
        say(f"{mean:.1f} experts" for mean in torch.stack(used).double().mean(0).tolist())
    if chunks is not None:
        say("closes a chunk" if closes else "" for closes in chunks)
    return phrases


def legend(low: float, high: float) -> str:
    """Return the color scale as HTML. low, high: FLOPs of heat 0 and 1; where they are equal, there is one color."""
    heats = [i / (html.LEVELS - 1) for i in range(html.LEVELS if high > low else 1)]
    return html.scale("MFLOPs per token", [(f"{(low + (high - low) * heat) / 1e6:.2f}", heat) for heat in heats])


def _stages(ledger: Ledger) -> list[tuple[str, str, str]]:
    """Return a table: layer and part, FLOPs, share of all."""
    return [(stage, f"{flops:,.0f}", f"{flops / ledger.total:.1%}") for stage, flops in ledger.stages.items()]
