"""Early exit: positions stop where going on would not change much about the next token.

Dimensions: B batch, N positions, M positions of the fullest row that are still going, D model width, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from resnet_bk.adaptive.depth import Seen, Stopping
from resnet_bk.config import ModelConfig
from resnet_bk.layers.block import Stack
from resnet_bk.layers.score import Score
from resnet_bk.ops.packing import Packing
from resnet_bk.record import TaskLoss

# In training the confidences at which positions stop are drawn from here to 1.
LEAST_SURE = {"gain": 0.9, "probability": 0.5, "entropy": 0.5}
EXPECTED_GAIN = 0.3  # nats, before learning
NEVER = 2.0  # a confidence that nothing reaches


class EarlyExit(Stopping):
    """Positions stop before a segment where the confidence reaches the threshold, and go straight to the head.

    gain: a unit predicts how many nats the later blocks would take off the loss of the next token. The confidence is
    exp(-gain), the share of its perplexity that a position keeps: 0.95 stops what would gain less than 5%.
    probability, entropy: what the model's head says after the blocks so far.

    In training each exit is scored, and the units learn what going on gained (squared error). A share of the sequences
    goes through all blocks; of each other one positions stop at a confidence drawn for it: the later blocks learn on
    chains from which others have left, few or many (for whole sequences this is layer dropout; Elhoushi et al. 2024,
    arXiv:2404.16710).
    """

    priced = False

    def __init__(self, config: ModelConfig, stack: Stack, read: Callable[[Tensor], Tensor]):
        """read: from features (..., D) to logits (..., V), the model's own."""
        super().__init__(config, stack)
        self.read, self.kind = read, config.depth.confidence
        units = len(self.segments) if self.kind == "gain" else 0
        self.units = nn.ModuleList(Score(config.d_model, EXPECTED_GAIN) for _ in range(units))

    def _draw(self, x: Tensor) -> Tensor:
        """(B, 1) or (): the confidence from which positions stop."""
        if not self.training:
            return x.new_full((), self.threshold if self.threshold < 1 else NEVER)
        everywhere, drawn = torch.rand(2, len(x), 1, device=x.device).unbind()
        least = LEAST_SURE[self.kind]
        return torch.where(everywhere < self.settings.full_depth, NEVER, least + (1 - least) * drawn)

    @torch.no_grad()
    def _halt(self, i: int, x: Tensor, drawn: Tensor) -> Tensor:
        sure = (-self.units[i](x)).exp() if self.kind == "gain" else confidence(self.read(x), self.kind)
        return (sure.clamp(max=1) >= drawn).to(sure.dtype)

    def _stops(self, halt: Tensor, left: Tensor) -> Tensor:
        return halt > 0

    def _task_loss(self, out: Tensor, seen: list[Seen], packings: list[Packing], drawn: Tensor) -> TaskLoss:
        """The loss of the output, the weighted mean of those of the exits, each over the positions it saw, and the
        units' squared errors over the sequences that went through all blocks."""

        def loss(nats: Callable[[Tensor], Tensor], scored: Tensor) -> Tensor:
            total = final = nats(out)
            for i, exit_ in enumerate(seen):
                x, present = exit_.x, exit_.present
                for packing in reversed(packings[: exit_.packings]):
                    x, present = packing.merge(x), packing.merge(present)
                here = nats(x) * present
                total = total + self.settings.exit_weight / len(seen) * here
                if self.kind == "gain":
                    error = self.units[i](x.detach()) - (here - final).detach()
                    total = total + error.square() * (scored & present & (drawn == NEVER))
            return total

        return loss


def confidence(logits: Tensor, kind: str) -> Tensor:
    """(..., V) -> (...), 0 to 1: the likeliest token's probability, or 1 - entropy / log V."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if kind == "probability":
        return (logits.amax(-1) - logits.logsumexp(-1)).exp()
    log_p = logits.log_softmax(-1)
    return 1 + (log_p.exp() * log_p).sum(-1) / math.log(logits.shape[-1])
