"""Benchmarks in miniature.

- On a GPU: it runs on a CPU too, it refuses wrong numbers, a failure stays on its page.
- Fronts: a technique pays only where nothing else is as good and as fast.
- Recall: peers compute their recurrences, tasks have the answers that they define.
"""

import contextlib
import itertools
import subprocess
import sys
from pathlib import Path

import common
import energies
import fronts
import gpu_kernels
import numpy as np
import pytest
import recall
import torch
from gpu_page import Machine, Page
from peer_mixers import GatedDeltaNet, Mamba2, gated_linear_attention, parameters

from resnet_bk.config import ModelConfig
from resnet_bk.model import LanguageModel

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
PARTS = ("Kernels: chunked", "Mixer layers", "Training", "Decoding", "Decoding: a Transformer", "A million tokens")


@pytest.mark.soak
def test_all_of_it_runs_in_miniature(tmp_path):
    page = tmp_path / "page.md"
    command = [sys.executable, "gpu.py", "--device", "cpu", "--quick", "--out", str(page)]
    subprocess.run(command, cwd=BENCHMARKS, check=True, capture_output=True)
    text = page.read_text()
    assert [f"## {part}\n" in text for part in PARTS] == [True] * len(PARTS)
    for name in ("plain", "adaptive", "Transformer (Llama)", "propagator (ours)", "softmax attention"):
        assert f"| {name}" in text
    assert "Failed" not in text
    assert "left out: out of time" not in text


@pytest.mark.parametrize("wrong", [False, True])
def test_no_speed_is_measured_of_a_kernel_with_wrong_numbers(wrong, monkeypatch):
    fast = gpu_kernels.fast

    def off(regime, backend):
        run = fast(regime, backend)
        return lambda *inputs: run(*inputs) * (1.001 if inputs[0].shape[1] == 33 else 1)

    monkeypatch.setattr(gpu_kernels, "fast", off if wrong else fast)
    found = []
    if wrong:
        with pytest.raises(gpu_kernels.WrongNumbersError, match=r"real, N = 33, torch.float64: 1.0e-03 where 1e-10"):
            found.extend(gpu_kernels.kernels(Machine("cpu", True, False), "chunked", 1e9))
    found.extend([] if wrong else gpu_kernels.kernels(Machine("cpu", True, False), "chunked", 1e9))
    assert any("GB/s" in part for part in found) != wrong


def test_a_part_that_fails_is_written_down_and_the_page_goes_on(tmp_path):
    page, machine = Page(tmp_path / "page.md"), Machine("cpu", True, False)

    def half():
        yield "a number\n"
        raise MemoryError("no technique")

    page.section("First", machine, 1.0, half())
    page.section("Second", machine, 1.0, iter(["another\n"]))
    text = (tmp_path / "page.md").read_text()
    assert page.failed
    assert (
        text.index("a number")
        < text.index("MemoryError: no technique")
        < text.index("## Second")
        < text.index("another")
    )


