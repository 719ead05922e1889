"""The engine computes what the model does, for every technique, and takes and returns its states.

Dimensions: B rows, N tokens.
"""

import functools
import time
from pathlib import Path

import contract_checks as checks
import numpy as np
import pytest
import torch
from test_contracts import TECHNIQUES
from torch.utils import _pytree as pytree

from resnet_bk import LanguageModel
from resnet_bk.ops import available_backends

if "numba" not in available_backends():
    pytest.skip("needs numba", allow_module_level=True)

from resnet_bk.checkpoint import CheckpointError
from resnet_bk.engine import interpreter
from resnet_bk.engine.compiler import engine_of
from resnet_bk.engine.conversion import from_torch, to_torch
from resnet_bk.engine.engine import _Faster
from resnet_bk.engine.instructions import Op
from resnet_bk.engine.layers import SHARED
from resnet_bk.engine.state import EngineState

STEPS = 512


def decoded(engine, ids, state=None):
    """Return the logits of all tokens, (B, N, V), and the state after them."""
    state = engine.start(len(ids)) if state is None else state
    return torch.stack([torch.from_numpy(engine.step(t.numpy(), state).copy()) for t in ids.T], dim=1), state


@pytest.mark.parametrize("name", TECHNIQUES)
@torch.no_grad()
def test_logits_and_states_are_the_models_for_every_technique(name):
    model = checks.build(**TECHNIQUES[name])
    engine, ids = engine_of(model), checks.tokens(model, 2, STEPS + 3)
    output = model(ids[:, :STEPS])
    logits, state = decoded(engine, ids[:, :STEPS])
    checks.close(logits, output.logits, "from the start")
    following = model(ids[:, STEPS:], state=output.state).logits
    checks.close(model(ids[:, STEPS:], state=to_torch(state)).logits, following, "state to the model")
    checks.close(
        decoded(engine, ids[:, STEPS:], from_torch(engine, output.state))[0], following, "state from the model"
    )
    again = from_torch(engine, to_torch(state))
    for x, y in zip(*(pytree.tree_leaves(to_torch(s)) for s in (again, state)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["propagator-bonds", "memory+multiscale+length+depth+sparsity+experts", "attention"])
@torch.no_grad()
def test_rows_do_not_depend_on_each_other(name):
    model = checks.build(**TECHNIQUES[name])
    engine, ids = engine_of(model), checks.tokens(model, 5, 40)
    together, state = decoded(engine, ids)
    for row in range(5):
        alone, own = decoded(engine, ids[row : row + 1])
        checks.close(alone[0], together[row], f"row {row}")  # one row runs in code without threads
        np.testing.assert_allclose(own.numbers[0], state.numbers[row], rtol=1e-9, atol=1e-9)
    pair, _ = decoded(engine, ids[2:4])
    assert torch.equal(pair, together[2:4])
    order = np.array([3, 3, 0])
    checks.close(
        decoded(engine, ids[:3], state.rows(order))[0],
        decoded(
            engine, ids[:3], from_torch(engine, pytree.tree_map(lambda x: x[torch.from_numpy(order)], to_torch(state)))
        )[0],
        "chosen rows",
    )


WIDTHS = [(32, 4), (32, 16), (32, 32), (96, 12), (30, 3), (30, 15), (7, 1), (35, 5), (64, 2)]
SHAPES = [*TECHNIQUES.values(), *({"d_model": d, "n_heads": heads} for d, heads in WIDTHS)]
SHAPES += [{"d_model": 30, "n_heads": 3, "energy": kind} for kind in ("real", "complex")]
SHAPES += [{"d_model": 32, "n_heads": 16, "sparsity": {"target": 0.5}}, {"vocab_size": 4097, "d_model": 24}]


@pytest.mark.parametrize(("dtype", "int8"), [(torch.float32, False), (torch.float32, True), (torch.float64, False)])
@torch.no_grad()
def test_four_rows_that_read_a_matrix_together_get_what_each_gets_alone(dtype, int8, monkeypatch):
    monkeypatch.setattr("numba.get_num_threads", lambda: 1)  # all rows in one group
    for fields in SHAPES:
        model = checks.build(**fields).to(dtype)
        engine, ids = engine_of(model, int8), checks.tokens(model, 7, 24)
        together, pairs = decoded(engine, ids)[0], [decoded(engine, ids[i : i + 2])[0] for i in range(0, 6, 2)]
        assert torch.equal(together[:6], torch.cat(pairs)), fields
        # One row has a function of its own. In a process that compiles one of both functions, while the other one is
        # in the cache, the helpers that both call are different code, which rounds differently.
        close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(together[6:], decoded(engine, ids[6:])[0], **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_nothing_is_written_beyond_the_memory_of_a_row(dtype):
    """Nothing checks the places that a program names. Numbers behind those of each row must stay."""
    for fields in SHAPES:
        model = checks.build(**fields).to(dtype)
        engine, ids = engine_of(model), checks.tokens(model, 5, 24)
        plain = engine.start(5)
        p, kind = engine.code, engine.code.weights.dtype
        expected, _ = decoded(engine, ids)
        engine._threads.scratch = np.full((5, p.most + 64), 7, kind)
        wide, wholes = np.full((5, p.numbers + 64), 7, kind), np.full((5, p.wholes + 8), 7)
        wide[:, : p.numbers], wholes[:, : p.wholes] = plain.numbers, plain.wholes
        state = EngineState(wide, wholes, engine)
        engine.fits = lambda state: True
        assert torch.equal(decoded(engine, ids, state)[0], expected), fields
        for row in (engine._threads.scratch[:, p.most :], wide[:, p.numbers :], wholes[:, p.wholes :]):
            assert (row == 7).all(), fields


def test_states_and_ids_that_do_not_fit_are_refused():
    engine, other = engine_of(checks.build()), engine_of(checks.build(n_layers=3))
    with pytest.raises(ValueError, match="state: is one of another model"):
        engine.step([1], other.start())
    with pytest.raises(ValueError, match="state: is one of another model"):
        engine.step([1], engine_of(checks.build().float()).start())
    for ids in ([1], [1, 2, 3], [[1, 2]]):
        with pytest.raises(ValueError, match=r"ids: expected shape \(2,\)"):
            engine.step(ids, engine.start(2))


def test_models_whose_modules_do_not_fit_are_not_compiled():
    model = checks.build()
    model.embed = torch.nn.Embedding(20, 16).double()
    with pytest.raises(ValueError, match="has 20 embeddings and 31 logits"):
        engine_of(model)
    model = checks.build(tie_word_embeddings=False)
    model.head = torch.nn.Linear(16, 31).double()
    with pytest.raises(ValueError, match="a head with a bias"):
        engine_of(model)
    model = checks.build()
    model.norm.eps = 1e-3
    with pytest.raises(ValueError, match=r"eps: got 0\.001"):
        engine_of(model)
    model = checks.build(**TECHNIQUES["memory"])
    model.memory.entries[:, 1] = 300 << 8 | 255
    with pytest.raises(CheckpointError, match="it is damaged"):
        engine_of(model)


@torch.no_grad()
def test_blocks_are_counted():
    model = checks.build(n_layers=4, depth={"policy": "skip"})
    engine, ids = engine_of(model), checks.tokens(model, 1, 60)
    state, counted = engine.start(), []
    for t in ids[0].tolist():
        engine.step([t], state)
        counted.append(int(engine.blocks(state)[0]))
    record = model(ids).records[0]
    assert counted == record.blocks[0].tolist()
    assert len(set(counted)) > 1


@pytest.mark.parametrize("policy", ["act", "skip", "exit"])
@torch.no_grad()
def test_each_row_may_have_a_threshold_of_its_own(policy):
    model = checks.build(n_layers=4, depth={"policy": policy})
    engine, ids = engine_of(model), checks.tokens(model, 1, 60)
    state, thresholds = engine.start(3), (0.01, 0.9, 1.0)
    for row, threshold in enumerate(thresholds):
        state.span(row, row + 1).set_threshold(threshold)
    found, _ = decoded(engine, ids.expand(3, -1), state)
    for row, threshold in enumerate(thresholds):
        model.blocks[0].threshold = threshold
        checks.close(found[row : row + 1], model(ids).logits, f"threshold {threshold}")
    assert not torch.equal(found[0], found[2])
    assert torch.equal(decoded(engine, ids)[0], decoded(engine, ids, from_torch(engine, to_torch(engine.start())))[0])


@torch.no_grad()
def test_rows_read_any_number_of_tokens_at_once():
    model = checks.build(**TECHNIQUES["memory+multiscale+length+depth+sparsity+experts"])
    engine, ids = engine_of(model), checks.tokens(model, 3, 40)
    steps, _ = decoded(engine, ids)
    state, at = engine.start(3), np.zeros(3, int)
    for counts in ((5, 0, 1), (1, 30, 1), (0, 0, 3), (34, 10, 35)):
        logits = torch.from_numpy(
            engine.read([ids[r, at[r] : at[r] + n].tolist() for r, n in enumerate(counts)], state).copy()
        )
        at += counts
        for row in np.flatnonzero(counts):
            assert torch.equal(logits[row], steps[row, at[row] - 1])
    one = engine.start()
    engine.read([ids[0, :39].tolist()], one)
    checks.close(torch.from_numpy(engine.read([ids[0, 39:].tolist()], one).copy()), steps[:1, 39], "one row")
    with pytest.raises(ValueError, match="pieces: expected 3, one for each row"):
        engine.read([[1], [2]], state)
    with pytest.raises(IndexError, match="got 0 to 31, allowed 0 to 30"):
        engine.read([[1], [2, 31], []], state)


@torch.no_grad()
def test_rows_of_a_state_are_replaced_and_viewed():
    model = checks.build()
    engine, ids = engine_of(model), checks.tokens(model, 2, 20)
    expected, _ = decoded(engine, ids)
    state = engine.start(3)
    decoded(engine, ids[:, :10], state.span(0, 2))
    state.put(2, state.span(0, 1))  # the first row goes on in the last one
    logits, _ = decoded(engine, ids[:, 10:].flip(0), state.span(1, 3))
    assert torch.equal(logits, expected[:, 10:].flip(0))
    state.put(1, engine.start())
    assert torch.equal(decoded(engine, ids[:1], state.span(1, 2))[0], decoded(engine, ids[:1])[0])


@torch.no_grad()
def test_single_precision_is_close_over_512_steps():
    for name in ("propagator-bonds", "propagator-complex", "sparsity+experts", "words", "memory"):
        model = checks.build(**TECHNIQUES[name]).float()
        ids = checks.tokens(model, 1, STEPS)
        expected = model(ids).logits
        error = (decoded(engine_of(model), ids)[0] - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, name


@torch.no_grad()
def test_weights_in_int8_are_close():
    for fields in ({}, {"num_experts": 4, "top_k": 2}, {"tie_word_embeddings": False, "readout": "diagonal"}):
        torch.manual_seed(0)
        model = LanguageModel(259, d_model=64, n_layers=2, n_seq=64, **fields).eval()
        ids = torch.randint(259, (1, 50))
        expected, got = model(ids).logits, decoded(engine_of(model, int8=True), ids)[0]
        assert 0 < (got - expected).abs().max() < 0.03 * expected.abs().max()


def test_tokens_outside_the_vocabulary_are_refused():
    engine = engine_of(checks.build())
    for token in (-1, 31):
        with pytest.raises(IndexError, match=r"allowed 0 to 30"):
            engine.step([token], engine.start())


def test_the_interpreter_knows_every_instruction():
    """It passes over rows that it does not know."""
    source = Path(interpreter.__file__).read_text()
    assert [op.name for op in Op if f"op == Op.{op.name}:" not in source] == []


@functools.cache
def models_by_instruction():
    """Map each instruction to the first models of TECHNIQUES whose programs have it: (name, model) pairs."""
    found = {}
    for name, fields in TECHNIQUES.items():
        model = checks.build(**fields)
        for op in np.unique(engine_of(model).code.instructions[:, 0]):
            found.setdefault(Op(op), []).append((name, model))
    return found


@pytest.mark.parametrize("op", [op for op in Op if op not in (Op.COUNT, Op.LINEAR_OF_BYTES)])
@torch.no_grad()
def test_a_missing_instruction_is_caught(op):
    """The comparison with the model can fail: in some program, without the last row of this kind, logits differ."""
    for _, model in models_by_instruction()[op][:8]:
        engine, ids = engine_of(model), checks.tokens(model, 2, 60)
        code = engine.code.instructions
        code[np.flatnonzero(code[:, 0] == op)[-1], 0] = 0
        got, expected = decoded(engine, ids)[0], model(ids).logits
        if not (got - expected).abs().max() <= 1e-9 * expected.abs().max():
            return
    pytest.fail(f"without {op.name}, logits are the same")


@pytest.mark.parametrize("int8", [False, True])
@torch.no_grad()
def test_threads_that_share_large_matrices_compute_the_same(int8):
    torch.manual_seed(0)
    model = LanguageModel(SHARED // 32 + 3, d_model=32, n_layers=1).eval()
    engine, ids = engine_of(model, int8), [5, 9, 700, 3, 3, 8]
    assert isinstance(engine._alone, _Faster)
    found = []
    for function in engine._alone._functions:
        engine._alone, state = function, engine.start()
        found.append([engine.step([token], state).copy() for token in ids])
    np.testing.assert_array_equal(*found)


def test_the_faster_function_is_called_and_the_other_one_is_measured_now_and_then():
    calls, slow = [], {"a": 0.0, "b": 0.01}

    def function(name):
        return lambda counts: (calls.append(name), time.sleep(slow[name] * counts[1]))

    faster = _Faster(function("a"), function("b"))
    for i in range(64):  # times are those of a step
        faster(np.array([0, 1 + 3 * (i % 2), 0]))
    assert calls.count("b") < 12
    slow |= {"a": 0.01, "b": 0.0}
    for _ in range(200):
        faster(np.ones(3))
    assert set(calls[-10:]) == {"b"} or calls[-10:].count("b") > 7


def test_recent_ngrams_of_a_damaged_state_are_not_there():
    engine = engine_of(checks.build(memory={"recent": [1], "recent_rows": 50}))
    states = [engine.start(), engine.start()]
    for state, change in zip(states, (lambda x: 0 * x, lambda x: (x > 0) * (x | 200 << 40 | 2**24 - 1)), strict=True):
        for token in (5, 6):
            engine.step([token], state)
        entries = state.part(engine.code.places[1])
        entries[...] = change(entries)  # of what followed 5
    damaged, empty = (engine.step([5], state).copy() for state in states[::-1])
    assert np.array_equal(damaged, empty)
