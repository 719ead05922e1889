"""Every technique and every mixer keeps every contract. Every planted bug is caught by the contract that it breaks.

A new technique is one more entry in TECHNIQUES, and each of its typical bugs is one more entry in BUGS.
"""

from dataclasses import replace
from itertools import combinations

import contract_checks as checks
import pytest
import torch
from torch import nn

from resnet_bk.adaptive import boundaries, depth, length, multiscale
from resnet_bk.adaptive.depth import AdaptiveDepth, Halting
from resnet_bk.adaptive.early_exit import EarlyExit
from resnet_bk.adaptive.length import LearnedLength
from resnet_bk.adaptive.select import Chunks
from resnet_bk.layers import attention, embedding, feedforward, mixer
from resnet_bk.layers.score import Score
from resnet_bk.layers.sparse import SparseBKCore
from resnet_bk.model import LanguageModel
from resnet_bk.ops import available_backends
from resnet_bk.ops.packing import Packing

LENGTH = {"bins": 4, "max_length": 16, "trunk": 1}

# name -> fields of the model's configuration
TECHNIQUES = {
    "propagator-bonds": {},
    "propagator-real": {"energy": "real"},
    "propagator-complex": {"energy": "complex"},
    "diagonal-real": {"readout": "diagonal"},
    "diagonal-complex": {"readout": "diagonal", "energy": "complex"},
    "experts-top1": {"num_experts": 4},
    "experts-top2": {"num_experts": 4, "top_k": 2},
    "experts-diagonal": {"num_experts": 3, "readout": "diagonal", "energy": "complex"},
    "no-convolution": {"conv_width": 1},
    "untied": {"tie_word_embeddings": False},
    "stride-4": {"multiscale": {"factors": [4], "layers": [1, 1, 1]}},
    "stride-2-3-wider": {"multiscale": {"factors": [2, 3], "layers": [1, 0, 1, 1, 0], "widths": [20, 24]}},
    "words": {"vocab_size": 259, "multiscale": {"factors": [4], "layers": [1, 1, 1], "boundaries": "whitespace"}},
    "learned-chunks": {"multiscale": {"factors": [3], "layers": [1, 1, 1], "boundaries": "learned"}},
    "learned-words": {
        "vocab_size": 259,
        "multiscale": {"factors": [3], "layers": [1, 1, 1], "boundaries": "learned-words"},
    },
    "learned-chunks-nested": {"multiscale": {"factors": [2, 2], "layers": [1, 0, 1, 0, 0], "boundaries": "learned"}},
    "learned-chunks-experts": {
        "d_model": 64,
        "num_experts": 4,
        "multiscale": {"factors": [3], "layers": [1, 1, 1], "boundaries": "learned"},
    },
    "stride-diagonal": {"readout": "diagonal", "multiscale": {"factors": [2], "layers": [0, 1, 1]}},
    "length-truncate": {"n_layers": 3, "length": {**LENGTH, "mode": "truncate"}},
    "length-truncate-sampled": {
        "n_layers": 3,
        "length": {**LENGTH, "mode": "truncate", "training": "sampled", "levels": 2, "placement": "geometric"},
    },
    "length-truncate-gumbel": {"length": {**LENGTH, "mode": "truncate", "training": "gumbel"}},
    "length-learned-bins": {"length": {**LENGTH, "mode": "truncate", "placement": "learned", "pooling": "attention"}},
    "length-continuous": {"length": {**LENGTH, "mode": "truncate", "placement": "continuous"}},
    "length-pool": {"n_layers": 3, "length": {**LENGTH, "mode": "pool"}},
    "length-pool-words": {
        "vocab_size": 259,
        "length": {**LENGTH, "mode": "pool", "spacing": "words", "execution": "batch_max", "max_length": 15},
    },
    "length-around-chunks": {
        "length": {**LENGTH, "mode": "pool", "pooling": "attention"},
        "multiscale": {"factors": [2], "layers": [1, 1, 0]},
    },
    "act": {"n_layers": 4, "depth": {"policy": "act", "threshold": 0.8}},
    "act-experts": {"n_layers": 3, "d_model": 64, "num_experts": 4, "depth": {"policy": "act"}},
    "act-diagonal": {
        "n_layers": 4,
        "readout": "diagonal",
        "depth": {"policy": "act", "first": 2, "last": 0, "threshold": 0.9},
    },
    "act-all-blocks": {"n_layers": 2, "depth": {"policy": "act", "first": 0, "last": 0, "threshold": 0.8}},
    "skip": {"n_layers": 4, "depth": {"policy": "skip"}},
    "skip-all-blocks": {"n_layers": 2, "depth": {"policy": "skip", "first": 0, "last": 0}},
    "skip-pairs": {"n_layers": 5, "depth": {"policy": "skip", "every": 2, "last": 0}},
    "exit": {"n_layers": 4, "depth": {"policy": "exit", "threshold": 0.7}},
    "exit-probability": {
        "n_layers": 4,
        "depth": {"policy": "exit", "threshold": 0.17, "confidence": "probability"},
    },
    "exit-entropy": {"n_layers": 3, "depth": {"policy": "exit", "threshold": 0.15, "confidence": "entropy"}},
    "act-in-length": {"n_layers": 4, "length": {**LENGTH, "mode": "truncate"}, "depth": {"policy": "act"}},
    "skip-in-length": {"n_layers": 4, "length": {**LENGTH, "mode": "pool"}, "depth": {"policy": "skip", "last": 0}},
    "act-in-words": {
        "vocab_size": 259,
        "multiscale": {"factors": [4], "layers": [1, 3, 1], "boundaries": "whitespace"},
        "depth": {"policy": "act"},
    },
    "sparse": {"sparsity": {"target": 0.5}},
    "sparse-real": {"energy": "real", "sparsity": {"target": 0.5}},
    "sparse-complex": {"energy": "complex", "sparsity": {"target": 0.5}},
    "sparse-diagonal": {"readout": "diagonal", "sparsity": {"target": 0.5}},
    "sparse-diagonal-complex": {"readout": "diagonal", "energy": "complex", "sparsity": {"target": 0.5}},
    "sparse-gumbel": {"sparsity": {"target": 0.5, "sampling": "gumbel"}},
    "sparse-act": {"n_layers": 4, "depth": {"policy": "act", "threshold": 0.8}, "sparsity": {"target": 0.5}},
    "sparse-in-words": {
        "vocab_size": 259,
        "multiscale": {"factors": [4], "layers": [1, 1, 1], "boundaries": "whitespace"},
        "sparsity": {"target": 0.5},
    },
    "sparse-length": {"n_layers": 3, "length": {**LENGTH, "mode": "pool"}, "sparsity": {"target": 0.5}},
    "experts-top-p": {"num_experts": 4, "experts": {"policy": "top_p"}},
    "experts-null": {
        "d_model": 64,
        "num_experts": 4,
        "experts": {"policy": "top_p", "top_p": 0.4, "identity": 1, "zero": 1},
    },
    "experts-null-top2": {"num_experts": 3, "top_k": 2, "experts": {"identity": 1, "zero": 1}},
    "experts-bias": {"num_experts": 4, "experts": {"policy": "top_p", "balance": "bias"}},
    "sparse-experts": {
        "d_model": 64,
        "num_experts": 4,
        "experts": {"policy": "top_p"},
        "sparsity": {"target": 0.5},
    },
    "skip-in-chunks": {"multiscale": {"factors": [2], "layers": [1, 3, 1]}, "depth": {"policy": "skip"}},
}
# One setting of each technique, to be combined: all pairs, and all together.
PARTS = {
    "memory": {"memory": {"orders": [1, 3], "rows": 5000, "successors": 2}},
    "multiscale": {"multiscale": {"factors": [3], "layers": [1, 3, 0], "boundaries": "learned"}},
    "length": {"length": {**LENGTH, "mode": "pool", "pooling": "attention"}},
    "depth": {"n_layers": 4, "depth": {"policy": "act", "threshold": 0.6}},
    "sparsity": {"sparsity": {"target": 0.5}},
    "experts": {"d_model": 64, "num_experts": 4, "experts": {"policy": "top_p"}},
}
for chosen in [*combinations(PARTS, 2), tuple(PARTS)]:
    TECHNIQUES["+".join(chosen)] = {name: value for technique in chosen for name, value in PARTS[technique].items()}
