"""Samples follow the probabilities that the filters leave, as in transformers."""

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from resnet_bk.inference.sampling import Sampler, Sampling, choose

V, DRAWS = 12, 20_000


def shares(settings, logits, prompt=()):
    sampler, counts = Sampler(settings, V, list(prompt)), np.zeros(V)
    for _ in range(DRAWS):
        seen = sampler.seen.copy()
        counts[sampler(logits)] += 1
        sampler.seen = seen
    return counts / DRAWS


@pytest.mark.parametrize(
    ("fields", "theirs"),
    [
        ({"temperature": 1.0}, []),
        ({"temperature": 0.5}, [TemperatureLogitsWarper(0.5)]),
        ({"temperature": 1.0, "top_k": 3}, [TopKLogitsWarper(3)]),
        ({"temperature": 1.0, "top_k": 99}, []),
        ({"temperature": 1.5, "top_p": 0.6}, [TemperatureLogitsWarper(1.5), TopPLogitsWarper(0.6)]),
        ({"temperature": 1.0, "top_p": 1e-6}, [TopPLogitsWarper(1e-6)]),
        ({"temperature": 1.0, "min_p": 0.2}, [MinPLogitsWarper(0.2)]),
        ({"temperature": 1.0, "min_p": 1.0}, [MinPLogitsWarper(1.0)]),
        ({"temperature": 1.0, "repetition_penalty": 1.7}, [RepetitionPenaltyLogitsProcessor(1.7)]),
        (
            {"temperature": 0.8, "top_k": 6, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.3},
            [
                RepetitionPenaltyLogitsProcessor(1.3),
                TemperatureLogitsWarper(0.8),
                TopKLogitsWarper(6),
                TopPLogitsWarper(0.8),
                MinPLogitsWarper(0.1),
            ],
        ),
    ],
)
def test_samples_follow_the_probabilities_of_transformers(fields, theirs):
    prompt, logits = [1, 4, 4], np.random.default_rng(3).normal(size=V).astype(np.float32) * 1.5
    scores = LogitsProcessorList(theirs)(torch.tensor([prompt]), torch.from_numpy(logits)[None].clone())
    expected = scores.softmax(-1)[0].numpy()
    got = shares(Sampling(**fields), logits, prompt)
    np.testing.assert_allclose(got, expected, atol=0.012)
    assert (got[expected == 0] == 0).all()


def test_temperature_0_takes_the_most_likely_token_after_the_penalty():
    logits = np.array([1.0, 3.0, 2.9, -1.0], np.float32)
    assert Sampler(Sampling(), 4, [])(logits) == 1
    sampler = Sampler(Sampling(repetition_penalty=2.0), 4, [])
    assert [sampler(logits) for _ in range(3)] == [1, 2, 1]  # 1.5 and 1.45 once both are seen
    negative = np.array([-1.0, -1.1], np.float32)
    assert Sampler(Sampling(repetition_penalty=2.0), 2, [0])(negative) == 1


def test_a_seed_decides_the_tokens():
    logits = np.zeros(V, np.float32)
    runs = [
        [sampler(logits) for _ in range(30)]
        for sampler in (Sampler(Sampling(temperature=1.0), V, [], s) for s in (5, 5, 6))
    ]
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) > 5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_refused(bad, temperature):
    logits = np.zeros(V, np.float32)
    logits[3] = bad
    with pytest.raises(ValueError, match="logits: one is NaN or infinite"):
        Sampler(Sampling(temperature=temperature), V, [])(logits)


def test_texts_together_have_the_tokens_of_each_alone():
    settings = [
        *(Sampling(temperature=t) for t in (0, 1e-6, 0.3, 0.7, 1.0, 100.0)),
        Sampling(temperature=1.0, top_k=3),
        Sampling(temperature=1.0, top_p=0.5),
        Sampling(temperature=1.0, min_p=0.1),
        Sampling(temperature=0.0, repetition_penalty=1.5),
    ]
    random = np.random.default_rng(0)
    for dtype in (np.float32, np.float64):
        alone, together = ([Sampler(s, 259, [3, 4], seed) for seed, s in enumerate(settings)] for _ in range(2))
        for _ in range(300):
            logits = (3 * random.standard_normal((len(settings), 259))).astype(dtype)
            assert choose(together, logits) == [sampler(x) for sampler, x in zip(alone, logits, strict=True)]
    assert choose(together[2:3], logits[2:3]) == [alone[2](logits[2])]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error_for_all(bad):
    logits = np.zeros((2, V))
    logits[1, 3] = bad
    with pytest.raises(ValueError, match="logits: one is NaN or infinite"):
        choose([Sampler(Sampling(), V, []), Sampler(Sampling(), V, [])], logits)
