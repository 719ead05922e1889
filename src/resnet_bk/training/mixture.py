"""The order of the windows of several sources, by their shares."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence

import numpy as np

from resnet_bk.config import ConfigError, DataConfig, shown
from resnet_bk.training.windows import ShuffledSampler, Windows


class MixtureSampler(ShuffledSampler):
    """Windows of several sources by their shares, part by part. The order depends on the seed and the epoch only.

    In each part of an epoch, every source has its share of the windows, up to rounding. It gives them from shuffled
    passes over its windows of the part: an epoch goes on where the one before it stopped, in the middle of a pass, and
    the next pass begins where one ends. So no window is drawn twice before all others of its source and part were.

    Example: with 8 windows of an epoch, two sources of 6 and 2 windows and equal shares give 4 each. The first needs
    one and a half epochs for a pass, and the second makes two passes in each epoch.
    """

    def __init__(self, parts: Sequence[np.ndarray], per_step: int, seed: int, windows: Windows):
        super().__init__(parts, per_step, seed)
        cuts = windows.bounds[1:-1]
        self.members = [np.split(part, np.searchsorted(part, cuts)) for part in parts]
        self.counts = [rounded(size, windows.shares) for size in self.sizes]

    def __iter__(self) -> Iterator[int]:
        for part, counts in enumerate(self.counts):
            drawn = np.concatenate([self._drawn(part, source, count) for source, count in enumerate(counts)])
            # source + 1 and 0 distinguish the generators; numpy ignores zeros at the end of a seed
            rng = np.random.default_rng([self.seed, self.epoch, part, 0])
            yield from rng.permutation(drawn).tolist()

    def _drawn(self, part: int, source: int, count: int) -> np.ndarray:
        """Return the windows of a source in a part of this epoch, `count` of them."""
        windows = self.members[part][source]
        done, skipped = divmod(self.epoch * count, len(windows))
        passes = range(done, done - (-(skipped + count) // len(windows)))
        rngs = (np.random.default_rng([self.seed, number, part, source + 1]) for number in passes)
        return np.concatenate([rng.permutation(windows) for rng in rngs])[skipped : skipped + count]


def rounded(total: int, shares: Sequence[float]) -> list[int]:
    """Return integers with the sum `total` in proportion to the shares; the largest remainders are rounded up."""
    exact = [total * share for share in shares]
    counts = [math.floor(x) for x in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def sampler(windows: Windows, per_step: int, seed: int, in_parts: bool) -> ShuffledSampler:
    """Return the order of the windows.

    Args:
        windows: the training text.
        per_step: number of windows of an update.
        seed: that of the run.
        in_parts: True if the steps train on one part of the text after the other, as n-gram memory needs.
    """
    parts = windows.parts(per_step) if in_parts else [np.arange(len(windows))]
    if len(windows.shares) == 1:
        return ShuffledSampler(parts, per_step, seed)
    return MixtureSampler(parts, per_step, seed, windows)


def check_sources(data: DataConfig, windows: Windows, order: ShuffledSampler) -> None:
    """Raise ConfigError if a source has too few windows, or too small a weight, to be in each part of an epoch."""
    if not isinstance(order, MixtureSampler):
        return
    for i, (source, share) in enumerate(data.shares.items()):
        if not all(len(members[i]) for members in order.members):
            raise ConfigError(
                f"data.sources: {shown(source)} has {windows.bounds[i + 1] - windows.bounds[i]} windows of "
                f"{windows.length} tokens, allowed at least {len(order.members)}; give it more text, or lower "
                "model.n_seq"
            )
        if not all(counts[i] for counts in order.counts):
            raise ConfigError(
                f"data.sources: {shown(source)} has a share of {share:.2g}, none of the {min(order.sizes)} windows "
                f"{'of an epoch' if len(order.sizes) == 1 else 'that an epoch draws from a part of the text'}; "
                "raise its weight, or give more text"
            )


def mixture_hash(text: str, windows: Windows) -> str:
    """Return the hash of a text and of the shares of its sources. text: the hash of the text, kept for one source."""
    if len(windows.shares) == 1:
        return text
    return hashlib.sha256(json.dumps([text, windows.bounds, windows.shares]).encode()).hexdigest()


def mixture_note(data: DataConfig, windows: Windows) -> str:
    """Return a line with the share of each source and how often an epoch reads it; empty for one source."""
    if len(windows.shares) == 1:
        return ""
    sizes = np.diff(windows.bounds)
    passes = [share * len(windows) / size for share, size in zip(windows.shares, sizes, strict=True)]
    each = zip(data.shares.items(), passes, strict=True)
    return "windows to train on: " + "; ".join(
        f"{share:.3g} of them from {source}, which an epoch reads {count:.2g} times" for (source, share), count in each
    )
