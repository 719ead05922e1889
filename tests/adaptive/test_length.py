"""Learned length: kept positions, the results at the others, and the gradients of the predictor."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.adaptive.boundaries import ends_of_words
from resnet_bk.adaptive.flops import flops_per_position
from resnet_bk.adaptive.length import LearnedLength, LengthRecord
from resnet_bk.config import BYTE_OFFSET
from resnet_bk.layers.block import Tokens
from resnet_bk.model import LanguageModel

TRAININGS = [{"mode": "truncate"}, {"mode": "truncate", "training": "sampled"}, {"mode": "pool"}]
TEXT = b"def f(x):\n    return x + 1  # one more, and then some words that go on for a while\n" * 8


def model(seed=0, n_layers=3, **length) -> LanguageModel:
    torch.manual_seed(seed)
    settings = {"bins": 4, "max_length": 16, "trunk": 1, **length}
    return LanguageModel(259, d_model=16, n_layers=n_layers, num_experts=1, n_heads=2, length=settings).double()


def adaptive_layer(model) -> LearnedLength:
    return model.blocks[0]


def always(model, length) -> None:
    """Let every window choose this length."""
    adaptive_layer(model).predictor.choose = lambda values, scores: torch.full(scores.shape[:-1], length)


def text(rows=2, length=64):
    ids = torch.tensor(list(TEXT[: rows * length])).view(rows, length)
    return ids + BYTE_OFFSET


def kept_by_definition(ids, mode, spacing, length, shortest=4, window=16):
    """Return the kept positions: those of the shortest length in a window's prefix, those of `length` after it."""
    words = ends_of_words(ids, torch.zeros(len(ids), dtype=torch.int64)).tolist()
    kept = []
    for row in range(len(ids)):
        kept.append([])
        for t in range(ids.shape[1]):
            offset = t % window
            if mode == "truncate":
                kept[row].append(offset < max(shortest, length))
                continue
            begin, span, n = (0, shortest, shortest) if offset < shortest else (shortest, window - shortest, length)
            cells = max(1, span * n // window)
            stretch = [p for p in range(span) if p * cells // span == (offset - begin) * cells // span]
            first = t - offset + begin + stretch[0]
            ends = [
                p
                for p in range(first, first + len(stretch))
                if spacing == "words" and p < ids.shape[1] and words[row][p]
            ]
            kept[row].append(t == (ends[0] if ends else first + len(stretch) - 1))
    return torch.tensor(kept)


@pytest.mark.parametrize("length", [4, 8, 12, 16])
@pytest.mark.parametrize(("mode", "spacing"), [("truncate", "even"), ("pool", "even"), ("pool", "words")])
@torch.no_grad()
def test_kept_positions_are_those_of_the_definition(mode, spacing, length):
    net = model(mode=mode, spacing=spacing).eval()
    always(net, length)
    ids = text()
    record = net(ids).records[0]
    assert isinstance(record, LengthRecord)
    assert (record.predicted_lengths == length).all()
    torch.testing.assert_close(record.kept, kept_by_definition(ids, mode, spacing, length))


@torch.no_grad()
def test_full_length_is_the_plain_model():
    """At full length, truncate equals the model without the layer, bit for bit."""
    net = model(mode="truncate").eval()
    always(net, 16)
    plain = LanguageModel(259, d_model=16, n_layers=3, num_experts=1, n_heads=2).double().eval()
    layer = adaptive_layer(net)
    plain.embed, plain.norm, plain.head = net.embed, net.norm, net.head
    for i, block in enumerate([*layer.trunk, *layer.deep]):
        plain.blocks[i] = block
    ids = text()
    assert torch.equal(net(ids).logits, plain(ids).logits)


@torch.no_grad()
def test_pooled_positions_represent_those_since_the_last_one():
    net = model(mode="pool").eval()
    layer = adaptive_layer(net)
    layer.down.weight.normal_()
    always(net, 4)
    inputs = []
    layer.deep.register_forward_pre_hook(lambda m, arguments: inputs.append(arguments[0]))
    ids = text(1, 32)
    record = net(ids).records[0]
    x = layer.trunk(net.embed(ids), Tokens(ids), None, None)[0][0]
    ends = [-1, *record.kept[0].nonzero().flatten().tolist()]
    for i, (before, end) in enumerate(itertools.pairwise(ends)):
        mean = x[before + 1 : end + 1].mean(0)
        torch.testing.assert_close(inputs[0][0, i], x[end] + layer.down(mean - x[end]))


@pytest.mark.parametrize("mode", ["truncate", "pool"])
@torch.no_grad()
def test_executions_agree_and_count_what_they_compute(mode):
    ids = torch.cat([text(8, 48), torch.randint(259, (8, 48), generator=torch.Generator().manual_seed(0))])
    outputs = {}
    for execution in ("grouped", "batch_max"):
        net = model(mode=mode, execution=execution, seed=3).eval()
        adaptive_layer(net).predictor.out.weight.mul_(30)
        outputs[execution] = net(ids)
    grouped, batch_max = outputs["grouped"], outputs["batch_max"]
    torch.testing.assert_close(grouped.logits, batch_max.logits, rtol=1e-12, atol=1e-12)
    a, b = grouped.records[0], batch_max.records[0]
    assert a.predicted_lengths.unique().numel() > 1
    assert int(a.kept.sum()) <= a.deep_positions <= b.deep_positions
    assert a.executed_flops < b.executed_flops
    assert a.speedup_estimate == b.speedup_estimate > 1


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts": 1},
        {"num_experts": 4, "top_k": 2},
        {"num_experts": 1, "readout": "diagonal"},
        {"num_experts": 1, "n_layers": None, "multiscale": {"factors": [4], "layers": [2, 6, 1]}},
    ],
)
@torch.no_grad()
def test_costs_equal_those_of_a_counter(fields):
    net = LanguageModel(
        259, **{"d_model": 64, "n_layers": 4, "length": {"bins": 4, "max_length": 256, "trunk": 1}, **fields}
    ).eval()
    always(net, 64)
    ids = torch.randint(259, (4, 256))
    with FlopCounterMode(display=False) as counter:
        record = net(ids, logits=False).records[0]
    assert record.executed_flops == pytest.approx(counter.get_total_flops(), rel=0.04)  # experts compute whole tiles