TECHNIQUES["all-skip"] = {**TECHNIQUES["+".join(PARTS)], "depth": {"policy": "skip"}}
TECHNIQUES["memory"] = PARTS["memory"]
TECHNIQUES["memory-of-one-token"] = {"memory": {"orders": [1], "rows": 16, "successors": 40}}
RECENT = {"recent": [1, 3], "recent_rows": 500}
TECHNIQUES["recent"] = {"memory": RECENT}
TECHNIQUES["recent+all"] = {**TECHNIQUES["+".join(PARTS)], "memory": PARTS["memory"]["memory"] | RECENT}
TECHNIQUES["memory+exit"] = PARTS["memory"] | TECHNIQUES["exit"]
TECHNIQUES["memory+exit-before-blocks"] = PARTS["memory"] | {
    "n_layers": 4,
    "depth": {"policy": "exit", "first": 0, "every": 2, "threshold": 0.97},
}
TECHNIQUES["exit+sparsity+experts"] = {
    **TECHNIQUES["sparsity+experts"],
    "n_layers": 4,
    "depth": {"policy": "exit", "threshold": 0.7},
}
ATTENTION = {"attention": {"every": 2, "window": 7}}
TECHNIQUES |= {
    "attention": {"attention": {"every": 2, "window": 23}},
    "attention-in-every-block": {"attention": {"every": 1, "window": 5}},
    "attention-over-several-folds": {"attention": {"every": 2, "window": attention.LEAST_FOLD + 37}},
    "attention-diagonal": {"attention": {"every": 2, "window": 2}, "readout": "diagonal", "energy": "complex"},
    **{f"attention+{name}": ATTENTION | part for name, part in PARTS.items()},
    # heads of 12 channels: in a strided tensor torch multiplies the last pairs of each by other code
    "attention-odd-heads": {
        "d_model": 12,
        "n_heads": 1,
        "attention": {"every": 2, "window": 100},
        "length": {"bins": 2, "max_length": 33, "trunk": 1, "mode": "truncate"},
    },
    "attention+exit": ATTENTION | TECHNIQUES["exit"],
    "attention+all": ATTENTION | TECHNIQUES["+".join(PARTS)],
}
CONTRACTS = [
    checks.causal,
    checks.batch_mates_and_padding,
    checks.padding_across_pieces,
    checks.step_equals_forward,
    checks.any_length,
    checks.everything_learns,
    checks.padding_is_not_counted,
]


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda f: f.__name__)
def test_contract(technique, contract):
    contract(checks.build(**TECHNIQUES[technique]))


