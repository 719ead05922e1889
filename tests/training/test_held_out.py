"""Scores of held-out text during training: what they are, what they cost the run, which weights are kept."""

import json
import math

import pytest
import torch
from test_trainer import build, weights, windows

from resnet_bk.checkpoint import verify
from resnet_bk.config import DataConfig
from resnet_bk.folders import HELD_OUT
from resnet_bk.hf import ResNetBKForCausalLM
from resnet_bk.training import held_out as module
from resnet_bk.training.held_out import HeldOut, best_line
from resnet_bk.training.windows import collate


def scored(folder, scores=None, **settings):
    """Return a trainer that scores held-out text every second step, and its callback. scores: instead of real ones."""
    trainer = build(folder, eval_every=2, eval_bytes=64, **settings)
    callback = HeldOut(trainer, windows(9).tokens, folder / "best", folder / "metrics.jsonl")
    if scores is not None:
        callback.score = iter(scores).__next__
    trainer.add_callback(callback)
    return trainer, callback


def lines(trainer):
    return {line["step"]: line[HELD_OUT] for line in trainer.state.log_history if HELD_OUT in line}


def test_a_score_is_the_cross_entropy_of_the_first_windows(tmp_path):
    trainer, callback = scored(tmp_path)
    rows = [windows(9)[i] for i in range(4)]  # 64 bytes are 4 windows of 8 tokens of two bytes
    batch = {name: x.to(trainer.args.device) for name, x in collate(rows).items()}
    with torch.no_grad():
        nats = trainer.model.eval()(**batch).loss
    trainer.model.train()
    assert callback.score() == pytest.approx(float(nats) / math.log(2) / 2, rel=1e-5)
    assert trainer.model.training


def test_of_several_sources_windows_from_all_of_the_text_are_scored(tmp_path):
    trainer, callback = scored(tmp_path, data=DataConfig(sources={"a": 1, "b": 1}))
    rows = [windows(9)[i] for i in (0, 2, 4, 6)]
    batch = {name: x.to(trainer.args.device) for name, x in collate(rows).items()}
    with torch.no_grad():
        nats = trainer.model.eval()(**batch).loss
    assert callback.score() == pytest.approx(float(nats) / math.log(2) / 2, rel=1e-5)


def test_every_score_is_logged_and_the_last_one_is_at_the_end(tmp_path):
    trainer, _ = scored(tmp_path, max_steps=5, log_every=3)
    trainer.run_training(None)
    assert list(lines(trainer)) == [2, 4, 5]


def test_scoring_changes_no_weight_and_no_clock(tmp_path, monkeypatch):
    plain = build(tmp_path / "plain")
    plain.run_training(None)
    trainer, callback = scored(tmp_path / "scored")
    score, seen = callback.score, []

    def slow():
        now = trainer.clock.seconds
        seen.append(trainer.clock.started is None)
        result = score()
        assert trainer.clock.seconds == now
        return result

    callback.score = slow
    trainer.run_training(None)
    assert seen == [True] * 6
    for found, expected in zip(weights(trainer), weights(plain), strict=True):
        assert torch.equal(found, expected)


def test_the_best_model_is_kept(tmp_path):
    trainer, _ = scored(tmp_path, [3.0, 2.0, 2.5, math.nan, 2.0, 2.7])
    kept = {}
    original = module.gather_weights

    def gathered(network, keep):
        kept[trainer.state.global_step] = {n: p.detach().clone() for n, p in network.named_parameters()}
        return original(network, keep)

    module.gather_weights = gathered
    try:
        trainer.run_training(None)
    finally:
        module.gather_weights = original
    assert list(kept) == [2, 4]
    verify(tmp_path / "best")
    best = ResNetBKForCausalLM.from_pretrained(tmp_path / "best")
    for name, p in best.named_parameters():
        assert torch.equal(p, kept[4][name])


def test_scores_of_earlier_sessions_count(tmp_path):
    lines = [{"step": 1}, {"step": 2, HELD_OUT: math.nan}, {"step": 3, HELD_OUT: 1.5}, {"step": 4, HELD_OUT: 2.5}]
    assert best_line(lines)["step"] == 3
    assert best_line(lines[:2]) is None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trainer, _ = scored(tmp_path, [1.6, 1.7, 1.8, 1.9, 1.55, 1.52])
    trainer.run_training(None)
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("count", [1, 3])
def test_a_short_text_is_scored_whole(tmp_path, count):
    trainer = build(tmp_path, eval_every=2)
    callback = HeldOut(trainer, windows(count, 5).tokens, tmp_path / "best", tmp_path / "metrics.jsonl")
    assert 2.5 < callback.score() < 4.5  # log2(40) / 2 bytes a token is 2.7
