"""``resnet-bk inspect``: what a model spends on a text, byte by byte, in the terminal and as one HTML page.

Dimensions: B sequences, N tokens.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn import functional as F

from resnet_bk.adaptive.depth import DepthRecord, measured_depth
from resnet_bk.adaptive.length import LengthRecord
from resnet_bk.adaptive.multiscale import ChunkRecord
from resnet_bk.checkpoint import write_whole
from resnet_bk.config import ConfigError, InspectConfig
from resnet_bk.hf import ResNetBKForCausalLM, Tokenizer, quiet_transformers
from resnet_bk.inference.loading import load
from resnet_bk.layers.feedforward import ExpertsRecord
from resnet_bk.layers.sparse import SparsityRecord
from resnet_bk.record import Record
from resnet_bk.report import html
from resnet_bk.report.terminal import colored
from resnet_bk.study.ledger import Ledger, plain_flops
from resnet_bk.study.measure import rank_correlation
from resnet_bk.study.run import versions

TITLE = "What the model spends"


@dataclass(frozen=True)
class Spending:
    """What a model spent on a text of N tokens. text: what they cover; spans: of each token, its characters; cost:
    (N,), FLOPs; bits: (N - 1,), of each token but the first; blocks: a token's mean, where depth is adaptive."""

    text: str
    spans: list[tuple[int, int]]
    cost: Tensor
    bits: Tensor
    records: list[Record]
    ledger: Ledger
    blocks: float | None

    @property
    def share(self) -> float:
        """FLOPs beside those of the plain model with all experts on."""
        return self.ledger.total / len(self.cost) / plain_flops(self.ledger.model.config)

    def pieces(self) -> list[tuple[str, float, str]]:
        """Text, mean FLOPs, and a note, of each character or longer token."""
        return _pieces(self.text, self.spans, self.cost, self.bits, _decided(self.records, len(self.cost)))


def spend(model: ResNetBKForCausalLM, tokenizer: Tokenizer, text: str, max_tokens: int, name: str) -> Spending:
    """Run the model on the beginning of a text. name: how the error calls a text without a token."""
    ids, spans = _tokens(text, tokenizer, max_tokens, name)
    with torch.no_grad(), measured_depth(model.model) as blocks, Ledger(model.model) as ledger:
        output = model.model(ids.to(model.device))
    assert output.logits is not None
    bits = F.cross_entropy(output.logits[0, :-1], ids[0, 1:].to(model.device), reduction="none") / math.log(2)
    shown = text[: spans[-1][1]]
    return Spending(shown, spans, ledger.by_token[0].cpu(), bits.cpu(), output.records, ledger, blocks())


def inspect(config: InspectConfig, console: Console) -> dict[str, float]:
    """Prints the text in colors and two tables, writes the page; returns the figures."""
    quiet_transformers()
    page = Path(config.output)
    check_output("inspect.output", page, TITLE)
    text = read_text("inspect.text", config.text)
    model, tokenizer = load(config.checkpoint, config.depth_threshold)
    spent = spend(model, tokenizer, text, config.max_tokens, f"inspect.text: {config.text}")
    cost, bits, ledger = spent.cost, spent.bits, spent.ledger
    low, high = cost.min().item(), cost.max().item()
    values = {
        "FLOPs per token": ledger.total / len(cost),
        "of the plain model's, all experts on": spent.share,
        "cheapest token": low,
        "dearest token": high,
        "filling up batches and tiles, share": ledger.unused / ledger.total,
        "bits per token": bits.mean().item() if len(bits) else math.nan,
        "rank correlation of cost and bits": rank_correlation(cost[1:], bits),
        **decisions(spent.records),
    }
    if spent.blocks is not None:
        values["blocks a token"] = spent.blocks
    rows = [(name, f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}") for name, value in values.items()]
    stages = _stages(ledger)
    pieces = heated(spent.pieces(), low, high)
    console.print(colored((piece, heat) for piece, heat, _ in pieces))
    for title, lines in ((f"{config.checkpoint} on {config.text}", rows), ("where", stages)):
        table = Table(title=Text(title), show_header=False)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    if len(spent.text) < len(text):
        console.print(f"looked at the first {len(cost):,} tokens; give --max_tokens to see more")
    footer = [f"{name} {version}" for name, version in versions().items()]
    footer.append(f"resnet-bk inspect {config.checkpoint} {config.text} --max_tokens {config.max_tokens}")
    sections = [
        ("Byte by byte", legend(low, high) + html.heat_map(pieces)),
        ("Where", html.table_html(stages)),
    ]
    write_whole(page, html.page(f"{TITLE}: {config.checkpoint} on {config.text}", rows, sections, footer))
    console.print(f"wrote {page}", markup=False)
    return values


def decisions(records: list[Record]) -> dict[str, float]:
    """Means of what the techniques decided, as far as their records reach the model's."""
    found: dict[str, list[float]] = {}
    for record in records:
        if isinstance(record, LengthRecord):
            found.setdefault("positions that go deep, share", []).append(record.kept.double().mean().item())
        elif isinstance(record, ChunkRecord) and record.closes is not None:
            share = record.closes.double().mean().item()
            found.setdefault("tokens a chunk", []).append(1 / share if share else math.inf)
        elif isinstance(record, SparsityRecord):
            found.setdefault("sites left out, share", []).append(record.sparsity)
        elif isinstance(record, ExpertsRecord):
            found.setdefault("computing experts a token", []).append(record.mean_used)
    return {name: sum(values) / len(values) for name, values in found.items()}


def check_output(where: str, page: Path, title: str) -> None:
    """May the page be written? where: the setting that names it; title: how those of its command begin."""
    if page.is_dir():
        raise ConfigError(f"{where}: {page} is a folder; name a file")
    if page.exists():
        with page.open(errors="replace") as file:
            if f"<title>{title}" not in file.read(500):
                raise ConfigError(f"{where}: {page} exists and is no page of this command; choose another")
    if not page.parent.is_dir():
        raise ConfigError(f"{where}: there is no folder {page.parent}; make it, or choose another")


def read_text(where: str, name: str) -> str:
    """A file's text, or that of standard input. where: the setting that names it."""
    if name == "-":
        return sys.stdin.read()
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"{where}: {name} is no file; give a text file, or '-'")
    return path.read_bytes().decode()


