"""Attention in a window against its dense definition; where blocks have it; its cost.

Dimensions: B batch, N positions, D model width, H heads, K head width.
"""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk import LanguageModel
from resnet_bk.adaptive.flops import flops_per_position
from resnet_bk.adaptive.multiscale import MultiScale
from resnet_bk.config import ModelConfig
from resnet_bk.layers import attention
from resnet_bk.layers.attention import LEAST_FOLD, MOST_FOLD, Attention, AttentionState
from resnet_bk.layers.mixer import PropagatorMixer


def make(window, d_model=16, n_heads=2, **fields):
    torch.manual_seed(0)
    config = {"d_model": d_model, "n_heads": n_heads, "attention": {"every": 1, "window": window}, **fields}
    return Attention(ModelConfig.from_dict(config)).double()


def definition(layer, x):
    """Softmax over all pairs, with rotations by the positions themselves and one mask."""
    q, k, v = (t.unflatten(-1, (layer.heads, layer.width)) for t in layer.in_proj(x).chunk(3, dim=-1))
    position = torch.arange(x.shape[1], dtype=torch.float64)
    angle = torch.outer(position, 10_000.0 ** (-torch.arange(0, layer.width, 2).double() / layer.width))

    def rotated(t):
        even, odd = t[..., 0::2], t[..., 1::2]
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    q, k = rotated(q), rotated(k)
    distance = position.unsqueeze(1) - position
    scores = torch.einsum("bnhk,bmhk->bhnm", q, k) / math.sqrt(layer.width)
    scores = scores.masked_fill((distance < 0) | (distance >= layer.window), -math.inf)
    return layer.out_proj(torch.einsum("bhnm,bmhk->bnhk", scores.softmax(-1), v).flatten(-2))


def outputs_and_gradients(run, layer, length):
    x = torch.randn(2, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = run(x)
    layer.zero_grad()
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("window", [1, 2, 5, LEAST_FOLD, LEAST_FOLD + 9])
@pytest.mark.parametrize("length", [1, 2, 5, 67, 150])
def test_it_is_its_definition(window, length):
    layer = make(window)
    expected = outputs_and_gradients(lambda x: definition(layer, x), layer, length)
    got = outputs_and_gradients(lambda x: layer(x, None, None)[0], layer, length)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bug", ["nothing before the start is masked", "no band", "unrotated"])
def test_planted_bugs_differ_from_the_definition(bug, monkeypatch):
    layer = make(5)
    if bug == "unrotated":
        monkeypatch.setattr(attention, "_rotate", lambda x, turn: x)
    elif bug == "no band":
        tables = attention._tables
        monkeypatch.setattr(attention, "_kept_tables", lambda *a: tables(*a)._replace(band=torch.zeros(())))
    else:
        start = layer._start
        monkeypatch.setattr(layer, "_start", lambda x: start(x) + (torch.arange(34) >= 32).double())
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    with torch.no_grad():
        assert (layer(x, None, None)[0] - definition(layer, x)).abs().max() > 1e-3


@pytest.mark.parametrize("window", [1, 4, 9])
@torch.no_grad()
def test_a_position_reads_the_window_and_nothing_else(window):
    layer, x = make(window), torch.randn(1, 20, 16, dtype=torch.float64)
    expected = layer(x, None, None)[0]
    for t in range(20):
        changed = x.clone()
        changed[0, t] += 1
        moved = (layer(changed, None, None)[0] != expected).any(-1)[0]
        assert moved.nonzero().flatten().tolist() == list(range(t, min(20, t + window)))


@torch.no_grad()
def test_the_state_holds_the_last_tokens_of_each_row():
    layer, x = make(4), torch.randn(3, 9, 16, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [2], [0]])
    after = layer(x, None, mask)[1]
    assert after.past.shape == layer.layout(x).past.shape == (3, 3, 34)
    assert after.past[..., -1].tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 0]]
    torch.testing.assert_close(after.past[1:2], layer(x[1:2, :2], None, None)[1].past)
    assert (after.past[2] == 0).all()
    unchanged = layer(x, after, torch.zeros_like(mask))[1]
    assert torch.equal(unchanged.past, after.past)


@torch.no_grad()
def test_a_state_of_another_precision_continues():
    layer = make(4).bfloat16()
    x = torch.randn(2, 9, 16)
    past = make(4).float()(x, None, None)[1].past
    for n in (1, 5):
        y, after, _ = layer(x[:, :n].bfloat16(), AttentionState(past), None)
        assert y.dtype == after.past.dtype == torch.bfloat16


