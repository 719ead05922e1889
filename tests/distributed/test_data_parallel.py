"""Training with several processes computes what one process computes, and whatever stops one stops all.

Models are in float64, so that results differ by the order of summation only.
"""

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from resnet_bk.checkpoint import newest_valid, verify
from resnet_bk.config import DepthConfig, ExpertsConfig, ModelConfig, MultiScaleConfig, SparsityConfig, TrainConfig
from resnet_bk.data.tokens import TokenFile
from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.layers.feedforward import Experts
from resnet_bk.training.errors import NonFiniteError
from resnet_bk.training.ranks import Ranks
from resnet_bk.training.sharded import shard
from resnet_bk.training.states import full_tensor
from resnet_bk.training.trainer import BKTrainer, Clock
from resnet_bk.training.windows import Windows

SHAPE = {"vocab_size": 40, "d_model": 16, "n_layers": 2, "n_seq": 8, "num_experts": 1}
PLAIN = ModelConfig(**SHAPE)
TECHNIQUES = {
    "experts": ModelConfig(
        **SHAPE | {"num_experts": 3}, balance_weight=0.5, experts=ExpertsConfig(policy="top_p", target=1.5)
    ),
    "sparsity": ModelConfig(**SHAPE, sparsity=SparsityConfig(target=0.5, warmup=0.0)),
    "depth": ModelConfig(**SHAPE | {"n_layers": 4}, depth=DepthConfig(policy="act", target=0.5)),
    "multiscale": ModelConfig(
        **SHAPE | {"n_layers": 3}, multiscale=MultiScaleConfig(factors=(2,), boundaries="learned")
    ),
}


class At(TrainerCallback):
    """Calls `action` before each update, or after each step."""

    def __init__(self, before=None, after=None):
        self.before, self.after = before, after

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.before:
            self.before(state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):
        if self.after:
            self.after(state.global_step)


def build(folder, model=PLAIN, count=28, **settings):
    ranks = Ranks.start()
    torch.manual_seed(0)
    defaults = {"batch_size": 4, "log_every": 1, "save_every": 1000, "max_steps": 4, "max_grad_norm": 1e6}
    config = TrainConfig(model=model, output_dir=str(folder), **{**defaults, **settings})
    network = ResNetBKForCausalLM(ResNetBKConfig.from_model_config(model)).double()
    if config.shard and ranks.world_size > 1:
        shard(network)
    ids = np.random.default_rng(0).integers(3, 40, count * model.n_seq + 1).astype(np.uint16)
    text = TokenFile(ids, np.array([0, len(ids)]), np.array([len(ids)]), ("all",))
    return BKTrainer(network, config, Windows(text, model.n_seq), ranks=ranks)


def newest(folder):
    return newest_valid(Path(folder) / "checkpoints", pytest.fail)


def outcome(trainer):
    """Return logged lines and weights as numbers that can be pickled."""
    kept = ("step", "loss", "grad_norm", "learning_rate")
    history = [[float(line[name]) for name in kept] for line in trainer.state.log_history if "loss" in line]
    return history, [full_tensor(p.detach()).numpy() for p in trainer.network.parameters()]


def train(rank, folder, settings, resume=False, stop_at=None, scaled=True):
    """Return the gradients of every step and the outcome. stop_at: (rank, step) at which that rank gets SIGTERM."""
    trainer = build(folder, **settings)
    gradients = []

    def keep(step):
        gradients.append([p.grad.clone().numpy() for p in trainer.network.parameters()])

    def send(step):
        if stop_at == (rank, step):
            signal.raise_signal(signal.SIGTERM)

    trainer.callback_handler.callbacks.insert(0, At(before=keep, after=send))
    if not scaled:
        trainer.compute_loss_func = "a loss that is scaled already"  # so the Trainer does not divide by accumulate
    trainer.run_training(newest(folder) if resume else None)
    return gradients, *outcome(trainer), trainer.stopped_by


def assert_same(a, b, rtol=1e-5):
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-9)


def gradients_of(workers, folder, world, **settings):
    answers = workers.run(world, train, str(folder / f"of-{world}"), settings)
    for other in answers[1:]:
        assert_same(other[:3], answers[0][:3], rtol=0)
    return answers[0]


