"""Parameters in parts (FSDP2), and blocks computed again in backward."""

import pytest
import torch
from test_data_parallel import PLAIN, SHAPE, TECHNIQUES, assert_alike, build, newest, outcome
from torch.distributed.tensor import DTensor

from resnet_bk import LanguageModel
from resnet_bk.checkpoint import verify
from resnet_bk.config import DepthConfig, LengthConfig, ModelConfig, SparsityConfig
from resnet_bk.hf import ResNetBKForCausalLM
from resnet_bk.layers.block import Block
from resnet_bk.training.sharded import recompute, shard, units
from resnet_bk.training.states import whole_weights

DEEP = {
    "plain": PLAIN,
    "multiscale": TECHNIQUES["multiscale"],
    "experts": TECHNIQUES["experts"],
    "depth": ModelConfig(**SHAPE | {"n_layers": 4}, depth=DepthConfig(policy="exit")),
}


def train(rank, folder, model, settings, sharded, resume=False):
    trainer = build(folder, model, shard=sharded, **settings)
    trainer.run_training(newest(folder) if resume else None)
    weights = whole_weights(trainer.network)
    parts = sum(isinstance(p, DTensor) for p in trainer.network.parameters())
    return outcome(trainer)[0], [weights[name].numpy() for name in sorted(weights)], parts


@pytest.mark.parametrize("name", DEEP)
def test_sharded_training_is_training(crew, tmp_path, name):
    settings = {"accumulate": 2, "max_steps": 3, "max_grad_norm": 0.5}
    copies = crew.run(2, train, str(tmp_path / "copies"), DEEP[name], settings, False)
    parts = crew.run(2, train, str(tmp_path / "parts"), DEEP[name], settings, True)
    assert parts[0][2] > 0
    assert copies[0][2] == 0
    for answer in parts:
        assert_alike(answer[:2], copies[0][:2])


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (2, 3)])
def test_a_sharded_run_is_saved_whole_and_goes_on_with_another_number_of_ranks(crew, tmp_path, first, then):
    settings = {"batch_size": 6, "max_steps": 6}
    straight = crew.run(1, train, str(tmp_path / "straight"), PLAIN, settings, False)[0]
    crew.run(first, train, str(tmp_path / "run"), PLAIN, {**settings, "save_every": 3, "max_steps": 3}, first > 1)
    saved = newest(tmp_path / "run")
    verify(saved)
    assert {path.suffix for path in saved.iterdir()} == {".safetensors", ".json"}
    ResNetBKForCausalLM.from_pretrained(saved)
    # the schedule of three steps is another one: compare with one process that does the same
    crew.run(1, train, str(tmp_path / "alone"), PLAIN, {**settings, "save_every": 3, "max_steps": 3}, False)
    alone = crew.run(1, train, str(tmp_path / "alone"), PLAIN, settings, False, True)[0]
    resumed = crew.run(then, train, str(tmp_path / "run"), PLAIN, settings, then > 1, True)[0]
    assert_alike(resumed[:2], alone[:2])
    with pytest.raises(AssertionError):
        assert_alike(resumed[1], straight[1])


def test_what_runs_as_often_as_data_say_is_gathered_as_a_whole():
    shape = {"vocab_size": 259, "d_model": 16, "num_experts": 1, "n_layers": 6}
    names = {
        "blocks": ({}, ["Block"] * 6),
        "chunks": ({"multiscale": {"factors": [2], "layers": [1, 4, 1]}}, [*["Block"] * 5, "MultiScale", "Block"]),
        "depth": ({"depth": {"policy": "act"}}, ["Halting"]),
        "length": ({"length": {"bins": 4, "max_length": 32}}, ["LearnedLength"]),
    }
    for fields, expected in names.values():
        model = LanguageModel(**shape | fields)
        assert [type(layer).__name__ for layer in units(model.blocks)] == expected


RECOMPUTED = {
    "plain": PLAIN,
    "noise": ModelConfig(**SHAPE, sparsity=SparsityConfig(target=0.5, sampling="gumbel")),
    "experts": TECHNIQUES["experts"],
    "multiscale": TECHNIQUES["multiscale"],
    "depth": TECHNIQUES["depth"],
    "length": ModelConfig(**SHAPE | {"n_layers": 4}, length=LengthConfig(bins=2, max_length=8)),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_blocks_computed_again_have_the_same_gradients(name):
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


def test_a_model_alone_is_sharded_too(crew):
    assert crew.run(2, alone) == [[True, True]] * 2


def alone(rank):
    """A LanguageModel without a Trainer: the gradient is the mean over ranks, and every parameter has a part here."""
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
