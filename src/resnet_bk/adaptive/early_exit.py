"""Early exit: positions stop where the remaining blocks would change little about the next token.

Dimensions: B batch, N positions, M packed length, D model width, V vocabulary.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from resnet_bk.adaptive.depth import Snapshot, Stopping
from resnet_bk.config import ModelConfig
from resnet_bk.layers.block import Stack
from resnet_bk.layers.score import Score
from resnet_bk.ops.packing import Packing
from resnet_bk.record import TaskLoss

# In training, the confidence at which the positions of a sequence stop is drawn between this and 1.
LEAST_CONFIDENCE = {"gain": 0.9, "probability": 0.5, "entropy": 0.5}
EXPECTED_GAIN = 0.3  # initial prediction of the units, in nats
NEVER = 2.0  # a confidence that no position reaches


class EarlyExit(Stopping):
    """Positions stop before a segment where their confidence reaches the threshold, and go straight to the head.

    The setting `confidence` chooses its measure:

    - gain: a unit predicts by how many nats the remaining blocks would lower the loss of the next token. The confidence
      is exp(-gain), the share of its perplexity that a position keeps: 0.95 stops positions that would gain less than
      5%.
    - probability, entropy: computed from the logits that the model's head gives after the blocks so far.

    In training each exit is scored, and the units learn what the remaining blocks gained (squared error). A share of
    the sequences runs all blocks. In each other sequence, positions stop at a confidence drawn for that sequence, so
    the later blocks learn on chains that few or many positions have left (for whole sequences this is layer dropout;
    Elhoushi et al. 2024, arXiv:2404.16710).
    """

    priced = False

    def __init__(self, config: ModelConfig, stack: Stack, read: Callable[[Tensor], Tensor]):
        """read: the model's own map from features (..., D) to logits (..., V)."""
        super().__init__(config, stack)
        self.read, self.kind = read, config.depth.confidence
        units = len(self.segments) if self.kind == "gain" else 0
        self.units = nn.ModuleList(Score(config.d_model, EXPECTED_GAIN) for _ in range(units))

    def _draw(self, x: Tensor) -> Tensor:
        """Return (B, 1) or (): the confidence from which positions stop."""
        if not self.training:
            return x.new_full((), self.threshold if self.threshold < 1 else NEVER)
        everywhere, drawn = torch.rand(2, len(x), 1, device=x.device).unbind()
        least = LEAST_CONFIDENCE[self.kind]
        return torch.where(everywhere < self.settings.full_depth, NEVER, least + (1 - least) * drawn)

    @torch.no_grad()
    def _halt(self, i: int, x: Tensor, drawn: Tensor) -> Tensor:
        sure = (-self.units[i](x)).exp() if self.kind == "gain" else confidence(self.read(x), self.kind)
        return (sure.clamp(max=1) >= drawn).to(sure.dtype)

    def _stops(self, halt: Tensor, left: Tensor) -> Tensor:
        return halt > 0

    def _task_loss(self, out: Tensor, snapshots: list[Snapshot], packings: list[Packing], drawn: Tensor) -> TaskLoss:
        """Return the loss of the output plus two terms.

        The first is the weighted mean of the exits' losses, each over the positions that reached the exit. The second
        is the squared error of the units, over the sequences that ran all blocks.
        """

        def loss(nats: Callable[[Tensor], Tensor], scored: Tensor) -> Tensor:
            total = final = nats(out)
            for i, snapshot in enumerate(snapshots):
                x, present = snapshot.x, snapshot.present
                for packing in reversed(packings[: snapshot.number_packings]):
                    x, present = packing.merge(x), packing.merge(present)
                here = nats(x) * present
                total = total + self.settings.exit_weight / len(snapshots) * here
                if self.kind == "gain":
                    error = self.units[i](x.detach()) - (here - final).detach()
                    total = total + error.square() * (scored & present & (drawn == NEVER))
            return total

        return loss


def confidence(logits: Tensor, kind: str) -> Tensor:
    """Return the confidence of a prediction, (..., V) -> (...), between 0 and 1.

    kind: "probability" for that of the likeliest token, "entropy" for 1 - entropy / log V.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if kind == "probability":
        return (logits.amax(-1) - logits.logsumexp(-1)).exp()
    log_p = logits.log_softmax(-1)
    return 1 + (log_p.exp() * log_p).sum(-1) / math.log(logits.shape[-1])
