"""The look-ups of n-gram memory: both backends against the definition, in one call and in pieces."""

import pytest
import torch

from resnet_bk.ops import use_backend
from resnet_bk.ops.chunked_ngrams import slots
from resnet_bk.ops.ngram_look_up import find_ngrams, recent_ngrams

ORDERS, ROWS = (1, 2, 5), 2**20


def window(ids, past=None):
    """Return the ids plus 1, after those of the past, (B, max(ORDERS))."""
    past = torch.zeros(len(ids), max(ORDERS), dtype=torch.int64) if past is None else past + 1
    return torch.cat([past, ids + 1], 1)


def by_definition(row, n):
    """Yield for each position what followed the last n tokens the last time, and how many times in a row; 0, 0."""
    for t in range(len(row)):
        ends = [s for s in range(n - 1, t) if t >= n - 1 and row[s - n + 1 : s + 1] == row[t - n + 1 : t + 1]]
        followed = [row[s + 1] for s in reversed(ends)]
        times = next((i for i, token in enumerate(followed) if token != followed[0]), len(followed))
        yield (min(times, 15), followed[0]) if followed else (0, 0)


@pytest.mark.parametrize("backend", ["numba", "chunked"])
@pytest.mark.parametrize("kinds", [2, 5, 259])
def test_it_finds_what_followed_last(backend, kinds):
    ids = torch.randint(kinds, (3, 150), generator=torch.Generator().manual_seed(kinds))
    ids[1] = 1  # one token, longer than the highest level
    with use_backend(backend):
        found, _ = recent_ngrams(window(ids), torch.full((3,), 150), torch.zeros(3, ROWS).long(), ORDERS)
    for b, row in enumerate(ids.tolist()):
        for o, n in enumerate(ORDERS):
            wanted = [[level, token << 8 | 255 if level else 0] for level, token in by_definition(row, n)]
            assert found[b, :, o].tolist() == wanted


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_backends_agree_where_contexts_share_slots_and_rows_have_padding(rows):
    generator = torch.Generator().manual_seed(rows)
    ids, lengths = torch.randint(4, (4, 90), generator=generator), torch.tensor([90, 0, 1, 50])
    entries = torch.zeros(4, rows).long()
    for _ in range(2):  # the second time with the tables of the first
        results = []
        for backend in ("numba", "chunked"):
            with use_backend(backend):
                results.append(recent_ngrams(window(ids), lengths, entries, ORDERS))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        assert not results[0][0][1].any()
        assert torch.equal(results[0][1][1], entries[1])
        entries = results[0][1]


@pytest.mark.parametrize("backend", ["numba", "chunked"])
def test_pieces_give_what_the_whole_gives(backend):
    ids = torch.randint(3, (2, 60), generator=torch.Generator().manual_seed(0))
    full = torch.full((2,), 60)
    with use_backend(backend):
        whole, after = recent_ngrams(window(ids), full, torch.zeros(2, 40).long(), ORDERS)
        entries, parts = torch.zeros(2, 40).long(), []
        for first, end in ((0, 1), (1, 2), (2, 33), (33, 60)):
            past = torch.cat([torch.full((2, 5), -1), ids[:, :first]], 1)[:, -5:]
            found, entries = recent_ngrams(window(ids[:, first:end], past), full * 0 + end - first, entries, ORDERS)
            parts.append(found)
    assert torch.equal(whole, torch.cat(parts, 1))
    assert torch.equal(after, entries)


@pytest.mark.parametrize("backend", ["numba", "chunked"])
def test_a_table_of_counts_is_read_where_slot_and_tag_agree(backend):
    tokens, rows = torch.randint(4, (2, 50)), 97
    entries = torch.randint(2**31, (rows, 4), dtype=torch.int32)
    for (slot, tag), first in zip(slots(tokens, ORDERS, rows), (0, 9, 20), strict=True):  # some contexts of each order
        entries[slot[:, first : first + 9], 0] = (tag[:, first : first + 9] << 8 | 7).int()
    with use_backend(backend):
        found = find_ngrams(tokens, entries, ORDERS)
    there = 0
    for o, (slot, tag) in enumerate(slots(tokens, ORDERS, rows)):
        for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(slot.shape[1])).tolist():
            entry = entries[slot[b, t]].tolist()
            same = entry[0] >> 8 == tag[b, t]
            there += same
            assert found[b, t, o].tolist() == ([entry[0] & 255, *entry[1:]] if same else [0] * 4)
    assert there > 40


@pytest.mark.parametrize("backend", ["numba", "chunked"])
@pytest.mark.parametrize("shape", [(0, 9), (2, 4)], ids=["no rows", "no positions"])
def test_nothing_is_looked_up_in_nothing(backend, shape):
    with use_backend(backend):
        found = find_ngrams(torch.zeros(shape, dtype=torch.int64), torch.zeros(7, 4, dtype=torch.int32), ORDERS)
    assert found.shape == (shape[0], shape[1] - 4, 3, 4)


def test_slots_are_spread_evenly():
    """Pairs of bytes, all of them: no slot has much more than its share."""
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256))
    slot, tag = next(slots(pairs + 1, (2,), 1000))
    counts = slot.flatten().bincount(minlength=1000)
    assert len(counts) == 1000
    assert counts.min() > 30
    assert counts.max() < 110
    assert tag.unique().numel() > 0.6 * 2**16  # of as many random numbers, 63% are different


@pytest.mark.parametrize("rows", [1, 3, 1000, 2**24])
def test_slots_and_tags_are_in_range(rows):
    for slot, tag in slots(torch.randint(2**23, (1, 5000)), (1, 64), rows):
        assert slot.min() >= 0
        assert slot.max() < rows
        assert tag.min() >= 0
        assert tag.max() < 2**16


def test_a_text_that_begins_is_no_text_after_the_first_token():
    """Positions before the start differ from every token."""
    tokens = torch.tensor([[0, 0, 0, 0, 8], [1, 1, 1, 1, 8]])
    for n, (slot, tag) in zip(ORDERS, slots(tokens, ORDERS, 2**20), strict=True):
        assert ((slot[0] == slot[1]) & (tag[0] == tag[1])).item() == (n == 1)


def test_the_operators_are_registered_as_torch_expects():
    tokens = window(torch.randint(4, (2, 9)))
    torch.library.opcheck(recent_ngrams, (tokens, torch.tensor([9, 4]), torch.zeros(2, 30).long(), ORDERS))
    torch.library.opcheck(find_ngrams, (tokens, torch.randint(2**31, (30, 4), dtype=torch.int32), ORDERS))
