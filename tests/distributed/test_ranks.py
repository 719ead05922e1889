"""Communication between the processes of a run."""

import pytest

from resnet_bk.config import ConfigError
from resnet_bk.training.ranks import Ranks, fail_together


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


def outcome(function):
    """Return what `function` returned, the status of its exit, or its error."""
    try:
        return function()
    except SystemExit as exit:
        return exit.code
    except (ZeroDivisionError, ConfigError) as error:
        return str(error)


def fail(rank, failing, error):
    ranks = Ranks.start()

    def block():
        with ranks.rank_zero_first():
            if rank == failing:
                raise error
        return "continued"

    return outcome(block)


@pytest.mark.parametrize("failing", [0, 1])
def test_when_one_rank_fails_the_others_exit(workers, failing):
    for error, status in ((ZeroDivisionError("zero"), 1), (ConfigError("zero"), 2)):
        found = workers.run(3, fail, failing, error)
        assert found == [("zero" if rank == failing else status) for rank in range(3)]


def compare(rank, settings, failures):
    def start():
        if rank in failures:
            return fail_together(failures[rank])
        return Ranks.start().check_same(settings[min(rank, len(settings) - 1)], "start them alike")

    return outcome(start)


@pytest.mark.parametrize(
    ("settings", "failures", "message"),
    [
        ([{"seed": 1}], {}, None),
        ([{"seed": 1, "width": 16}, {"seed": 2, "width": 16}], {}, "seed: got 2 on rank 1, 1 on rank 0"),
        ([{"seed": 1}, {}], {}, "seed: got None on rank 1, 1 on rank 0"),
        ([{}, {}, {"seed": "x"}], {}, "seed: got 'x' on rank 2, None on rank 0"),
        ([{"seed": 1}], {2: "no such file"}, "rank 2: no such file"),
        ([{"seed": 1}], {0: "bad seed", 1: "bad seed"}, "bad seed"),
        ([{"seed": 1}], {0: "bad seed", 1: "bad rate", 2: "bad seed"}, "bad seed; rank 1: bad rate"),
    ],
)
def test_settings_that_differ_end_all_ranks(workers, settings, failures, message):
    first, *others = workers.run(3, compare, settings, failures)
    assert first == (message + "; start them alike" if message and not failures else message)
    assert others == [2, 2] if message or failures else others == [None, None]


@pytest.mark.parametrize(("name", "text"), [("WORLD_SIZE", "abc"), ("WORLD_SIZE", "0"), ("RANK", "-1"), ("RANK", "x")])
def test_odd_variables_of_a_launcher_are_named(monkeypatch, name, text):
    for variable, value in {"RANK": "0", "WORLD_SIZE": "2", name: text}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"^{name}: got '{text}', allowed an integer of at least"):
        Ranks.start()


def test_a_single_process_needs_no_group():
    ranks = Ranks.start()
    assert (ranks.rank, ranks.world_size, ranks.group) == (0, 1, None)
    assert ranks.broadcast(lambda: "text") == "text"
    assert ranks.max(3.0, -1.0) == [3.0, -1.0]
    assert ranks.mean(3.0) == 3.0
    with pytest.raises(ZeroDivisionError), ranks.rank_zero_first():
        _ = 1 / 0
    ranks.shutdown()
