"""Adaptive depth: results against loops that follow the definition, gradients, and computed positions."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from resnet_bk import LanguageModel
from resnet_bk.adaptive import depth
from resnet_bk.adaptive.depth import DepthRecord, Skipping, Stopping
from resnet_bk.adaptive.early_exit import LEAST_CONFIDENCE, NEVER, EarlyExit, confidence
from resnet_bk.layers.block import Tokens
from resnet_bk.layers.score import Score

POLICIES = ["act", "skip", "exit"]


def model(policy, n_layers=4, vocab=31, **settings) -> LanguageModel:
    """Return a float64 model in evaluation whose decisions vary."""
    torch.manual_seed(0)
    if policy == "exit":  # thresholds that some positions of an untrained model reach
        thresholds = {"gain": 0.9, "probability": 0.15, "entropy": 0.1}
        settings = {"threshold": thresholds[settings.get("confidence", "gain")], **settings}
    settings = {"policy": policy, **settings}
    net = LanguageModel(vocab, d_model=16, n_layers=n_layers, num_experts=1, n_heads=2, depth=settings).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for module in net.modules():
            if isinstance(module, Score):
                module.bias.zero_()
                module.weight.normal_()
    return net


def adaptive_layer(net):
    return net.blocks[0]


def parts(net):
    layer = adaptive_layer(net)
    return [layer.first, *layer.segments, layer.last]


def plain(net) -> LanguageModel:
    """Return a model of the same blocks without decisions."""
    blocks = [block for part in parts(net) for block in part]
    other = LanguageModel(net.config.vocab_size, d_model=16, n_layers=len(blocks), num_experts=1, n_heads=2)
    other.double().eval()
    other.embed, other.norm, other.head = net.embed, net.norm, net.head
    for i, block in enumerate(blocks):
        other.blocks[i] = block
    return other


def tokens(batch, length, vocab=31):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(1))


def by_definition(net, ids):
    """Run one sequence position by position.

    Returns:
        The output (N, D), the number of blocks of each position, and the expected number, summed over positions.
    """
    layer = adaptive_layer(net)
    x = layer.first(net.embed(ids), Tokens(ids), None, None)[0][0]
    n, for_all = len(x), len(layer.first) + len(layer.last)
    running, left, out = list(range(n)), [1.0] * n, [torch.zeros_like(x[0])] * n
    blocks, expected = [for_all] * n, for_all * n
    for i, segment in enumerate(layer.segments):
        if isinstance(layer, Skipping):
            probability = [layer.routers[i](x[t : t + 1])[0].sigmoid() for t in range(n)]
            expected = expected + len(segment) * sum(probability)
            running = [t for t in range(n) if probability[t] >= layer.threshold]
        else:
            others = []
            for t in running:
                if isinstance(layer, EarlyExit):
                    p = net.read(x[t]).softmax(-1)
                    sure = {
                        "gain": lambda t=t, i=i, x=x: (-layer.units[i](x[t : t + 1])[0]).exp(),
                        "probability": lambda p=p: p.max(),
                        "entropy": lambda p=p: 1 + (p * p.log()).sum() / math.log(len(p)),
                    }[layer.kind]()
                    halt = float(sure >= layer.threshold)
                    stops = halt == 1.0
                else:
                    halt = layer.units[i](x[t : t + 1])[0].sigmoid()
                    stops = left[t] - halt <= 1 - layer.threshold
                weight = left[t] if stops else halt
                out[t], left[t] = out[t] + weight * x[t], left[t] - weight
                if not stops:
                    others.append(t)
                    expected = expected + len(segment) * left[t]
            running = others
        for t in running:
            blocks[t] += len(segment)
        if running:
            x = x.index_copy(0, torch.tensor(running), segment(x[running].unsqueeze(0), ids, None, None)[0][0])
    if isinstance(layer, Stopping):
        x = torch.stack([out[t] + left[t] * x[t] for t in range(n)])
    return layer.last(x.unsqueeze(0), Tokens(ids), None, None)[0][0], blocks, expected


@pytest.mark.parametrize("length", [1, 2, 7, 33])
@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("act", {}),
        ("act", {"first": 2, "threshold": 0.6}),
        ("act", {"every": 2, "last": 0}),
        ("exit", {}),
        ("exit", {"every": 2}),
        ("exit", {"confidence": "probability"}),
        ("exit", {"confidence": "entropy"}),
        ("skip", {}),
        ("skip", {"last": 0, "threshold": 0.4}),
    ],
)
def test_outputs_gradients_and_blocks_are_those_of_the_definition(policy, settings, length):
    net = model(policy, **settings)
    ids = tokens(3, length)
    output = net(ids)
    output.logits.square().sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    record = output.records[0]
    assert isinstance(record, DepthRecord)
    total = 0.0
    for row in range(3):
        x, blocks, _ = by_definition(net, ids[row : row + 1])
        logits = net.head(net.norm(x))
        torch.testing.assert_close(output.logits[row], logits, rtol=1e-10, atol=1e-10)
        assert record.blocks[row].tolist() == blocks
        total = total + logits.square().sum()
    total.backward()
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize(("target", "price"), [(0.0, 1.0), (1.0, -1.0), (None, 0.3), (None, -0.6)])
@pytest.mark.parametrize("policy", ["act", "skip"])
def test_ponder_is_the_expected_share_of_blocks_at_a_price_that_holds_the_target(policy, target, price):
    ids = tokens(2, 19)
    executed = model(policy)(ids).records[0].mean_blocks / 4
    target = executed - price * depth.BAND if target is None else target
    net = model(policy, target=target)
    output = net(ids, targets=ids)
    expected = sum(by_definition(net, ids[row : row + 1])[2] for row in range(2)) / (2 * 19 * 4)
    torch.testing.assert_close(output.losses["ponder"], price * expected)
    output.losses["ponder"].backward()
    layer = adaptive_layer(net)
    pull = layer.units[0].bias.grad if policy == "act" else -layer.routers[0].bias.grad
    assert pull * price < 0  # to stop sooner above the target, later below it
    added = output.loss - output.losses["cross_entropy"]
    torch.testing.assert_close(added, net.config.depth.penalty * output.losses["ponder"])


@pytest.mark.parametrize("policy", POLICIES)
def test_without_decisions_it_is_bit_for_bit_the_plain_model(policy):
    net, ids = model(policy, first=4, last=0), tokens(3, 21)
    assert torch.equal(net(ids).logits, plain(net)(ids).logits)
    assert (net(ids).records[0].blocks == 4).all()


@pytest.mark.parametrize("kind", LEAST_CONFIDENCE)
def test_a_confidence_of_one_is_never_reached(kind):
    net, ids = model("exit", threshold=1.0, confidence=kind), tokens(3, 32)
    net.head.weight = torch.nn.Parameter(1e3 * net.head.weight.detach())  # certain of everything
    with torch.no_grad():
        for unit in adaptive_layer(net).units:
            unit.bias.fill_(-100.0)
    assert torch.equal(net(ids).logits, plain(net)(ids).logits)
    assert (net(ids).records[0].blocks == 4).all()


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_stopped_positions_are_not_computed(policy):
    net, ids = model(policy, last=1), tokens(4, 100)
    positions = []
    for part in parts(net):
        part.register_forward_hook(lambda m, i, output: positions.append(len(m) * output[0][..., 0].numel()))
    record = net(ids).records[0]
    assert sum(positions) == record.computed
    assert int(record.blocks.sum()) <= record.computed
    assert record.computed < 0.95 * 4 * ids.numel()
    assert record.available == 4


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_a_decoding_step_runs_only_the_blocks_it_needs(policy):
    net, ids = model(policy), tokens(1, 60)
    state = net(ids[:, :1]).state
    for t in range(1, 60):
        calls = []
        hooks = [part.register_forward_hook(lambda m, i, o, calls=calls: calls.append(len(m))) for part in parts(net)]
        output = net(ids[:, t : t + 1], state=state)
        state = output.state
        for hook in hooks:
            hook.remove()
        assert sum(calls) == int(output.records[0].blocks)


@torch.no_grad()
def test_padding_runs_no_block():
    for policy in POLICIES:
        net, ids = model(policy), tokens(2, 30)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[0, 10:] = False
        blocks = net(ids, mask=mask).records[0].blocks
        assert (blocks[0, 10:] == 0).all()
        assert (blocks[0, :10] > 0).all()
        assert (blocks[1] > 0).all()


@pytest.mark.parametrize("kind", LEAST_CONFIDENCE)
def test_exits_are_scored_in_training_and_units_learn_the_gain(kind):
    net, ids = model("exit", full_depth=1.0, confidence=kind), tokens(2, 15)
    output = net.train()(ids[:, :-1], targets=ids[:, 1:])
    layer, losses, units = adaptive_layer(net), [], []
    x = layer.first(net.embed(ids[:, :-1]), Tokens(ids), None, None)[0]
    for i, segment in enumerate(layer.segments):
        losses.append(F.cross_entropy(net.read(x).transpose(1, 2), ids[:, 1:], reduction="none"))
        units.append(layer.units[i](x) if kind == "gain" else None)
        x = segment(x, Tokens(ids), None, None)[0]
    final = F.cross_entropy(net.read(x).transpose(1, 2), ids[:, 1:], reduction="none")
    expected = final + net.config.depth.exit_weight * torch.stack(losses).mean(0)
    if kind == "gain":
        expected = expected + sum((u - (here - final)) ** 2 for u, here in zip(units, losses, strict=True))
    torch.testing.assert_close(output.losses["cross_entropy"], expected.mean())


def test_units_learn_only_from_sequences_that_run_all_blocks():
    net, ids = model("exit", full_depth=0.0), tokens(4, 15)
    net.train()(ids[:, :-1], targets=ids[:, 1:]).loss.backward()
    for unit in adaptive_layer(net).units:
        assert (unit.weight.grad == 0).all()


@pytest.mark.parametrize("kind", LEAST_CONFIDENCE)
@pytest.mark.parametrize("full_depth", [0.0, 0.25, 1.0])
def test_each_training_sequence_stops_at_a_confidence_of_its_own(full_depth, kind):
    net = model("exit", full_depth=full_depth, confidence=kind).train()
    drawn = adaptive_layer(net)._draw(torch.zeros(4000, 1, 16))
    everywhere = drawn == NEVER
    assert drawn.shape == (4000, 1)
    assert everywhere.double().mean().item() == pytest.approx(full_depth, abs=0.03)
    least = LEAST_CONFIDENCE[kind]
    assert ((drawn[~everywhere] >= least) & (drawn[~everywhere] <= 1)).all()
    if full_depth < 1:
        assert drawn[~everywhere].mean().item() == pytest.approx((1 + least) / 2, abs=0.02)
    assert full_depth < 1 or (net(tokens(6, 40)).records[0].blocks == 4).all()


@pytest.mark.parametrize("kind", ["probability", "entropy"])
def test_confidence_is_between_even_and_certain(kind):
    even, certain = torch.zeros(7), torch.tensor([0.0, 50.0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(confidence(even, kind), torch.tensor(1 / 7 if kind == "probability" else 0.0))
    torch.testing.assert_close(confidence(certain, kind), torch.tensor(1.0))
    p = torch.tensor([0.5, 0.25, 0.25])
    expected = 0.5 if kind == "probability" else 1 - 1.5 * math.log(2) / math.log(3)
    assert confidence(p.log() + 3, kind).item() == pytest.approx(expected)


def test_a_copy_reads_with_its_own_head():
    net = model("exit", confidence="probability")
    other = copy.deepcopy(net)
    with torch.no_grad():
        net.norm.weight.zero_()
    ids = tokens(2, 30)
    assert adaptive_layer(other).read.__self__ is other
    assert not torch.equal(other(ids).records[0].blocks, net(ids).records[0].blocks)


@pytest.mark.parametrize("policy", ["act", "skip"])
def test_depth_follows_the_text(policy):
    """The same model and settings, trained on an easy stream and on a hard one. Easy: one byte over and over. Hard: two
    steps of composed look-ups, which a single block cannot do."""

    def stream(kind, generator):
        if kind == "easy":
            return torch.full((16, 33), 3)
        x = torch.randint(4, 30, (16, 33), generator=generator)
        x[:, 1::2] = (x[:, ::2][:, : x[:, 1::2].shape[1]] * 7 + 3) % 26 + 4  # every other byte follows from the last
        return x

    means = {}
    for kind in ("easy", "hard"):
        torch.manual_seed(0)
        settings = {"policy": policy, "penalty": 0.05 if policy == "act" else 0.02, "target": 0.0}
        net = LanguageModel(31, d_model=32, n_layers=4, num_experts=1, depth=settings)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        generator = torch.Generator().manual_seed(0)
        for _ in range(60):
            ids = stream(kind, generator)
            net(ids[:, :-1], targets=ids[:, 1:]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            means[kind] = net.eval()(stream(kind, generator)).records[0].mean_blocks
    assert means["easy"] + 0.5 < means["hard"]


def test_parts_are_those_of_the_settings():
    def sizes(policy, n_layers, **settings):
        return [len(part) for part in parts(model(policy, n_layers, **settings))]

    assert sizes("act", 7, first=2, every=2, last=1) == [2, 2, 2, 1]
    assert sizes("act", 7, first=2, every=3, last=0) == [2, 3, 2, 0]
    assert sizes("skip", 7, first=1, every=5, last=1) == [1, 5, 1]
    assert sizes("exit", 4, last=1) == [1, 1, 1, 1, 0]
