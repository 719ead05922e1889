"""The order of the windows, and the tables of n-gram memory that leave out what a step trains on."""

import numpy as np
import pytest
import torch
from test_trainer import MODEL, build, newest_valid, weights

from resnet_bk.config import MemoryConfig, ModelConfig
from resnet_bk.data.tokens import TokenFile
from resnet_bk.hf import ResNetBKForCausalLM
from resnet_bk.layers import ngrams
from resnet_bk.layers.embedding import NgramMemory
from resnet_bk.ops.ngram_look_up import find_ngrams
from resnet_bk.training import windows as module
from resnet_bk.training.windows import HeldBack, ShuffledSampler, Windows

MEMORY = ModelConfig(**{**vars(MODEL), "memory": MemoryConfig(orders=(1, 3), rows=500)})


def text(length, count, ids=None):
    ids = np.random.default_rng(0).integers(3, 40, count * length + 1) if ids is None else ids
    return Windows(TokenFile(ids.astype(np.uint16), np.array([0, len(ids)]), np.array([len(ids)]), ("all",)), length)


@pytest.mark.parametrize(("length", "count", "per_step", "parts"), [(8, 100, 3, 4), (8, 7, 3, 2), (8192, 70, 3, 4)])
def test_parts_are_pieces_of_the_text_in_turn(length, count, per_step, parts):
    found = text(length, count).parts(per_step)
    assert len(found) == parts
    assert sorted(np.concatenate(found).tolist()) == list(range(count))
    assert min(map(len, found)) >= per_step
    together = np.diff(found[0])
    piece = 1 + (together == 1).sum() // ((together > 1).sum() + 1)
    assert piece * length <= module.PIECE
    assert (together > 1).sum() + 1 >= 4


def test_every_part_has_the_windows_of_an_update_where_the_text_has_enough():
    for per_step in (1, 2, 3, 7, 16, 25, 64):
        for count in range(2 * per_step, 6 * per_step):
            found = text(1, count).parts(per_step)
            assert min(map(len, found)) >= per_step
            assert sorted(np.concatenate(found).tolist()) == list(range(count))
        assert min(map(len, text(1, 2 * per_step - 1).parts(per_step))) < per_step


def test_one_part_is_shuffled_in_every_epoch():
    sampler = ShuffledSampler([np.arange(50)], 8, seed=3)
    first = list(sampler)
    sampler.epoch = 1
    second = list(sampler)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first == np.random.default_rng([3, 0]).permutation(50).tolist()
    assert {sampler.part(step) for step in range(20)} == {0}


def test_each_step_has_windows_of_one_part():
    parts = text(8, 103).parts(4)
    sampler = ShuffledSampler(parts, 4, seed=0)
    steps = len(sampler) // 4
    assert steps * 4 == len(sampler)
    assert 103 - len(sampler) < 4 * 4
    for epoch in range(2):
        sampler.epoch = epoch
        order = list(sampler)
        assert len(order) == len(set(order)) == len(sampler)
        for step in range(steps):
            part = parts[sampler.part(epoch * steps + step)]
            assert set(order[4 * step : 4 * step + 4]) <= set(part.tolist())


def test_a_step_does_not_find_its_own_text():
    """In a text where every token occurs once, what follows a token is found in the other parts only."""
    windows = text(8, 60, np.arange(3, 484))
    memory = NgramMemory(ModelConfig(vocab_size=484, memory=MemoryConfig(orders=(1,), rows=2**20)))
    sampler = ShuffledSampler(windows.parts(5), 5, seed=0)
    held_back = HeldBack(memory, windows, sampler)
    held_back.count()
    rows = torch.from_numpy(np.stack([windows[i]["input_ids"] for i in range(60)]))

    def found(table):
        return find_ngrams(rows + 1, table, (1,))[..., 0, 0].bool()

    assert found(memory.entries).all()
    for part in range(4):
        held_back.hold_back(int(sampler.ends[part]) - 1)
        own = torch.zeros(60, dtype=torch.bool)
        own[sampler.indices[part]] = True
        assert torch.equal(found(memory.held_back), (~own).unsqueeze(1).expand(60, 8))


def test_training_counts_the_text_and_saves_the_whole_table(tmp_path):
    trainer = build(tmp_path, model=MEMORY, save_every=6, max_steps=6)
    trainer.run_training(None)
    memory = trainer.network.model.blocks[0]
    expected = ngrams.count(trainer.windows.tokens.ids, (1, 3), 500, 4)
    assert torch.equal(memory.entries, expected)
    assert memory.held_back is None
    saved = ResNetBKForCausalLM.from_pretrained(newest_valid(tmp_path / "checkpoints", pytest.fail))
    assert torch.equal(saved.model.blocks[0].entries, expected)
    assert saved.model.blocks[0].held_back is None


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_resumed_run_holds_back_the_same(tmp_path, stop):
    """The run of 14 windows and two of them a step has four parts, of one or two steps each."""
    straight = build(tmp_path / "straight", model=MEMORY)
    straight.run_training(None)
    assert straight.sampler.ends[-1] < 12
    first = build(tmp_path / "run", model=MEMORY, save_every=stop)
    at = type(straight).check_signals

    def stops(trainer):
        at(trainer)
        trainer.stopped_by = 15 if trainer.state.global_step == stop else None

    first.check_signals = lambda: stops(first)
    first.run_training(None)
    second = build(tmp_path / "run", model=MEMORY)
    second.run_training(newest_valid(tmp_path / "run" / "checkpoints", pytest.fail))
    for p, q in zip(weights(straight), weights(second), strict=True):
        assert torch.equal(p, q)


def test_an_error_of_counting_ends_the_step_that_needs_the_table():
    windows = text(8, 60)
    memory = NgramMemory(ModelConfig(vocab_size=40, memory=MemoryConfig(orders=(1,), rows=100)))
    held_back = HeldBack(memory, windows, ShuffledSampler(windows.parts(5), 5, seed=0))
    held_back._without = lambda part: 1 / 0
    with pytest.raises(ZeroDivisionError):
        held_back.hold_back(0)


def test_the_learning_rate_rises_after_counting(tmp_path):
    trainer = build(tmp_path, model=MEMORY, max_steps=2, max_seconds=1000)
    trainer.run_training(None)
    assert 0 < trainer.begin < 0.5
    factor = trainer.lr_scheduler.lr_lambdas[0]
    trainer.begin = 0.4
    for seconds, expected in ((400, 1e-3), (415, 0.5), (430, 1.0)):
        trainer.seconds = seconds
        assert factor(0) == pytest.approx(expected)
    plain = build(tmp_path / "plain", max_steps=2, max_seconds=1000)
    plain.run_training(None)
    assert plain.begin == 0
