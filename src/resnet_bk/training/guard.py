"""A black-box test that no prediction depends on later tokens. It runs before held-out scores are reported."""

from collections.abc import Callable

import torch
from torch import Tensor

from resnet_bk.training.errors import LeakError

PREFIXES = (1, 3, 7, 15, 31, 32, 63)
LENGTH = 64


@torch.no_grad()
def check_causal(
    logits_of: Callable[[Tensor], Tensor], vocab_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Change the tokens after a prefix and compare the logits of the prefix.

    Args:
        logits_of: maps token ids (1, N) to logits (1, N, V).
        vocab_size: V; token ids are drawn from it.
        dtype: the dtype `logits_of` computes in. Differences of the size of its rounding are allowed.
        device: where `logits_of` expects the ids.

    Raises:
        LeakError: the logits differ, and the message names the shortest prefix for which they do; or they are not
            finite.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (1, LENGTH), generator=generator)
    other = (ids + torch.randint(1, max(2, vocab_size), (1, LENGTH), generator=generator)) % vocab_size
    expected = logits_of(ids.to(device))
    if not expected.isfinite().all():
        raise LeakError("the model's logits are NaN or infinite; its bits per byte would mean nothing")
    allowed = 64 * torch.finfo(dtype).eps * expected.abs().max().item()
    for n in PREFIXES:
        changed = torch.cat([ids[:, :n], other[:, n:]], dim=1)
        worst = (logits_of(changed.to(device))[:, :n] - expected[:, :n]).abs().max().item()
        if not worst <= allowed:  # NaN fails too
            raise LeakError(
                f"the model sees the future: logits of the first {n} tokens move by {worst:.3g} when only later tokens "
                f"change (rounding allows {allowed:.1g}); its bits per byte would mean nothing"
            )