SPARSE = ["sparse", "sparse-complex", "sparse-gumbel"] if "numba" in available_backends() else []
CONDITIONAL = ["experts-top-p", "experts-null", "experts-null-top2", "experts-bias", "sparse-experts"]


@pytest.mark.parametrize("technique", [*SPARSE, *CONDITIONAL])
def test_what_is_left_out_is_not_computed(technique):
    checks.what_is_left_out_is_not_computed(checks.build(**TECHNIQUES[technique]))


@pytest.mark.parametrize("technique", [name for name, fields in TECHNIQUES.items() if "experts" in fields])
@torch.no_grad()
def test_experts_used_vary_in_the_models_under_contract(technique):
    model = checks.build(**TECHNIQUES[technique])
    used = [
        r.used.flatten() for r in model(checks.tokens(model, 8, 65)).records if isinstance(r, feedforward.ExpertsRecord)
    ]
    assert len(torch.cat(used).unique()) > 1


DEEP = [technique for technique, fields in TECHNIQUES.items() if "depth" in fields]


@pytest.mark.parametrize("technique", DEEP)
@torch.no_grad()
def test_depth_varies_in_the_models_under_contract(technique):
    """Otherwise the contracts would say nothing about decisions."""
    model = checks.build(**TECHNIQUES[technique])
    records = []
    for module in model.modules():
        if isinstance(module, AdaptiveDepth):
            module.register_forward_hook(lambda m, i, output: records.append(output[2][0]))
    model(checks.tokens(model, 8, 65))
    blocks = torch.cat([record.blocks.flatten() for record in records])
    _, counts = blocks[blocks > 0].unique(return_counts=True)
    assert len(counts) > 1
    assert counts.max() < 0.9 * counts.sum()


@pytest.mark.parametrize(
    "technique",
    [
        "act",
        "skip",
        "exit",
        "propagator-real",
        "diagonal-complex",
        "experts-top2",
        "stride-4",
        "words",
        "learned-chunks",
        "length-pool",
        "sparse",
        "experts-null",
        "attention",
        "memory",
    ],
)
def test_float32_keeps_the_contracts_within_1e_5(technique, monkeypatch):
    model = checks.build(**TECHNIQUES[technique]).float()

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
    """The convolution ends at the next position."""
    inputs = mixer.mixer_inputs

    def ahead(p, past, *arguments):
        return inputs(
            torch.cat([p[:, 1:], p[:, -1:]], dim=1),
            torch.cat([past[:, 1:], p[:, :1, : past.shape[2]]], dim=1),
            *arguments,
        )

    monkeypatch.setattr(mixer, "mixer_inputs", ahead)


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
        return x * share.sum(-1, keepdim=True), []

    monkeypatch.setattr(feedforward.Experts, "forward", forward)


