"""Every room keeps every contract; every planted bug is caught by the contract it breaks.

A new technique is one more entry in ROOMS, and its typical bugs more entries in BUGS.
"""

import contract_checks as checks
import pytest
import torch
from torch import nn

from resnet_bk.layers import feedforward, mixer
from resnet_bk.model import LanguageModel, Packing

# name -> fields of the model's configuration
ROOMS = {
    "propagator-real": {},
    "propagator-complex": {"energy": "complex"},
    "diagonal-real": {"readout": "diagonal"},
    "diagonal-complex": {"readout": "diagonal", "energy": "complex"},
    "experts-top1": {"num_experts": 4},
    "experts-top2": {"num_experts": 4, "top_k": 2},
    "experts-diagonal": {"num_experts": 3, "readout": "diagonal", "energy": "complex"},
    "no-convolution": {"conv_width": 1},
    "untied": {"tie_word_embeddings": False},
}
CONTRACTS = [
    checks.causal,
    checks.batch_mates_and_padding,
    checks.step_equals_forward,
    checks.any_length,
    checks.everything_learns,
]


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda f: f.__name__)
def test_contract(room, contract):
    contract(checks.build(**ROOMS[room]))


@pytest.mark.parametrize("room", ["propagator-real", "diagonal-complex", "experts-top2"])
def test_float32_keeps_the_contracts_within_1e_5(room, monkeypatch):
    model = checks.build(**ROOMS[room]).float()

    def close(x, y, what):
        worst = (x - y).abs().max().item()
        assert worst <= 1e-5 * max(1.0, y.abs().max().item()), f"{what}: differs by {worst:.2g}"

    monkeypatch.setattr(checks, "close", close)
    checks.batch_mates_and_padding(model)
    checks.step_equals_forward(model)


# ------------------------------------------------------------------------------------ planted bugs


def right_going_sweep(model: LanguageModel, monkeypatch) -> None:
    model.blocks[0].mixer.causal = False


def convolution_without_shift(model: LanguageModel, monkeypatch) -> None:
    model.blocks[1].mixer.conv.causal = False


def norm_over_the_sequence(model: LanguageModel, monkeypatch) -> None:
    model.norm.register_forward_hook(lambda m, i, y: y - 1e-6 * y.mean(1, keepdim=True))


def mean_pool_router(model: LanguageModel, monkeypatch) -> None:
    router = model.blocks[0].feed_forward.router
    router.register_forward_hook(lambda m, i, y: y + y.mean(0, keepdim=True))


def top_k_over_the_sequence(model: LanguageModel, monkeypatch) -> None:
    """Experts choose tokens: the classic leak."""

    def forward(self, x, mask):
        weights = self.router(x).softmax(-1)
        share = torch.zeros_like(weights)
        kept = weights.topk(max(1, x.shape[1] // 2), dim=1).indices
        share = share.scatter(1, kept, weights.gather(1, kept))
        return x * share.sum(-1, keepdim=True), {}

    monkeypatch.setattr(feedforward.Experts, "forward", forward)


def capacity_drop(model: LanguageModel, monkeypatch) -> None:
    """Each expert takes so many tokens of the batch; the rest gets nothing."""
    expert = feedforward.Experts._expert

    def limited(self, e, tokens):
        y = expert(self, e, tokens)
        return torch.cat([y[:8], torch.zeros_like(y[8:])])

    monkeypatch.setattr(feedforward.Experts, "_expert", limited)


def padding_is_computed(model: LanguageModel, monkeypatch) -> None:
    """The batch's longest row decides: padding is packed as if it were text."""
    monkeypatch.setattr("resnet_bk.model.Packing", lambda mask: Packing(torch.ones_like(mask)))


def pad_mask_off_by_one(model: LanguageModel, monkeypatch) -> None:
    class Shifted(Packing):
        def __init__(self, keep):
            super().__init__(keep)
            self.mask = torch.cat([self.mask[:, 1:], torch.zeros_like(self.mask[:, :1])], dim=1)

    monkeypatch.setattr("resnet_bk.model.Packing", Shifted)


def state_without_convolution(model: LanguageModel, monkeypatch) -> None:
    forward = mixer.ShortConv.forward

    def forgetful(self, x, state, mask):
        y, past = forward(self, x, None, mask)
        return y, past

    monkeypatch.setattr(mixer.ShortConv, "forward", forgetful)


def state_forgets_g(model: LanguageModel, monkeypatch) -> None:
    propagate = mixer.propagate

    def forgetful(*args, state=None, **kwargs):
        state = None if state is None else state._replace(g=torch.zeros_like(state.g))
        return propagate(*args, state=state, **kwargs)

    monkeypatch.setattr(mixer, "propagate", forgetful)


def state_grows(model: LanguageModel, monkeypatch) -> None:
    forward = mixer.ShortConv.forward

    def hoarding(self, x, state, mask):
        y, past = forward(self, x, None if state is None else state[:, -(self.width - 1) :], mask)
        return y, past if state is None else torch.cat([state, past], dim=1)

    monkeypatch.setattr(mixer.ShortConv, "forward", hoarding)


def gates_do_not_scale(model: LanguageModel, monkeypatch) -> None:
    """The router chooses, but its choice is not in the output: the task cannot train it."""
    model.blocks[0].feed_forward.router.register_forward_hook(lambda m, i, y: y.detach())


def even_lengths_only(model: LanguageModel, monkeypatch) -> None:
    def forward(self, x):
        return nn.functional.layer_norm(x[:, : x.shape[1] // 2 * 2], x.shape[-1:], self.weight)

    monkeypatch.setattr(type(model.norm), "forward", forward)


BUGS = [
    (right_going_sweep, "propagator-real", checks.causal),
    (right_going_sweep, "diagonal-complex", checks.causal),
    (convolution_without_shift, "propagator-real", checks.causal),
    (norm_over_the_sequence, "propagator-real", checks.causal),
    (mean_pool_router, "experts-top1", checks.causal),
    (top_k_over_the_sequence, "experts-top1", checks.causal),
    (capacity_drop, "experts-top1", checks.batch_mates_and_padding),
    (mean_pool_router, "experts-top2", checks.batch_mates_and_padding),
    (padding_is_computed, "propagator-real", checks.batch_mates_and_padding),
    (pad_mask_off_by_one, "diagonal-real", checks.batch_mates_and_padding),
    (pad_mask_off_by_one, "experts-top1", checks.batch_mates_and_padding),
    (state_without_convolution, "propagator-real", checks.step_equals_forward),
    (state_forgets_g, "propagator-real", checks.step_equals_forward),
    (state_grows, "propagator-real", checks.step_equals_forward),
    (gates_do_not_scale, "experts-top1", checks.everything_learns),
    (even_lengths_only, "propagator-real", checks.any_length),
]


@pytest.mark.parametrize(("bug", "room", "contract"), BUGS, ids=lambda x: getattr(x, "__name__", x))
def test_planted_bug_is_caught(bug, room, contract, monkeypatch):
    model = checks.build(**ROOMS[room])
    bug(model, monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        contract(model)
