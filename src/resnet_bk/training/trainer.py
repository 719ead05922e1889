"""transformers' Trainer with a time budget and sealed checkpoints, that logs the cross-entropy as the loss.

All processes of a run act on rank 0's clock, on the same signal and on the same check for a NaN or an infinity.
"""

import contextlib
import json
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from resnet_bk import files
from resnet_bk.checkpoint import ELAPSED, RUN_FILES, STATE, CheckpointError, replacing, saved_steps, step_of
from resnet_bk.clock import Clock
from resnet_bk.config import TrainConfig, shown
from resnet_bk.extras import extra
from resnet_bk.folders import HELD_OUT
from resnet_bk.hf import ResNetBKForCausalLM
from resnet_bk.layers.sparse import anneal
from resnet_bk.training import optimizers
from resnet_bk.training.errors import NonFiniteError
from resnet_bk.training.mixture import sampler
from resnet_bk.training.ranks import Ranks
from resnet_bk.training.states import (
    full_tensor,
    gather_optimizer_state,
    gather_weights,
    load_optimizer_state,
    load_weights,
    save_optimizer_state,
)
from resnet_bk.training.windows import HeldBack, Windows, collate

with extra("train"):
    import accelerate  # noqa: F401 - which transformers would ask for with an error of its own
    from transformers import (
        PreTrainedTokenizerBase,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainerState,
        TrainingArguments,
    )

NO_STEP_LIMIT = 10**9
KEPT_CHECKPOINTS, KEPT_LINES = 2, 100


def learning_rate_factor(progress: float, warmup: float, final: float) -> float:
    """Return the learning rate as a fraction of its peak: a linear rise, then a cosine.

    Args:
        progress: 0 at the start of the run, 1 at its end.
        warmup: progress at which the rise ends.
        final: fraction at the end of the run.
    """
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    along = min(1.0, (progress - warmup) / max(1e-9, 1 - warmup))
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * along))


