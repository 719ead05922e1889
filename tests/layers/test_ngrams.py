"""Tables of n-grams against counts in plain Python."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from resnet_bk.layers import ngrams
from resnet_bk.ngram_format import LEVELS

ORDERS, VOCABULARY = (1, 2, 5), 7


def text(length=3000, seed=0):
    """Return ids in which some tokens follow others more often."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(VOCABULARY, size=length)
    for i in range(1, length):
        if rng.random() < 0.6:
            ids[i] = (ids[i - 1] * 3 + 1) % VOCABULARY
    return ids.astype(np.uint16)


def what_followed(ids, orders, counted=None):
    """Return a Counter of what followed each n-gram."""
    found = defaultdict(Counter)
    for n in orders:
        for i in range(n, len(ids)):
            if counted is None or counted[i]:
                found[tuple(ids[i - n : i].tolist())][int(ids[i])] += 1
    return found


def expected(followed, successors):
    """Return level and [(token, share in 255ths)] of a context."""
    if not followed:
        return 0, []
    total, kinds = sum(followed.values()), len(followed)
    best = sorted(followed.items(), key=lambda item: (-item[1], item[0]))[:successors]
    level = min(LEVELS - 1, 1 + int(np.log2(total**2)))
    return level, [(token, -(-255 * count // (total + kinds))) for token, count in best]


def windows(ids, orders):
    reach = max(orders) - 1
    return torch.cat([torch.zeros(reach, dtype=torch.int64), torch.from_numpy(ids.astype(np.int64)) + 1])[None]


def differences(ids, table, followed, orders=ORDERS, successors=3):
    """Return the number of positions and orders at which the table has something else than the counts."""
    found = ngrams.look_up(windows(ids, orders), orders, table)
    wrong = 0
    for i in range(max(orders), len(ids)):
        for o, n in enumerate(orders):
            level, best = expected(followed.get(tuple(ids[i - n + 1 : i + 1].tolist())), successors)
            shares = (found.shares[0, i, o] * 255).round().int().tolist()
            got = [(token, share) for token, share in zip(found.tokens[0, i, o].tolist(), shares, strict=True) if share]
            wrong += (int(found.level[0, i, o]), got) != (level, best)
    return wrong


@pytest.mark.parametrize("counted", [None, 0.6])
@pytest.mark.parametrize("chunk", [ngrams.CHUNK, 77])
@pytest.mark.parametrize("part", [ngrams.PART, 800])
def test_the_table_has_what_followed(counted, chunk, part, monkeypatch):
    monkeypatch.setattr(ngrams, "CHUNK", chunk)
    monkeypatch.setattr(ngrams, "PART", part)
    ids = text()
    if counted is not None:
        counted = np.random.default_rng(1).random(len(ids)) < counted
    table = ngrams.count(ids, ORDERS, 2**20, 3, counted)
    assert table.dtype == torch.int32
    assert differences(ids, table, what_followed(ids, ORDERS, counted)) <= 3  # n-grams with the same slot


def test_other_texts_find_little():
    """What does not occur in the text is not in the table."""
    table, other = ngrams.count(text(), (5,), 2**20, 3), text(seed=1)
    found = ngrams.look_up(windows(other, (5,)), (5,), table)
    followed = what_followed(text(), (5,))
    absent = torch.tensor([tuple(other[i - 4 : i + 1].tolist()) not in followed for i in range(4, len(other))])
    assert absent.sum() > 500
    assert not found.level[0, 4:, 0][absent].any()
    assert not found.shares[0, 4:, 0][absent].any()


def test_the_most_frequent_context_keeps_its_slot():
    ids = text()
    followed = what_followed(ids, ORDERS)
    table = ngrams.count(ids, ORDERS, 32, 3)
    found = ngrams.look_up(windows(ids, ORDERS), ORDERS, table)
    window = windows(ids, ORDERS)
    slots = torch.stack([slot for slot, _ in ngrams.slots(window, ORDERS, 32)], dim=-1)[0]
    totals = torch.zeros(slots.shape, dtype=torch.int64)
    for i in range(max(ORDERS), len(ids)):
        for o, n in enumerate(ORDERS):
            totals[i, o] = sum(followed[tuple(ids[i - n + 1 : i + 1].tolist())].values())
    most = torch.zeros(32, dtype=torch.int64).scatter_reduce(0, slots.flatten(), totals.flatten(), "amax")
    there = found.level[0] > 0
    there[: max(ORDERS)] = False  # here the totals are not known
    assert there.sum() > 1000
    assert torch.equal(totals[there], most[slots[there]])
    assert differences(ids, table, followed) > 1000


def test_slots_are_spread_evenly():
    """Pairs of bytes, all of them: no slot has much more than its share."""
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256))
    slot, tag = next(ngrams.slots(pairs + 1, (2,), 1000))
    counts = slot.flatten().bincount(minlength=1000)
    assert len(counts) == 1000
    assert counts.min() > 30
    assert counts.max() < 110
    assert tag.unique().numel() > 0.6 * 2**16  # of as many random numbers, 63% are different


@pytest.mark.parametrize("rows", [1, 3, 1000, 2**24])
def test_slots_and_tags_are_in_range(rows):
    window = torch.randint(2**23, (1, 5000))
    for slot, tag in ngrams.slots(window, (1, 64), rows):
        assert slot.min() >= 0
        assert slot.max() < rows
        assert tag.min() >= 0
        assert tag.max() < 2**16


def test_a_text_that_begins_is_no_text_after_the_first_token():
    """Positions before the start differ from every token."""
    window = torch.tensor([[0, 0, 0, 0, 8], [1, 1, 1, 1, 8]])
    for n, (slot, tag) in zip(ORDERS, ngrams.slots(window, ORDERS, 2**20), strict=True):
        assert ((slot[0] == slot[1]) & (tag[0] == tag[1])).item() == (n == 1)


def test_the_largest_ids_and_the_most_rows():
    ids = np.array([2**23 - 1, 5, 2**23 - 1, 5, 2**23 - 1], np.uint32)
    table = ngrams.count(ids, (1,), 2**24, 1)
    found = ngrams.look_up(windows(ids, (1,)), (1,), table)
    assert found.tokens[0, :, 0, 0].tolist() == [5, 2**23 - 1, 5, 2**23 - 1, 5]
    assert found.shares[0, 0, 0, 0] == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize("length", [2, 3, 5])
def test_texts_shorter_than_an_order(length):
    ids = text(length)
    assert differences(ids, ngrams.count(ids, ORDERS, 2**10, 3), what_followed(ids, ORDERS)) == 0


def test_nothing_is_counted():
    assert not ngrams.count(text(50), ORDERS, 2**10, 3, np.zeros(50, bool)).any()