def capacity_drop(model: LanguageModel, monkeypatch) -> None:
    """Each expert computes only the first tokens of the batch; the others get zero."""
    expert = feedforward.Experts._expert

    def limited(self, e, tokens, own):
        y = expert(self, e, tokens, own)
        return torch.cat([y[:8], torch.zeros_like(y[8:])])

    monkeypatch.setattr(feedforward.Experts, "_expert", limited)


def padding_is_computed(model: LanguageModel, monkeypatch) -> None:
    """Padding is packed as if it were text."""
    monkeypatch.setattr("resnet_bk.model.Packing", lambda mask, **fields: Packing(torch.ones_like(mask), **fields))


def padding_is_counted(model: LanguageModel, monkeypatch) -> None:
    monkeypatch.setattr("resnet_bk.model.Features.counted", lambda self, targets: targets)


def pad_mask_off_by_one(model: LanguageModel, monkeypatch) -> None:
    class Shifted(Packing):
        def __init__(self, selected, **fields):
            super().__init__(selected, **fields)
            self.mask = torch.cat([self.mask[:, 1:], torch.zeros_like(self.mask[:, :1])], dim=1)

    monkeypatch.setattr("resnet_bk.model.Packing", Shifted)


def state_without_convolution(model: LanguageModel, monkeypatch) -> None:
    inputs = mixer.mixer_inputs
    monkeypatch.setattr(mixer, "mixer_inputs", lambda p, past, *rest: inputs(p, torch.zeros_like(past), *rest))


def state_forgets_g(model: LanguageModel, monkeypatch) -> None:
    propagate = mixer.propagate

    def forgetful(*args, state=None, **kwargs):
        state = None if state is None else state._replace(g=torch.zeros_like(state.g))
        return propagate(*args, state=state, **kwargs)

    monkeypatch.setattr(mixer, "propagate", forgetful)


def state_grows(model: LanguageModel, monkeypatch) -> None:
    inputs, last, width = mixer.mixer_inputs, mixer.last_positions, model.config.conv_width - 1
    monkeypatch.setattr(mixer, "mixer_inputs", lambda p, past, *rest: inputs(p, past[:, -width:], *rest))
    monkeypatch.setattr(
        mixer, "last_positions", lambda past, x, mask: torch.cat([past, last(past[:, -width:], x, mask)], dim=1)
    )
    monkeypatch.setattr("resnet_bk.model.check_state", lambda *arguments: None)  # it would refuse the second state


def gates_do_not_scale(model: LanguageModel, monkeypatch) -> None:
    """The output does not depend on the router's probabilities, so the task cannot train it."""
    model.blocks[0].feed_forward.router.register_forward_hook(lambda m, i, y: y.detach())


