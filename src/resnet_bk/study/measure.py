"""What a model costs: parameters, FLOPs per byte, bytes per second of prefill and of decoding.

Dimensions: B sequences, N tokens.
"""

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.clock import timed
from resnet_bk.model import LanguageModel


@dataclass(frozen=True)
class Costs:
    """flops_per_byte: of a forward pass, a multiply-add is two. Rates: median of `repeats` runs, bytes per second."""

    parameters: int
    flops_per_byte: float
    prefill: float
    prefill_setting: str
    decode: float
    decode_setting: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def measure(
    model: LanguageModel,
    text: np.ndarray,
    bytes_per_token: float,
    batch: int = 8,
    length: int = 2048,
    new: int = 256,
    repeats: int = 5,
) -> Costs:
    """Prefill of `batch` x `length` tokens; greedy decoding of `new` tokens, one sequence, after a prompt of 64.

    text: (T,) integer, T >= 1, from which the tokens come, over and over where it is short. What a model that decides
    by content costs depends on it.
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
    decode = [timed(lambda: greedy(model, ids[:1, :64], new), device)[1] for _ in range(repeats + 1)][1:]
    model.train(was_training)
    return Costs(
        parameters=sum(p.numel() for p in model.parameters()),
        flops_per_byte=flops / bytes_per_token,
        prefill=batch * length * bytes_per_token / statistics.median(prefill),
        prefill_setting=f"{batch} x {length} tokens",
        decode=new * bytes_per_token / statistics.median(decode),
        decode_setting=f"1 sequence, {new} tokens",
    )


@torch.no_grad()
def greedy(model: LanguageModel, ids: torch.Tensor, new: int) -> torch.Tensor:
    """Continue ids (B, N) by the likeliest token, `new` times; (B, new). Constant time and memory a token."""
    output = model(ids)
    tokens = []
    for _ in range(new):
        assert output.logits is not None
        tokens.append(output.logits[:, -1].argmax(-1, keepdim=True))
        output = model(tokens[-1], state=output.state)
    return torch.cat(tokens, dim=1)


def rank_correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Spearman's, of two tensors of one size; equal values share the mean of their ranks. 0 where one is constant."""
    ranks = []
    for values in (x, y):
        _, inverse, counts = values.flatten().unique(return_inverse=True, return_counts=True)
        if len(counts) < 2:
            return 0.0
        ranks.append((counts.cumsum(0) - (counts - 1) / 2.0)[inverse].double())
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()
