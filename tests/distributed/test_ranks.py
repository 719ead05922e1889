"""What processes tell each other."""

import pytest

from resnet_bk.training.ranks import Ranks


def exchange(rank):
    ranks = Ranks.start()
    texts = [ranks.told(lambda text=text: text) for text in ("", "a folder/ä\udc80 ", "x" * 100_000)]
    order = []
    with ranks.first():
        order.append(rank)
    return ranks.largest(rank, -rank, 5.0), ranks.mean(rank), texts, ranks.is_first


def test_all_ranks_hear_the_same(crew):
    answers = crew.run(3, exchange)
    for rank, (largest, mean, texts, is_first) in enumerate(answers):
        assert largest == [2.0, 0.0, 5.0]
        assert mean == pytest.approx(1.0)
        assert texts == ["", "a folder/ä\udc80 ", "x" * 100_000]
        assert is_first == (rank == 0)


def fail(rank):
    ranks = Ranks.start()
    try:
        ranks.told(lambda: 1 / 0)
    except ZeroDivisionError:
        return "raised"
    except SystemExit as left:
        return left.code
    return "went on"


def test_where_the_first_fails_the_others_leave(crew):
    assert crew.run(2, fail) == ["raised", 1]


def test_one_process_is_alone_and_needs_no_group():
    ranks = Ranks.start()
    assert (ranks.rank, ranks.world, ranks.group) == (0, 1, None)
    assert ranks.told(lambda: "text") == "text"
    assert ranks.largest(3.0, -1.0) == [3.0, -1.0]
    assert ranks.mean(3.0) == 3.0
    with pytest.raises(ZeroDivisionError), ranks.first():
        _ = 1 / 0
    ranks.leave()
