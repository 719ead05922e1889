"""Softmax attention within a sliding window: a mixer that recalls any of the last positions.

A chain sums its past in a small state, so it cannot recall each of many positions. A few blocks with attention among
blocks with chains can, as far back as the window reaches.

Queries are computed in folds. Each fold reads its own positions and the W - 1 positions before it, so the work is
linear in N. Rotations (RoPE, Su et al. 2021, arXiv:2104.09864) count positions from the first key of a fold. Scores
depend on distances only, so a state needs no position counter, and no angle grows with N.

Dimensions: B batch, N positions, D model width, H heads, K = D / H head width, W window, F folds, C positions of a
fold, which reads C + W - 1 keys.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry

from resnet_bk.config import ModelConfig
from resnet_bk.layers.matrices import Matrices
from resnet_bk.layers.mixer import Mixer, last_positions
from resnet_bk.record import Record

# Positions of a fold. Longer folds compute more scores outside the window, and texts are filled up to whole folds;
# shorter ones copy keys more often.
LEAST_FOLD, MOST_FOLD = 64, 512
ROPE_BASE = 10_000.0
FLAGS = 2  # a flag of each position in the state, twice: view_as_complex needs rows of even width

# torch's counter has formulas for the kernels of GPUs only. All kernels have the same first arguments.
for _direction in ("", "_backward"):
    _on_gpu, _on_cpu = (
        getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{_device}{_direction}")
        for _device in ("", "_for_cpu")
    )
    flop_registry.setdefault(_on_cpu, flop_registry[_on_gpu])


class AttentionState(NamedTuple):
    """State of an attention.

    past: (B, W - 1, 2 D + 2), the last positions that are not padding: for each its keys, not rotated, its values, and
        two ones. Entries before the first position of a sequence are zeros.
    """

    past: Tensor


class Tables(NamedTuple):
    """Constants of a fold.

    turn: (C + W - 1, 1, K / 2) complex, the factor of each pair of channels at each key.
    band: (C, C + W - 1), 0 where a query may read a key, else -inf.
    """

    turn: Tensor
    band: Tensor


class Attention(Mixer):
    """Causal attention of each position to itself and the W - 1 positions before it, (B, N, D) -> (B, N, D)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        d, self.heads, self.window = config.d_model, config.attention_heads, config.attention.window
        self.width, self.fold = d // self.heads, min(self.window, MOST_FOLD, max(LEAST_FOLD, self.window // 4))
        self.in_proj = nn.Linear(d, 3 * d, bias=False)
        self.out_proj = nn.Linear(d, d, bias=False)

    def matrices(self) -> list[Matrices]:
        """Return the matrices of q, k and v, and of the output."""
        d = self.out_proj.in_features
        return [Matrices(self.in_proj.weight, (d, d, d)), Matrices(self.out_proj.weight)]

    def layout(self, x: Tensor) -> AttentionState:
        return AttentionState(self._start(x))

    def forward(
        self, x: Tensor, state: AttentionState | None, mask: Tensor | None
    ) -> tuple[Tensor, AttentionState, list[Record]]:
        self._check_split(state, mask)
        d = x.shape[-1]
        if mask is not None:  # queries before padding give it weight 0, and 0 times a NaN would be NaN
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
        q, kv = self.in_proj(x).split([d, 2 * d], dim=-1)
        new = torch.cat([kv, kv.new_ones(*x.shape[:2], FLAGS)], dim=-1)
        if self.pieces is not None:
            past = self.pieces.inputs(new, self.window - 1)
        else:
            past = self._start(new) if state is None else state.past.to(new.dtype)
        read = torch.cat([past, new], dim=1)
        after = AttentionState(last_positions(past, new, mask))
        return self.out_proj(self._attend(q.unflatten(-1, (self.heads, self.width)), read).to(x.dtype)), after, []

    def _start(self, x: Tensor) -> Tensor:
        """Return the past of the first position of sequences x (B, N, ...)."""
        return x.new_zeros(len(x), self.window - 1, 2 * self.heads * self.width + FLAGS)

    def _attend(self, q: Tensor, read: Tensor) -> Tensor:
        """Let queries q (B, N, H, K) read the past and the new positions, (B, W - 1 + N, 2 D + 2). Return (B, N, D).

        For N > 1 the fold does not depend on N. Techniques choose N by the text, and the rounding of a position must
        not depend on later ones.
        """
        batch, length = q.shape[:2]
        fold = 1 if length == 1 else self.fold
        folds = -(-length // fold)
        if torch.compiler.is_exporting():  # one more: for any N, no size may be 1 at some lengths only
            folds += 1
        missing = folds * fold - length
        if (
            missing
        ):  # fill up the last fold. Queries of an added one may read nothing: their result, which is cut off, is 0
            q, read = F.pad(q, (0, 0, 0, 0, 0, missing)), F.pad(read, (0, 0, 0, missing))
        q = q.unflatten(1, (folds, fold)).flatten(0, 1)  # (B F, C, H, K)
        read = read.unfold(1, fold + self.window - 1, fold).mT.flatten(0, 1)  # (B F, C + W - 1, 2 D + 2)
        k, v = read[..., :-FLAGS].unflatten(-1, (2, self.heads, self.width)).unbind(2)
        turn, band = self._tables(fold, read)
        exists = read[..., -1].detach().log()  # 0, or -inf before the first position
        bias = band + exists[:, None, None]  # (B F, 1, C, C + W - 1)
        y = F.scaled_dot_product_attention(
            _rotate(q, turn[-fold:]).transpose(1, 2),
            _rotate(k, turn).transpose(1, 2),
            v.transpose(1, 2),
            bias,
        )
        return y.transpose(1, 2).flatten(-2).unflatten(0, (batch, -1)).flatten(1, 2)[:, :length]

    def _tables(self, fold: int, x: Tensor) -> Tables:
        traced = torch.compiler.is_compiling() or torch._guards.detect_fake_mode([x]) is not None
        make = _tables if traced else _kept_tables
        return make(fold, self.window, self.width, x.dtype, x.device)

    def scores(self, length: int) -> int:
        """Return the number of scores that each head computes for a row of `length` positions."""
        fold = 1 if length == 1 else self.fold
        return -(-length // fold) * fold * (fold + self.window - 1)


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Multiply the pairs of channels of x (..., H, K) by complex factors."""
    exact = torch.promote_types(x.dtype, torch.float32)
    # contiguous: torch rounds the products of a strided tensor differently, and strides depend on N
    pairs = torch.view_as_complex(x.to(exact).contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def _tables(fold: int, window: int, width: int, dtype: torch.dtype, device: torch.device) -> Tables:
    """Return the tables of a fold. Rotations are complex64, or complex128 if the dtype is float64."""
    key = torch.arange(fold + window - 1, device=device)
    frequency = ROPE_BASE ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    angle = torch.outer(key.double(), frequency)
    distance = key[:fold, None] + window - 1 - key
    outside = (distance < 0) | (distance >= window)
    band = torch.zeros(outside.shape, dtype=dtype, device=device).masked_fill(outside, -torch.inf)
    turn = torch.polar(torch.ones_like(angle), angle).unsqueeze(1)
    return Tables(turn if dtype == torch.float64 else turn.to(torch.complex64), band)


@functools.cache
def _kept_tables(*arguments: Any) -> Tables:
    with torch.inference_mode(False):  # else training could not use tables that inference has made
        return _tables(*arguments)
