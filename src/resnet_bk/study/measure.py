"""Measure what a model costs: parameters, FLOPs per byte, bytes per second of prefill and decoding.

Dimensions: B sequences, N tokens.
"""

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.clock import timed
from resnet_bk.engine.decoder import decoder_of
from resnet_bk.inference.readers import PIECE, EngineReader, ModelReader, Reader
from resnet_bk.model import LanguageModel

PROMPT = 64  # tokens before those that are decoded
TOKENS_A_CALL = PIECE  # where a token takes about 0.1 ms, `generate` writes about as many


@dataclass(frozen=True)
class Costs:
    """Costs of one model.

    Attributes:
        parameters: number of parameters.
        flops_per_byte: FLOPs of a forward pass per byte of text; a multiply-add counts as two.
        prefill: bytes per second, median of the repeats.
        prefill_setting: batch and length of the prefill, in words.
        decode: bytes per second, median of the repeats.
        decode_setting: batch and length of the decoding, in words.
    """

    parameters: int
    flops_per_byte: float
    prefill: float
    prefill_setting: str
    decode: float
    decode_setting: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Return name and value of each row of a table of costs."""
        return [
            ("prefill", f"{self.prefill:,.0f} bytes/s ({self.prefill_setting})"),
            ("decode", f"{self.decode:,.0f} bytes/s ({self.decode_setting})"),
            ("parameters", f"{self.parameters:,}"),
            ("FLOPs per byte", f"{self.flops_per_byte:,.0f} (forward)"),
        ]


@torch.no_grad()
def measure(
    model: LanguageModel,
    text: np.ndarray,
    bytes_per_token: float,
    batch: int = 8,
    length: int = 2048,
    new: int = 512,
    repeats: int = 5,
) -> Costs:
    """Measure prefill of a batch, and decoding: one sequence, token by token, after a prompt of 64 tokens.

    Decoding reads the text, so what adaptive compute decides is what it decides for real text. A model's own likeliest
    text soon repeats itself, which is easy.

    Args:
        model: left in the mode, training or evaluation, that it was in.
        text: (T,) integer, T >= 1, the tokens to read, repeated if there are too few. With adaptive compute the costs
            depend on them.
        bytes_per_token: mean over the text, to convert tokens into bytes.
        batch: sequences of the prefill.
        length: tokens of each sequence of the prefill.
        new: tokens to read one by one.
        repeats: timed runs, after one that is not timed.
    """
    device = model.embed.weight.device
    was_training = model.training
    model.eval()
    ids = torch.from_numpy(np.resize(text[: batch * length], (batch, length)).astype(np.int64)).to(device)
    with FlopCounterMode(display=False) as counter:
        for row in ids.unbind():
            model(row.unsqueeze(0))
    flops = counter.get_total_flops() / ids.numel()
    prefill = [timed(lambda: model(ids, logits=False), device)[1] for _ in range(repeats + 1)][1:]
    tokens = np.resize(text[: PROMPT + new], PROMPT + new).tolist()
    decode = [one_by_one(model, tokens) for _ in range(repeats + 1)][1:]
    model.train(was_training)
    return Costs(
        parameters=sum(p.numel() for p in model.parameters()),
        flops_per_byte=flops / bytes_per_token,
        prefill=batch * length * bytes_per_token / statistics.median(prefill),
        prefill_setting=f"{batch} x {length} tokens",
        decode=new * bytes_per_token / statistics.median(decode),
        decode_setting=f"1 sequence, {new} tokens",
    )


def one_by_one(model: LanguageModel, tokens: list[int]) -> float:
    """Return the seconds in which tokens after the first PROMPT ones are read one by one.

    `generate` reads so what it writes: with the engine, TOKENS_A_CALL in one call. Choosing them is not measured.
    """
    decoder = decoder_of(model)
    reader: Reader = ModelReader(model, decoder)
    at_a_time = 1
    if decoder.uses_engine():
        from resnet_bk.engine.compiler import engine_of  # imports numba

        reader, at_a_time = EngineReader(engine_of(model)), TOKENS_A_CALL
    reader.read(tokens[:PROMPT])
    started = time.perf_counter()
    for first in range(PROMPT, len(tokens), at_a_time):
        reader.read(tokens[first : first + at_a_time])
    return time.perf_counter() - started


def rank_correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Return Spearman's rank correlation of two tensors of one size, 0 if one is constant.

    Equal values share the mean of their ranks. Ranked by position, they would follow any order in the text.
    """
    ranks = []
    for values in (x, y):
        _, inverse, counts = values.flatten().unique(return_inverse=True, return_counts=True)
        if len(counts) < 2:
            return 0.0
        ranks.append((counts.cumsum(0) - (counts - 1) / 2.0)[inverse].double())
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()
