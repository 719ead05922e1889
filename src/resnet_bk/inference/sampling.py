"""Choose the next token of a text from its logits. Dimensions: B texts, V vocabulary."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NOT_FINITE = "logits: one is NaN or infinite; the model is damaged or its training has diverged"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Filters apply in the order of the fields, as in transformers.

    Attributes:
        repetition_penalty: divides the positive logits of the tokens that the text has, and multiplies negative ones
            (Keskar et al. 2019, arXiv:1909.05858); 1 changes nothing.
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: number of most likely tokens to sample from; 0 allows all.
        top_p: sample from the fewest of the most likely tokens whose probabilities add up to this (Holtzman et al.
            2020, arXiv:1904.09751).
        min_p: leave out tokens less likely than this share of the most likely one (Nguyen et al. 2024,
            arXiv:2407.01082).
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def is_plain(self) -> bool:
        """True if nothing but the temperature changes the logits."""
        return self.repetition_penalty == 1 and not self.top_k and self.top_p >= 1 and not self.min_p


class Sampler:
    """Chooses the tokens of a text, which depend on the seed only.

    Attributes:
        seen: (V,) bool, the tokens that the text has; kept up to date only if there is a repetition penalty.
    """

    def __init__(self, settings: Sampling, vocabulary: int, prompt: list[int], seed: int = 0):
        self.settings, self._random = settings, np.random.default_rng(seed)
        self.seen = np.zeros(vocabulary, bool)
        self.seen[prompt] = True

    def __call__(self, logits: np.ndarray) -> int:
        """Return a token, given its logits (V,).

        Raises:
            ValueError: a logit is NaN, or none is finite.
        """
        settings = self.settings
        if settings.repetition_penalty != 1:
            scaled = np.where(logits > 0, logits / settings.repetition_penalty, logits * settings.repetition_penalty)
            logits = np.where(self.seen, scaled, logits)
        token = int(logits.argmax())
        greatest = float(logits[token])  # NaN if there is one
        if not math.isfinite(greatest):
            raise ValueError(NOT_FINITE)
        if settings.temperature > 0:
            token = self._draw(_likely(np.exp((logits - greatest) / settings.temperature, dtype=np.float64), settings))
        if settings.repetition_penalty != 1:
            self.seen[token] = True
        return token

    def random(self, count: int) -> np.ndarray:
        """Return the numbers from 0 to below 1, (count,), by which the next tokens are chosen."""
        return self._random.random(count)

    def _draw(self, weights: np.ndarray) -> int:
        total = weights.cumsum()
        return int(total.searchsorted(self.random(1)[0] * total[-1], side="right"))


def choose(samplers: Sequence[Sampler], logits: np.ndarray) -> list[int]:
    """Return the next tokens of several texts, given their logits (B, V): what each sampler alone returns.

    Texts that need nothing but a temperature are computed together, in less than half of the time.

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    if len(samplers) == 1:
        return [samplers[0](logits[0])]
    tokens = logits.argmax(1)
    greatest = np.take_along_axis(logits, tokens[:, None], 1)
    if not np.isfinite(greatest).all():
        raise ValueError(NOT_FINITE)
    found: list[int] = tokens.tolist()
    drawn = [row for row, x in enumerate(samplers) if x.settings.temperature > 0 and x.settings.is_plain]
    if drawn:
        temperatures = np.array([[samplers[row].settings.temperature] for row in drawn], logits.dtype)
        weights = np.exp((logits[drawn] - greatest[drawn]) / temperatures, dtype=np.float64)
        totals = weights.cumsum(1)
        points = totals[:, -1] * np.array([samplers[row].random(1)[0] for row in drawn])
        for row, token in zip(drawn, (totals <= points[:, None]).sum(1).tolist(), strict=True):
            found[row] = token
    for row, sampler in enumerate(samplers):
        if not sampler.settings.is_plain:
            found[row] = sampler(logits[row])
    return found


def _likely(weights: np.ndarray, settings: Sampling) -> np.ndarray:
    """Return the weights (V,), of which the greatest is 1, with 0 for those that the filters leave out."""
    if 0 < settings.top_k < len(weights):
        weights = np.where(weights < np.partition(weights, -settings.top_k)[-settings.top_k], 0.0, weights)
    if settings.top_p < 1:
        order = (-weights).argsort(kind="stable")
        before = weights[order].cumsum() - weights[order]
        weights = weights.copy()
        weights[order[before >= settings.top_p * weights.sum()]] = 0.0
    if settings.min_p > 0:
        weights = np.where(weights < settings.min_p, 0.0, weights)
    return weights