@pytest.mark.parametrize(("accumulate", "optimizer"), [(1, "adamw"), (3, "adamw"), (1, "muon")])
def test_ranks_that_share_a_batch_compute_its_gradient(workers, tmp_path, accumulate, optimizer):
    """Batches of 4 shared by two ranks, past the end of an epoch: 28 windows are 7 batches."""
    settings = {"accumulate": accumulate, "max_steps": 8 // accumulate + 1, "optimizer": optimizer}
    one = gradients_of(workers, tmp_path, 1, **settings)
    two = gradients_of(workers, tmp_path, 2, **settings)
    assert_same(two[:3], one[:3])


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_losses_of_techniques_are_computed_per_part_of_a_batch(workers, tmp_path, technique):
    """Prices and balances are computed per forward pass, so two ranks equal one that accumulates their parts."""
    parts = gradients_of(workers, tmp_path, 1, model=TECHNIQUES[technique], batch_size=2, accumulate=4, max_steps=2)
    two = gradients_of(workers, tmp_path, 2, model=TECHNIQUES[technique], batch_size=4, accumulate=2, max_steps=2)
    assert_same(two[:3], parts[:3])


def train_unscaled(rank, folder, settings):
    return train(rank, folder, settings, scaled=False)


def test_a_loss_that_is_not_scaled_is_detected(workers, tmp_path):
    right = gradients_of(workers, tmp_path, 2, accumulate=2, max_steps=1)
    wrong = workers.run(2, train_unscaled, str(tmp_path / "wrong"), {"accumulate": 2, "max_steps": 1})[0]
    with pytest.raises(AssertionError):
        assert_same(wrong[0], right[0])


def test_experts_that_one_rank_does_not_use_block_no_rank(workers, tmp_path):
    one, two = workers.run(2, one_expert_per_rank, str(tmp_path))
    assert_same(one, two, rtol=0)
    assert len(one[0]) == 3


def one_expert_per_rank(rank, folder):
    """Each rank sends all tokens to its own expert; the third expert is unused."""
    model = ModelConfig(**SHAPE | {"num_experts": 3})
    trainer = build(folder, model=model, max_steps=3)

    def choose(self, logits, probabilities):
        chosen = torch.full((len(logits), 1), rank)
        return chosen, torch.ones_like(chosen, dtype=torch.bool)

    real, Experts._choose = Experts._choose, choose
    try:
        trainer.run_training(None)
    finally:
        Experts._choose = real
    return outcome(trainer)


def one_rank_stops_early(rank, folder, policy):
    """On rank 1 every position stops after the first block; on rank 0 none does."""
    model = ModelConfig(**SHAPE | {"n_layers": 4}, depth=DepthConfig(policy=policy))
    trainer = build(folder, model=model, max_steps=3)
    technique = next(m for m in trainer.network.modules() if hasattr(m, "segments"))
    if policy == "skip":
        run = technique._run_segments
        technique._run_segments = lambda x, tokens, past, mask, totals: run(x, tokens, past, mask & (rank == 0), totals)
    else:
        technique._stops = lambda halt, left: torch.full_like(halt, rank == 1, dtype=torch.bool)
    trainer.run_training(None)
    return outcome(trainer)


@pytest.mark.parametrize("policy", ["act", "skip", "exit"])
def test_blocks_that_one_rank_does_not_run_block_no_rank(workers, tmp_path, policy):
    one, two = workers.run(2, one_rank_stops_early, str(tmp_path), policy)
    assert_same(one, two, rtol=0)


# ------------------------------------------------------------------------------------- stopping, resuming


@pytest.mark.parametrize(("first", "then", "stop"), [(2, 1, 5), (1, 2, 5), (2, 2, 6), (2, 2, 4)])
def test_a_run_resumes_with_another_number_of_ranks(workers, tmp_path, first, then, stop):
    """Stopped by a signal to the last rank only, within the second epoch (of four steps) or at its start."""
    settings = {"accumulate": 2, "max_steps": 7}
    straight = workers.run(1, train, str(tmp_path / "straight"), settings)[0]
    stopped = workers.run(first, train, str(tmp_path / "run"), settings, False, (first - 1, stop))
    assert {answer[3] for answer in stopped} == {signal.SIGTERM}
    assert newest(tmp_path / "run").name == f"checkpoint-{stop}"
    verify(newest(tmp_path / "run"))
    resumed = workers.run(then, train, str(tmp_path / "run"), settings, True)[0]
    assert_same(resumed[1:3], straight[1:3])
    assert_same(resumed[0], straight[0][stop:])


def train_by_clock(rank, folder, settings, own_clock=False):
    """Rank 1's clock runs three times as fast. own_clock plants a bug: each rank uses its own clock."""
    trainer = build(folder, **settings)
    real = Clock.seconds
    if rank == 1:
        Clock.seconds = property(lambda clock: 3 * real.fget(clock))

    def check():
        BKTrainer.check_update(trainer)
        trainer.seconds = trainer.clock.seconds

    if own_clock:
        trainer.check_update = check
        trainer.add_callback(At(after=lambda step: step == 4 and signal.raise_signal(signal.SIGTERM)))
    try:
        trainer.run_training(None)
        return trainer.state.global_step, trainer.seconds, real.fget(trainer.clock), outcome(trainer)
    finally:
        Clock.seconds = real


def test_all_ranks_use_the_clock_of_rank_zero(workers, tmp_path):
    one, two = workers.run(2, train_by_clock, str(tmp_path), {"max_steps": None, "max_seconds": 1.0})
    assert one[:2] == two[:2]
    assert 1.0 <= one[1] <= one[2]
    assert_same(one[3], two[3], rtol=0)


def test_a_clock_per_rank_is_detected(workers, tmp_path):
    settings = {"max_steps": None, "max_seconds": 10.0, "warmup": 1.0}
    one, two = workers.run(2, train_by_clock, str(tmp_path), settings, True)
    with pytest.raises(AssertionError):
        assert_same(one[3], two[3], rtol=0)


def spoil(rank, folder, where):
    """Rank 1 meets a NaN in its third step."""
    trainer = build(folder)
    norm = trainer.network.model.norm
    before = []

    def keep(step):
        if step == 3:
            before.extend(p.detach().clone() for p in trainer.network.parameters())

    def poison(x):
        return x * float("nan") if rank == 1 and trainer.state.global_step == 2 else x

    if where == "loss":
        norm.register_forward_hook(lambda module, inputs, output: poison(output))
    else:
        norm.weight.register_hook(poison)
    trainer.callback_handler.callbacks.insert(0, At(before=keep))
    with pytest.raises(NonFiniteError) as caught:
        trainer.run_training(None)
    same = all(torch.equal(a, b) for a, b in zip(before, trainer.network.parameters(), strict=True))
    return str(caught.value), same


@pytest.mark.parametrize(
    ("where", "what"), [("loss", "the loss is nan"), ("gradient", "the gradient norm is not finite")]
)
def test_a_nan_on_one_rank_stops_all(workers, tmp_path, where, what):
    assert workers.run(2, spoil, str(tmp_path), where) == [(f"step 3: {what}; no update was made", True)] * 2
