"""Measured costs, decoding at temperature 0 and rank correlation."""

import numpy as np
import pytest
import torch

from resnet_bk.engine.decoder import decoder_of
from resnet_bk.inference.decoding import generate
from resnet_bk.model import LanguageModel
from resnet_bk.study import measure as module
from resnet_bk.study.measure import measure, rank_correlation

TEXT = np.random.default_rng(0).integers(0, 31, 500, dtype=np.uint16)  # shorter than the prefill


@pytest.mark.parametrize("readout", ["propagator", "diagonal"])
def test_flops_per_byte_are_those_of_the_matrices(readout):
    """Each entry of a matrix takes two operations per token, and each of a state 7; everything else is small."""
    model = LanguageModel(259, d_model=64, n_layers=2, num_experts=1, readout=readout)
    matrices = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    expected = 2 * sum(weight.numel() for weight in matrices)
    expected += 7 * 2 * 2 * 32**2 if readout == "propagator" else 0  # two blocks of two heads of 32 channels
    costs = measure(model, TEXT, bytes_per_token=1.0, batch=1, length=64, new=2, repeats=1)
    assert costs.flops_per_byte == pytest.approx(expected, rel=0.1)
    assert costs.parameters == sum(p.numel() for p in model.parameters())
    halved = measure(model, TEXT, bytes_per_token=2.0, batch=1, length=64, new=2, repeats=1)
    assert halved.flops_per_byte == pytest.approx(costs.flops_per_byte / 2)


def test_only_the_experts_used_count():
    one, four = (
        measure(
            LanguageModel(31, d_model=32, n_layers=1, num_experts=n), TEXT, 1.0, batch=1, length=1024, new=2, repeats=1
        )
        for n in (1, 4)
    )
    assert one.flops_per_byte <= four.flops_per_byte <= 1.1 * one.flops_per_byte
    assert four.parameters > 2 * one.parameters


def test_rates_are_positive_and_the_model_is_left_as_it_was():
    model = LanguageModel(31, d_model=16, n_layers=1, num_experts=1).train()
    costs = measure(model, TEXT, 1.0, batch=2, length=16, new=3, repeats=1)
    assert costs.prefill > 0
    assert costs.decode > 0
    assert (costs.prefill_setting, costs.decode_setting) == ("2 x 16 tokens", "1 sequence, 3 tokens")
    assert model.training


@torch.no_grad()
def test_decoding_reads_the_text_with_the_engine_or_the_model(monkeypatch):
    model = LanguageModel(31, d_model=16, n_layers=2, depth={"policy": "exit"}).eval()
    read = {"EngineReader": [], "ModelReader": []}
    for name, found in read.items():
        kind = getattr(module, name)
        monkeypatch.setattr(
            kind, "read", lambda self, ids, found=found, read=kind.read: found.append(ids) or read(self, ids)
        )
    tokens = TEXT[:70].tolist()
    monkeypatch.setattr(decoder_of(model), "asked", False)
    assert module.one_by_one(model, tokens) > 0
    expected = [tokens[:64], *([token] for token in tokens[64:])]
    assert (read["ModelReader"], read["EngineReader"]) == (expected, [])
    monkeypatch.setattr(decoder_of(model), "asked", None)
    if decoder_of(model).uses_engine():
        assert module.one_by_one(model, tokens) > 0
        assert (read["ModelReader"], read["EngineReader"]) == (expected, [tokens[:64], tokens[64:]])


@torch.no_grad()
def test_costs_are_those_of_the_text():
    """A model whose chunks end with words computes more chunks, and so more FLOPs, where words are short."""
    torch.manual_seed(0)
    scales = {"factors": [8], "layers": [0, 3, 0], "boundaries": "whitespace"}
    model = LanguageModel(259, d_model=32, num_experts=1, multiscale=scales)
    short, long = (np.frombuffer(word * 200, np.uint8).astype(np.uint16) + 3 for word in (b"a ", b"abcdefghijk "))
    costs = [measure(model, text, 1.0, batch=1, length=256, new=2, repeats=1).flops_per_byte for text in (short, long)]
    assert costs[0] > 2 * costs[1]


@pytest.mark.parametrize("readout", ["propagator", "diagonal"])
@pytest.mark.parametrize("energy", ["real", "complex"])
def test_greedy_decoding_is_the_argmax_of_full_forwards(readout, energy):
    fields = {"d_model": 16, "n_layers": 2, "num_experts": 3, "tie_word_embeddings": False}
    model = LanguageModel(31, readout=readout, energy=energy, **fields).double().eval()
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.out_proj.weight *= 8
    prompt = torch.randint(31, (3, 6))
    ids = prompt
    for _ in range(20):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generate(model, prompt, 20), ids[:, 6:])
    assert len(set(ids[0, 6:].tolist())) > 3


def test_rank_correlation_gives_ties_the_mean_of_their_ranks():
    """Ranked by their position, equal values would correlate with anything that rises along the text."""
    rising = torch.arange(200.0)
    mostly_constant = torch.zeros(200)
    mostly_constant[7] = 1
    assert abs(rank_correlation(mostly_constant, rising)) < 0.15
    assert rank_correlation(rising, rising**3) == pytest.approx(1)
    assert rank_correlation(rising, -rising) == pytest.approx(-1)
    assert rank_correlation(torch.ones(5), torch.arange(5)) == 0
    # Spearman's rho of [1, 2.5, 2.5, 4] and [1, 3, 2, 4]
    assert rank_correlation(torch.tensor([1.0, 2, 2, 3]), torch.tensor([1.0, 3, 2, 4])) == pytest.approx(0.948683)
