"""Which positions go deep, what the others get, and what teaches the predictor."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from resnet_bk.adaptive.boundaries import ends_of_words
from resnet_bk.adaptive.length import LearnedLength, LengthRecord
from resnet_bk.config import BYTE_OFFSET
from resnet_bk.model import LanguageModel

TEXT = b"def f(x):\n    return x + 1  # one more, and then some words that go on for a while\n" * 8


def model(seed=0, n_layers=3, **length) -> LanguageModel:
    torch.manual_seed(seed)
    settings = {"bins": 4, "max_length": 16, "trunk": 1, **length}
    return LanguageModel(259, d_model=16, n_layers=n_layers, num_experts=1, n_heads=2, length=settings).double()


def room_of(model) -> LearnedLength:
    return model.blocks[0]


def always(model, length) -> None:
    """Every window chooses this length."""
    room_of(model).predictor.choose = lambda choices: torch.full(choices.probabilities.shape[:-1], length)


def text(rows=2, length=64):
    ids = torch.tensor(list(TEXT[: rows * length])).view(rows, length)
    return ids + BYTE_OFFSET


def kept_by_definition(ids, mode, spacing, length, shortest=4, window=16):
    """Position by position: the window's prefix as the shortest length has it, the rest as `length` has it."""
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
    """Truncating nothing is bit for bit the model without the room."""
    net = model(mode="truncate").eval()
    always(net, 16)
    plain = LanguageModel(259, d_model=16, n_layers=3, num_experts=1, n_heads=2).double().eval()
    room = room_of(net)
    plain.embed, plain.norm, plain.head = net.embed, net.norm, net.head
    for i, block in enumerate([*room.trunk, *room.deep]):
        plain.blocks[i] = block
    ids = text()
    assert torch.equal(net(ids).logits, plain(ids).logits)


@torch.no_grad()
def test_pooled_positions_stand_for_those_since_the_last_one():
    net = model(mode="pool").eval()
    room = room_of(net)
    room.down.weight.normal_()
    always(net, 4)
    seen = []
    room.deep.register_forward_pre_hook(lambda m, arguments: seen.append(arguments[0]))
    ids = text(1, 32)
    record = net(ids).records[0]
    x = room.trunk(net.embed(ids), ids, None, None)[0][0]
    ends = [-1, *record.kept[0].nonzero().flatten().tolist()]
    for i, (before, end) in enumerate(itertools.pairwise(ends)):
        mean = x[before + 1 : end + 1].mean(0)
        torch.testing.assert_close(seen[0][0, i], x[end] + room.down(mean - x[end]))


@pytest.mark.parametrize("mode", ["truncate", "pool"])
@torch.no_grad()
def test_executions_agree_and_count_what_they_compute(mode):
    ids = torch.cat([text(8, 48), torch.randint(259, (8, 48), generator=torch.Generator().manual_seed(0))])
    outputs = {}
    for execution in ("grouped", "batch_max"):
        net = model(mode=mode, execution=execution, seed=3).eval()
        room_of(net).predictor.out.weight.mul_(30)
        outputs[execution] = net(ids)
    grouped, batch_max = outputs["grouped"], outputs["batch_max"]
    torch.testing.assert_close(grouped.logits, batch_max.logits, rtol=1e-12, atol=1e-12)
    a, b = grouped.records[0], batch_max.records[0]
    assert a.predicted_lengths.unique().numel() > 1
    assert int(a.kept.sum()) <= a.deep_positions <= b.deep_positions
    assert a.speedup_estimate >= b.speedup_estimate


def test_record_adds_up():
    net = model(mode="truncate").eval()
    always(net, 4)
    record = net(text(2, 32)).records[0]
    assert record.avg_predicted_length == 4
    assert record.predicted_lengths.shape == record.decided.shape == (2, 2)
    assert record.length_probs.shape == (2, 2, 4)
    trunk, deep, way_out = record.costs
    block = 2 * sum(p.numel() for p in room_of(net).trunk.parameters() if p.dim() >= 2)
    assert (trunk, deep) == (block, 2 * block)
    computed = 2 * 16  # two windows of four positions, in tiles of 16
    assert record.deep_positions == computed
    assert record.executed_flops == 64 * trunk + computed * deep + 48 * way_out
    undecided = net(text(2, 3)).records[0]
    assert not undecided.decided.any()
    assert undecided.kept.all()


