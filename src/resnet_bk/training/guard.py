"""A black-box look for leaks from the future, before any bits per byte are quoted."""

from collections.abc import Callable

import torch
from torch import Tensor

PREFIXES = (1, 3, 7, 15, 31, 32, 63)
LENGTH = 64


class LeakError(RuntimeError):
    """A model whose prediction at one position changes with tokens after it."""


@torch.no_grad()
def check_causal(
    logits_of: Callable[[Tensor], Tensor], vocab_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Change what follows a prefix and compare the prefix's logits.

    Args:
        logits_of: (1, N) token ids -> (1, N, V) logits.
        dtype: what it computes in; differences of rounding size are allowed.

    Raises:
        LeakError: naming the first prefix that differs.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, LENGTH), generator=generator)
    other = (ids + torch.randint(1, max(2, vocab_size), (1, LENGTH), generator=generator)) % vocab_size
    expected = logits_of(ids.to(device))
    allowed = 64 * torch.finfo(dtype).eps * expected.abs().max().item()
    for n in PREFIXES:
        changed = torch.cat([ids[:, :n], other[:, n:]], dim=1)
        worst = (logits_of(changed.to(device))[:, :n] - expected[:, :n]).abs().max().item()
        if not worst <= allowed:
            raise LeakError(
                f"the model sees the future: logits of the first {n} tokens move by {worst:.3g} when only later tokens "
                f"change (rounding allows {allowed:.1g}); its bits per byte would mean nothing"
            )