# The class uses private parts of transformers' Trainer that have no public hook. They behave the same in 5.0.0, 5.17.0
# and 5.24.0.
# - _save_checkpoint(model, trial) is overridden. The original writes optimizer, scheduler and generator files after the
#   public save_model, so an override of save_model alone could not seal the finished folder.
# - _load_from_checkpoint(folder, model) is overridden. The original cannot load full tensors into a sharded model.
# - The Trainer's own loading of optimizer.pt, scheduler.pt and rng_state.pth does nothing if the files are missing, as
#   in our checkpoints. create_optimizer and create_scheduler restore the state instead; RunControl seeds every step.
class BKTrainer(Trainer):
    """Trainer with a schedule by steps or seconds, sealed checkpoints, and a check for NaN before each update.

    Args:
        model: the model to train. May be sharded already, see :func:`resnet_bk.training.sharded.shard`.
        config: settings of the run. Its batch_size counts the sequences of all ranks together.
        windows: the training text.
        tokenizer: saved in each checkpoint, so that the checkpoint can be evaluated as it is.
        ranks: the processes that share each batch; default: this one only.
    """

    def __init__(
        self,
        model: ResNetBKForCausalLM,
        config: TrainConfig,
        windows: Windows,
        tokenizer: PreTrainedTokenizerBase | None = None,
        ranks: Ranks | None = None,
    ):
        self.config, self.clock, self.windows = config, Clock(), windows
        self.network, self.checkpoints = model, Path(config.output_dir) / "checkpoints"  # network: self.model, typed
        self.ranks = ranks or Ranks()
        self.bytes_per_step = config.batch_size * config.accumulate * windows.length * windows.bytes_per_token
        memory, per_step = model.model.memory, config.batch_size * config.accumulate
        self.sampler = sampler(windows, per_step, config.seed, in_parts=memory is not None)
        self.steps_per_epoch = math.ceil(len(self.sampler) // config.batch_size / config.accumulate)
        self.cross_entropy: list[Tensor] = []  # one of each forward pass since the last log line
        self.losses: list[Tensor] = []  # one of each forward pass of this step
        self.seconds = 0.0  # rank 0's clock, read just before the last update; the same on all ranks
        self.begin = 0.0  # progress at the first update of the run, where n-grams were counted before
        self.grad_norm = 0.0  # that of the last update, before clipping
        self.held_out_bits: float | None = None  # a score for the next log line, see HeldOut
        self.teacher: Callable[[Tensor], Tensor] | None = None  # log-probabilities (B, N, V) to learn, of ids (B, N)
        self.received_signal: int | None = None  # the last signal that this process received
        self.stopped_by: int | None = None  # the signal that stops all ranks
        self.resumed_from: Path | None = None
        self.first_step = 0
        arguments = TrainingArguments(
            output_dir=str(self.checkpoints),
            max_steps=config.max_steps or NO_STEP_LIMIT,
            per_device_train_batch_size=config.batch_size // self.ranks.world_size,
            gradient_accumulation_steps=config.accumulate,
            learning_rate=config.learning_rate,
            max_grad_norm=0.0,  # check_update clips
            bf16=config.dtype == "bfloat16",
            logging_steps=config.log_every,
            logging_nan_inf_filter=False,
            save_steps=config.save_every,
            seed=config.seed,
            report_to=[] if config.report_to == "none" else config.report_to.split(","),
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            ddp_find_unused_parameters=False,  # every parameter gets a gradient in each pass, even if it is 0
            remove_unused_columns=False,
        )
        if arguments.n_gpu > 1:  # transformers would cut the batches with DataParallel; several GPUs need torchrun
            arguments._n_gpu = 1
        super().__init__(model, arguments, data_collator=collate, train_dataset=windows, processing_class=tokenizer)
        self.remove_callback(PrinterCallback)
        self.add_callback(RunControl(self))
        if memory is not None:
            self.add_callback(HeldBack(memory, windows, self.sampler))
            # Every process counts the same table. Otherwise DDP would broadcast it in each step; the setting against
            # that, broadcast_buffers, is deprecated.
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                model, [name for name, _ in model.named_buffers()]
            )
        # Mark a sharded model as prepared: otherwise train() would try to wrap it in DistributedDataParallel.
        if isinstance(model, FSDPModule):
            self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)

    @property
    def progress(self) -> float:
        """How much of the run is done, 0 to 1: the larger of the share of its steps and the share of its seconds."""
        return self._progress(self.state.global_step)

    def _progress(self, step: int) -> float:
        seconds = 0.0 if self.config.max_seconds is None else self.seconds / self.config.max_seconds
        return min(1.0, max(step / (self.config.max_steps or NO_STEP_LIMIT), seconds))

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(
            self.windows,
            self.args.train_batch_size,
            sampler=self.sampler,
            collate_fn=collate,
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer; load its state if resumed."""
        config, network = self.config, model or self.network
        optimizer = optimizers.create(
            network, config.learning_rate, config.weight_decay, (0.9, config.beta2), config.optimizer
        )
        for group in optimizer.param_groups:
            group["initial_lr"] = config.learning_rate  # LambdaLR requires it in a run that resumes
        self.optimizer = optimizer
        if self.resumed_from is not None:
            load_optimizer_state(self.network, self.optimizer, self.resumed_from)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        def factor(step: int) -> float:
            progress = max(0.0, self._progress(step) - self.begin) / max(1e-9, 1 - self.begin)
            return learning_rate_factor(progress, self.config.warmup, self.config.final_learning_rate)

        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        self.lr_scheduler = LambdaLR(optimizer, factor, last_epoch=self.first_step - 1)
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run forward and backward. A sharded model exchanges gradients in the last pass of a step only."""
        if not isinstance(self.network, FSDPModule):
            return super().training_step(*args, **kwargs)
        self.network.set_requires_gradient_sync(self.accelerator.sync_gradients)
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            for p in self.network.parameters():
                if not isinstance(p, DTensor) and p.grad is not None:  # FSDP2 reduces sharded parameters only
                    dist.all_reduce(p.grad, dist.ReduceOp.AVG)
        return loss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        anneal(self.network, self.progress)
        if self.teacher is not None:
            self.network.model.taught = self.teacher(inputs["input_ids"]), self.config.distill
        output = model(**inputs, skip_logits=True)
        auxiliary = 0.0 if output.aux_loss is None else output.aux_loss.detach()
        self.cross_entropy.append(output.loss.detach() - auxiliary)
        self.losses.append(output.loss.detach())
        return (output.loss, output) if kwargs.get("return_outputs") else output.loss

    def check_update(self) -> None:
        """Before each update, take rank 0's clock, check the losses and gradients of all ranks, and clip the gradients.

        Raises:
            NonFiniteError: on every rank, if a loss or the gradient norm of any rank is NaN or infinite.
        """
        loss = torch.stack(self.losses).sum()
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        norm = full_tensor(torch.nn.utils.get_total_norm(gradients))
        self.losses.clear()
        faults = [float(loss.isnan()), float(loss.isinf()), float(not norm.isfinite())]
        *faults, self.seconds = self.ranks.max(*faults, self.clock.seconds if self.ranks.is_rank_zero else 0.0)
        if any(faults):
            what = ("the loss is nan", "the loss is inf", "the gradient norm is not finite")[faults.index(1.0)]
            raise NonFiniteError(f"step {self.state.global_step + 1}: {what}; no update was made")
        if self.state.global_step == 0 and self.network.model.memory is not None:
            self.begin = self._progress(0)
        torch.nn.utils.clip_grads_with_norm_(self.network.parameters(), self.config.max_grad_norm, norm)
        self.grad_norm = norm.item()

    def check_signals(self) -> None:
        """Set `stopped_by` on all ranks if any of them received a signal. It is called after each step."""
        self.stopped_by = int(self.ranks.max(self.received_signal or 0)[0]) or None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the mean cross-entropy of all ranks since the last line instead of the loss; add bits per byte.

        Where a layer replaces the cross-entropy in training, as with early exit, its task loss is logged.
        """
        if "loss" in logs and self.cross_entropy:
            logs["loss"] = self.ranks.mean(torch.stack(self.cross_entropy).mean().item())
            logs["bits_per_byte"] = logs["loss"] / math.log(2) / self.windows.bytes_per_token
            logs["grad_norm"], logs["seconds"] = self.grad_norm, self.clock.seconds
            self.cross_entropy.clear()
            if self.held_out_bits is not None:
                logs[HELD_OUT], self.held_out_bits = self.held_out_bits, None
        super().log(logs, *args, **kwargs)

    # ---------------------------------------------------------------------------------------- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Gather weights and optimizer state on all ranks; write them on rank 0.

        The folder gets its name once it is complete and sealed; only then are older checkpoints deleted.
        """
        assert self.optimizer is not None
        weights = gather_weights(self.network, self.ranks.is_rank_zero)
        optimizer_state = gather_optimizer_state(self.network, self.optimizer, self.ranks.is_rank_zero)
        with self.ranks.rank_zero_first():
            if not self.ranks.is_rank_zero:
                return  # the other ranks only wait until rank 0 has written
            folder = self.checkpoints / f"checkpoint-{self.state.global_step}"
            with replacing(folder, RUN_FILES) as scratch:
                self.network.save_pretrained(scratch, state_dict=weights)
                if isinstance(self.processing_class, PreTrainedTokenizerBase):
                    self.processing_class.save_pretrained(scratch)
                save_optimizer_state(optimizer_state, scratch)
                self.state.save_to_json(str(scratch / STATE))
                (scratch / ELAPSED).write_text(json.dumps({"seconds": self.clock.seconds}))
            self._delete_checkpoints(self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.network, Path(resume_from_checkpoint))

    @contextlib.contextmanager
    def naming_the_last_checkpoint(self) -> Iterator[None]:
        """Add to an error of the disk from which checkpoint the run can go on."""
        try:
            yield
        except OSError as error:
            if error.errno is None:  # not of the system
                raise
            steps = [f"checkpoint-{step}" for step in sorted(saved_steps(self.checkpoints))[-1:]]
            goes_on = f"the run can go on from {steps[0]}" if steps else "the run has no checkpoint yet"
            raise OSError(error.errno, f"{error.strerror or error}; {goes_on}", error.filename) from error

    def _delete_checkpoints(self, step: int) -> None:
        """Delete all but the newest checkpoints up to `step`. Later ones could not be read when the run resumed."""
        saved = saved_steps(self.checkpoints)
        for old in sorted(s for s in saved if s <= step)[:-KEPT_CHECKPOINTS]:
            with contextlib.suppress(OSError):  # Windows cannot rename a folder that is being read
                files.remove(saved[old])
        files.remove_scratch(self.checkpoints)  # left by a kill

    @contextlib.contextmanager
    def _handle_signals(self) -> Iterator[None]:
        """Make SIGTERM and Ctrl-C end the run after the current step, with a checkpoint."""

        def stop(number: int, frame: Any) -> None:
            self.received_signal = number

        asked = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) not in (signal.SIG_IGN, None)]
        previous = {number: signal.signal(number, stop) for number in asked}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def run_training(self, checkpoint: Path | None) -> None:
        """Train until the steps or seconds are used up, from the start or from a checkpoint that was verified."""
        if checkpoint is not None:
            self.resumed_from, self.first_step = checkpoint, step_of(checkpoint)
            with self.ranks.rank_zero_first():
                self.seconds = _elapsed(checkpoint / ELAPSED)
                _check_state(checkpoint / STATE, self.first_step)
                if self.ranks.is_rank_zero:  # a kill after the last save may have left older ones
                    self._delete_checkpoints(self.first_step)
        with self.naming_the_last_checkpoint(), self._handle_signals():
            self.clock.start(self.seconds)
            try:
                if checkpoint and self._progress(self.first_step) >= 1:  # the Trainer would make one more step
                    self.state = TrainerState.load_from_json(str(checkpoint / STATE))
                    load_weights(self.network, checkpoint)
                else:
                    self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:
                self.clock.stop()


