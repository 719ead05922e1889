"""Sharded parameters (FSDP2) and activation checkpointing."""

from pathlib import Path

import pytest
import torch
from test_data_parallel import PLAIN, SHAPE, TECHNIQUES, assert_same, build, newest, outcome
from torch.distributed.tensor import DTensor

from resnet_bk import LanguageModel
from resnet_bk.checkpoint import verify
from resnet_bk.config import DepthConfig, LengthConfig, MemoryConfig, ModelConfig, SparsityConfig
from resnet_bk.hf import ResNetBKForCausalLM
from resnet_bk.layers.block import Block
from resnet_bk.training import optimizers
from resnet_bk.training.held_out import HeldOut
from resnet_bk.training.sharded import fsdp_units, recompute, shard
from resnet_bk.training.states import gather_weights

DEEP = {
    "plain": PLAIN,
    "multiscale": TECHNIQUES["multiscale"],
    "experts": TECHNIQUES["experts"],
    "depth": ModelConfig(**SHAPE | {"n_layers": 4}, depth=DepthConfig(policy="exit")),
    "memory": ModelConfig(**SHAPE, memory=MemoryConfig(orders=(1, 3), rows=61)),
}


def train(rank, folder, model, settings, sharded, resume=False):
    trainer = build(folder, model, shard=sharded, **settings)
    trainer.run_training(newest(folder) if resume else None)
    weights = gather_weights(trainer.network)
    sharded_parameters = sum(isinstance(p, DTensor) for p in trainer.network.parameters())
    return outcome(trainer)[0], [weights[name].numpy() for name in sorted(weights)], sharded_parameters


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [*((name, "adamw") for name in DEEP), *((name, "muon") for name in ("plain", "multiscale", "experts"))],
)
def test_sharded_training_is_training(workers, tmp_path, name, optimizer):
    settings = {"accumulate": 2, "max_steps": 3, "max_grad_norm": 0.5, "optimizer": optimizer}
    replicated = workers.run(2, train, str(tmp_path / "replicated"), DEEP[name], settings, False)
    sharded = workers.run(2, train, str(tmp_path / "sharded"), DEEP[name], settings, True)
    assert sharded[0][2] > 0
    assert replicated[0][2] == 0
    for answer in sharded:
        assert_same(answer[:2], replicated[0][:2])


@pytest.mark.parametrize(
    ("first", "then", "optimizer"), [(2, 1, "adamw"), (1, 2, "adamw"), (2, 3, "adamw"), (2, 1, "muon"), (1, 2, "muon")]
)
def test_a_sharded_run_is_saved_in_full_and_resumes_with_another_number_of_ranks(
    workers, tmp_path, first, then, optimizer
):
    settings = {"batch_size": 6, "max_steps": 6, "optimizer": optimizer}
    straight = workers.run(1, train, str(tmp_path / "straight"), PLAIN, settings, False)[0]
    workers.run(first, train, str(tmp_path / "run"), PLAIN, {**settings, "save_every": 3, "max_steps": 3}, first > 1)
    saved = newest(tmp_path / "run")
    verify(saved)
    assert {path.suffix for path in saved.iterdir()} == {".safetensors", ".json", ".py"}
    ResNetBKForCausalLM.from_pretrained(saved)
    # a run of three steps has another schedule: compare with one process that does the same
    workers.run(1, train, str(tmp_path / "alone"), PLAIN, {**settings, "save_every": 3, "max_steps": 3}, False)
    alone = workers.run(1, train, str(tmp_path / "alone"), PLAIN, settings, False, True)[0]
    resumed = workers.run(then, train, str(tmp_path / "run"), PLAIN, settings, then > 1, True)[0]
    assert_same(resumed[:2], alone[:2])
    with pytest.raises(AssertionError):
        assert_same(resumed[1], straight[1])


