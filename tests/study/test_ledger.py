"""The ledger against torch's FLOP counter, by layer, by token; nothing left behind."""

import contract_checks as checks
import pytest
import torch
from test_contracts import TECHNIQUES
from torch.utils.flop_counter import FlopCounterMode

from resnet_bk.study.ledger import Ledger, plain_flops
from resnet_bk.training.sharded import recompute


@pytest.mark.parametrize("technique", TECHNIQUES)
@torch.no_grad()
def test_the_total_is_what_the_flop_counter_sees(technique):
    model = checks.build(**TECHNIQUES[technique])
    ids = checks.tokens(model, 3, 65)
    mask = torch.arange(65) < torch.tensor([[65], [30], [64]])
    for options in ({}, {"mask": mask}):
        with FlopCounterMode(display=False) as counter, Ledger(model) as ledger:
            model(ids, **options)
        assert ledger.total == pytest.approx(counter.get_total_flops(), rel=0.02)
        assert ledger.total == pytest.approx(sum(ledger.stages.values()))
        assert ledger.by_token.sum().item() + ledger.unused == pytest.approx(ledger.total)
        assert ledger.by_token.shape == ids.shape
        if options:
            assert (ledger.by_token[~mask] == 0).all()


def test_each_tokens_own_work_is_booked_for_it():
    """Bytes that went deeper, that more mixers kept and that used more experts cost more, by just what that is."""
    depth = checks.build(**TECHNIQUES["act"])
    ids = checks.tokens(depth, 4, 64)
    with Ledger(depth) as ledger:
        record = depth(ids).records[0]
    cost = [ledger.by_token[record.blocks == n] for n in record.blocks.unique().tolist()]
    assert all(c.max() - c.min() < 1e-6 * c.max() for c in cost)
    steps = torch.stack([c.mean() for c in cost]).diff()
    assert (steps > 0).all()
    experts = checks.build(**TECHNIQUES["experts-top-p"])
    with Ledger(experts) as ledger:
        records = experts(ids).records
    used = sum(r.used for r in records)
    each = 6 * experts.config.d_model * experts.config.d_hidden
    rest = ledger.by_token - each * used
    assert rest.max() - rest.min() < 1e-6 * rest.max()
    sparse = checks.build(**TECHNIQUES["sparse"])
    with Ledger(sparse) as ledger:
        records = sparse(ids).records
    kept = sum(r.kept.long() for r in records)
    read, scan, fill = 4 * 16**2, 7 * 2 * 8**2, 3 * 2 * 8  # D = 16: two heads of width 8
    rest = ledger.by_token - (read + scan - fill) * kept
    assert rest.max() - rest.min() < 1e-6 * rest.max()


def test_the_work_of_a_chunk_is_booked_where_it_closes():
    model = checks.build(**TECHNIQUES["stride-4"])
    with Ledger(model) as ledger:
        model(checks.tokens(model, 2, 32))
    inner = sum(flops for stage, flops in ledger.stages.items() if ".inner" in stage)
    closing = ledger.by_token[:, 3::4] - ledger.by_token[:, 0::4]
    assert (closing > 0).all()
    assert closing.sum().item() == pytest.approx(inner, rel=1e-6)


@pytest.mark.parametrize(
    ("technique", "tolerance"),
    [
        *((technique, 1e-12) for technique in ("act", "skip", "exit", "sparse")),
        ("experts-top-p", 0.05),
        ("act-in-words", 0.05),
        ("length-pool", 0.15),
    ],
)
def test_what_a_token_cost_is_the_same_alone_and_in_a_padded_batch(technique, tolerance):
    """But for what chunks and windows share: techniques pack, reorder and group rows, places stay with tokens."""
    model = checks.build(**TECHNIQUES[technique])
    rows = [checks.tokens(model, 1, n, seed=n) for n in (40, 17, 64)]
    alone = []
    for row in rows:
        with Ledger(model) as ledger:
            model(row)
        alone.append(ledger.by_token[0])
    ids, mask = torch.zeros(3, 64, dtype=torch.int64), torch.zeros(3, 64, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, 64 - row.shape[1] :], mask[i, 64 - row.shape[1] :] = row[0], True
    with Ledger(model) as ledger:
        model(ids, mask=mask)
    for i in range(3):
        torch.testing.assert_close(ledger.by_token[i, mask[i]], alone[i], rtol=tolerance, atol=0)


def test_several_calls_add_up_and_nothing_stays():
    model = checks.build()
    ids = checks.tokens(model, 2, 20)
    with Ledger(model) as once:
        model(ids)
    with Ledger(model) as twice:
        model(ids)
        model(ids)
    assert twice.total == 2 * once.total
    assert (twice.by_token == once.by_token).all()
    model(ids)
    assert twice.total == 2 * once.total
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_in_training_the_head_inside_the_loss_counts():
    model = checks.build()
    ids = checks.tokens(model, 2, 20)
    with Ledger(model) as with_logits:
        model(ids)
    for logits in (True, False):
        with FlopCounterMode(display=False) as counter, Ledger(model) as with_loss:
            model(ids, targets=ids, logits=logits)
        assert with_loss.total == pytest.approx(counter.get_total_flops(), rel=0.02)
        assert (with_loss.total == with_logits.total) != logits


def test_what_a_backward_pass_computes_again_does_not_count():
    ids, totals = None, []
    for change in (lambda model: model, recompute):
        model = change(checks.build())
        ids = checks.tokens(model, 2, 20) if ids is None else ids
        with Ledger(model) as ledger:
            model(ids, targets=ids).loss.backward()
        totals.append(ledger.total)
    assert totals[0] == totals[1]


def test_parts_called_by_themselves_are_refused():
    model = checks.build()
    with Ledger(model), pytest.raises(RuntimeError, match="ledger: a part of the model was called by itself"):
        model.features(checks.tokens(model, 2, 20))


def test_single_steps_of_sparse_cores_count_in_full():
    """They compute everything: skipping would save nothing there."""
    model = checks.build(**TECHNIQUES["sparse"])
    with Ledger(model) as ledger:
        records = model(checks.tokens(model, 64, 1)).records
    left_out = sum((~r.kept).double().squeeze(1) for r in records)
    assert left_out.max() > left_out.min()
    whole = ledger.by_token.squeeze(1) + 4 * 16**2 * left_out  # queries and keys that nobody asks for
    assert whole.max() == pytest.approx(whole.min().item(), rel=1e-12)
    assert ledger.unused == 4 * 16**2 * left_out.sum()


@pytest.mark.parametrize(
    "fields", [{}, {"readout": "diagonal"}, {"num_experts": 4}, TECHNIQUES["act"], TECHNIQUES["stride-4"]]
)
def test_the_plain_model_is_the_one_without_techniques(fields):
    config = checks.build(**fields).config
    plain = checks.build(
        readout=config.readout, n_layers=config.blocks, d_ff=config.num_experts * config.d_hidden, vocab_size=31
    )
    ids = checks.tokens(plain, 1, 40)
    with Ledger(plain) as ledger:
        plain(ids)
    assert plain_flops(config) == pytest.approx(ledger.total / 40)
