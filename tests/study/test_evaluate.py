"""Scores of a model on text, compared with scores computed one document or window at a time."""

import math

import numpy as np
import pytest
import torch

from resnet_bk.config import ConfigError, EvalConfig
from resnet_bk.data.corpus import Document
from resnet_bk.data.tokens import END_OF_DOCUMENT, TokenFile, cached
from resnet_bk.model import LanguageModel
from resnet_bk.study.evaluate import Scores, check_vocabulary, chosen_documents, evaluate
from resnet_bk.training.errors import LeakError

LENGTHS = (1, 23, 7, 8, 64, 1, 40, 9)


def tiny(**fields):
    model = LanguageModel(259, d_model=16, n_layers=2, **{"num_experts": 1, "tie_word_embeddings": False, **fields})
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.out_proj.weight *= 8  # so that scores depend on the context
    return model.double()


@pytest.fixture
def corpus(tmp_path) -> TokenFile:
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 256, n, np.uint8).tobytes() for n in LENGTHS]
    return cached([Document(f"{i}", text=text) for i, text in enumerate(texts)], tmp_path, "byte", None)[0]


def score(model, tokens, **settings) -> Scores:
    return evaluate(model, tokens, END_OF_DOCUMENT, EvalConfig("unused", **settings))


def nats_of(model, text, first, start):
    """Return -log p of text[first:], read from text[start] on."""
    logits = model(torch.from_numpy(text[start:-1]).unsqueeze(0)).logits[0].detach()
    nats = torch.nn.functional.cross_entropy(logits, torch.from_numpy(text[start + 1 :]), reduction="none")
    return float(nats[first - start - 1 :].sum())


def texts_of(tokens):
    """Return each document as it is read for scoring: the end marker, then its text."""
    return [
        np.concatenate([[END_OF_DOCUMENT], tokens.document(i)[:-1].astype(np.int64)]) for i in range(len(tokens.sizes))
    ]


MODELS = [
    ("propagator", "real", 1),
    ("propagator", "complex", 1),
    ("diagonal", "complex", 1),
    ("diagonal", "real", 3),
]


@pytest.mark.parametrize(("readout", "energy", "experts"), MODELS)
def test_document_scores_are_those_of_each_document_by_itself(corpus, readout, energy, experts):
    model = tiny(readout=readout, energy=energy, num_experts=experts)
    expected = sum(nats_of(model, text, 1, 0) for text in texts_of(corpus))
    for window, batch_size in [(1, 3), (7, 1), (8, 4), (16, 8), (1000, 2)]:
        scores = score(model, corpus, window=window, stride=1, batch_size=batch_size)
        assert scores.nats == pytest.approx(expected, rel=1e-10)
        assert (scores.tokens, scores.bytes, scores.documents) == (sum(LENGTHS), sum(LENGTHS), len(LENGTHS))


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (16, 5), (1, 1), (200, 50)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_sliding_scores_are_those_of_each_window_by_itself(corpus, window, stride, batch_size):
    model, expected = tiny(), 0.0
    for text in texts_of(corpus):
        done = 1  # text[0] is the end marker, which is read and not scored
        while done < len(text):
            stop = min(len(text), window + 1 if done == 1 else done + stride)
            expected += nats_of(model, text[:stop], done, max(0, stop - 1 - window))
            done = stop
    scores = score(model, corpus, context="sliding", window=window, stride=stride, batch_size=batch_size)
    assert scores.nats == pytest.approx(expected, rel=1e-10)
    assert scores.tokens == sum(LENGTHS)
    assert f"window of {window} tokens, the last {stride} scored" in scores.context


def test_a_sliding_window_that_holds_every_document_gives_the_document_scores(corpus):
    model = tiny()
    whole = score(model, corpus).nats
    assert score(model, corpus, context="sliding", window=64, stride=1).nats == pytest.approx(whole, rel=1e-10)
    assert score(model, corpus, context="sliding", window=8, stride=8).nats != pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("context", ["document", "sliding"])
def test_the_end_marker_is_not_scored(corpus, context):
    """The scores of a model that gives the end marker no probability are finite."""
    model = tiny()
    model.head.register_forward_hook(lambda head, x, logits: logits.index_fill(2, torch.tensor(END_OF_DOCUMENT), -1e6))
    assert score(model, corpus, context=context).nats < 1e4


def test_figures_follow_from_nats_by_their_definitions():
    values = Scores("", documents=1, bytes=100, tokens=50, words=20, nats=120.0, seconds=2.0).to_dict()
    assert values["bits_per_byte"] == pytest.approx(120 / math.log(2) / 100)
    assert values["perplexity_per_byte"] == pytest.approx(math.exp(1.2))
    assert values["perplexity_per_token"] == pytest.approx(math.exp(2.4))
    assert values["perplexity_per_word"] == pytest.approx(math.exp(6.0))
    assert values["bytes_per_second"] == 50
    huge = Scores("", documents=1, bytes=10**6, tokens=10**6, words=1, nats=10.0**6, seconds=2.0).to_dict()
    assert huge["perplexity_per_word"] == math.inf


def test_a_uniform_model_costs_the_logarithm_of_its_vocabulary(corpus):
    model = tiny()
    with torch.no_grad():
        model.head.weight.zero_()
    assert score(model, corpus).bits_per_byte == pytest.approx(math.log2(259), rel=1e-10)


def test_a_limit_in_bytes_keeps_whole_documents_spread_over_the_text(corpus):
    assert chosen_documents(corpus, None) == list(range(8))
    assert chosen_documents(corpus, 10**9) == list(range(8))
    chosen = chosen_documents(corpus, 80)
    assert chosen == [0, 2, 4, 6]
    assert chosen_documents(corpus, 1) == [0]
    scores = score(tiny(), corpus, max_bytes=80)
    assert (scores.documents, scores.bytes, scores.tokens) == (4, 112, 112)


def test_a_model_that_sees_the_future_is_not_scored(corpus):
    with pytest.raises(LeakError):
        score(tiny(causal=False), corpus)


def test_the_model_is_left_as_it_was(corpus):
    model = tiny().train()
    score(model, corpus)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_tokenizer_with_more_ids_than_the_model_is_an_error():
    check_vocabulary(tiny(), 259, "byte", "0" * 64)
    with pytest.raises(ConfigError, match=r"has 260 ids .* the model 259"):
        check_vocabulary(tiny(), 260, "big", "0" * 64)


def test_scores_have_the_mean_number_of_blocks(corpus):
    assert score(tiny(), corpus).blocks is None
    deciding = LanguageModel(259, d_model=16, n_layers=4, num_experts=1, depth={"policy": "act"}).double()
    assert score(deciding, corpus).blocks == 4  # untrained, no position stops
    with torch.no_grad():
        deciding.blocks[0].units[1].bias.fill_(100.0)
    assert score(deciding, corpus).blocks == 3  # the first, the one before that decision, the last
