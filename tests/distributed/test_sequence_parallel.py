"""One sequence in pieces over several processes equals the same sequence in one, in float64, with all gradients."""

import numpy as np
import pytest
import torch
from torch import distributed as dist

from resnet_bk import LanguageModel
from resnet_bk.config import ConfigError
from resnet_bk.ops import left_green, propagate
from resnet_bk.ops import sequence_parallel as module
from resnet_bk.ops.sequence_parallel import Pieces
from resnet_bk.training.sharded import split_sequences

B, H, K, V = 2, 3, 4, 5
ATTENTION = {"attention": {"every": 2, "window": 6}}
LENGTHS = {1: (23,), 2: (7, 16), 3: (5, 11, 7)}


def inputs(energy):
    generator = torch.Generator().manual_seed(1)
    n = sum(LENGTHS[2])
    q, k, v = (torch.randn(B, n, H, width, generator=generator, dtype=torch.float64) for width in (K, K, V))
    a = -2.1 - 0.3 * torch.rand(B, n, H, generator=generator, dtype=torch.float64)
    hop = 0.7 + 0.3 * torch.rand(B, n, H, generator=generator, dtype=torch.float64)
    z = torch.tensor([0.05, 0.1, 0.2], dtype=torch.float64)
    if energy == "complex":
        z = torch.complex(z - 2, torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64))
    write = torch.rand(B, n, H, generator=generator, dtype=torch.float64)
    tensors = {"q": q, "k": k, "v": v, "a": a, "hop": hop, "write": write, "z": z}
    return {name: x.requires_grad_() for name, x in tensors.items()}


def cut(x, rank, lengths):
    begin = sum(lengths[:rank])
    return x[:, begin : begin + lengths[rank]]


def loss_of(y, rank, lengths):
    """A sum over the piece, whose terms all differ."""
    weight = torch.linspace(-1, 1, B * sum(LENGTHS[2])).view(B, -1).double()
    weight = cut(weight, rank, lengths)
    y = torch.view_as_real(y).sum(-1) if y.is_complex() else y
    return (weight.reshape(weight.shape + (1,) * (y.dim() - 2)) * y.sin()).sum()


