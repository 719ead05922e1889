import pytest
import torch

from resnet_bk.adaptive.length_predictor import Lengths, SequenceLengthPredictor
from resnet_bk.config import ConfigError
from resnet_bk.model import LanguageModel

LIKE = torch.zeros(())


def test_lengths_are_even_geometric_or_learned():
    even = SequenceLengthPredictor(32).values(LIKE)
    assert even.tolist() == [16, 32, 48, 64, 80, 96, 112, 128]
    geometric = SequenceLengthPredictor(32, placement="geometric").values(LIKE)
    assert geometric[[0, -1]].tolist() == [16, 128]
    ratios = geometric[1:] / geometric[:-1]
    assert (ratios - 8 ** (1 / 7)).abs().max() < 0.05
    learned = SequenceLengthPredictor(32, placement="learned")
    torch.testing.assert_close(learned.values(LIKE), even)
    learned.gaps.data[0] = 1.0
    moved = learned.values(LIKE)
    torch.testing.assert_close(moved[[0, -1]], torch.tensor([16.0, 128.0]))
    assert moved[1] > 40


@pytest.mark.parametrize("bins", [1, 3, 8])
@pytest.mark.parametrize("placement", ["even", "geometric", "learned", "continuous"])
@pytest.mark.parametrize("levels", [1, 2])
def test_probabilities_and_choices_are_allowed_ones(bins, placement, levels):
    if levels == 2 and (bins != 8 or placement == "continuous"):
        pytest.skip("two levels need bins to group")
    torch.manual_seed(0)
    predictor = SequenceLengthPredictor(32, bins, 100, placement=placement, levels=levels)
    choices = predictor(torch.randn(7, 3, 32) * 5)
    assert choices.probabilities.shape == (7, 3, 1 if placement == "continuous" else bins)
    torch.testing.assert_close(choices.probabilities.sum(-1), torch.ones(7, 3))
    chosen = predictor.choose(*choices)
    assert chosen.shape == (7, 3)
    assert chosen.dtype == torch.int64
    assert predictor.shortest <= chosen.min()
    assert chosen.max() <= 100
    if placement in ("even", "geometric"):
        assert set(chosen.flatten().tolist()) <= {int(v) for v in predictor.values(LIKE)}


def test_two_levels_are_one_distribution():
    torch.manual_seed(0)
    predictor = SequenceLengthPredictor(16, 8, 128, levels=2)
    pooled = torch.randn(5, 16)
    probabilities = predictor(pooled).probabilities
    scores = predictor.out(torch.nn.functional.silu(predictor.hidden(predictor.norm(pooled))))
    coarse, fine = scores[:, :4].softmax(-1), scores[:, 4:].view(5, 4, 2).softmax(-1)
    torch.testing.assert_close(probabilities, (coarse.unsqueeze(-1) * fine).flatten(1))


def test_expected_length_and_reach_agree():
    """The expected length is the sum over positions of the probability to reach them, for every placement."""
    torch.manual_seed(0)
    for placement in ("even", "geometric", "learned", "continuous"):
        predictor = SequenceLengthPredictor(16, 4, 64, placement=placement).double()
        choices = predictor(torch.randn(6, 1, 16, dtype=torch.float64))
        offsets = torch.arange(-64, 192).expand(6, -1)  # ramps reach beyond both ends
        values = choices.values if choices.values.dim() == 1 else choices.values.expand(6, 256, 1)
        probabilities = choices.probabilities.expand(6, 256, -1)
        reach = predictor.reach(values, probabilities, offsets)
        torch.testing.assert_close(reach.sum(1) - 64, choices.expected.squeeze(1), atol=0.51, rtol=0)


@pytest.mark.parametrize("placement", ["even", "learned", "continuous"])
def test_gradient_moves_lengths_where_the_gain_is(placement):
    """If the first 40 of 64 positions gain from depth, the expected length settles near 40."""
    torch.manual_seed(0)
    predictor = SequenceLengthPredictor(16, 8, 64, placement=placement)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=0.02)
    pooled, offsets = torch.randn(32, 16), torch.arange(64).expand(32, -1)
    gain = torch.where(torch.arange(64) < 40, 1.0, -1.0)
    for _ in range(200):
        choices = predictor(pooled)
        values = choices.values if choices.values.dim() == 1 else choices.values.unsqueeze(1).expand(-1, 64, -1)
        reach = predictor.reach(values, choices.probabilities.unsqueeze(1).expand(-1, 64, -1), offsets)
        optimizer.zero_grad()
        (reach * -gain).mean().backward()
        optimizer.step()
    assert (predictor(pooled).expected - 40).abs().max() < 6


def test_weights_are_positive():
    predictor = SequenceLengthPredictor(16, pooling="attention")
    weights = predictor.weigh(torch.randn(3, 5, 16) * 100)
    assert weights.shape == (3, 5)
    assert ((weights > 0) & (weights <= 1)).all()
    assert (SequenceLengthPredictor(16).weigh(torch.randn(2, 16)) == 1).all()


def test_certainty_has_a_finite_gradient():
    """The choice is so certain that the other probabilities are zero in float32."""
    scores = torch.tensor([[300.0, 0.0, -300.0]], requires_grad=True)
    lengths = Lengths(torch.tensor([1.0, 2.0, 3.0]), scores.log_softmax(-1))
    (lengths.entropy + lengths.expected).sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_predicted_numbers_reach_both_ends():
    predictor = SequenceLengthPredictor(16, 8, 100, placement="continuous")
    values = torch.tensor([[12.0], [17.9], [18.1], [93.0], [99.0]])
    assert predictor.choose(values, torch.zeros(5, 1)).tolist() == [12, 12, 24, 96, 100]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pooling": "globl"}, "pooling: got 'globl', allowed 'prefix'"),
        ({"placement": "evn"}, "placement: got 'evn'"),
        ({"num_length_bins": 0}, "num_length_bins: got 0"),
        ({"num_length_bins": 7, "levels": 2}, "product of two"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        SequenceLengthPredictor(16, **settings)


def test_costs_under_a_percent_of_the_parameters_and_a_thousandth_of_the_flops():
    predictor = SequenceLengthPredictor(512)
    with torch.device("meta"):
        model = LanguageModel(259, d_model=512, n_layers=12, num_experts=1)
    weights = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in predictor.parameters()) < 0.01 * weights
    per_window = sum(p.numel() for p in predictor.parameters() if p.dim() == 2)
    assert per_window / 128 < 0.001 * weights
