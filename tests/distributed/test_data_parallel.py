"""Training by several processes: what it computes is what one process computes, and whatever ends it ends it for all.

Models are in float64, so that only the order of sums differs.
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
from resnet_bk.training.ranks import Ranks
from resnet_bk.training.sharded import shard
from resnet_bk.training.states import whole
from resnet_bk.training.trainer import BKTrainer, Budget, Clock, NonFiniteError, Windows

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
    if config.shard and ranks.world > 1:
        shard(network)
    ids = np.random.default_rng(0).integers(3, 40, count * model.n_seq + 1).astype(np.uint16)
    text = TokenFile(ids, np.array([0, len(ids)]), np.array([len(ids)]), ("all",))
    trainer = BKTrainer(network, config, Windows(text, model.n_seq), bytes_per_token=2.0, ranks=ranks)
    trainer.add_callback(Budget(trainer))
    return trainer


def newest(folder):
    return newest_valid(Path(folder) / "checkpoints", pytest.fail)


def outcome(trainer):
    """Logged lines and weights, as numbers that can be sent."""
    kept = ("step", "loss", "grad_norm", "learning_rate")
    history = [[float(line[name]) for name in kept] for line in trainer.state.log_history if "loss" in line]
    return history, [whole(p.detach()).numpy() for p in trainer.network.parameters()]


def train(rank, folder, settings, resume=False, stop_at=None, scale=1.0):
    """Gradients of every step, then the outcome. stop_at: (rank, step) at which that one is sent SIGTERM."""
    trainer = build(folder, **settings)
    gradients = []

    def keep(step):
        gradients.append([p.grad.clone().numpy() for p in trainer.network.parameters()])

    def send(step):
        if stop_at == (rank, step):
            signal.raise_signal(signal.SIGTERM)

    trainer.callback_handler.callbacks.insert(0, At(before=keep, after=send))
    if scale != 1.0:
        trainer.loss_is_scaled_for_ga = True
    trainer.run_training(newest(folder) if resume else None)
    return gradients, *outcome(trainer), trainer.stopped_by


def assert_alike(a, b, rtol=1e-5):
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-9)


def gradients_of(crew, folder, world, **settings):
    answers = crew.run(world, train, str(folder / f"of-{world}"), settings)
    for other in answers[1:]:
        assert_alike(other[:3], answers[0][:3], rtol=0)
    return answers[0]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_ranks_that_share_a_batch_compute_its_gradient(crew, tmp_path, accumulate):
    """Batches of 4, shared by two, over the end of an epoch: 28 windows are 7 batches."""
    settings = {"accumulate": accumulate, "max_steps": 8 // accumulate + 1}
    one = gradients_of(crew, tmp_path, 1, **settings)
    two = gradients_of(crew, tmp_path, 2, **settings)
    assert_alike(two[:3], one[:3])


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_losses_of_techniques_are_those_of_each_part_of_a_batch(crew, tmp_path, technique):
    """Prices and balances look at a batch at a time, so two ranks equal one that accumulates their parts."""
    parts = gradients_of(crew, tmp_path, 1, model=TECHNIQUES[technique], batch_size=2, accumulate=4, max_steps=2)
    two = gradients_of(crew, tmp_path, 2, model=TECHNIQUES[technique], batch_size=4, accumulate=2, max_steps=2)
    assert_alike(two[:3], parts[:3])


def forgets_to_scale(rank, folder, settings):
    return train(rank, folder, settings, scale=0.0)


def test_a_loss_that_is_not_scaled_is_seen(crew, tmp_path):
    right = gradients_of(crew, tmp_path, 2, accumulate=2, max_steps=1)
    wrong = crew.run(2, forgets_to_scale, str(tmp_path / "wrong"), {"accumulate": 2, "max_steps": 1})[0]
    with pytest.raises(AssertionError):
        assert_alike(wrong[0], right[0])


def test_experts_that_one_rank_does_not_use_hold_nobody_up(crew, tmp_path):
    one, two = crew.run(2, lopsided, str(tmp_path))
    assert_alike(one, two, rtol=0)
    assert len(one[0]) == 3


def lopsided(rank, folder):
    """Each rank sends all tokens to an expert of its own; the third one is used by nobody."""
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


def everybody_leaves(rank, folder, policy):
    """On the second rank no position goes on after the first block; on the first rank all of them do."""
    model = ModelConfig(**SHAPE | {"n_layers": 4}, depth=DepthConfig(policy=policy))
    trainer = build(folder, model=model, max_steps=3)
    technique = next(m for m in trainer.network.modules() if hasattr(m, "segments"))
    if policy == "skip":
        decide = technique._decide
        technique._decide = lambda x, ids, past, real, spent: decide(x, ids, past, real & (rank == 0), spent)
    else:
        technique._stops = lambda halt, left: torch.full_like(halt, rank == 1, dtype=torch.bool)
    trainer.run_training(None)
    return outcome(trainer)


@pytest.mark.parametrize("policy", ["act", "skip", "exit"])
def test_blocks_that_one_rank_does_not_run_hold_nobody_up(crew, tmp_path, policy):
    one, two = crew.run(2, everybody_leaves, str(tmp_path), policy)
    assert_alike(one, two, rtol=0)


# ------------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize(("first", "then", "stop"), [(2, 1, 5), (1, 2, 5), (2, 2, 6), (2, 2, 4)])
def test_a_run_goes_on_with_another_number_of_ranks(crew, tmp_path, first, then, stop):
    """Stopped within the second epoch, of four steps, or at its start, by a signal to the last rank alone."""
    settings = {"accumulate": 2, "max_steps": 7}
    straight = crew.run(1, train, str(tmp_path / "straight"), settings)[0]
    stopped = crew.run(first, train, str(tmp_path / "run"), settings, False, (first - 1, stop))
    assert {answer[3] for answer in stopped} == {signal.SIGTERM}
    assert newest(tmp_path / "run").name == f"checkpoint-{stop}"
    verify(newest(tmp_path / "run"))
    resumed = crew.run(then, train, str(tmp_path / "run"), settings, True)[0]
    assert_alike(resumed[1:3], straight[1:3])
    assert_alike(resumed[0], straight[0][stop:])


def by_the_clock(rank, folder, settings, own=False):
    """The second rank's clock runs three times as fast. own: a bug, each rank goes by its own one."""
    trainer = build(folder, **settings)
    real = Clock.seconds
    if rank == 1:
        Clock.seconds = property(lambda clock: 3 * real.fget(clock))

    def check():
        BKTrainer.check_update(trainer)
        trainer.seconds = trainer.clock.seconds

    if own:
        trainer.check_update = check
        trainer.add_callback(At(after=lambda step: step == 4 and signal.raise_signal(signal.SIGTERM)))
    try:
        trainer.run_training(None)
        return trainer.state.global_step, trainer.seconds, real.fget(trainer.clock), outcome(trainer)
    finally:
        Clock.seconds = real


def test_all_ranks_go_by_one_clock(crew, tmp_path):
    one, two = crew.run(2, by_the_clock, str(tmp_path), {"max_steps": None, "max_seconds": 1.0})
    assert one[:2] == two[:2]
    assert 1.0 <= one[1] <= one[2]
    assert_alike(one[3], two[3], rtol=0)


def test_a_clock_for_each_rank_is_seen(crew, tmp_path):
    settings = {"max_steps": None, "max_seconds": 10.0, "warmup": 1.0}
    one, two = crew.run(2, by_the_clock, str(tmp_path), settings, True)
    with pytest.raises(AssertionError):
        assert_alike(one[3], two[3], rtol=0)


def spoil(rank, folder, where):
    """The second rank meets NaN in its third step."""
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


@pytest.mark.parametrize(("where", "what"), [("loss", "the loss is nan"), ("gradient", "a gradient is not finite")])
def test_a_number_that_is_none_on_one_rank_stops_all(crew, tmp_path, where, what):
    assert crew.run(2, spoil, str(tmp_path), where) == [(f"step 3: {what}; no update was made", True)] * 2
