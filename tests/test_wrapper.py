"""The wrapper: the base model stays as it is, every position gets logits, lengths follow the settings."""

import pytest
import torch

from resnet_bk import AdaptiveSequenceLengthWrapper, ConfigError, LanguageModel
from resnet_bk.wrapper import AdaptiveOutput, length_histogram

IDS = torch.randint(259, (6, 40), generator=torch.Generator().manual_seed(0))


def base(**fields) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(259, **{"d_model": 32, "n_layers": 4, "num_experts": 1, **fields})


def wrapper(model=None, **settings) -> AdaptiveSequenceLengthWrapper:
    settings = {"max_seq_len": 32, "num_length_bins": 4, **settings}
    return AdaptiveSequenceLengthWrapper(base_model=model or base(), **settings)


@pytest.mark.parametrize("fields", [{}, {"num_experts": 4}, {"multiscale": {"factors": [2], "layers": [2, 2, 0]}}])
@pytest.mark.parametrize("mode", ["truncate", "pool"])
@torch.no_grad()
def test_base_model_is_untouched_and_shared(fields, mode):
    model = base(**fields).eval()
    before = model(IDS).logits
    names = set(model.state_dict())
    wrapped = wrapper(model, mode=mode).eval()
    assert torch.equal(model(IDS).logits, before)
    assert torch.equal(wrapped(IDS).logits, before)
    assert set(model.state_dict()) == names
    assert wrapped.base_model is model
    shared = {id(p) for p in model.parameters()}
    assert shared <= {id(p) for p in wrapped.parameters()}
    assert len({id(p) for p in wrapped.parameters()} - shared) == len(wrapped.parameters_added())


@pytest.mark.parametrize("n", [1, 7, 8, 31, 32, 33, 100])
@pytest.mark.parametrize("mode", ["truncate", "pool"])
@torch.no_grad()
def test_every_position_of_any_length_gets_logits(n, mode):
    ids = torch.randint(259, (3, n))
    output = wrapper(mode=mode).eval()(ids, use_adaptive_length=True)
    assert isinstance(output, AdaptiveOutput)
    assert output.logits.shape == (3, n, 259)
    assert torch.isfinite(output.logits).all()
    assert output.length.predicted_lengths.shape == (3, -(-n // 32))
    assert output.length.kept.shape == (3, n)


def test_state_dict_is_that_of_a_model_with_learned_length():
    wrapped = wrapper().eval()
    model = LanguageModel.from_config(wrapped.config).eval()
    model.load_state_dict(wrapped.state_dict())
    torch.testing.assert_close(model(IDS).logits, wrapped(IDS, use_adaptive_length=True).logits)


def test_type_of_the_base_model_is_kept():
    wrapped = wrapper(base().double())
    assert {p.dtype for p in wrapped.parameters()} == {torch.float64}


@pytest.mark.parametrize("mode", ["truncate", "pool"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_targets_at_padding_are_not_counted(adaptive, mode):
    model, mask = wrapper(mode=mode), torch.ones_like(IDS, dtype=torch.bool)
    mask[0, :9] = False
    losses = []
    for targets in (IDS, IDS.masked_fill(~mask, -100)):
        torch.manual_seed(0)
        losses.append(model(IDS, targets=targets, mask=mask, use_adaptive_length=adaptive).loss)
    assert losses[0] == losses[1]


def test_a_state_of_the_other_mode_is_refused():
    model = wrapper().eval()
    for mode in (False, True):
        state = model(IDS, use_adaptive_length=mode).state
        with pytest.raises((TypeError, ValueError), match=r"state.*: expected"):
            model(IDS, state=state, use_adaptive_length=not mode)


def test_bidirectional_models_choose_from_the_whole_input():
    model = base(causal=False).eval()
    wrapped = wrapper(model, mode="truncate").eval()
    with torch.no_grad():
        output = wrapped(IDS[:, :32], use_adaptive_length=True)
    assert output.length.decided.all()
    changed = IDS[:, :32].clone()
    changed[:, -1] = 3
    with torch.no_grad():
        other = wrapped(changed, use_adaptive_length=True)
    assert (other.length.length_probs != output.length.length_probs).any()


def test_histogram_counts_windows_that_decided():
    output = wrapper().eval()(IDS, use_adaptive_length=True)
    histogram = length_histogram(output.length)
    assert sum(histogram.values()) == int(output.length.decided.sum())
    assert set(histogram) <= {8, 16, 24, 32}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pooling": "global"}, "would leak its end to its beginning"),
        ({"num_length_bins": 0}, "num_length_bins"),
        ({"bins": 4}, "num_length_bins here"),
        ({"penalty": 0.1}, "length_penalty here"),
        ({"num_length_bins": 64}, "at most one per position"),
        ({"trunk": 4}, "model.length.trunk: got 4 of 4 blocks"),
        ({"mode": "pool", "training": "expected"}, "a computation of its own"),
        ({"placement": "learned", "training": "sampled"}, "where lengths are sampled"),
        ({"temprature": 2.0}, "did you mean 'temperature'"),
        ({"levels": 2, "num_length_bins": 3}, "product of two"),
        ({"levels": 2, "placement": "continuous"}, "there are no bins"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ConfigError, match=words) as caught:
        wrapper(**settings)
    assert "\n" not in str(caught.value)


def test_models_that_have_a_length_already_are_refused():
    model = LanguageModel(259, n_layers=4, num_experts=1, length={"bins": 4, "max_length": 32})
    with pytest.raises(ConfigError, match="already"):
        AdaptiveSequenceLengthWrapper(model)
    with pytest.raises(ConfigError, match="global"):
        AdaptiveSequenceLengthWrapper(base(causal=False), pooling="prefix")
