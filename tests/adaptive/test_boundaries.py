"""Where chunks end."""

import pytest
import torch

from resnet_bk.adaptive.boundaries import (
    LONGEST,
    AfterWords,
    FixedStride,
    Router,
    WordRouter,
    at_most,
    ends_of_words,
    since_last,
)
from resnet_bk.config import ModelConfig

CONFIG = ModelConfig(d_model=8)


def after_words(text, factor=4, since=0, before=0):
    ids = torch.tensor([[b + 3 for b in text.encode()]])
    since, before = torch.tensor([since]), torch.tensor([before])
    decision = AfterWords(CONFIG, factor)(torch.zeros(*ids.shape, 8), ids, since, before)
    assert decision.probability is None
    return "".join("|" if c else "." for c in at_most(decision.closes, since, LONGEST * factor)[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two", "...|..."),
        ("f(x, y):", ".|.|..|."),
        ("a\n\nb", ".||."),
        ("  ab", "...."),
        ("an_id2 x", "......|."),
        ("schön gut", "......|..."),
        ("abcdefghijkl m", ".......|....|."),
        ("        x", ".......|."),
    ],
)
def test_words_lines_and_long_runs(text, expected):
    assert after_words(text) == expected


def test_a_text_in_two_pieces_closes_where_the_whole_does():
    text = "def f(alpha, beta):\n    return alphabetagamma  # x\n"
    whole = after_words(text)
    for cut in range(1, len(text)):
        first = whole[:cut]
        since = cut if "|" not in first else cut - 1 - first.rindex("|")
        assert first + after_words(text[cut:], since=since, before=ord(text[cut - 1]) + 3) == whole


@pytest.mark.parametrize("factor", [2, 3, 7])
def test_fixed_strides_continue_across_pieces(factor):
    decision = FixedStride(CONFIG, factor)(torch.zeros(1, 20, 8), None, torch.tensor([1]), torch.tensor([0]))
    assert decision.closes[0].nonzero().flatten().tolist() == [t for t in range(20) if (t + 2) % factor == 0]


def test_a_router_starts_near_its_ratio_and_decides_at_one_half():
    torch.manual_seed(0)
    router = Router(ModelConfig(d_model=64), 4)
    nothing = torch.zeros(8, dtype=torch.int64)
    decision = router(torch.randn(8, 500, 64), nothing.unsqueeze(1), nothing, nothing)
    assert torch.equal(decision.closes, decision.probability > 0.5)
    assert 0.15 < decision.closes.float().mean() < 0.35


def test_a_word_router_starts_as_words_and_can_leave_them():
    torch.manual_seed(0)
    router = WordRouter(ModelConfig(d_model=64), 4)
    ids = torch.tensor([[b + 3 for b in b"import os\n\nprint(os.name)  # a name\n"]])
    nothing, x = torch.zeros(1, dtype=torch.int64), torch.randn(1, ids.shape[1], 64)
    ends = ends_of_words(ids, nothing)
    assert torch.equal(router(x, ids, nothing, nothing).closes, ends)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.1)
    for _ in range(
        100
    ):  # the target is all but ends of words: a threshold does not suffice, `trust` must change its sign
        probability = router(x, ids, nothing, nothing).probability
        torch.nn.functional.binary_cross_entropy(probability, (~ends).float()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(router(x, ids, nothing, nothing).closes, ~ends)


def test_since_last():
    marks = torch.tensor([[0, 0, 1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    assert since_last(marks, torch.tensor([5, 2])).tolist() == [[6, 7, 0, 1, 0, 0, 1, 2], [3, 4, 5, 6, 7, 8, 9, 10]]
