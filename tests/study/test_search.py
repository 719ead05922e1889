"""The rules of a search, compared with brute force and shown by examples."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resnet_bk.config import ConfigError, DepthConfig, ModelConfig, TrainConfig
from resnet_bk.study.search import (
    Point,
    choose,
    default_space,
    hopeless,
    pareto_front,
    recipe_settings,
    with_settings,
)

# few values, so that ties are frequent
PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12)


def points(pairs):
    return [Point("", {}, bits / 2, float(time)) for bits, time in pairs]


def recipe(policy="act", **depth):
    model = ModelConfig(num_experts=2, depth=DepthConfig(policy=policy, **depth))
    return TrainConfig(model=model, max_steps=1)


@given(PAIRS)
def test_the_front_is_what_no_other_point_dominates(pairs):
    def dominated(a):
        return any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in pairs)

    front = pareto_front(points(pairs))
    assert sorted(front) == [i for i, pair in enumerate(pairs) if not dominated(pair)]
    times = [pairs[i][1] for i in front]
    assert times == sorted(times)


def test_without_points_the_front_is_empty():
    assert pareto_front([]) == []


@given(PAIRS, st.sampled_from([0.0, 0.3, 0.5, 2.0]))
def test_the_chosen_one_is_on_the_front_and_the_fastest_that_is_good_enough(pairs, max_loss):
    every = points(pairs)
    chosen = choose(every, max_loss)
    assert chosen in pareto_front(every)
    least = min(2**point.bits_per_byte for point in every)
    good = [point for point in every if 2**point.bits_per_byte <= least * (1 + max_loss)]
    assert every[chosen] in good
    assert every[chosen].ms_per_kb == min(point.ms_per_kb for point in good)


@pytest.mark.parametrize(("max_loss", "chosen"), [(0.0, 0), (0.05, 0), (0.08, 1), (0.5, 1), (1.1, 2)])
def test_loss_is_a_share_of_perplexity(max_loss, chosen):
    """0.1 bits more are 7.2% more perplexity, 1 bit more doubles it."""
    assert choose([Point("", {}, 2.0, 9.0), Point("", {}, 2.1, 5.0), Point("", {}, 3.0, 1.0)], max_loss) == chosen


@pytest.mark.parametrize(
    ("bits", "finished", "stopped"),
    [
        (3.31, [1.0, 2.0, 3.0, 2.0], True),
        (3.29, [1.0, 2.0, 3.0, 2.0], False),
        (9.0, [1.0, 2.0, 3.0], False),
        (9.0, [1.0, 2.0, 3.0, 8.5], False),
        (9.0, [], False),
    ],
)
def test_a_trial_is_stopped_where_it_is_a_tenth_worse_than_the_worst_of_four(bits, finished, stopped):
    assert hopeless(bits, finished) is stopped


def test_the_default_space_is_what_the_policy_reads():
    space = default_space(recipe("act"))
    assert space["model.depth.threshold"] == [0.5, 0.99]
    assert space.keys() == {f"model.depth.{name}" for name in ("threshold", "penalty", "target")}
    assert default_space(recipe("skip")) == default_space(recipe("act"))
    assert default_space(recipe("exit")) == {"model.depth.threshold": [0.9, 0.99]}
    assert default_space(recipe("exit", confidence="entropy")) == {"model.depth.threshold": [0.5, 0.99]}
    with pytest.raises(ConfigError, match=r"tune\.space: missing, .* model\.depth\.policy = 'none'; give --space"):
        default_space(recipe("none"))


def test_settings_are_replaced_in_any_section_and_nothing_else():
    start = recipe()
    changed = with_settings(start, {"learning_rate": 0.1, "model.d_model": 96, "model.depth.penalty": 0.7})
    depth = dataclasses.replace(start.model.depth, penalty=0.7)
    assert changed == dataclasses.replace(
        start, learning_rate=0.1, model=dataclasses.replace(start.model, d_model=96, depth=depth)
    )
    assert start == recipe()


def test_settings_are_checked_together():
    assert with_settings(recipe(), {"model.n_heads": 5, "model.d_model": 40}).model.heads == 5
    with pytest.raises(ConfigError, match=r"model\.top_k: got 3"):
        with_settings(recipe(), {"model.top_k": 3})


@pytest.mark.parametrize(("policy", "threshold"), [("act", 0.5), ("skip", 0.5), ("exit", 0.95)])
def test_the_recipe_is_a_point_of_the_space_with_its_default_threshold(policy, threshold):
    found = recipe_settings(recipe(policy), {"model.depth.threshold": [0.5, 0.99], "learning_rate": [0.001, 0.01]})
    assert found == {"model.depth.threshold": threshold, "learning_rate": 0.01}
    given = recipe_settings(recipe(policy, threshold=0.7), {"model.depth.threshold": [0.5, 0.99]})
    assert given == {"model.depth.threshold": 0.7}


@pytest.mark.parametrize(
    "space",
    [
        {"model.depth.threshold": [0.6, 0.9]},
        {"learning_rate": [0.001, 0.01], "model.depth.penalty": [0.4, 1.0]},
        {"model.d_ff": [8, 64]},
    ],
)
def test_a_recipe_outside_the_space_or_without_a_value_is_none(space):
    assert recipe_settings(recipe(), space) is None
