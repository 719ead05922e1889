"""The engine writes what a sampler would choose step by step."""

import contract_checks as checks
import numpy as np
import pytest
import torch
from test_contracts import TECHNIQUES

from resnet_bk.inference.sampling import Sampler, Sampling
from resnet_bk.ops import available_backends

if "numba" not in available_backends():
    pytest.skip("needs numba", allow_module_level=True)

from resnet_bk.engine.compiler import engine_of

GIVEN, COUNT = [5, 7, 9], 40
NAMES = "propagator-bonds", "recent", "recent+all"


def step_by_step(engine, sampler, end=-1):
    """Return the tokens, the logits after the last one that was read, the state, and the blocks that ran."""
    state, tokens, blocks = engine.start(), [], 0
    for token in GIVEN:
        logits = engine.step([token], state)[0]
        blocks += int(engine.blocks(state)[0])
    while len(tokens) < COUNT:
        tokens.append(sampler(logits))
        if tokens[-1] == end or len(tokens) == COUNT:
            return tokens, logits, state, blocks
        logits = engine.step(tokens[-1:], state)[0]
        blocks += int(engine.blocks(state)[0])
    return None


def new(engine):
    return engine.start(), np.zeros(engine.code.vocabulary, engine.code.weights.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_a_sampler_chooses_step_by_step(name, temperature, dtype):
    engine = engine_of(checks.build(**TECHNIQUES[name]).to(dtype))
    sampling = Sampling(temperature=temperature)
    tokens, expected, after, blocks = step_by_step(engine, Sampler(sampling, engine.code.vocabulary, [], seed=3))
    sampler, (state, logits) = Sampler(sampling, engine.code.vocabulary, [], seed=3), new(engine)
    written, unread, read, ran = [], GIVEN, 0, 0
    for count in (1, 2, COUNT - 3):
        result = engine.write(unread, state, logits, sampler.random(count), temperature)
        assert len(result.tokens) == count
        written, unread = written + result.tokens, result.tokens[-1:]
        read, ran = read + result.read, ran + result.blocks
    assert written == tokens
    assert len(set(tokens)) > 1 or not temperature
    assert (read, ran) == (len(GIVEN) + COUNT - 1, blocks)
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_array_equal(state.numbers, after.numbers)
    np.testing.assert_array_equal(state.wholes, after.wholes)


def test_nothing_is_chosen_after_the_end_of_a_text():
    engine = engine_of(checks.build())
    sampling = Sampling(temperature=2.0)
    whole = step_by_step(engine, Sampler(sampling, engine.code.vocabulary, [], seed=1))[0]
    end = whole[10]
    tokens, expected, after, _ = step_by_step(engine, Sampler(sampling, engine.code.vocabulary, [], seed=1), end)
    state, logits = new(engine)
    random = Sampler(sampling, engine.code.vocabulary, [], seed=1).random(COUNT)
    assert engine.write(GIVEN, state, logits, random, 2.0, end).tokens == tokens == whole[: whole.index(end) + 1]
    np.testing.assert_array_equal(logits, expected)
    np.testing.assert_array_equal(state.numbers, after.numbers)


@pytest.mark.parametrize("random", [1e-12, 1 - 2**-53, 1.0])
def test_the_first_and_the_last_likely_token(random):
    engine = engine_of(checks.build())
    state, logits = new(engine)
    logits[:] = -200
    logits[[4, 17]] = 1.0
    chosen = engine.write([], state, logits, [random], 1.0).tokens
    assert chosen == [4 if random < 0.5 else 17] or (random == 1 and chosen == [30])  # never one that does not exist


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error(wrong):
    engine = engine_of(checks.build())
    state, logits = new(engine)
    logits[3:] = wrong
    if wrong == -np.inf:
        assert engine.write([], state, logits, [0.5], 1.0).tokens[0] < 3
        logits[:] = wrong
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        engine.write([], state, logits, [0.5])


def test_bad_input_is_refused():
    engine = engine_of(checks.build())
    with pytest.raises(ValueError, match="expected one row, got 2"):
        engine.write([1], engine.start(2), new(engine)[1])
    for token in (-1, 31):
        with pytest.raises(IndexError, match="allowed 0 to 30"):
            engine.write([1, token], *new(engine))
