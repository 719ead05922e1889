"""transformers' Trainer with what a run on any machine, or on several, needs: a time budget, sealed checkpoints, honest
logs. Whatever ends or steers a run - the clock, a signal, a loss that is no number - all its processes agree on.

Dimensions: B sequences a step, N tokens each.
"""

import contextlib
import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset, Sampler

from resnet_bk.checkpoint import replacing
from resnet_bk.clock import Clock
from resnet_bk.config import TrainConfig
from resnet_bk.data.tokens import TokenFile
from resnet_bk.extras import extra
from resnet_bk.hf import ResNetBKForCausalLM
from resnet_bk.layers.sparse import anneal
from resnet_bk.training.ranks import Ranks
from resnet_bk.training.states import (
    load_moments,
    load_weights,
    save_moments,
    whole,
    whole_moments,
    whole_weights,
)

with extra("train"):
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from transformers import (
        PreTrainedTokenizerBase,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainerState,
        TrainingArguments,
    )

NO_STEP_LIMIT = 10**9
KEPT_CHECKPOINTS = 2
_ELAPSED, _STATE = "elapsed.json", "trainer_state.json"
Watch = Callable[[float, float], None]  # of progress, 0 to 1, and training bits per byte since the last log line


class NonFiniteError(RuntimeError):
    """Training produced NaN or infinity; the update was not made."""


class Windows(Dataset):
    """Non-overlapping windows of a token file, end to end."""

    def __init__(self, tokens: TokenFile, length: int):
        self.ids, self.length = tokens.ids, length

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.length

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        window = self.ids[i * self.length : (i + 1) * self.length + 1].astype(np.int64)
        return {"input_ids": window[:-1], "shift_labels": window[1:]}


class Shuffled(Sampler):
    """All windows in an order that follows from the seed and the epoch alone, whatever process asks, and wherever in an
    epoch a run goes on. (accelerate's own sampler forgets the epoch when several processes go on within one.)"""

    def __init__(self, size: int, seed: int):
        self.size, self.seed, self.epoch = size, seed, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        yield from np.random.default_rng([self.seed, self.epoch]).permutation(self.size).tolist()