class RunControl(TrainerCallback):
    """End the run, and seed every epoch and step.

    The run ends with a checkpoint when its steps or seconds are used up or a signal arrived, and with an error at a NaN
    or an infinity. The order of the windows depends on the seed and the epoch; the random numbers of a step depend on
    the seed, the step and the rank. So checkpoints need no generator states, and a resumed run draws the same numbers
    as one that was never stopped.
    """

    def __init__(self, trainer: BKTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, args.max_steps)  # a checkpoint has the save_every and log_every of its session

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.sampler.epoch = state.global_step // self.trainer.steps_per_epoch

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        numbers = [self.trainer.config.seed, state.global_step, self.trainer.ranks.rank]
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_signals()
        del state.log_history[:-KEPT_LINES]  # metrics.jsonl has every line; here they would fill each checkpoint
        if self.trainer.stopped_by is not None or self.trainer.progress >= 1:
            control.should_save = control.should_training_stop = True


def _elapsed(path: Path) -> float:
    """Return the training time in seconds that a checkpoint has saved.

    Raises:
        CheckpointError: the file does not have it.
    """
    seconds = _read(path).get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= 1e12:
        raise CheckpointError(f"{path}: expected 'seconds', a number of at least 0, got {shown(seconds)}")
    return float(seconds)


def _check_state(path: Path, step: int) -> None:
    """Raise CheckpointError unless the file has the Trainer's state after `step` steps."""
    saved = _read(path)
    if saved.get("global_step") != step:
        raise CheckpointError(f"{path}: expected 'global_step' {step}, got {shown(saved.get('global_step'))}")
    try:
        TrainerState.load_from_json(str(path))
    except Exception as error:  # of the classes of transformers
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: expected a state of transformers' Trainer ({reason})") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected JSON, got {path.stat().st_size} bytes that are not") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a mapping, got {shown(values)}")
    return values
