"""Mixers: initial gradients, dtypes, bidirectional use."""

import pytest
import torch

from resnet_bk import LanguageModel
from resnet_bk.config import ModelConfig
from resnet_bk.layers.mixer import MIXERS, Energies, ShortConv
from resnet_bk.ops.gates import mixer_inputs

VARIANTS = [("propagator", "bonds"), *((readout, energy) for readout in MIXERS for energy in ("real", "complex"))]


@pytest.mark.parametrize(("readout", "energy"), VARIANTS)
def test_first_gradients_are_of_ordinary_size(readout, energy):
    """With an untuned start, the first gradients of the complex propagator were 50 times those of the others."""
    norms = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = LanguageModel(64, d_model=64, num_experts=1, readout=readout, energy=energy)
        ids = torch.randint(64, (4, 129))
        model(ids[:, :-1], targets=ids[:, 1:]).loss.backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
    assert max(norms) < 20


def of_kind(kind, **fields):
    return ModelConfig(d_model=16, n_heads=8, energy=kind, **fields)


@pytest.mark.parametrize("kind", ["bonds", "real", "complex"])
def test_energies_lie_where_the_regime_needs_them(kind):
    energies = Energies(of_kind(kind))
    a, z, hop = energies(torch.randn(2, 50, 16) * 10)
    if kind == "bonds":
        assert a is None
        assert ((hop >= 0) & (hop <= 1)).all()
    elif kind == "real":
        assert ((a - z).abs() >= 2).all()
        assert not z.is_complex()
    else:
        assert (z.imag > 0).all()


@pytest.mark.parametrize("longest", [7, 3000])
def test_initial_memories_run_from_the_shortest_to_the_longest(longest):
    _, _, hop = Energies(of_kind("bonds", longest_memory=longest))(torch.zeros(1, 1, 16))
    memory = -1 / hop[0, 0].log()
    assert memory.min().item() == pytest.approx(1, rel=1e-4)
    assert memory.max().item() == pytest.approx(longest, rel=1e-3)


def test_a_single_head_has_the_shortest_memory_and_its_bias_counts_eight_times():
    energies = Energies(ModelConfig(d_model=16, shortest_memory=2.0, longest_memory=32.0))
    v = torch.nn.functional.softplus(8 * energies.potential.bias)
    torch.testing.assert_close(1 / v, torch.tensor([2.0]))
    hop = energies(torch.zeros(1, 1, 16))[2]
    (slope,) = torch.autograd.grad(torch.logit(hop).sum(), energies.potential.bias)
    torch.testing.assert_close(slope, torch.tensor([-8.0]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e6])
def test_a_site_writes_at_most_what_its_key_lacks(size):
    """The delta rule is stable for ``0 <= write |k|^2 <= 2``. Short keys write little."""
    p = size * torch.randn(2, 9, 4 * 64 + 2)
    _, k, _, _, write = mixer_inputs(p, torch.zeros(2, 3, 192), torch.rand(4, 192), 2, True)
    written = write.unsqueeze(-1) * k.square().sum(-1, keepdim=True)
    assert ((written >= 0) & (written <= 1 + 1e-6)).all()
    assert size > 1e-2 or (written < 1e-3).all()


def test_initial_memories_of_real_energies_run_from_one_to_seven_positions():
    a, _, _ = Energies(of_kind("real"))(torch.zeros(1, 1, 16))
    margin = (a[0, 0] + 2).abs()
    assert margin.max().item() == pytest.approx(1, rel=1e-4)
    assert margin.min().item() == pytest.approx(0.02, rel=1e-3)


@pytest.mark.parametrize("fields", [{}, {"energy": "complex"}, {"sparsity": {"target": 0.5}}], ids=str)
def test_training_under_autocast_has_gradients_near_those_of_float32(backend, fields):
    """On every backend, operators compute in the dtype of their inputs."""
    torch.manual_seed(0)
    model = LanguageModel(64, d_model=32, n_layers=2, num_experts=1, **fields)
    ids = torch.randint(64, (4, 70))
    found = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(ids[:, :-1], targets=ids[:, 1:]).loss
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.cosine_similarity(*found, dim=0) > 0.98


@pytest.mark.parametrize(("readout", "energy"), VARIANTS)
def test_bfloat16_stays_near_float32(readout, energy):
    """Autocast and a bfloat16 model: the recurrence itself stays in float32."""
    torch.manual_seed(0)
    model = LanguageModel(64, d_model=64, num_experts=4, top_k=2, readout=readout, energy=energy).eval()
    ids = torch.randint(64, (2, 70))
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)
        with torch.autocast("cpu", torch.bfloat16):
            under_autocast = model(ids).logits.float().log_softmax(-1)
        converted = model.bfloat16()(ids).logits.float().log_softmax(-1)
    assert (under_autocast - expected).abs().mean() < 0.05
    assert (converted - expected).abs().mean() < 0.05


@pytest.mark.parametrize(("readout", "energy"), VARIANTS[1:])
@pytest.mark.parametrize("experts", [1, 3])
def test_bidirectional_models_see_both_sides_and_no_padding(readout, energy, experts):
    torch.manual_seed(0)
    model = LanguageModel(31, d_model=16, n_heads=2, readout=readout, energy=energy, causal=False, num_experts=experts)
    model = model.double().eval()
    ids = torch.randint(31, (1, 20))
    with torch.no_grad():
        expected = model(ids).logits
        for t in (0, 19):
            changed = ids.clone()
            changed[0, t] = (changed[0, t] + 1) % 31
            moved = (model(changed).logits - expected).abs().amax(-1)[0]
            assert (moved > 0).sum() > 10, "a change must reach positions on both sides"
        mask = torch.zeros(1, 33, dtype=torch.bool)
        mask[0, 4:24] = True
        padded = torch.randint(31, (1, 33))
        padded[0, 4:24] = ids
        torch.testing.assert_close(model(padded, mask=mask).logits[0, 4:24], expected[0], rtol=0, atol=1e-12)


def test_the_convolution_of_a_bidirectional_model_is_centred():
    conv = ShortConv(2, 3, causal=False)
    x = torch.zeros(1, 9, 2)
    x[0, 4] = 1
    y, _ = conv(x, None, None)
    assert y[0, :, 0].nonzero().flatten().tolist() == [3, 4, 5]


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"model.n_heads: got 5, allowed a divisor of d_model = 64"):
        ModelConfig(n_heads=5)
    assert ModelConfig(n_heads=5, readout="diagonal").heads == 5