def gated_linear_steps(q, k, v, log_alpha):
    state, ys = q.new_zeros(*q.shape[::2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        state = log_alpha[:, t].exp().unsqueeze(-1) * state + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        ys.append((q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(ys, 1)


@pytest.mark.parametrize("length", [1, 16, 77])
def test_gated_linear_attention_in_chunks_is_its_recurrence(length):
    torch.manual_seed(0)
    q, k, v, x = torch.randn(4, 2, length, 2, 8, dtype=torch.float64)
    inputs = q, k, v, -x.sigmoid()
    found, gradients = torch.func.vjp(gated_linear_attention, *inputs)
    wanted, right = torch.func.vjp(gated_linear_steps, *inputs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)
    for a, b in zip(gradients(v), right(v), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_mamba2_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    torch.manual_seed(0)
    ours = Mamba2(ModelConfig(d_model=16, n_heads=2))
    shape = {"hidden_size": 16, "num_heads": 2, "head_dim": 8, "state_size": 8, "n_groups": 2, "expand": 1}
    theirs = Mamba2Mixer(transformers.Mamba2Config(**shape, num_hidden_layers=1, chunk_size=16), 0)
    for parameter in (ours.conv_bias, ours.skip, ours.norm.weight):
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        q, k, v, gate = ours.in_proj.weight.split(16)
        theirs.in_proj.weight.copy_(torch.cat([gate, v, k, q, ours.decay.step.weight]))
        order = torch.arange(48).view(3, 16).flip(0).flatten()  # v, k, q
        theirs.conv1d.weight.copy_(ours.conv.weight.T[order].unsqueeze(1))
        theirs.conv1d.bias.copy_(ours.conv_bias[order])
        theirs.dt_bias.copy_(ours.decay.dt_bias)
        theirs.A_log.copy_(ours.decay.A_log)
        theirs.D.copy_(ours.skip)
        theirs.norm.weight.copy_(ours.norm.weight.repeat(2))
        theirs.out_proj.weight.copy_(ours.out_proj.weight)
        x = torch.randn(2, 40, 16)
        torch.testing.assert_close(ours(x, None, None)[0], theirs(x), rtol=0, atol=1e-5)


def test_gated_deltanet_computes_the_rule_of_transformers():
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    torch.manual_seed(0)
    ours = GatedDeltaNet(ModelConfig(d_model=16, n_heads=2))
    x, (q, k, v) = torch.randn(2, 40, 16), torch.randn(3, 2, 40, 2, 8)
    with torch.no_grad():
        log_alpha, strength = ours.decay(x)[0], ours.strength(x).sigmoid()
        expected, _ = qwen.torch_recurrent_gated_delta_rule(q, k, v, log_alpha, strength, use_qk_l2norm_in_kernel=True)
        torch.testing.assert_close(ours.rule(x, q, k, v), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mixer", recall.PEERS)
def test_peers_are_as_large_as_our_mixer_and_their_states_too(mixer):
    ours, peer = (recall.model_of({"mixer": name, "fields": {}, "seed": 0}) for name in ("ours", mixer))
    assert abs(parameters(peer) - parameters(ours)) < 0.005 * parameters(ours)
    if mixer != recall.SOFTMAX:
        assert recall.state_floats(peer) == recall.state_floats(ours) == 2 * 2 * 32**2


@pytest.mark.parametrize(("energy", "own"), [("bonds", 0), ("real", 1), ("complex", 1)])
def test_the_state_counts_g_where_it_changes(energy, own):
    model = recall.model_of({"mixer": "ours", "fields": {"energy": energy}, "seed": 0})
    assert recall.state_floats(model) == 2 * 2 * 32**2 + own * 2 * 2 * (2 if energy == "complex" else 1)


def test_a_training_that_is_ended_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "SAVED_EVERY", 0.0)
    ids, state = np.random.default_rng(0).integers(0, 9, 1000), tmp_path / "state"

    def trained(ended_after: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = LanguageModel(9, d_model=8, n_layers=2, n_seq=16, num_experts=1)
        draws = itertools.count()
        draw = common.batches(ids, 2, 16, seed=0)

        def next_draw():
            if next(draws) == ended_after:
                raise KeyboardInterrupt
            return draw()

        def loss_of(x, y):
            return torch.rand(()) * model(x, targets=y).loss

        with contextlib.suppress(KeyboardInterrupt):
            common.train(loss_of, model, next_draw, 6, optimizer="muon", state=state)
        return model.state_dict()

    wanted = trained(100)
    assert not state.exists()
    trained(4)
    assert state.exists()
    torch.testing.assert_close(trained(100), wanted, rtol=0, atol=0)


def test_a_logged_cell_runs_again_after_a_change_of_the_code(tmp_path):
    script, log = tmp_path / "script.py", tmp_path / "log.jsonl"
    for answer in (1, 1, 2):
        script.write_text(f"print('{{\"answer\": {answer}}}')")
        results = common.run_cells(str(script), [{"size": 1}, {"size": 2}], 2, log)
        assert [result["answer"] for result in results] == [answer, answer]
    assert len(log.read_text().splitlines()) == 4


@pytest.mark.parametrize("name", recall.TASKS)
def test_tasks_have_the_answers_that_they_define(name):
    task = recall.TASKS[name]
    for draw in filter(None, (task.draw, task.far)):
        for ids, targets in zip(*draw(4, 16, torch.Generator().manual_seed(0)), strict=True):
            places = (targets != -100).nonzero().flatten()
            if name == "copy":
                wanted = ids[:16]
            elif name == "selective":
                wanted = ids[ids < recall.FILLER]
            else:  # what comes after the first place that has the same token
                wanted = torch.stack([ids[(ids == ids[place]).nonzero()[0, 0] + 1] for place in places])
            assert targets[places].tolist() == wanted.tolist()
            assert len(places) == (1 if name in ("induction", "needle") else 16)
            assert torch.equal(ids[places] == recall.MARK, places >= 0) == (name in ("induction", "selective"))


def test_reading_in_pieces_changes_nothing(monkeypatch):
    model = recall.model_of({"mixer": "ours", "fields": {}, "seed": 0})
    whole = recall.score(model, recall.recall, 16, 16)
    monkeypatch.setattr(recall, "PIECE", 40)
    assert recall.score(model, recall.recall, 16, 16) == pytest.approx(whole, rel=1e-5)


def test_energies_trains_compares_and_times(monkeypatch):
    monkeypatch.setattr(energies, "SCORED", 2048)
    monkeypatch.setattr(energies, "REPEATS", 1)
    results = []
    for kind, bits in (("real", 2.5), ("bonds", 2.25)):
        cell = {"energy": kind, "corpus": "stdlib", "seconds": 0.1, "window": 256, "seed": 0}
        found = energies.cell(cell)
        assert 0 < found["bits_per_byte"] < 10
        results.append({"cell": cell, **found, "bits_per_byte": bits})
    assert "| 2.5000 | 2.2500 | -0.2500 |" in energies.quality(results)
    assert energies.speed().count("\n") == 2 + len(energies.SHAPES)


@pytest.mark.parametrize(
    ("bits", "clocks", "pays"),
    [
        (1.2, (9.0, 9.0), ["does not pay here"]),  # two plain blocks are as good, and faster
        (1.2, (4.0, 9.0), ["pays in reading"]),
        (1.0, (19.0, 19.0), ["pays in reading and decoding"]),  # nothing is as good
    ],
)
def test_a_technique_pays_where_nothing_as_good_is_as_fast(bits, clocks, pays):
    scores = {"plain, 1": 1.3, "plain, 2": 1.2, "plain, 8": 1.1, "early exit, 0.9": bits, "early exit, 1": 1.1}
    speeds = {"plain, 1": 3.0, "plain, 2": 5.0, "plain, 8": 20.0, "early exit, 1": 21.0}
    times = {
        clock: {name: [x] for name, x in (speeds | {"early exit, 0.9": own}).items()}
        for clock, own in zip(fronts.CLOCKS, clocks, strict=True)
    }
    rows = [line for line in fronts.verdicts([scores], [times]).splitlines() if line.startswith("| early exit")]
    assert [row.split(" | ")[-1].removesuffix(" |") for row in rows] == pays


def test_every_kind_of_model_of_the_fronts_can_be_built(monkeypatch):
    monkeypatch.setitem(fronts.SHAPE, "memory", {"orders": [1, 2], "rows": 100})
    for name, kind in fronts.KINDS.items():
        assert bool(fronts.build(name).config.techniques[1:]) == bool(kind.technique)  # memory is the first
