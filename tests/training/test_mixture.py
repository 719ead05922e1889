"""Several sources: their shares of the windows, and an order that depends on the seed and the epoch only."""

import numpy as np
import pytest
import torch
from test_trainer import MODEL, newest_valid, weights

from resnet_bk.config import ConfigError, DataConfig, MemoryConfig, ModelConfig, TrainConfig
from resnet_bk.data.tokens import TokenFile
from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.training.mixture import (
    MixtureSampler,
    check_sources,
    mixture_hash,
    mixture_note,
    rounded,
    sampler,
)
from resnet_bk.training.trainer import BKTrainer
from resnet_bk.training.windows import HeldBack, ShuffledSampler, Windows

MEMORY = ModelConfig(**{**vars(MODEL), "memory": MemoryConfig(orders=(1, 3), rows=500)})


def text(counts, shares, length=8, bytes_per_token=None):
    """Windows of sources with `counts` windows each, two documents a source."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 40, sum(counts) * length + 1).astype(np.uint16)
    begins = np.cumsum([0, *counts]) * length
    begins[-1] += 1
    starts = sorted([*begins, *((begins[:-1] + begins[1:]) // 2)])
    sizes = np.diff(starts) * np.repeat(bytes_per_token or [1] * len(counts), 2)
    file = TokenFile(ids, np.array(starts), sizes, ("x",) * len(sizes))
    return Windows(file, length, range(0, 2 * len(counts), 2), shares)


def epochs(order, count):
    for order.epoch in range(count):
        yield np.array(list(order))


def of_source(windows, drawn):
    """Number of windows of each source."""
    return np.histogram(drawn, windows.bounds)[0].tolist() if len(windows.bounds) > 2 else [len(drawn)]


@pytest.mark.parametrize(
    ("total", "shares", "expected"),
    [
        (10, (0.7, 0.3), [7, 3]),
        (10, (0.25, 0.75), [3, 7]),
        (7, (1 / 3, 1 / 3, 1 / 3), [3, 2, 2]),
        (5, (0.999, 0.001), [5, 0]),
        (0, (0.5, 0.5), [0, 0]),
    ],
)
def test_shares_are_rounded_to_whole_windows(total, shares, expected):
    assert rounded(total, shares) == expected


def test_every_epoch_has_the_shares():
    windows = text((60, 15, 25), (0.2, 0.5, 0.3))
    assert windows.bounds == [0, 60, 75, 100]
    order = sampler(windows, 4, 3, in_parts=False)
    assert (type(order), len(order)) == (MixtureSampler, 100)
    drawn = list(epochs(order, 9))
    for each in drawn:
        assert of_source(windows, each) == [20, 50, 30]
    assert not np.array_equal(drawn[0], drawn[1])


def test_a_window_is_not_drawn_again_before_all_others_of_its_source():
    windows = text((60, 15, 25), (0.2, 0.5, 0.3))
    total = np.zeros(100, int)
    for drawn in epochs(sampler(windows, 4, 0, in_parts=False), 7):
        total += np.bincount(drawn, minlength=100)
        for begin, end in zip(windows.bounds, windows.bounds[1:], strict=False):
            assert np.ptp(total[begin:end]) <= 1
    assert (total[:60].min(), total[60:75].min(), total[75:].min()) == (2, 23, 8)


def test_the_order_depends_on_seed_and_epoch_only():
    windows = text((20, 30), (0.5, 0.5))
    first, second = (MixtureSampler(windows.parts(2), 2, 5, windows) for _ in range(2))
    straight = list(epochs(first, 4))
    second.epoch = 3
    assert list(second) == straight[3].tolist()
    other = MixtureSampler(windows.parts(2), 2, 6, windows)
    assert list(other) != straight[0].tolist()


def test_sources_are_mixed_within_an_epoch():
    windows = text((500, 500), (0.5, 0.5))
    (drawn,) = epochs(sampler(windows, 4, 0, in_parts=False), 1)
    halves = np.add.reduceat(drawn < 500, np.arange(0, 1000, 100))
    assert 30 < halves.min() <= halves.max() < 70


def test_every_step_has_windows_of_one_part_and_every_part_the_shares():
    windows = text((103, 9, 40), (0.5, 0.25, 0.25))
    parts = windows.parts(4)
    assert len(parts) == 4
    assert sorted(np.concatenate(parts).tolist()) == list(range(152))
    order = sampler(windows, 4, 0, in_parts=True)
    for epoch, drawn in enumerate(epochs(order, 3)):
        steps = len(drawn) // 4
        for step in range(steps):
            part = order.part(epoch * steps + step)
            assert set(drawn[4 * step : 4 * step + 4]) <= set(parts[part].tolist())
        for part, size in zip(np.split(drawn, np.cumsum(order.sizes)[:-1]), order.sizes, strict=True):
            assert of_source(windows, part) == rounded(size, windows.shares)


def test_a_source_of_few_windows_makes_fewer_parts():
    assert [len(text((100, few), (0.5, 0.5)).parts(4)) for few in (1, 2, 3, 4, 50)] == [2, 2, 3, 4, 4]


def test_the_parts_of_a_single_source_are_the_same_in_a_mixture():
    windows = text((100, 80), (0.5, 0.5))
    alone = text((100,), (1.0,))
    for part, expected in zip(windows.parts(4), alone.parts(4), strict=True):
        assert part[part < 100].tolist() == expected.tolist()


def test_a_window_belongs_to_the_source_of_its_first_token():
    ids = np.arange(3, 44).astype(np.uint16)
    file = TokenFile(ids, np.array([0, 12, 30, 41]), np.array([12, 18, 11]), ("a", "b", "c"))
    assert Windows(file, 8, (0, 1, 2), (0.2, 0.3, 0.5)).bounds == [0, 2, 4, 5]
    assert Windows(file, 8).bounds == [0, 5]


def test_bytes_per_token_are_those_of_the_windows_to_train_on():
    windows = text((10, 30), (0.5, 0.5), bytes_per_token=[2, 4])
    assert windows.bytes_per_token == pytest.approx(3)
    single = Windows(windows.tokens, 8)
    assert single.bytes_per_token == windows.tokens.bytes / len(windows.tokens.ids)


def test_a_single_source_keeps_its_order_and_its_hash():
    windows = text((20,), (1.0,))
    order = sampler(windows, 4, 0, in_parts=False)
    assert type(order) is ShuffledSampler
    assert mixture_hash("abc", windows) == "abc"
    assert mixture_note(DataConfig(), windows) == ""


def test_the_hash_depends_on_the_shares():
    windows = [text((20, 10), shares) for shares in ((0.5, 0.5), (0.4, 0.6))]
    found = {mixture_hash(name, each) for name in ("a", "b") for each in windows}
    assert len(found) == 4
    assert all(len(each) == 64 for each in found)


def test_the_note_has_shares_and_passes():
    data = DataConfig(sources={"a": 3, "b": 1})
    expected = "windows to train on: 0.75 of them from a, which an epoch reads 1.5 times; 0.25 of them from b, "
    assert mixture_note(data, text((15, 15), (0.75, 0.25))) == f"{expected}which an epoch reads 0.5 times"


@pytest.mark.parametrize(
    ("counts", "weights", "in_parts", "message"),
    [
        ((20, 0), (1, 1), False, "'b' has 0 windows of 8 tokens, allowed at least 1; give it more text, or lower"),
        ((20, 1), (1, 1), True, "'b' has 1 windows of 8 tokens, allowed at least 2; give it more text, or lower"),
        ((20, 20), (1, 0.001), False, "'b' has a share of 0.001, none of the 40 windows of an epoch; raise its"),
        (
            (40, 40),
            (1, 0.01),
            True,
            "'b' has a share of 0.0099, none of the 16 windows that an epoch draws from a part",
        ),
    ],
)
def test_a_source_that_an_epoch_would_not_have_is_refused(counts, weights, in_parts, message):
    data = DataConfig(sources=dict(zip("ab", weights, strict=True)))
    windows = text(counts, tuple(data.shares.values())) if counts[1] else empty_second(data)
    with pytest.raises(ConfigError) as caught:
        check_sources(data, windows, sampler(windows, 4, 0, in_parts))
    assert str(caught.value).startswith(f"data.sources: {message}")


def empty_second(data):
    """Windows whose second source ends before a window begins in it."""
    ids = np.full(8 * 20 + 3, 5, np.uint16)
    file = TokenFile(ids, np.array([0, 161, 163]), np.array([160, 1]), ("a", "b"))
    return Windows(file, 8, (0, 1), tuple(data.shares.values()))


def test_the_table_of_a_step_leaves_out_its_part_in_all_sources():
    windows = text((40, 16), (0.3, 0.7))
    order = sampler(windows, 4, 0, in_parts=True)

    class Memory:
        def counted(self, ids, chosen):
            return chosen

    chosen = [HeldBack(Memory(), windows, order)._without(part) for part in range(4)]
    assert sum((~each).sum() for each in chosen) == 56 * 8
    for part, each in enumerate(chosen):
        for i in order.indices[part]:
            assert not each[8 * i + 1 : 8 * i + 9].any()


def build(folder, **settings):
    defaults = {"batch_size": 2, "log_every": 1, "save_every": 1000, "max_steps": 20}
    config = TrainConfig(output_dir=str(folder), **{"model": MODEL, **defaults, **settings})
    torch.manual_seed(0)
    network = ResNetBKForCausalLM(ResNetBKConfig.from_model_config(config.model))
    return BKTrainer(network, config, text((14, 4), (0.5, 0.5)))


@pytest.mark.parametrize("model", [MODEL, MEMORY], ids=["plain", "memory"])
def test_a_resumed_run_draws_the_same(tmp_path, model):
    straight = build(tmp_path / "straight", model=model)
    straight.run_training(None)
    first = build(tmp_path / "run", model=model, save_every=13)
    at = type(first).check_signals

    def stops(trainer):
        at(trainer)
        trainer.stopped_by = 15 if trainer.state.global_step == 13 else None

    first.check_signals = lambda: stops(first)
    first.run_training(None)
    second = build(tmp_path / "run", model=model)
    second.run_training(newest_valid(tmp_path / "run" / "checkpoints", pytest.fail))
    for p, q in zip(weights(straight), weights(second), strict=True):
        assert torch.equal(p, q)