def core(rank, energy, readout):
    """Output of this rank's piece, and the gradients of all inputs, summed over ranks."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    lengths, x = LENGTHS[world], inputs(energy)
    mine = {name: t if name == "z" else cut(t, rank, lengths) for name, t in x.items()}
    a, z, hop = mine["a"], mine["z"], mine["hop"]
    pieces = Pieces(dist.group.WORLD) if world > 1 else None
    if readout == "green":
        y, _ = left_green(a, z, hop, state=pieces.green(a, z, hop) if pieces else None)
    else:
        q, k, v = mine["q"], mine["k"], mine["v"]
        write = mine["write"] if readout in ("delta", "bonds") else None
        a = None if readout == "bonds" else a
        entering = pieces.state(k, v, a, z, hop, write=write) if pieces else None
        y, _ = propagate(q, k, v, a, z, hop, write=write, state=entering)
    loss_of(y, rank, lengths).backward()
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in x.values()]
    for grad in grads if world > 1 else ():
        dist.all_reduce(torch.view_as_real(grad) if grad.is_complex() else grad)
    return y.detach().numpy(), [g.numpy() for g in grads]


def joined(answers):
    y = torch.cat([torch.from_numpy(y) for y, _ in answers], dim=1)
    return y, [torch.from_numpy(g) for g in answers[0][1]]


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize(
    ("energy", "readout"),
    [(energy, readout) for energy in ("real", "complex") for readout in ("green", "propagator")]
    + [("real", "delta"), ("real", "bonds")],
)
def test_pieces_equal_the_whole(workers, world, readout, energy):
    whole = joined(workers.run(1, core, energy, readout))
    assert_equal(joined(workers.run(world, core, energy, readout)), whole)


def broken(rank, bug):
    """Each process keeps its gradients to itself; or states pass a piece without decay, or without its matrix."""
    backward, times, matrix = module._Gather.backward, module._times, module._matrix_and_sum
    if bug == "gradients stay":
        module._Gather.backward = staticmethod(lambda ctx, grad: (grad[rank], None))
    elif bug == "nothing decays":
        module._times = lambda x, c: x if c.shape[-1] == 1 else times(x, c)
    else:
        module._matrix_and_sum = lambda *x: (torch.eye(K, dtype=torch.float64), matrix(*x)[1])
    try:
        return core(rank, "real", "delta" if bug == "nothing is replaced" else "propagator")
    finally:
        module._Gather.backward, module._times, module._matrix_and_sum = backward, times, matrix


@pytest.mark.parametrize("bug", ["gradients stay", "nothing decays", "nothing is replaced"])
def test_planted_bugs_are_seen(workers, bug):
    whole = joined(workers.run(1, core, "real", "delta" if bug == "nothing is replaced" else "propagator"))
    found = joined(workers.run(3, broken, bug))
    with pytest.raises(AssertionError):
        assert_equal(found, whole)


def train(rank, fields):
    """Logits of this rank's piece and the gradients of all parameters, summed over ranks."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    shape = {"d_model": 16, "n_layers": 2, "num_experts": 1, "balance_weight": 0.0}
    model = LanguageModel(40, **shape | fields).double()
    if model.memory is not None:
        model.memory.count(np.random.default_rng(0).integers(40, size=20_000))
    if world > 1:
        split_sequences(model)
    ids = torch.randint(40, (B, sum(LENGTHS[2])), generator=torch.Generator().manual_seed(1))
    logits = model(cut(ids, rank, LENGTHS[world])).logits
    loss_of(logits, rank, LENGTHS[world]).backward()
    for p in model.parameters() if world > 1 else ():
        dist.all_reduce(p.grad)
    return logits.detach().numpy(), [p.grad.numpy() for p in model.parameters()]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"energy": "real"},
        {"energy": "complex", "n_heads": 2},
        {"readout": "diagonal"},
        {"num_experts": 3},
        {"conv_width": 1},
        ATTENTION,
        {"memory": {"orders": [1, 3], "rows": 5000}},
        {"memory": {"recent": [1, 2, 9], "recent_rows": 50}},
    ],
    ids=lambda fields: "-".join(fields) or "default",
)
def test_a_model_on_pieces_equals_the_model_on_the_whole(workers, fields):
    whole = joined(workers.run(1, train, fields))
    assert_equal(joined(workers.run(3, train, fields)), whole)


def refusals(rank):
    """What a model with a split sequence does not take."""
    found = []
    for fields in ({"sparsity": {"target": 0.5}}, {"causal": False}):
        with pytest.raises(ConfigError) as caught:
            split_sequences(LanguageModel(40, d_model=16, num_experts=1, **fields))
        found.append(str(caught.value))
    model = split_sequences(LanguageModel(40, d_model=16, n_layers=1, num_experts=1))
    ids = torch.zeros(1, 5, dtype=torch.int64)
    output = model(ids)
    for arguments in ({"state": output.state}, {"mask": torch.ones_like(ids, dtype=torch.bool)}):
        with pytest.raises(ValueError, match="for a sequence that is split over processes") as caught:
            model(ids, **arguments)
        found.append(str(caught.value))
    with pytest.raises(ValueError, match="got 2 positions, allowed 3 or more") as caught:
        model(ids[:, :2])
    model = split_sequences(LanguageModel(40, d_model=16, n_layers=2, **ATTENTION))
    with pytest.raises(ValueError, match="got 4 positions, allowed 5 or more"):
        model(ids[:, :4])
    return found


def test_what_cannot_be_split_is_refused_in_one_line(workers):
    messages = workers.run(2, refusals)[0]
    assert messages[0].startswith("model.sparsity: is on, allowed in")
    assert messages[1].startswith("model.causal: got False")
    assert messages[2].startswith("state: got one")
    assert messages[3].startswith("mask: got one")