@torch.no_grad()
def test_generation_decides_once_the_prefix_is_read_and_keeps_to_it():
    """A prompt shorter than the prefix decides later; a window keeps its length, the next one chooses its own."""
    net = model(mode="truncate", seed=3).eval()
    room_of(net).predictor.out.weight.mul_(30)
    ids = text(4, 64)
    whole = net(ids).records[0]
    assert whole.predicted_lengths.unique().numel() > 1
    for prompt in (2, 5, 16, 21):
        state, kept, lengths = None, [], []
        for piece in (ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)):
            output = net(piece, state=state)
            state = output.state
            kept.append(output.records[0].kept)
            lengths.append(state[0].length)
        torch.testing.assert_close(torch.cat(kept, dim=1), whole.kept)
        for t in range(prompt, 64):
            if 3 <= t % 16 < 15:  # the state after token t, whose window has decided and goes on
                torch.testing.assert_close(lengths[t - prompt + 1], whole.predicted_lengths[:, t // 16])


# ---------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("mode", ["truncate", "pool"])
def test_expected_and_sampled_gradients_agree(mode):
    """The mean gradient of many samples is the gradient of the expectation over all lengths, by enumeration."""
    net = model(mode=mode, training="sampled", n_layers=2).train()
    room = room_of(net)
    ids = text(1, 16)
    weights = list(room.predictor.parameters())
    inputs, targets = ids[:, :-1], ids[:, 1:]

    def nats(length):
        net.eval()
        always(net, length)
        with torch.no_grad():
            logits = net(inputs).logits
        del room.predictor.choose
        net.train()
        return F.cross_entropy(logits[0], targets[0], reduction="none").mean()

    costs = torch.stack([nats(length) for length in (4, 8, 12, 16)])
    net.eval()
    x = room.trunk(net.embed(inputs), inputs, None, None)[0].detach()
    probabilities = room.predictor(x[:, :4].mean(1)).probabilities[0]
    expected = torch.autograd.grad((probabilities * costs).sum(), weights)
    net.train()
    total = [torch.zeros_like(w) for w in weights]
    draws = 600
    torch.manual_seed(0)
    batch = inputs.expand(draws, -1)
    for _ in range(4):
        loss = net(batch, targets=targets.expand(draws, -1), logits=False).losses["cross_entropy"]
        for sum_, gradient in zip(total, torch.autograd.grad(loss, weights), strict=True):
            sum_ += gradient / 4
    a, b = (torch.cat([g.flatten() for g in gradients]) for gradients in (expected, total))
    assert F.cosine_similarity(a, b, dim=0) > 0.9
    assert 0.7 < (b.norm() / a.norm()).item() < 1.4


@pytest.mark.parametrize(
    "settings", [{"mode": "truncate"}, {"mode": "truncate", "training": "gumbel"}, {"mode": "pool"}]
)
def test_the_penalty_alone_shortens(settings):
    net = model(penalty=1.0, entropy_weight=0.0, **settings).train()
    optimizer = torch.optim.Adam(room_of(net).predictor.parameters(), lr=0.03)
    ids = text()
    for _ in range(80):
        output = net(ids)
        optimizer.zero_grad()
        output.losses["length"].backward()
        optimizer.step()
    assert output.losses["length"] < 0.3


@pytest.mark.parametrize(
    "settings", [{"mode": "truncate"}, {"mode": "truncate", "training": "sampled"}, {"mode": "pool"}]
)
def test_decisions_follow_the_data(settings):
    """Windows that need depth and windows that do not, in one batch: same model, same penalty, other lengths."""
    net = model(penalty=0.05, entropy_weight=0.01, n_layers=2, **settings).train()
    room = room_of(net)
    for parameter in room.trunk.parameters():  # the way out then sees the present token alone
        parameter.requires_grad_(False).zero_()
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=0.01)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(1)

    def batch():
        """One byte throughout, and two bytes in turn: which comes next takes the one before."""
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
    assert (record.predicted_lengths[16:] > 4).all()