def collate(rows: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def learning_rate_factor(progress: float, warmup: float, final: float) -> float:
    """Linear rise, then a cosine down to `final`. progress: 0 at the start of the run, 1 at its end."""
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    along = min(1.0, (progress - warmup) / max(1e-9, 1 - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * along))


class BKTrainer(Trainer):
    """Trainer whose schedule follows steps or the clock, whose loss log is cross-entropy alone, whose checkpoints are
    sealed by a manifest, and which stops at the first NaN or infinity before it reaches a weight."""

    def __init__(
        self,
        model: ResNetBKForCausalLM,
        config: TrainConfig,
        windows: Windows,
        bytes_per_token: float,
        tokenizer: PreTrainedTokenizerBase | None = None,
        ranks: Ranks | None = None,
    ):
        """tokenizer: saved in each checkpoint, so that it can be evaluated as it is. ranks: the processes that share
        each batch; config.batch_size is of all of them."""
        self.run, self.clock, self.bytes_per_token = config, Clock(), bytes_per_token
        self.network, self.checkpoints = model, Path(config.output_dir) / "checkpoints"
        self.ranks = ranks or Ranks()
        self.tokens_per_step = config.batch_size * config.accumulate * windows.length
        self.steps_per_epoch = math.ceil(len(windows) // config.batch_size / config.accumulate)
        self.order = Shuffled(len(windows), config.seed)
        self.cross_entropy: list[Tensor] = []
        self.losses: list[Tensor] = []  # of this step
        self.seconds = 0.0  # of the first rank's clock, when all last looked at it
        self.signalled: int | None = None  # what this process was sent
        self.stopped_by: int | None = None  # what all of them stop for
        on_gpu = torch.cuda.is_available()
        arguments = TrainingArguments(
            output_dir=str(self.checkpoints),
            max_steps=config.max_steps or NO_STEP_LIMIT,
            per_device_train_batch_size=config.batch_size // self.ranks.world,
            gradient_accumulation_steps=config.accumulate,
            learning_rate=config.learning_rate,
            max_grad_norm=config.max_grad_norm,
            bf16=config.dtype == "bfloat16",
            logging_steps=config.log_every,
            logging_nan_inf_filter=False,
            save_steps=config.save_every,
            seed=config.seed,
            report_to=[] if config.report_to == "none" else config.report_to.split(","),
            disable_tqdm=True,
            use_cpu=not on_gpu,
            dataloader_drop_last=True,
            dataloader_pin_memory=on_gpu,
            ddp_find_unused_parameters=False,  # each technique takes part in each step, if only with a gradient of 0
            remove_unused_columns=False,
        )
        super().__init__(model, arguments, data_collator=collate, train_dataset=windows, processing_class=tokenizer)
        self.remove_callback(PrinterCallback)
        # The Trainer's name for a model that comes sharded: it wraps nothing around it, averages the gradients of what
        # is not sharded, and clips over both. Not said before, since it cannot save such a model's optimizer; we can.
        self.is_distributed_loading_by_transformers = isinstance(model, FSDPModule)

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1: of its steps or of its seconds, whichever is further."""
        return self._progress(self.state.global_step)

    def _progress(self, step: int) -> float:
        seconds = 0.0 if self.run.max_seconds is None else self.seconds / self.run.max_seconds
        return min(1.0, max(step / (self.run.max_steps or NO_STEP_LIMIT), seconds))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return self.order

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Of a sharded model, while batches accumulate."""
        assert isinstance(self.network, FSDPModule)
        self.network.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.network.set_requires_gradient_sync(True)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        parameters = [p for p in (model or self.network).parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.dim() >= 2]
        others = [p for p in parameters if p.dim() < 2]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": self.run.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        for group in groups:
            group["initial_lr"] = self.run.learning_rate  # where a schedule that goes on looks for it
        betas = (0.9, self.run.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=self.run.learning_rate, betas=betas, fused=True)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        def factor(step: int) -> float:
            return learning_rate_factor(self._progress(step), self.run.warmup, self.run.final_learning_rate)

        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        self.lr_scheduler = LambdaLR(optimizer, factor, last_epoch=self.state.global_step - 1)
        return self.lr_scheduler

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        anneal(self.network, self.progress)
        output = model(**inputs)
        extra = 0.0 if output.aux_loss is None else output.aux_loss.detach()
        self.cross_entropy.append(output.loss.detach() - extra)
        self.losses.append(output.loss.detach())
        return (output.loss, output) if kwargs.get("return_outputs") else output.loss

    def check_update(self) -> None:
        """Before each update, on all ranks: one clock for all, and an error on all where any of them met NaN or
        infinity."""
        loss = torch.stack(self.losses).sum()
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        self.losses.clear()
        found = 3 if torch.isnan(loss) else 2 if torch.isinf(loss) else int(not torch.isfinite(norm))
        worst, self.seconds = self.ranks.largest(found, self.clock.seconds if self.ranks.is_first else 0.0)
        if worst:
            what = ("a gradient is not finite", "the loss is inf", "the loss is nan")[int(worst) - 1]
            raise NonFiniteError(f"step {self.state.global_step + 1}: {what}; no update was made")

    def check_signals(self) -> None:
        """After each step, on all ranks: a signal to one of them is a signal to all."""
        self.stopped_by = int(self.ranks.largest(self.signalled or 0)[0]) or None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.cross_entropy:
            logs["loss"] = self.ranks.mean(torch.stack(self.cross_entropy).mean().item())
            logs["bits_per_byte"] = logs["loss"] / math.log(2) / self.bytes_per_token
            logs["seconds"] = self.clock.seconds
            self.cross_entropy.clear()
        super().log(logs, *args, **kwargs)

    # ---------------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """All ranks gather, the first one writes: beside the checkpoints, then moved among them sealed, and only then
        old ones are deleted."""
        assert self.optimizer is not None
        weights = whole_weights(self.network, self.ranks.is_first)
        moments = whole_moments(self.network, self.optimizer, self.ranks.is_first)
        with self.ranks.first():
            if not self.ranks.is_first:
                return
            with replacing(self.checkpoints / f"checkpoint-{self.state.global_step}") as scratch:
                self.network.save_pretrained(scratch, state_dict=weights)
                if isinstance(self.processing_class, PreTrainedTokenizerBase):
                    self.processing_class.save_pretrained(scratch)
                save_moments(moments, scratch)
                self.state.save_to_json(str(scratch / _STATE))
                (scratch / _ELAPSED).write_text(json.dumps({"seconds": self.clock.seconds}))
            self._delete_old_checkpoints()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.network, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.optimizer is not None
            load_moments(self.network, self.optimizer, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: see :class:`Budget`."""

    def _delete_old_checkpoints(self) -> None:
        """Keep the newest ones up to this step: later ones did not verify when this run was resumed."""
        found = {}
        for path in self.checkpoints.glob("checkpoint-*"):
            number = path.name.removeprefix("checkpoint-")
            if number.isdigit():
                found[int(number)] = path
        kept = sorted(step for step in found if step <= self.state.global_step)[-KEPT_CHECKPOINTS:]
        for step, path in found.items():
            if step not in kept:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.checkpoints.glob(".checkpoint-*.partial"):  # of runs killed while they wrote
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C mean: finish the step, save, stop."""

        def stop(number: int, frame: Any) -> None:
            self.signalled = number

        previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _load_finished(self, checkpoint: Path) -> None:
        """The end of a run that was killed after its last step; the Trainer would make one step more."""
        self.state = TrainerState.load_from_json(str(checkpoint / _STATE))
        load_weights(self.network, checkpoint)

    def run_training(self, checkpoint: Path | None) -> None:
        """Train to the end of the budget, from the start or from a verified checkpoint."""
        self.seconds = json.loads((checkpoint / _ELAPSED).read_text())["seconds"] if checkpoint else 0.0
        with self._signals():
            self.clock.start(self.seconds)
            try:
                if checkpoint and self._progress(int(checkpoint.name.rpartition("-")[2])) >= 1:
                    self._load_finished(checkpoint)
                    return
                self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:
                self.clock.stop()


class Budget(TrainerCallback):
    """Ends the run, with a checkpoint, when its time is up or a signal came; refuses losses and gradients that are not
    finite. And it deals out chance: the order of an epoch follows from seed and epoch, what techniques draw in a
    step from seed, step and rank. So no state of a generator is saved, and a run that goes on draws what it
    would have drawn."""

    def __init__(self, trainer: BKTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.order.epoch = state.global_step // self.trainer.steps_per_epoch

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        numbers = [self.trainer.run.seed, state.global_step, self.trainer.ranks.rank]
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_signals()
        if self.trainer.stopped_by is not None or self.trainer.progress >= 1:
            control.should_save = control.should_training_stop = True


class Recorder(TrainerCallback):
    """metrics.jsonl, one line a log, and the progress bar: bits per byte, bytes per second, time left."""

    def __init__(self, trainer: BKTrainer, path: Path, console: Console, watch: Watch | None = None):
        self.trainer, self.path, self.watch = trainer, path, watch
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.bar = Progress(*columns, *times, console=console)
        self.task: TaskID | None = None
        self.marks: list[tuple[float, int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.marks = [(self.trainer.clock.seconds, state.global_step)]
        if self.path.exists():  # a resumed run: lines after its checkpoint will be written again
            lines = [line for line in self.path.read_text().splitlines() if _step(line) <= state.global_step]
            self.path.write_text("".join(line + "\n" for line in lines))
        self.task = self.bar.add_task("training", total=1.0)
        self.bar.update(self.task, completed=self.trainer.progress)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.task is not None:
            self.bar.update(self.task, completed=self.trainer.progress)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "bits_per_byte" not in logs:
            return
        self.marks = [*self.marks[-10:], (logs["seconds"], state.global_step)]
        (t0, s0), (t1, s1) = self.marks[0], self.marks[-1]
        rate = (s1 - s0) * self.trainer.tokens_per_step * self.trainer.bytes_per_token / max(1e-9, t1 - t0)
        line = {"step": state.global_step, "bytes_per_second": round(rate, 1)}
        line |= {
            name: logs[name] for name in ("seconds", "bits_per_byte", "learning_rate", "grad_norm") if name in logs
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.task is not None:
            text = f"step {state.global_step}  {logs['bits_per_byte']:.3f} bits/byte  {rate / 1000:.1f} kB/s"
            self.bar.update(self.task, description=text)
        if self.watch is not None:
            self.watch(self.trainer.progress, logs["bits_per_byte"])

    def close(self) -> None:
        self.bar.stop()


def _step(line: str) -> float:
    """Of a line of metrics.jsonl; infinite for the half line that a killed run may leave."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf
