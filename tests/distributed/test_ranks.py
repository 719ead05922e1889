"""Communication between the processes of a run."""

import pytest

from resnet_bk.training.ranks import Ranks


def exchange(rank):
    ranks = Ranks.start()
    texts = [ranks.broadcast(lambda text=text: text) for text in ("", "a folder/ä\udc80 ", "x" * 100_000)]
    order = []
    with ranks.rank_zero_first():
        order.append(rank)
    return ranks.max(rank, -rank, 5.0), ranks.mean(rank), texts, ranks.is_rank_zero


def test_all_ranks_get_the_same_values(workers):
    answers = workers.run(3, exchange)
    for rank, (largest, mean, texts, is_rank_zero) in enumerate(answers):
        assert largest == [2.0, 0.0, 5.0]
        assert mean == pytest.approx(1.0)
        assert texts == ["", "a folder/ä\udc80 ", "x" * 100_000]
        assert is_rank_zero == (rank == 0)


def fail(rank):
    ranks = Ranks.start()
    try:
        ranks.broadcast(lambda: 1 / 0)
    except ZeroDivisionError:
        return "raised"
    except SystemExit as exit:
        return exit.code
    return "continued"


def test_when_rank_zero_fails_the_others_exit(workers):
    assert workers.run(2, fail) == ["raised", 1]


def test_a_single_process_needs_no_group():
    ranks = Ranks.start()
    assert (ranks.rank, ranks.world_size, ranks.group) == (0, 1, None)
    assert ranks.broadcast(lambda: "text") == "text"
    assert ranks.max(3.0, -1.0) == [3.0, -1.0]
    assert ranks.mean(3.0) == 3.0
    with pytest.raises(ZeroDivisionError), ranks.rank_zero_first():
        _ = 1 / 0
    ranks.shutdown()
