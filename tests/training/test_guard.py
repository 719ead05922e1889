import pytest
import torch
from torch import nn

from resnet_bk.model import LanguageModel
from resnet_bk.training.errors import LeakError
from resnet_bk.training.guard import check_causal

V = 29
TECHNIQUES = [(r, e, n) for r in ("propagator", "diagonal") for e in ("real", "complex") for n in (1, 3)]


def tiny(**fields):
    return LanguageModel(V, d_model=16, n_layers=2, **{"num_experts": 1, **fields}).eval()


def check(logits_of, dtype=torch.float32):
    check_causal(logits_of, V, dtype, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("readout", "energy", "experts"), TECHNIQUES)
def test_every_causal_model_passes(readout, energy, experts, dtype):
    model = tiny(readout=readout, energy=energy, num_experts=experts).to(dtype)
    check(lambda ids: model(ids).logits, dtype)


@pytest.mark.parametrize("readout", ["propagator", "diagonal"])
def test_a_bidirectional_mixer_is_caught(readout):
    model = tiny(readout=readout, causal=False)
    with pytest.raises(LeakError, match="sees the future"):
        check(lambda ids: model(ids).logits)


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_a_mean_over_the_sequence_is_caught_however_small(size):
    model = tiny()

    def leaky(ids):
        pooled = nn.functional.one_hot(ids, V).float().mean(1, keepdim=True)
        return model(ids).logits + size * pooled / pooled.max()

    with pytest.raises(LeakError, match="logits of the first 1 tokens"):
        check(leaky)


@pytest.mark.parametrize("ahead", [1, 4, 33])
def test_a_look_at_one_later_token_is_caught(ahead):
    model = tiny()

    def leaky(ids):
        later = nn.functional.one_hot(ids.roll(-ahead, dims=1), V).float()
        later[:, -ahead:] = 0
        return model(ids).logits + 1e-3 * later

    with pytest.raises(LeakError, match="sees the future"):
        check(leaky)


def test_a_leak_inside_blocks_of_a_fixed_length_is_caught():
    """Adds the mean of the block that a token is in, as a pooling without a shift would."""
    model = tiny()

    def leaky(ids):
        blocks = nn.functional.one_hot(ids, V).float().view(len(ids), -1, 4, V).mean(2, keepdim=True)
        return model(ids).logits + 0.01 * blocks.expand(-1, -1, 4, -1).flatten(1, 2)

    with pytest.raises(LeakError, match="sees the future"):
        check(leaky)


def test_nan_logits_do_not_pass():
    with pytest.raises(LeakError):
        check(lambda ids: torch.full((1, ids.shape[1], V), torch.nan))
