import math

import pytest
import torch

from resnet_bk import AdaptiveSequenceLengthWrapper, LanguageModel, LearnedSequenceLengthTrainer
from resnet_bk.wrapper import length_histogram

KEYS = {"total_loss", "ce_loss", "length_cost", "avg_predicted_length", "speedup_estimate"}


def pair(**settings):
    torch.manual_seed(0)
    base = LanguageModel(259, d_model=32, n_layers=4, num_experts=1)
    settings = {"max_seq_len": 32, "num_length_bins": 4, "length_penalty": 0.1, **settings}
    wrapper = AdaptiveSequenceLengthWrapper(base, **settings)
    return wrapper, LearnedSequenceLengthTrainer(wrapper, torch.optim.Adam(wrapper.parameters(), lr=3e-3))


def batch(seed=0, rows=8, length=32):
    ids = torch.randint(60, 90, (rows, length // 4 + 1), generator=torch.Generator().manual_seed(seed))
    ids = ids.repeat_interleave(4, dim=1)[:, : length + 1]
    return ids[:, :-1], ids[:, 1:]


@pytest.mark.parametrize("mode", ["truncate", "pool"])
def test_steps_learn_and_report(mode):
    _, trainer = pair(mode=mode)
    reports = [trainer.train_step(*batch(i)) for i in range(40)]
    assert set(reports[0]) == KEYS
    first, last = reports[0], reports[-1]
    assert last["ce_loss"] < first["ce_loss"] - 0.5
    for report in reports:
        assert 8 <= report["avg_predicted_length"] <= 32
        assert 0 < report["length_cost"] <= 0.1
        assert report["speedup_estimate"] > 0.5
    shortest, longest = (f(reports, key=lambda r: r["avg_predicted_length"]) for f in (min, max))
    assert shortest["speedup_estimate"] > longest["speedup_estimate"]


def test_steps_at_full_length_are_steps_of_the_base_model():
    wrapper, trainer = pair()
    x, y = batch()
    expected = wrapper.base_model.train()(x, targets=y).loss.item()
    report = trainer.train_step(x, y, use_adaptive_length=False)
    assert report["total_loss"] == pytest.approx(expected)
    assert set(report) == KEYS
    assert report["length_cost"] == 0
    assert report["speedup_estimate"] == 1


def test_only_the_parameters_of_the_optimizer_are_trained_and_clipped():
    wrapper, _ = pair()
    optimizer = torch.optim.SGD(wrapper.parameters_added(), lr=0.1)
    trainer = LearnedSequenceLengthTrainer(wrapper, optimizer, max_grad_norm=1e9)
    before = [p.clone() for p in wrapper.base_model.parameters()]
    gradients = []
    for _ in range(2):
        trainer.train_step(*batch())
        gradients.append(wrapper.base_model.embed.weight.grad.norm().item())
    assert all(torch.equal(p, q) for p, q in zip(before, wrapper.base_model.parameters(), strict=True))
    assert gradients[1] == pytest.approx(gradients[0], rel=0.5)  # gradients are not accumulated over steps


def test_a_loss_that_is_not_finite_makes_no_update():
    wrapper, trainer = pair()
    with torch.no_grad():
        wrapper.embed.weight[60] = math.nan
    before = [p.clone() for p in wrapper.parameters_added()]
    with pytest.raises(FloatingPointError, match="no update"):
        trainer.train_step(*batch())
    assert all(torch.equal(p, q) for p, q in zip(before, wrapper.parameters_added(), strict=True))


def test_evaluation_scores_all_positions_in_both_modes():
    wrapper, trainer = pair()
    x, y = batch()
    y = y.clone()
    y[0, :5] = -100
    ragged = [(x, y), (x[:3, :20], y[:3, :20])]
    scores = trainer.evaluate(iter(ragged))
    wrapper.eval()

    def perplexity(**mode):
        nats, count = 0.0, 0
        for inputs, targets in ragged:
            with torch.no_grad():
                logits = wrapper(inputs, **mode).logits
            nats += torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
            ).item()
            count += int((targets != -100).sum())
        return math.exp(nats / count)

    assert scores["perplexity"] == pytest.approx(perplexity(use_adaptive_length=True), rel=1e-5)
    assert scores["full_perplexity"] == pytest.approx(perplexity(), rel=1e-5)
    assert scores["avg_speedup"] > 0
    with torch.no_grad():
        found = [length_histogram(wrapper(inputs, use_adaptive_length=True).length) for inputs, _ in ragged]
    assert sum(scores["histogram"].values()) == sum(sum(h.values()) for h in found) == 11
    assert 8 <= scores["avg_predicted_length"] <= 32
    plain = trainer.evaluate(ragged, use_adaptive_length=False)
    assert plain["perplexity"] == plain["full_perplexity"] == pytest.approx(scores["full_perplexity"])
    assert plain["avg_speedup"] == 1
    assert plain["histogram"] == {}


def test_an_empty_loader_is_an_error():
    _, trainer = pair()
    with pytest.raises(ValueError, match="loader"):
        trainer.evaluate([])
