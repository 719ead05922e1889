"""Recent n-grams: both backends against the definition, in one call and in pieces."""

import pytest
import torch

from resnet_bk.layers.ngrams import slots
from resnet_bk.ops import use_backend
from resnet_bk.ops.recent_ngrams import recent_ngrams

ORDERS, ROWS = (1, 2, 5), 2**20


def contexts(ids, rows=ROWS, past=None):
    """Return slot and tag of the contexts before and at each position."""
    past = torch.zeros(len(ids), max(ORDERS), dtype=torch.int64) if past is None else past + 1
    return [torch.stack(part, -1) for part in zip(*slots(torch.cat([past, ids + 1], 1), ORDERS, rows), strict=True)]


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
        level, token, _ = recent_ngrams(*contexts(ids), ids, torch.full((3,), 150), torch.zeros(3, ROWS).long())
    for b, row in enumerate(ids.tolist()):
        for o, n in enumerate(ORDERS):
            wanted = list(by_definition(row, n))
            assert [*zip(level[b, :, o].tolist(), token[b, :, o].tolist(), strict=True)] == wanted


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_backends_agree_where_contexts_share_slots_and_rows_have_padding(rows):
    generator = torch.Generator().manual_seed(rows)
    ids, lengths = torch.randint(4, (4, 90), generator=generator), torch.tensor([90, 0, 1, 50])
    entries = torch.zeros(4, rows).long()
    for _ in range(2):  # the second time with the tables of the first
        results = []
        for backend in ("numba", "chunked"):
            with use_backend(backend):
                results.append(recent_ngrams(*contexts(ids, rows), ids, lengths, entries))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        assert not results[0][0][1].any()
        assert torch.equal(results[0][2][1], entries[1])
        entries = results[0][2]


@pytest.mark.parametrize("backend", ["numba", "chunked"])
def test_pieces_give_what_the_whole_gives(backend):
    ids = torch.randint(3, (2, 60), generator=torch.Generator().manual_seed(0))
    full = torch.full((2,), 60)
    with use_backend(backend):
        whole = recent_ngrams(*contexts(ids, 40), ids, full, torch.zeros(2, 40).long())
        entries, found = torch.zeros(2, 40).long(), []
        for first, end in ((0, 1), (1, 2), (2, 33), (33, 60)):
            past = torch.cat([torch.full((2, 5), -1), ids[:, :first]], 1)[:, -5:]
            *some, entries = recent_ngrams(
                *contexts(ids[:, first:end], 40, past), ids[:, first:end], full * 0 + end - first, entries
            )
            found.append(some)
    for whole_part, parts in zip(whole, zip(*found, strict=True), strict=False):
        assert torch.equal(whole_part, torch.cat(parts, 1))
    assert torch.equal(whole[2], entries)


def test_the_operator_is_registered_as_torch_expects():
    ids = torch.randint(4, (2, 9))
    torch.library.opcheck(recent_ngrams, (*contexts(ids, 30), ids, torch.tensor([9, 4]), torch.zeros(2, 30).long()))
