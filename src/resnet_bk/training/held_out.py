"""Scores of held-out text while a model trains, and the best weights so far."""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import FSDPModule

from resnet_bk.checkpoint import replacing
from resnet_bk.data.tokens import TokenFile
from resnet_bk.extras import extra
from resnet_bk.folders import HELD_OUT
from resnet_bk.training.states import gather_weights
from resnet_bk.training.windows import Windows, collate

with extra("train"):
    from transformers import TrainerCallback

if TYPE_CHECKING:
    from resnet_bk.training.trainer import BKTrainer


class HeldOut(TrainerCallback):
    """Every `eval_every` updates, score the beginning of the held-out text, and keep the model that scores best.

    Of several sources, windows from all of the held-out text are scored, at equal distances.

    The text is cut into windows of n_seq tokens, read without a past, as in training. The final scores of a run read
    whole documents. The clock of the training stands still meanwhile.
    """

    def __init__(self, trainer: "BKTrainer", tokens: TokenFile, best: Path, metrics: Path):
        """Create the callback.

        Args:
            trainer: its `held_out_bits` get the score, and its next log line has it.
            tokens: the held-out text.
            best: the folder for the model with the best score.
            metrics: lines of earlier sessions of the run; their best score counts.
        """
        self.trainer, self.folder = trainer, best
        windows = Windows(tokens, min(trainer.config.model.n_seq, len(tokens.ids) - 1))
        size, ranks = trainer.config.batch_size // trainer.ranks.world_size, trainer.ranks
        wanted = math.ceil(trainer.config.eval_bytes / windows.bytes_per_token / windows.length)
        # Every rank scores as many batches: a sharded model needs all ranks in each of its passes.
        self.size = max(1, min(size, len(windows) // ranks.world_size))
        self.batches = max(1, min(wanted, len(windows)) // (self.size * ranks.world_size))
        lines = metrics.read_text("utf-8").splitlines() if metrics.exists() else []
        best_so_far = best_line(map(json.loads, lines))
        count = self.batches * self.size * ranks.world_size
        self.step = max(1.0, len(windows) / count) if trainer.config.data.sources else 1.0
        self.windows, self.best = windows, best_so_far[HELD_OUT] if best_so_far else math.inf

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        at_end = control.should_training_stop and trainer.stopped_by is None
        if state.global_step % trainer.config.eval_every and not at_end:
            return
        with trainer.clock.paused():
            bits = trainer.held_out_bits = self.score()
            if trainer.ranks.max(float(trainer.ranks.is_rank_zero and bits < self.best))[0]:
                self.best = bits
                self._keep()
        control.should_log = True

    @torch.no_grad()
    def score(self) -> float:
        """Return the mean bits per byte over all ranks."""
        trainer, nats = self.trainer, 0.0
        first = trainer.ranks.rank * self.batches
        with _evaluating(trainer.network):
            for i in range(first, first + self.batches):
                chosen = (int((i * self.size + j) * self.step) for j in range(self.size))
                rows = collate([self.windows[index % len(self.windows)] for index in chosen])
                rows = {name: x.to(trainer.network.device) for name, x in rows.items()}
                output = trainer.network(**rows, skip_logits=True)
                auxiliary = 0.0 if output.aux_loss is None else output.aux_loss
                nats += float(output.loss - auxiliary) / self.batches
        return trainer.ranks.mean(nats) / math.log(2) / self.windows.bytes_per_token

    def _keep(self) -> None:
        trainer = self.trainer
        weights = gather_weights(trainer.network, trainer.ranks.is_rank_zero)
        with trainer.ranks.rank_zero_first():
            if trainer.ranks.is_rank_zero:
                with replacing(self.folder) as scratch:
                    trainer.network.save_pretrained(scratch, state_dict=weights)
                    if trainer.processing_class is not None:
                        trainer.processing_class.save_pretrained(scratch)


def best_line(lines: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the line of a metrics.jsonl with the least finite score; None without one."""
    scored = [line for line in lines if math.isfinite(line.get(HELD_OUT, math.inf))]
    return min(scored, key=lambda line: line[HELD_OUT], default=None)


@contextlib.contextmanager
def _evaluating(network: torch.nn.Module) -> Iterator[None]:
    network.eval()
    try:
        yield
    finally:
        network.train()
        for module in network.modules():
            if isinstance(
                module, FSDPModule
            ):  # gathered weights otherwise stay until a backward pass, without gradients
                module.reshard()
