"""Chunks, resampling and the multi-scale stack: outputs and gradients against loops that follow the definition."""

import pytest
import torch

from resnet_bk import LanguageModel, LearnedDownsampling, LearnedUpsampling
from resnet_bk.adaptive import multiscale
from resnet_bk.adaptive.compose import build_stack
from resnet_bk.adaptive.multiscale import ChunkRecord, smooth
from resnet_bk.adaptive.select import Chunks
from resnet_bk.config import ModelConfig, MultiScaleConfig

LENGTHS = [1, 2, 3, 4, 5, 7, 12, 33]


def model(vocab=259, **fields):
    torch.manual_seed(0)
    scales = MultiScaleConfig(**{"factors": (4,), "layers": (1, 1, 1), **fields})
    return LanguageModel(vocab, d_model=16, num_experts=1, n_heads=2, multiscale=scales)


def groups(closes):
    """Return, for each row, its closed chunks as lists of positions, and the open chunk."""
    rows = []
    for row in closes.tolist():
        closed, here = [], []
        for t, close in enumerate(row):
            here.append(t)
            if close:
                closed.append(here)
                here = []
        rows.append((closed, here))
    return rows


def same_gradients(expected, got, inputs):
    for x, y in zip(torch.autograd.grad(expected, inputs), torch.autograd.grad(got, inputs), strict=True):
        torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_downsampling_is_the_weighted_mean_and_the_last_position_of_each_chunk(n, share):
    generator = torch.Generator().manual_seed(n)
    closes = torch.rand(3, n, generator=generator) < share
    x = torch.randn(3, n, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    down = LearnedDownsampling(4, width=6).double()
    chunks = Chunks(closes)
    got, _ = down.pool(x, chunks, None, None)
    weight = torch.sigmoid(x @ down.weigh.weight[0] + down.weigh.bias)
    expected = torch.zeros_like(got)
    for b, (closed, _) in enumerate(groups(closes)):
        for j, positions in enumerate(closed):
            mean = (weight[b, positions, None] * x[b, positions]).sum(0) / weight[b, positions].sum()
            expected[b, j] = down.refine(torch.cat([x[b, positions[-1]], mean]))
    mask = chunks.ends.mask.unsqueeze(-1)
    torch.testing.assert_close(got * mask, expected, rtol=1e-12, atol=1e-12)
    if share:
        factors = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
        inputs = [x, *down.parameters()]
        if mask.any():
            same_gradients((expected * factors).sum(), (got * mask * factors).sum(), inputs)


@pytest.mark.parametrize("factor", [2, 3, 5])
@pytest.mark.parametrize("n", LENGTHS)
def test_resampling_at_a_stride_shifts_by_factor_minus_one(factor, n):
    down, up = LearnedDownsampling(4, factor, 6).double(), LearnedUpsampling(4, factor, 6).double()
    torch.nn.init.normal_(up.gain)
    x = torch.randn(2, n, 4, dtype=torch.float64)
    coarse = down(x)
    assert coarse.shape == (2, n // factor, 6)
    fine = up(coarse, n)
    expected = torch.zeros_like(x)
    for t in range(n):
        if (t + 1) // factor:
            expected[:, t] = up.expand(coarse[:, (t + 1) // factor - 1]) * (1 + up.gain[(t + 1) % factor])
    torch.testing.assert_close(fine, expected, rtol=1e-12, atol=1e-12)


def test_upsampling_refuses_too_few_chunks():
    with pytest.raises(ValueError, match="got 2 chunks for n = 6 positions, allowed 3 or more"):
        LearnedUpsampling(4)(torch.zeros(1, 2, 4), 6)


@pytest.mark.parametrize("kind", [LearnedDownsampling, LearnedUpsampling])
def test_a_factor_below_2_is_refused(kind):
    with pytest.raises(ValueError, match="factor: got 1, allowed 2 or more"):
        kind(4, factor=1)


def test_smoothing_is_its_recurrence_and_trains_the_probabilities():
    y = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    p = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    first = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    got = smooth(y, p, mask, first)
    s, rows = first, []
    for j in range(5):
        s = torch.where(mask[:, j, None], p[:, j, None] * y[:, j] + (1 - p[:, j, None]) * s, s)
        rows.append(s)
    expected = torch.stack(rows, 1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    factors = torch.randn_like(expected)
    same_gradients((expected * factors).sum(), (got * factors).sum(), [y, p, first])


def test_without_factors_the_model_is_the_plain_one():
    torch.manual_seed(0)
    plain = LanguageModel(31, d_model=16, n_layers=3, num_experts=1)
    torch.manual_seed(0)
    neutral = LanguageModel(31, d_model=16, n_layers=3, num_experts=1, multiscale={"boundaries": "learned"})
    assert plain.state_dict().keys() == neutral.state_dict().keys()
    ids = torch.randint(31, (2, 19))
    assert torch.equal(plain(ids).logits, neutral(ids).logits)


def test_a_stack_has_the_layers_and_widths_of_its_configuration():
    scales = MultiScaleConfig(factors=(2, 3), layers=(1, 2, 4, 0, 3), widths=(24, 40))
    stack = build_stack(ModelConfig(d_model=16, num_experts=1, multiscale=scales), torch.nn.Identity())
    assert len(stack) == 1 + 1 + 3
    middle = stack[1].inner
    assert len(middle) == 2 + 1 + 0
    assert middle[0].mixer.in_proj.in_features == 24
    assert len(middle[2].inner) == 4
    assert middle[2].inner[0].mixer.in_proj.in_features == 40
    assert middle[2].factor == 3


def test_the_inner_stack_runs_only_when_a_chunk_closes_and_only_for_rows_that_close():
    net = model(boundaries="whitespace").eval()
    ran = []
    net.blocks[1].inner.register_forward_hook(lambda m, inputs, out: ran.append(inputs[0].shape[:2]))
    texts = [b"one two\nx", b"a bc;defg"]
    ids = torch.tensor([[b + 3 for b in text] for text in texts])
    state = net(ids[:, :1]).state  # once at the start, to have a state at all
    ran.clear()
    closing = []
    for t in range(1, ids.shape[1]):
        output = net(ids[:, t : t + 1], state=state)
        state = output.state
        closing.append(output.records[0].closes[:, 0].tolist())
    expected = [[t in (3, 7) for t in range(1, 9)], [t in (1, 4) for t in range(1, 9)]]
    assert closing == [list(pair) for pair in zip(*expected, strict=True)]
    assert ran == [(1, 1)] * 4


def test_inner_state_of_rows_that_do_not_close_is_untouched():
    net = model(boundaries="whitespace").eval()
    ids = torch.tensor([[b + 3 for b in text] for text in (b"ab cd", b"abcde")])
    state = net(ids[:, :2]).state
    after = net(ids[:, 2:3], state=state).state
    before_s, after_s = state[1].inner[0].core.s, after[1].inner[0].core.s
    assert torch.equal(before_s[1], after_s[1])
    assert not torch.equal(before_s[0], after_s[0])


@pytest.mark.parametrize("boundaries", ["fixed", "whitespace", "learned"])
def test_the_record_has_the_decisions(boundaries):
    ids = torch.randint(3, 259, (2, 40))
    output = model(boundaries=boundaries)(ids, targets=ids)
    (record,) = [r for r in output.records if isinstance(r, ChunkRecord)]
    assert record.closes.shape == (2, 40)
    assert (record.probability is not None) == (boundaries == "learned") == ("ratio" in output.losses)
    if boundaries == "fixed":
        assert record.closes[0].nonzero().flatten().tolist() == list(range(3, 40, 4))


def test_the_ratio_loss_is_one_at_the_target_and_weighted_in():
    net = model(boundaries="learned", ratio_weight=0.5)
    ids = torch.randint(259, (4, 64))
    output = net(ids, targets=ids)
    share, mean = output.records[0].closes.float().mean(), output.records[0].probability.mean()
    expected = 4 / 3 * (3 * share * mean + (1 - share) * (1 - mean))
    torch.testing.assert_close(output.losses["ratio"], expected)
    torch.testing.assert_close(output.loss, output.losses["cross_entropy"] + 0.5 * expected)
    even = net.blocks[1]._losses(torch.tensor([[True, False, False, False]]), torch.full((1, 4), 0.25), None)
    torch.testing.assert_close(even["ratio"].value, torch.tensor(1.0))


@pytest.mark.parametrize("task_reaches", [True, False])
def test_the_task_moves_boundaries_without_another_loss(task_reaches, monkeypatch):
    """Two equal models train on texts that differ in one symbol, which is random in one of them, and move differently.

    Without the gradient of the smoothing, nothing moves.
    """
    if not task_reaches:
        monkeypatch.setattr(multiscale, "smooth", lambda y, p, mask, first: smooth(y, p.detach(), mask, first))

    def trained(is_random):
        torch.manual_seed(0)
        scales = {"factors": [4], "layers": [1, 1, 1], "boundaries": "learned", "ratio_weight": 0.0}
        net = LanguageModel(16, d_model=32, num_experts=1, n_heads=1, multiscale=scales)
        start = net.blocks[1].boundaries.weight.detach().clone()
        optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0.0)
        for _ in range(30):
            ids = torch.arange(49).remainder(4).repeat(8, 1)
            ids[:, 1::4] = torch.randint(4, 16, ids[:, 1::4].shape) if is_random else 4
            net(ids[:, :-1], targets=ids[:, 1:]).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        return net.blocks[1].boundaries.weight.detach() - start

    moved, moved_otherwise = trained(True), trained(False)
    assert (moved.abs().max() > 0.02) == (moved_otherwise.abs().max() > 0.02) == task_reaches
    assert ((moved - moved_otherwise).abs().max() > 0.02) == task_reaches


def test_the_ratio_loss_holds_the_share_of_boundaries():
    torch.manual_seed(0)
    scales = {"factors": [4], "layers": [1, 1, 1], "boundaries": "learned"}
    net = LanguageModel(16, d_model=32, num_experts=1, n_heads=1, multiscale=scales)
    with torch.no_grad():
        net.blocks[1].boundaries.threshold.fill_(-0.2)  # nearly everything closes
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    shares = []
    for _ in range(80):
        ids = torch.randint(16, (8, 49))
        output = net(ids[:, :-1], targets=ids[:, 1:])
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shares.append(output.records[0].closes.float().mean().item())
    assert shares[0] > 0.6
    assert 0.12 < sum(shares[-20:]) / 20 < 0.4


def test_padding_does_not_count_in_the_ratio_loss():
    net = model(boundaries="learned")
    ids = torch.randint(259, (2, 20))
    expected = net(ids).losses["ratio"]
    padded = torch.cat([torch.randint(259, (2, 9)), ids], dim=1)
    mask = torch.arange(29).expand(2, -1) >= 9
    torch.testing.assert_close(net(padded, mask=mask).losses["ratio"], expected)


@pytest.mark.parametrize("boundaries", ["fixed", "whitespace", "learned", "learned-words"])
@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_bfloat16_trains_and_decodes_about_as_float32(boundaries, how):
    net = model(boundaries=boundaries)
    ids = torch.tensor(
        [[b + 3 for b in b"one two three\nfour five six"], [b + 3 for b in b"seven, eight: nine_ten, ele"]]
    )
    expected = net(ids, targets=ids)
    low = net.bfloat16() if how == "weights" else net
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        output = low(ids, targets=ids)
        output.loss.backward()
        state, logits = None, []
        with torch.no_grad():
            for t in range(ids.shape[1]):
                step = low(ids[:, t : t + 1], state=state)
                state = step.state
                logits.append(step.logits)
    for parameter in low.parameters():
        assert torch.isfinite(parameter.grad).all()
    torch.testing.assert_close(output.loss.float(), expected.loss, rtol=0.02, atol=0.02)
    torch.testing.assert_close(torch.cat(logits, 1).float(), output.logits.float(), rtol=0.1, atol=0.1)


def test_int32_ids_give_the_results_of_int64_ids():
    net = model(boundaries="whitespace").eval()
    ids = torch.randint(259, (2, 30))
    expected = net(ids).logits
    state, logits = None, []
    for i, piece in enumerate(ids.split([7, 1, 1, 1, 1, 1, 18], dim=1)):
        output = net(piece.int() if i % 2 else piece, state=state)
        state = output.state
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-5)


def test_bidirectional_models_have_no_multi_scale():
    from resnet_bk.config import ConfigError

    with pytest.raises(ConfigError, match=r"model\.multiscale\.factors: got \[4\] with model\.causal = False"):
        LanguageModel(31, causal=False, multiscale={"factors": [4], "layers": [1, 1, 1]})
