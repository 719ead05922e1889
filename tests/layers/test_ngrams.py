"""Tables of n-grams against counts in plain Python."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from resnet_bk.layers import ngrams
from resnet_bk.ngram_format import LEVELS
from resnet_bk.ops.chunked_ngrams import slots
from resnet_bk.ops.ngram_look_up import find_ngrams

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
    found = find_ngrams(windows(ids, orders), table, orders)[0].tolist()
    wrong = 0
    for i in range(max(orders), len(ids)):
        for o, n in enumerate(orders):
            level, best = expected(followed.get(tuple(ids[i - n + 1 : i + 1].tolist())), successors)
            entry = found[i][o]
            wrong += (entry[0], [(part >> 8, part & 255) for part in entry[1:] if part & 255]) != (level, best)
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
    found = find_ngrams(windows(other, (5,)), table, (5,))[0]
    followed = what_followed(text(), (5,))
    absent = torch.tensor([tuple(other[i - 4 : i + 1].tolist()) not in followed for i in range(4, len(other))])
    assert absent.sum() > 500
    assert not found[4:, 0][absent].any()


def test_the_most_frequent_context_keeps_its_slot():
    ids = text()
    followed = what_followed(ids, ORDERS)
    table = ngrams.count(ids, ORDERS, 32, 3)
    window = windows(ids, ORDERS)
    level = find_ngrams(window, table, ORDERS)[0, :, :, 0]
    slot = torch.stack([slot for slot, _ in slots(window, ORDERS, 32)], dim=-1)[0]
    totals = torch.zeros(slot.shape, dtype=torch.int64)
    for i in range(max(ORDERS), len(ids)):
        for o, n in enumerate(ORDERS):
            totals[i, o] = sum(followed[tuple(ids[i - n + 1 : i + 1].tolist())].values())
    most = torch.zeros(32, dtype=torch.int64).scatter_reduce(0, slot.flatten(), totals.flatten(), "amax")
    there = level > 0
    there[: max(ORDERS)] = False  # here the totals are not known
    assert there.sum() > 1000
    assert torch.equal(totals[there], most[slot[there]])
    assert differences(ids, table, followed) > 1000


def test_the_largest_ids_and_the_most_rows():
    ids = np.array([2**23 - 1, 5, 2**23 - 1, 5, 2**23 - 1], np.uint32)
    table = ngrams.count(ids, (1,), 2**24, 1)
    found = find_ngrams(windows(ids, (1,)), table, (1,))[0, :, 0, 1]
    assert (found >> 8).tolist() == [5, 2**23 - 1, 5, 2**23 - 1, 5]
    assert (found[0] & 255) / 255 == pytest.approx(2 / 3, abs=0.01)


@pytest.mark.parametrize("length", [2, 3, 5])
def test_texts_shorter_than_an_order(length):
    ids = text(length)
    assert differences(ids, ngrams.count(ids, ORDERS, 2**10, 3), what_followed(ids, ORDERS)) == 0


def test_nothing_is_counted():
    assert not ngrams.count(text(50), ORDERS, 2**10, 3, np.zeros(50, bool)).any()
