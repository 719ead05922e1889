"""Drafts change how often the later blocks run, never the generated tokens."""

import functools

import pytest
import torch

from resnet_bk import LanguageModel
from resnet_bk.inference.decoding import generate
from resnet_bk.inference.speculation import speculate


def model(seed=0, n_layers=4, attention=None, memory=None, **depth) -> LanguageModel:
    torch.manual_seed(seed)
    settings = {"policy": "exit", "confidence": "probability", "threshold": 1.0, **depth}
    shape = {"d_model": 16, "n_layers": n_layers, "n_heads": 2, "attention": attention or {}, "memory": memory or {}}
    net = LanguageModel(31, num_experts=1, depth=settings, **shape).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    if memory:
        net.blocks[0].count(torch.randint(31, (20_000,)).numpy())
    return net


@functools.cache
def trained() -> LanguageModel:
    """Return a model trained on sequences that mostly count up by one."""
    net = model().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        ids = stream(8, 33, generator)
        net(ids[:, :-1], targets=ids[:, 1:]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.eval()


def stream(batch, length, generator):
    ids = torch.randint(31, (batch, length), generator=generator)
    for t in range(1, length):
        following = (ids[:, t - 1] + 1) % 31
        ids[:, t] = torch.where(torch.rand(batch, generator=generator) < 0.9, following, ids[:, t])
    return ids


@pytest.mark.parametrize(("draft", "sure"), [(1, 0.0), (2, 0.0), (5, 0.0), (5, 0.15), (5, 1.0), (16, 0.0)])
def test_tokens_are_those_of_full_depth(draft, sure):
    ids = torch.randint(31, (1, 9))
    for net in (
        model(2, first=2),
        model(2, first=2, attention={"every": 2, "window": 6}),
        model(2, memory={"orders": [1, 3], "recent": [1, 2], "recent_rows": 50}),
        trained(),
    ):
        drafts = speculate(net, ids.int(), 50, draft, sure)
        assert torch.equal(drafts.tokens, generate(net, ids, 50))
        assert drafts.accepted <= drafts.drafted
        assert drafts.accepted + drafts.rounds + 1 >= 50


def test_accepted_drafts_save_runs_of_the_later_blocks():
    net, calls = trained(), []
    ids = stream(1, 20, torch.Generator().manual_seed(5))
    net.blocks[0].segments[-1][0].register_forward_hook(lambda m, arguments, o: calls.append(arguments[0].shape[1]))
    drafts = speculate(net, ids, 60, draft=6, sure=0.0)
    assert drafts.accepted > 0.5 * drafts.drafted
    assert len(calls) < 40
    assert drafts.rounds + 1 <= len(calls)


def test_the_threshold_of_the_model_does_not_matter():
    """Verification runs all blocks and ignores the exits."""
    ids = torch.randint(31, (1, 9))
    for threshold in (0.0, 0.05, 1.0):
        net = model(threshold=threshold)
        expected = generate(model(threshold=1.0), ids, 40)
        assert torch.equal(speculate(net, ids, 40, 4, 0.0).tokens, expected)


def test_models_without_exits_and_batches_are_refused():
    ids = torch.randint(31, (2, 9))
    with pytest.raises(ValueError, match="no early exit"):
        speculate(LanguageModel(31, d_model=16, n_layers=2, num_experts=1), ids[:1], 5)
    with pytest.raises(ValueError, match="no early exit"):
        speculate(model(policy="act"), ids[:1], 5)
    with pytest.raises(ValueError, match="one sequence, got 2"):
        speculate(model(), ids, 5)
    with pytest.raises(ValueError, match="1 or more tokens, got 5 and 0"):
        speculate(model(), ids[:1], 5, 0)