def test_record_adds_up():
    net = model(mode="truncate").eval()
    always(net, 4)
    record = net(text(2, 32)).records[0]
    assert record.avg_predicted_length == 4
    assert record.predicted_lengths.shape == record.decided.shape == (2, 2)
    assert record.length_probs.shape == (2, 2, 4)
    trunk, deep, bypass = record.costs
    block = flops_per_position(adaptive_layer(net).trunk)
    assert (trunk, deep) == (block, 2 * block)
    assert record.speedup_estimate == pytest.approx(64 * 3 * block / (64 * block + 16 * 2 * block + 48 * bypass))
    computed = 2 * 16  # two rows of two windows of four positions, in tiles of 16
    assert record.deep_positions == computed
    assert record.executed_flops == 64 * trunk + computed * deep + 48 * bypass
    undecided = net(text(2, 3)).records[0]
    assert not undecided.decided.any()
    assert undecided.kept.all()


@torch.no_grad()
def test_generation_decides_when_the_prefix_is_complete_and_keeps_the_length():
    """A prompt shorter than the prefix decides later. A window keeps its length; the next window chooses its own."""
    net = model(mode="truncate", seed=3).eval()
    adaptive_layer(net).predictor.out.weight.mul_(30)
    ids = text(4, 64)
    whole = net(ids).records[0]
    assert whole.predicted_lengths.unique().numel() > 1
    for prompt in (2, 5, 16, 21):
        state, kept, lengths = None, [], []
        for piece in (ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)):
            output = net(piece, state=state)
            state = output.state
            kept.append(output.records[0].kept)
            lengths.append(state[0].window.length)
        torch.testing.assert_close(torch.cat(kept, dim=1), whole.kept)
        for t in range(prompt, 64):
            if 3 <= t % 16 < 15:  # the state after token t, inside a window that has decided
                torch.testing.assert_close(lengths[t - prompt + 1], whole.predicted_lengths[:, t // 16])


# ---------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("training", ["expected", "sampled"])
@pytest.mark.parametrize("mode", ["truncate", "pool"])
def test_gradient_is_that_of_the_expected_loss_by_enumeration(mode, training):
    """One window: the expectation, or the mean over many samples, against every length computed in turn."""
    if (mode, training) == ("pool", "expected"):
        pytest.skip("pooled lengths are always sampled")
    net = model(mode=mode, training=training, n_layers=2)
    layer = adaptive_layer(net)
    ids = text(1, 17)
    weights = list(layer.predictor.parameters())
    inputs, targets = ids[:, :-1], ids[:, 1:]
    costs = []
    net.eval()
    for length in (4, 8, 12, 16):
        always(net, length)
        with torch.no_grad():
            costs.append(F.cross_entropy(net(inputs).logits[0], targets[0]))
    del layer.predictor.choose
    x = layer.trunk(net.embed(inputs), Tokens(inputs), None, None)[0].detach()
    probabilities = layer.predictor(x[:, :4].mean(1)).probabilities[0]
    expected = torch.autograd.grad((probabilities * torch.stack(costs)).sum(), weights)
    net.train()
    torch.manual_seed(0)
    draws = 1 if training == "expected" else 3000
    loss = net(inputs.expand(draws, -1), targets=targets.expand(draws, -1), logits=False).losses["cross_entropy"]
    got = torch.autograd.grad(loss, weights)
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (expected, got))
    if training == "expected":
        torch.testing.assert_close(b, a)
        torch.testing.assert_close(loss.detach(), (probabilities.detach() * torch.stack(costs)).sum())
    else:
        assert F.cosine_similarity(a, b, dim=0) > 0.95
        assert 0.8 < (b.norm() / a.norm()).item() < 1.25


@pytest.mark.parametrize("rows", [1, 2])
def test_few_windows_teach_too(rows):
    """A pooled length is compared with other windows; a single window is compared with the bypass."""
    net = model(mode="pool", n_layers=2).train()
    torch.manual_seed(2)
    ids = text(rows, 17)
    net(ids[:, :-1], targets=ids[:, 1:]).losses["cross_entropy"].backward()
    assert adaptive_layer(net).predictor.out.bias.grad.abs().max() > 1e-6


@pytest.mark.parametrize("settings", TRAININGS)
def test_padding_changes_no_gradient(settings):
    net = model(**settings).train()
    ids = text(2, 33)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    gradients = []
    for padding in (0, 9):
        torch.manual_seed(0)
        mask = F.pad(torch.ones(2, 32, dtype=torch.bool), (padding, 0))
        loss = net(F.pad(inputs, (padding, 0)), targets=F.pad(targets, (padding, 0)), mask=mask).loss
        gradients.append(torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad]))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_balance_loss_in_groups_is_near_that_of_all_rows_together():
    ids = text(6, 64)
    losses = []
    for execution in ("grouped", "batch_max"):
        torch.manual_seed(0)
        length = {"bins": 4, "max_length": 64, "trunk": 1, "execution": execution}
        net = LanguageModel(259, d_model=16, n_layers=2, num_experts=4, length=length).double().eval()
        adaptive_layer(net).predictor.choose = lambda values, scores: (
            torch.tensor([16, 32, 64] * 2).unsqueeze(1).expand(scores.shape[:-1])
        )
        losses.append(net(ids).losses["balance"])
    assert abs(losses[0] - losses[1]) < 0.2 * losses[1]