def test_not_a_number_at_padding_reaches_no_position():
    layer, x, mask = make(8), torch.randn(2, 6, 16, dtype=torch.float64), torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    clean = layer(x, None, mask)
    x[1, 4:] = torch.nan
    y, state, _ = layer(x, None, mask)
    assert torch.equal(y[mask], clean[0][mask])
    assert torch.equal(state.past, clean[1].past)


@torch.no_grad()
def test_a_long_window_is_read_in_folds_of_limited_length():
    assert make(8192).fold == MOST_FOLD
    y = make(8192)(torch.randn(1, 3, 16, dtype=torch.float64), None, None)[0]
    assert y.shape == (1, 3, 16)


def test_tables_that_inference_has_made_serve_training():
    layer, x = make(11), torch.randn(1, 30, 16, dtype=torch.float64)
    attention._kept_tables.cache_clear()
    with torch.inference_mode():
        layer(x, None, None)
    layer(x, None, None)[0].sum().backward()
    assert layer.in_proj.weight.grad.abs().max() > 0


def test_tables_of_fake_tensors_are_not_kept():
    layer, x = make(11), torch.randn(1, 30, 16, dtype=torch.float64)
    attention._kept_tables.cache_clear()
    expected = layer(x, None, None)[0]
    attention._kept_tables.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.empty(1, 30, 16, dtype=torch.float64), None, None)
    assert torch.equal(layer(x, None, None)[0], expected)


def kinds(stack):
    """Return the mixer of each block: A attention, C chain; stacks on chunks in parentheses."""
    return "".join(
        f"({kinds(layer.inner)})"
        if isinstance(layer, MultiScale)
        else {Attention: "A", PropagatorMixer: "C"}[type(layer.mixer)]
        for layer in stack
    )


@pytest.mark.parametrize(
    ("every", "fields", "expected"),
    [
        (1, {"n_layers": 3}, "AAA"),
        (2, {"n_layers": 5}, "CACAC"),
        (3, {"n_layers": 3}, "CCA"),
        (2, {"multiscale": {"factors": [2, 2], "layers": [1, 2, 4, 0, 2]}}, "C(CA(CACA))AC"),
    ],
)
def test_every_kth_block_of_each_stack_has_attention(every, fields, expected):
    model = LanguageModel(20, d_model=16, attention={"every": every, "window": 4}, **fields)
    assert kinds(model.blocks) == expected


def test_first_gradients_are_of_ordinary_size():
    torch.manual_seed(0)
    model = LanguageModel(64, d_model=64, attention={"every": 2, "window": 32})
    ids = torch.randint(64, (4, 129))
    model(ids[:, :-1], targets=ids[:, 1:]).loss.backward()
    assert torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]) < 20


@torch.no_grad()
def test_bfloat16_stays_near_float32():
    torch.manual_seed(0)
    model = LanguageModel(64, d_model=64, attention={"every": 2, "window": 32}).eval()
    ids = torch.randint(64, (2, 70))
    expected = model(ids).logits.log_softmax(-1)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = model(ids).logits.float().log_softmax(-1)
    converted = model.bfloat16()(ids).logits.float().log_softmax(-1)
    assert (under_autocast - expected).abs().mean() < 0.05
    assert (converted - expected).abs().mean() < 0.05


def test_torchs_counter_sees_attention_forward_and_backward():
    layer, x = make(8), torch.randn(2, 24, 16, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        layer(x, None, None)[0].sum().backward()
    flops = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    forward = "aten._scaled_dot_product_flash_attention_for_cpu"
    assert flops[forward] == 2 * 4 * 16 * layer.scores(24)
    assert flops[f"{forward}_backward"] == 2.5 * flops[forward]


def test_the_cost_of_a_position_does_not_grow_with_the_length():
    layer = make(100)
    assert layer.scores(1) == 100
    assert layer.scores(64) == layer.scores(2) == 64 * 163
    assert layer.scores(6400) == 100 * layer.scores(64)
    assert flops_per_position(layer) == 2 * 4 * 16**2 + 4 * 16 * 163


def test_second_derivatives_are_refused_on_cpus():
    layer, x = make(5), torch.randn(1, 9, 16, dtype=torch.float64)
    (first,) = torch.autograd.grad(layer(x, None, None)[0].square().sum(), layer.in_proj.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        first.square().sum().backward()
