"""Training and scoring of learned length in plain PyTorch: any optimizer, any iterable of (inputs, targets)."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import TypedDict

import torch
from torch import Tensor

from resnet_bk.clock import timed
from resnet_bk.model import ModelOutput
from resnet_bk.wrapper import AdaptiveOutput, AdaptiveSequenceLengthWrapper, length_histogram


class LengthScores(TypedDict):
    """Scores over all positions that have a target.

    Attributes:
        perplexity: per token, in the mode asked for.
        full_perplexity: per token, of the same model at full length.
        avg_speedup: seconds at full length over seconds in the mode asked for. The two alternate batch by batch.
        avg_predicted_length: mean over the windows that chose a length; the window's length if none did.
        histogram: length -> number of windows that chose it.
    """

    perplexity: float
    full_perplexity: float
    avg_speedup: float
    avg_predicted_length: float
    histogram: dict[int, int]


class LearnedSequenceLengthTrainer:
    """Minimizes ``CE + length_penalty * E[length] / max_seq_len``; both terms have a gradient in the predictor.

    CE is the task loss of learned length. A bonus for undecided choices and the losses of the layers inside are added.

    Args:
        model: the wrapper. Its base model is trained together with the length predictor and the bypass.
        optimizer: holds ``model.parameters()``, or those that should be trained.
        max_grad_norm: the gradients of the optimizer's parameters are clipped to this norm.
    """

    def __init__(
        self, model: AdaptiveSequenceLengthWrapper, optimizer: torch.optim.Optimizer, max_grad_norm: float = 1.0
    ):
        self.model, self.optimizer, self.max_grad_norm = model, optimizer, max_grad_norm

    def train_step(self, x: Tensor, y: Tensor, use_adaptive_length: bool = True) -> dict[str, float]:
        """Make one update.

        Args:
            x: (B, N) integer, inputs.
            y: (B, N) integer, targets; -100 is not counted.
            use_adaptive_length: False trains the base model at full length.

        Returns:
            total_loss; ce_loss, the task loss in nats per target; length_cost, the weighted length penalty;
            avg_predicted_length; speedup_estimate, a ratio of FLOPs. At full length the last three are 0, the length
            of x, at most a window's, and 1.

        Raises:
            FloatingPointError: the loss or a gradient is not finite; no update was made.
        """
        self.model.train()
        output = self.model(x, targets=y, logits=False, use_adaptive_length=use_adaptive_length)
        assert output.loss is not None
        if not torch.isfinite(output.loss):
            raise FloatingPointError(f"the loss is {output.loss.item()}; no update was made")
        self.model.zero_grad()
        output.loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm.item()}; no update was made")
        self.optimizer.step()
        report = {"total_loss": output.loss.item(), "ce_loss": output.losses["cross_entropy"].item()}
        if not isinstance(output, AdaptiveOutput):
            return report | {
                "length_cost": 0.0,
                "avg_predicted_length": float(min(x.shape[1], self.model.config.window)),
                "speedup_estimate": 1.0,
            }
        return report | {
            "length_cost": self.model.config.length.penalty * output.losses["length"].item(),
            "avg_predicted_length": output.length.avg_predicted_length,
            "speedup_estimate": output.length.speedup_estimate,
        }

    @torch.no_grad()
    def evaluate(self, loader: Iterable[tuple[Tensor, Tensor]], use_adaptive_length: bool = True) -> LengthScores:
        """Score every batch at full length and, unless `use_adaptive_length` is False, at the predicted lengths.

        Raises:
            ValueError: the loader has no batch with a target.
        """
        self.model.eval()
        nats = {False: 0.0, True: 0.0}
        seconds = {False: 0.0, True: 0.0}
        tokens, histogram, first = 0, Counter[int](), True
        modes = (False, True) if use_adaptive_length else (False,)
        for x, y in loader:
            if first:  # compile kernels before timing
                self._timed(x, y, True)
                self._timed(x, y, False)
            first, count = False, int((y != -100).sum())
            tokens += count
            for mode in modes:
                output, elapsed = self._timed(x, y, mode)
                seconds[mode] += elapsed
                nats[mode] += output.losses["cross_entropy"].item() * count if count else 0.0
                if isinstance(output, AdaptiveOutput):
                    histogram.update(length_histogram(output.length))
        if not tokens:
            raise ValueError("loader: has no batch with a target to score")
        windows = sum(histogram.values())
        lengths = sum(length * number for length, number in histogram.items())
        return {
            "perplexity": math.exp(nats[use_adaptive_length] / tokens),
            "full_perplexity": math.exp(nats[False] / tokens),
            "avg_speedup": seconds[False] / seconds[use_adaptive_length],
            "avg_predicted_length": lengths / windows if windows else float(self.model.config.window),
            "histogram": dict(sorted(histogram.items())),
        }

    def _timed(self, x: Tensor, y: Tensor, adaptive: bool) -> tuple[ModelOutput, float]:
        return timed(lambda: self.model(x, targets=y, logits=False, use_adaptive_length=adaptive), x.device)