def _tokens(text: str, tokenizer: Tokenizer, max_tokens: int, name: str) -> tuple[Tensor, list[tuple[int, int]]]:
    """Ids (1, N), and of each token the characters it covers, from and to; bytes of one character all cover it."""
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids, spans = encoded["input_ids"][:max_tokens], encoded["offset_mapping"][:max_tokens]
    if not ids:
        raise ConfigError(f"{name} is empty; give at least one character")
    return torch.tensor([ids]), spans


def _pieces(
    text: str, spans: list[tuple[int, int]], cost: Tensor, bits: Tensor, decided: list[list[str]]
) -> list[tuple[str, float, str]]:
    """Text, mean FLOPs of its tokens, and a note, of each character or longer token. decided: of each token."""
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
        note = "; ".join(dict.fromkeys([note, *(said for token in decided[first : last + 1] for said in token)]))
        pieces.append((text[end : spans[first][1]], own, note))  # with whatever no token covers before it
        first, end = last + 1, spans[first][1]
    return pieces


def heated(pieces: list[tuple[str, float, str]], low: float, high: float) -> list[tuple[str, float, str]]:
    """Their FLOPs as heat, from 0 at `low` to 1 at `high`: as html.heat_map takes them."""
    return [(text, (own - low) / (high - low) if high > low else 0.0, note) for text, own, note in pieces]


def _decided(records: list[Record], length: int) -> list[list[str]]:
    """What the techniques decided for each of N tokens: on tokens themselves, and how many blocks their chunk had.

    Records of rows that depth or length packed are left out: whose they are, they do not say.
    """
    said: list[list[str]] = [[] for _ in range(length)]

    def say(words: Iterable[str]) -> None:
        for own, word in zip(said, words, strict=True):
            own += [word] if word else []

    levels = [r.closes[0].long().cpu() for r in records if isinstance(r, ChunkRecord) and r.closes is not None]
    chunks = levels[0] if levels and len(levels[0]) == length else None
    kept = [r.kept[0] for r in records if isinstance(r, SparsityRecord) and r.kept.shape[1] == length]
    used = [r.used[0] for r in records if isinstance(r, ExpertsRecord) and r.used.shape[1] == length]
    for record in records:
        if isinstance(record, LengthRecord):
            say("goes deep" if deep else "leaves after the trunk" for deep in record.kept[0])
        elif isinstance(record, DepthRecord) and record.blocks.shape[1] == length:
            say(f"{n} of {record.available} blocks" for n in record.blocks[0].tolist())
        elif isinstance(record, DepthRecord) and chunks is not None and len(levels) == 1:
            own = [*record.blocks[0, : chunks.sum()].tolist(), 0]  # the last chunk may still be open
            mine = (chunks.cumsum(0) - chunks).tolist()
            say(f"its chunk {own[i]} of {record.available} blocks" if own[i] else "" for i in mine)
    if kept:
        say(f"kept in {n} of {len(kept)} mixers" for n in torch.stack(kept).sum(0).tolist())
    if used:
        say(f"{mean:.1f} experts" for mean in torch.stack(used).double().mean(0).tolist())
    if chunks is not None:
        say("closes a chunk" if closes else "" for closes in chunks)
    return said


def legend(low: float, high: float) -> str:
    """The colors from low to high, FLOPs of heat 0 and 1."""
    low, high = low / 1e6, high / 1e6
    steps = [(f" {low + (high - low) * i / 7:.2f} ", i / 7, "MFLOPs a token") for i in range(8)]
    return html.heat_map([("MFLOPs a token: ", 0.0, ""), *steps])


def _stages(ledger: Ledger) -> list[tuple[str, str, str]]:
    """Layer and part, FLOPs, share of all."""
    return [(stage, f"{flops:,.0f}", f"{flops / ledger.total:.1%}") for stage, flops in ledger.stages.items()]