def test_layers_that_run_a_variable_number_of_times_are_one_fsdp_unit():
    shape = {"vocab_size": 259, "d_model": 16, "num_experts": 1, "n_layers": 6}
    names = {
        "blocks": ({}, ["Block"] * 6),
        "chunks": ({"multiscale": {"factors": [2], "layers": [1, 4, 1]}}, [*["Block"] * 5, "MultiScale", "Block"]),
        "depth": ({"depth": {"policy": "act"}}, ["Halting"]),
        "memory": ({"memory": {"orders": [2]}}, ["NgramMemory", *["Block"] * 6]),
        "length": ({"length": {"bins": 4, "max_length": 32}}, ["LearnedLength"]),
    }
    for fields, expected in names.values():
        model = LanguageModel(**shape | fields)
        assert [type(layer).__name__ for layer in fsdp_units(model.blocks)] == expected


RECOMPUTED = {
    "plain": PLAIN,
    "noise": ModelConfig(**SHAPE, sparsity=SparsityConfig(target=0.5, sampling="gumbel")),
    "experts": TECHNIQUES["experts"],
    "multiscale": TECHNIQUES["multiscale"],
    "depth": TECHNIQUES["depth"],
    "length": ModelConfig(**SHAPE | {"n_layers": 4}, length=LengthConfig(bins=2, max_length=8)),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_activation_checkpointing_has_the_same_gradients(name):
    model = LanguageModel.from_config(RECOMPUTED[name])
    ids = torch.randint(3, 40, (4, 9))

    def gradients():
        torch.manual_seed(5)
        model.zero_grad()
        output = model(ids[:, :-1], targets=ids[:, 1:])
        output.loss.backward()
        return [output.loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    kept, calls = gradients(), []
    for block in recompute(model).modules():
        if isinstance(block, Block):
            block.ff_norm.register_forward_hook(lambda *call: calls.append(call[0]))
    again = gradients()
    assert len(again) == len(kept)
    assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))
    assert len(calls) >= 2 * len(set(calls))
    with torch.no_grad():
        model(ids)


def test_a_model_without_a_trainer_is_sharded(workers):
    assert workers.run(2, without_trainer) == [[True, True]] * 2


def without_trainer(rank):
    """Return whether the gradients are the means over ranks, and whether every parameter is sharded."""
    model = LanguageModel(40, d_model=16, n_layers=2, num_experts=1)
    ids = torch.randint(40, (4, 9), generator=torch.Generator().manual_seed(0))
    model(ids[:, :-1], targets=ids[:, 1:]).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    shard(model)
    mine = ids[2 * rank : 2 * rank + 2]
    model(mine[:, :-1], targets=mine[:, 1:]).loss.backward()
    found = [p.grad.full_tensor() for p in model.parameters()]
    same = all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    return [same, all(isinstance(p, DTensor) for p in model.parameters())]


def sharded_momentum(rank):
    """Return whether every momentum is sharded as its matrix, and the number of momenta."""
    model = shard(LanguageModel(40, d_model=16, n_layers=2, num_experts=1))
    optimizer = optimizers.create(model, 0.01, 0.1, (0.9, 0.99), "muon")
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(rank))
    model(ids[:, :-1], targets=ids[:, 1:]).loss.backward()
    optimizer.step()
    pairs = [(p, optimizer.state[p]["momentum"]) for p in optimizer.param_groups[0]["params"]]
    same = all(isinstance(x, DTensor) and x.placements == p.placements for p, x in pairs)
    return [same and all(x.to_local().shape == p.to_local().shape for p, x in pairs), len(pairs)]


def test_each_process_holds_its_shard_of_the_momentum(workers):
    assert workers.run(2, sharded_momentum) == [[True, 8]] * 2


def score_and_train(rank, folder, sharded):
    trainer = build(folder, shard=sharded, eval_every=2, eval_bytes=8 * PLAIN.n_seq)
    callback = HeldOut(trainer, trainer.windows.tokens, Path(folder) / "best", Path(folder) / "metrics.jsonl")
    trainer.add_callback(callback)
    before = callback.score()
    trainer.run_training(None)
    return before, callback.best


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_share_the_scores_of_held_out_text(workers, tmp_path, sharded):
    alone = workers.run(1, score_and_train, str(tmp_path / "alone"), False)[0]
    together = workers.run(2, score_and_train, str(tmp_path / "together"), sharded)
    assert together[0] == together[1] == pytest.approx(alone, rel=1e-9)
    verify(tmp_path / "together" / "best")
    ResNetBKForCausalLM.from_pretrained(tmp_path / "together" / "best")