@pytest.mark.parametrize(
    "settings", [{"mode": "truncate"}, {"mode": "truncate", "training": "gumbel"}, {"mode": "pool"}]
)
def test_the_penalty_alone_shortens(settings):
    net = model(penalty=1.0, entropy_weight=0.0, **settings).train()
    optimizer = torch.optim.Adam(adaptive_layer(net).predictor.parameters(), lr=0.03)
    ids = text()
    for _ in range(80):
        output = net(ids)
        optimizer.zero_grad()
        output.losses["length"].backward()
        optimizer.step()
    assert output.losses["length"] < 0.3


@pytest.mark.parametrize("settings", TRAININGS)
def test_decisions_follow_the_data(settings):
    """In one batch, windows that need depth choose longer lengths than windows that do not."""
    net = model(penalty=0.1, entropy_weight=0.01, n_layers=2, **settings).train()
    layer = adaptive_layer(net)
    for parameter in layer.trunk.parameters():  # the bypass then reads the present token only
        parameter.requires_grad_(False).zero_()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)

    def batch():
        """Return rows of one repeated byte, and rows of two alternating bytes, where the next one needs the past."""
        easy = torch.full((16, 17), 5)
        pair = torch.randint(20, 40, (16, 2), generator=generator)
        return torch.cat([easy, pair.repeat(1, 9)[:, :17]])

    for _ in range(150):
        rows = batch()
        output = net(rows[:, :-1], targets=rows[:, 1:], logits=False)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    net.eval()
    with torch.no_grad():
        record = net(batch()[:, :-1]).records[0]
    assert (record.predicted_lengths[:16] == 4).all()
    assert (record.predicted_lengths[16:] > 4).sum() >= 12