def even_lengths_only(model: LanguageModel, monkeypatch) -> None:
    def forward(self, x):
        return nn.functional.layer_norm(x[:, : x.shape[1] // 2 * 2], x.shape[-1:], self.weight)

    monkeypatch.setattr(type(model.norm), "forward", forward)


def missing_shift(model: LanguageModel, monkeypatch) -> None:
    """The result of a chunk reaches all of its positions, also those before its end."""

    def spread(self, first, y):
        table = torch.cat([first.unsqueeze(1), y, y[:, -1:]], dim=1)
        chunk = self.closed - self.closes.long() + 1
        return table.gather(1, chunk.unsqueeze(-1).expand(-1, -1, y.shape[-1]))

    monkeypatch.setattr(Chunks, "spread", spread)


def boundary_by_the_next_position(model: LanguageModel, monkeypatch) -> None:
    """A chunk closes by the content of the next position, so position t depends on t + 1."""
    rule = type(adaptive_layer(model).boundaries)
    forward = rule.forward

    def peeking(self, x, ids, since, before):
        ahead = torch.cat([x[:, 1:], x[:, -1:]], dim=1)
        following = torch.cat([ids[:, 1:], ids[:, -1:]], dim=1)
        return forward(self, ahead, following, since, before)

    monkeypatch.setattr(rule, "forward", peeking)


def pooling_over_what_is_open(model: LanguageModel, monkeypatch) -> None:
    """Padding is pooled into the open chunk."""
    weighted = multiscale.LearnedDownsampling._weighted
    monkeypatch.setattr(multiscale.LearnedDownsampling, "_weighted", lambda self, x, mask: weighted(self, x, None))


def open_chunk_forgotten(model: LanguageModel, monkeypatch) -> None:
    pool = multiscale.LearnedDownsampling.pool
    monkeypatch.setattr(
        multiscale.LearnedDownsampling, "pool", lambda self, x, chunks, past, mask: pool(self, x, chunks, None, mask)
    )


def batch_steps_together(model: LanguageModel, monkeypatch) -> None:
    """If a chunk of any row closes, the inner stack steps for every row."""

    def inside(self, coarse, chunks, tokens, state, unpadded_start):
        return self.inner(coarse, tokens.map(chunks.ends.pack), state, None)

    monkeypatch.setattr(multiscale.MultiScale, "_inside", inside)


def ratio_over_the_batch(model: LanguageModel, monkeypatch) -> None:
    """Boundaries are at the most likely positions of the batch, so batch-mates and later positions decide."""

    def forward(self, x, ids, since, before):
        score = self.norm(x) @ self.weight
        probability = (score - score.quantile(0.7)).sigmoid()
        return boundaries.Decision(probability >= 0.5, probability)

    monkeypatch.setattr(boundaries.Router, "forward", forward)


def no_smoothing(model: LanguageModel, monkeypatch) -> None:
    """The router's probability does not affect the output, so the task cannot train it."""
    monkeypatch.setattr(multiscale, "smooth", lambda y, probability, mask, first: y)


def global_mean_in_a_causal_model(model: LanguageModel, monkeypatch) -> None:
    """The length is chosen from the whole window, including positions that the choice is about."""
    read = length.read_windows

    def peeking(predictor, size, *others):
        predictor.prefix = size - 1
        return read(predictor, size, *others)

    monkeypatch.setattr(length, "read_windows", peeking)


def batch_max_changes_the_output(model: LanguageModel, monkeypatch) -> None:
    """All rows keep as many positions as the longest row of the batch."""
    kept = LearnedLength._kept

    def greedy(self, windows, *others):
        longest = windows.chosen.amax(0, keepdim=True).expand_as(windows.chosen)
        return kept(self, windows._replace(chosen=longest), *others)

    monkeypatch.setattr(LearnedLength, "_kept", greedy)


def padding_counts_for_the_length(model: LanguageModel, monkeypatch) -> None:
    """Padding is pooled into the prefix."""
    read = length.read_windows

    def careless(predictor, size, x, mask, *others):
        return read(predictor, size, x, torch.ones_like(mask), *others)

    monkeypatch.setattr(length, "read_windows", careless)


def length_forgotten(model: LanguageModel, monkeypatch) -> None:
    """A window that continues in the next call loses its length."""
    read = length.read_windows

    def forgetful(predictor, size, x, mask, past, sampled):
        return read(predictor, size, x, mask, past._replace(length=torch.full_like(past.length, size)), sampled)

    monkeypatch.setattr(length, "read_windows", forgetful)


def stretch_forgotten(model: LanguageModel, monkeypatch) -> None:
    """Positions before this call are not part of what the next kept position represents."""
    run = LearnedLength._run_deep

    def forgetful(self, x, tokens, kept, mask, past):
        return run(self, x, tokens, kept, mask, past._replace(open=torch.zeros_like(past.open)))

    monkeypatch.setattr(LearnedLength, "_run_deep", forgetful)


def gain_does_not_reach_the_predictor(model: LanguageModel, monkeypatch) -> None:
    """Only the penalty trains it."""
    for name in ("_expected_loss", "_sampled_loss"):
        monkeypatch.setattr(LearnedLength, name, lambda self, windows, a, b, c=None: None)


def halted_token_still_mixes(model: LanguageModel, monkeypatch) -> None:
    """Positions that have stopped keep their output, but stay in the chains of the later blocks."""

    class Everyone(Packing):
        def __init__(self, selected, tile=1, bound=None):
            super().__init__(selected if selected.shape[1] == 1 else torch.ones_like(selected), tile)

    monkeypatch.setattr(depth, "Packing", Everyone)


def depth_by_top_k_over_the_sequence(model: LanguageModel, monkeypatch) -> None:
    """The highest scores of the sequence run on, which is how mixture of depths chooses in training."""
    score = Score.forward

    def ranked(self, x):
        s = score(self, x)
        return s - s.quantile(0.5, dim=1, keepdim=True)

    monkeypatch.setattr(Score, "forward", ranked)


def as_deep_as_the_deepest(model: LanguageModel, monkeypatch) -> None:
    """If a position of any row runs on, it runs on in all rows."""

    class Together(Packing):
        def __init__(self, selected, tile=1, bound=None):
            super().__init__(selected.any(0, keepdim=True).expand_as(selected), tile)

    monkeypatch.setattr(depth, "Packing", Together)


def stopped_rows_step(model: LanguageModel, monkeypatch) -> None:
    """In decoding, the later blocks step for all rows if they step for any row."""
    monkeypatch.setattr(depth, "run_rows", lambda segment, x, tokens, state, *others: segment(x, tokens, state, None))


def confident_about_the_next_position(model: LanguageModel, monkeypatch) -> None:
    """A position stops if the next one is confident."""
    halt = EarlyExit._halt

    def peeking(self, i, x, drawn):
        return halt(self, i, torch.cat([x[:, 1:], x[:, -1:]], dim=1), drawn)

    monkeypatch.setattr(EarlyExit, "_halt", peeking)


def halting_does_not_weigh(model: LanguageModel, monkeypatch) -> None:
    """Probabilities decide where positions stop, but do not weigh the output: only the ponder cost trains them."""
    halt = Halting._halt
    monkeypatch.setattr(Halting, "_halt", lambda self, i, x, drawn: halt(self, i, x, drawn).detach())


def units_do_not_learn(model: LanguageModel, monkeypatch) -> None:
    """Exits are scored, but the units do not learn the gain of the later blocks."""
    monkeypatch.setattr("resnet_bk.adaptive.early_exit.NEVER", 3.0)  # no sequence counts as one that ran all blocks
    draw = EarlyExit._draw
    monkeypatch.setattr(EarlyExit, "_draw", lambda self, x: draw(self, x).clamp(max=2.0))


def interpolation_from_the_right(model: LanguageModel, monkeypatch) -> None:
    """Left-out sites read the next kept site."""
    propagate = mixer.propagate

    def peeking(*args, sparsity=None, **kwargs):
        y, state = propagate(*args, sparsity=sparsity, **kwargs)
        following = torch.cat([y[:, 1:], y[:, -1:]], dim=1)
        return torch.where((sparsity.gate > 0)[..., None, None], y, following), state

    monkeypatch.setattr(mixer, "propagate", peeking)


def importance_by_rank(model: LanguageModel, monkeypatch) -> None:
    """The most important half of the sequence is kept."""
    for module in model.modules():
        if isinstance(module, SparseBKCore):
            module.importance.register_forward_hook(lambda m, i, y: y - y.quantile(0.5, dim=1, keepdim=True))


def mask_multiplies(model: LanguageModel, monkeypatch) -> None:
    """Every site is computed, and left-out sites are multiplied by zero."""
    propagate = mixer.propagate

    def dense(q, k, v, *args, sparsity=None, state=None, **kwargs):
        sites, empty = sparsity.sites, replace(sparsity, gate=0 * sparsity.gate)
        y, _ = propagate(sites.merge(q), sites.merge(k), v, *args, state=None, **kwargs)
        _, state = propagate(q[:, :1], k[:, :1], v, *args, state=state, sparsity=replace(empty, tile=1), **kwargs)
        return y * sparsity.gate[..., None, None], state

    monkeypatch.setattr(mixer, "propagate", dense)


def every_expert_runs(model: LanguageModel, monkeypatch) -> None:
    """Each expert computes tokens that are not its own and drops the results."""
    expert = feedforward.Experts._expert

    def wasteful(self, e, tokens, own):
        return expert(self, e, tokens, torch.cat([own, torch.zeros(200, dtype=own.dtype)]))[: len(own)]

    monkeypatch.setattr(feedforward.Experts, "_expert", wasteful)


def fill_forgotten(model: LanguageModel, monkeypatch) -> None:
    propagate = mixer.propagate

    def forgetful(*args, state=None, **kwargs):
        state = None if state is None else state._replace(r=torch.zeros_like(state.r))
        return propagate(*args, state=state, **kwargs)

    monkeypatch.setattr(mixer, "propagate", forgetful)


def mask_without_a_gradient(model: LanguageModel, monkeypatch) -> None:
    """The task's gradient of kept sites does not reach the predictor."""
    propagate = mixer.propagate

    def detached(*args, sparsity=None, **kwargs):
        return propagate(*args, sparsity=replace(sparsity, gate=sparsity.gate.detach()), **kwargs)

    monkeypatch.setattr(mixer, "propagate", detached)


def _with_band(monkeypatch, change) -> None:
    """Let each query read keys at other distances; `change` maps the (C, C + W - 1) distances from 0 to W - 1."""
    tables = attention._tables

    def changed(fold, window, *others):
        key = torch.arange(fold + window - 1)
        allowed = change(key[:fold, None] + window - 1 - key, window)
        found = tables(fold, window, *others)
        return found._replace(band=torch.zeros_like(found.band).masked_fill(~allowed, -torch.inf))

    monkeypatch.setattr(attention, "_kept_tables", changed)


def window_reaches_the_next_position(model: LanguageModel, monkeypatch) -> None:
    _with_band(monkeypatch, lambda distance, window: (distance >= -1) & (distance < window))


def window_is_longer_where_the_fold_has_more(model: LanguageModel, monkeypatch) -> None:
    """A position reads W positions before it, but the state holds only W - 1."""
    _with_band(monkeypatch, lambda distance, window: (distance >= 0) & (distance <= window))


def whole_fold_is_read(model: LanguageModel, monkeypatch) -> None:
    """All positions before it that the fold has, as many as its place in the fold allows."""
    _with_band(monkeypatch, lambda distance, window: distance >= 0)


def window_state(monkeypatch, change) -> None:
    last = attention.last_positions
    monkeypatch.setattr(attention, "last_positions", lambda *arguments: change(last, *arguments))


def padding_is_in_the_window(model: LanguageModel, monkeypatch) -> None:
    """The state holds the last positions of each row, padding included."""
    window_state(monkeypatch, lambda last, past, x, mask: last(past, x, None))


def nothing_counts_as_a_position(model: LanguageModel, monkeypatch) -> None:
    """After fewer than W - 1 positions, the empty entries of the state are read, too."""

    def full(last, *arguments):
        return torch.cat([last(*arguments)[..., :-1], torch.ones_like(last(*arguments)[..., -1:])], dim=-1)

    window_state(monkeypatch, full)


def window_forgotten(model: LanguageModel, monkeypatch) -> None:
    window_state(monkeypatch, lambda last, *arguments: torch.zeros_like(last(*arguments)))


def rotated_by_the_place_in_the_fold(model: LanguageModel, monkeypatch) -> None:
    """Queries are rotated as the first query of a fold, so distances are wrong elsewhere."""
    rotate = attention._rotate

    def fixed(x, turn):
        return rotate(x, turn if x.shape[1] == 1 or len(turn) > model.blocks[1].mixer.fold else turn[:1])

    monkeypatch.setattr(attention, "_rotate", fixed)


def grams_read_ahead(model: LanguageModel, monkeypatch) -> None:
    """N-grams end at the next position."""
    find = embedding.find_ngrams

    def ahead(window, entries, orders):
        return find(torch.cat([window[:, 1:], window[:, -1:]], dim=1), entries, orders)

    monkeypatch.setattr(embedding, "find_ngrams", ahead)


def grams_forgotten(model: LanguageModel, monkeypatch) -> None:
    last = embedding.last_positions
    monkeypatch.setattr(embedding, "last_positions", lambda *arguments: torch.zeros_like(last(*arguments)))


def padding_is_in_the_grams(model: LanguageModel, monkeypatch) -> None:
    last = embedding.last_positions
    monkeypatch.setattr(embedding, "last_positions", lambda past, x, mask: last(past, x, None))


def adaptive_layer(model: LanguageModel) -> multiscale.MultiScale:
    return next(layer for layer in model.blocks if isinstance(layer, multiscale.MultiScale))


BUGS = [
    (grams_read_ahead, "memory", checks.causal),
    (grams_forgotten, "memory", checks.step_equals_forward),
    (padding_is_in_the_grams, "memory", checks.padding_across_pieces),
    (interpolation_from_the_right, "sparse", checks.causal),
    (importance_by_rank, "sparse", checks.causal),
    (importance_by_rank, "sparse-diagonal", checks.causal),
    (mask_without_a_gradient, "sparse", checks.everything_learns),
    (mask_multiplies, "sparse", checks.what_is_left_out_is_not_computed),
    (every_expert_runs, "experts-top-p", checks.what_is_left_out_is_not_computed),
    (fill_forgotten, "sparse", checks.step_equals_forward),
    (fill_forgotten, "sparse-complex", checks.padding_across_pieces),
    (capacity_drop, "experts-top-p", checks.batch_mates_and_padding),
    (mean_pool_router, "experts-null", checks.causal),
    (gates_do_not_scale, "experts-top-p", checks.everything_learns),
    (halted_token_still_mixes, "act", checks.step_equals_forward),
    (halted_token_still_mixes, "exit", checks.step_equals_forward),
    (halted_token_still_mixes, "skip", checks.step_equals_forward),
    (depth_by_top_k_over_the_sequence, "act", checks.causal),
    (depth_by_top_k_over_the_sequence, "skip", checks.causal),
    (as_deep_as_the_deepest, "act", checks.batch_mates_and_padding),
    (as_deep_as_the_deepest, "exit", checks.batch_mates_and_padding),
    (stopped_rows_step, "act", checks.padding_across_pieces),
    (stopped_rows_step, "skip", checks.padding_across_pieces),
    (confident_about_the_next_position, "exit", checks.causal),
    (confident_about_the_next_position, "exit-probability", checks.causal),
    (units_do_not_learn, "exit", checks.everything_learns),
    (halting_does_not_weigh, "act", checks.everything_learns),
    (global_mean_in_a_causal_model, "length-truncate-sampled", checks.causal),
    (global_mean_in_a_causal_model, "length-pool", checks.causal),
    (batch_max_changes_the_output, "length-pool-words", checks.batch_mates_and_padding),
    (batch_max_changes_the_output, "length-truncate", checks.batch_mates_and_padding),
    (padding_counts_for_the_length, "length-truncate", checks.batch_mates_and_padding),
    (length_forgotten, "length-truncate", checks.step_equals_forward),
    (length_forgotten, "length-pool", checks.padding_across_pieces),
    (stretch_forgotten, "length-pool", checks.step_equals_forward),
    (missing_shift, "length-pool", checks.causal),
    (gain_does_not_reach_the_predictor, "length-truncate", checks.everything_learns),
    (gain_does_not_reach_the_predictor, "length-pool", checks.everything_learns),
    (missing_shift, "stride-4", checks.causal),
    (missing_shift, "words", checks.causal),
    (missing_shift, "learned-chunks", checks.causal),
    (boundary_by_the_next_position, "words", checks.causal),
    (boundary_by_the_next_position, "learned-chunks", checks.causal),
    (ratio_over_the_batch, "learned-chunks", checks.causal),
    (ratio_over_the_batch, "learned-chunks", checks.batch_mates_and_padding),
    (pooling_over_what_is_open, "stride-4", checks.batch_mates_and_padding),
    (pooling_over_what_is_open, "words", checks.padding_across_pieces),
    (batch_steps_together, "words", checks.batch_mates_and_padding),
    (open_chunk_forgotten, "stride-4", checks.step_equals_forward),
    (open_chunk_forgotten, "words", checks.step_equals_forward),
    (no_smoothing, "learned-chunks", checks.everything_learns),
    (right_going_sweep, "propagator-real", checks.causal),
    (right_going_sweep, "diagonal-complex", checks.causal),
    (convolution_without_shift, "propagator-real", checks.causal),
    (norm_over_the_sequence, "propagator-real", checks.causal),
    (mean_pool_router, "experts-top1", checks.causal),
    (top_k_over_the_sequence, "experts-top1", checks.causal),
    (capacity_drop, "experts-top1", checks.batch_mates_and_padding),
    (mean_pool_router, "experts-top2", checks.batch_mates_and_padding),
    (padding_is_computed, "propagator-real", checks.batch_mates_and_padding),
    (padding_is_counted, "propagator-real", checks.padding_is_not_counted),
    (padding_is_counted, "exit", checks.padding_is_not_counted),
    (pad_mask_off_by_one, "diagonal-real", checks.batch_mates_and_padding),
    (pad_mask_off_by_one, "experts-top1", checks.batch_mates_and_padding),
    (state_without_convolution, "propagator-real", checks.step_equals_forward),
    (state_forgets_g, "propagator-real", checks.step_equals_forward),
    (state_grows, "propagator-real", checks.step_equals_forward),
    (gates_do_not_scale, "experts-top1", checks.everything_learns),
    (even_lengths_only, "propagator-real", checks.any_length),
    (window_reaches_the_next_position, "attention", checks.causal),
    (window_is_longer_where_the_fold_has_more, "attention", checks.step_equals_forward),
    (whole_fold_is_read, "attention-over-several-folds", checks.step_equals_forward),
    (padding_is_in_the_window, "attention", checks.batch_mates_and_padding),
    (padding_is_in_the_window, "attention+multiscale", checks.padding_across_pieces),
    (nothing_counts_as_a_position, "attention", checks.step_equals_forward),
    (nothing_counts_as_a_position, "attention+depth", checks.padding_across_pieces),
    (window_forgotten, "attention-diagonal", checks.step_equals_forward),
    (rotated_by_the_place_in_the_fold, "attention", checks.step_equals_forward),
]


@pytest.mark.parametrize(("bug", "technique", "contract"), BUGS, ids=lambda x: getattr(x, "__name__", x))
def test_planted_bug_is_caught(bug, technique, contract, monkeypatch):
    model = checks.build(**TECHNIQUES[technique])
    bug(model, monkeypatch)
    with pytest.raises(RuntimeError if bug is even_lengths_only else AssertionError):
        contract(model)
