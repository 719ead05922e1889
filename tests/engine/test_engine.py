"""The engine computes what the model does, for every technique, and takes and returns its states.

Dimensions: B rows, N tokens.
"""

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

from resnet_bk.engine.engine import Engine
from resnet_bk.engine.instructions import Op

STEPS = 512


def decoded(engine, ids, state=None):
    """Return the logits of all tokens, (B, N, V), and the state after them."""
    state = engine.start(len(ids)) if state is None else state
    return torch.stack([torch.from_numpy(engine.step(t.numpy(), state).copy()) for t in ids.T], dim=1), state


@pytest.mark.parametrize("name", TECHNIQUES)
@torch.no_grad()
def test_logits_and_states_are_the_models_for_every_technique(name):
    model = checks.build(**TECHNIQUES[name])
    engine, ids = Engine(model), checks.tokens(model, 2, STEPS + 3)
    output = model(ids[:, :STEPS])
    logits, state = decoded(engine, ids[:, :STEPS])
    checks.close(logits, output.logits, "from the start")
    following = model(ids[:, STEPS:], state=output.state).logits
    checks.close(model(ids[:, STEPS:], state=state.to_torch()).logits, following, "state to the model")
    checks.close(decoded(engine, ids[:, STEPS:], engine.from_torch(output.state))[0], following, "state from the model")
    again = engine.from_torch(state.to_torch())
    for x, y in zip(*(pytree.tree_leaves(s.to_torch()) for s in (again, state)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", ["propagator-bonds", "memory+multiscale+length+depth+sparsity+experts", "attention"])
@torch.no_grad()
def test_rows_do_not_depend_on_each_other(name):
    model = checks.build(**TECHNIQUES[name])
    engine, ids = Engine(model), checks.tokens(model, 5, 40)
    together, state = decoded(engine, ids)
    for row in range(5):
        alone, own = decoded(engine, ids[row : row + 1])
        assert torch.equal(alone[0], together[row])
        assert np.array_equal(own.numbers[0], state.numbers[row])
    order = np.array([3, 3, 0])
    checks.close(
        decoded(engine, ids[:3], state.rows(order))[0],
        decoded(
            engine, ids[:3], engine.from_torch(pytree.tree_map(lambda x: x[torch.from_numpy(order)], state.to_torch()))
        )[0],
        "chosen rows",
    )


@torch.no_grad()
def test_blocks_are_counted():
    model = checks.build(n_layers=4, depth={"policy": "skip"})
    engine, ids = Engine(model), checks.tokens(model, 1, 60)
    state, counted = engine.start(), []
    for t in ids[0].tolist():
        engine.step([t], state)
        counted.append(int(engine.blocks(state)[0]))
    record = model(ids).records[0]
    assert counted == record.blocks[0].tolist()
    assert len(set(counted)) > 1


@torch.no_grad()
def test_single_precision_is_close_over_512_steps():
    for name in ("propagator-bonds", "propagator-complex", "sparsity+experts", "words", "memory"):
        model = checks.build(**TECHNIQUES[name]).float()
        ids = checks.tokens(model, 1, STEPS)
        expected = model(ids).logits
        error = (decoded(Engine(model), ids)[0] - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, name


@torch.no_grad()
def test_weights_in_int8_are_close():
    for fields in ({}, {"num_experts": 4, "top_k": 2}, {"tie_word_embeddings": False, "readout": "diagonal"}):
        torch.manual_seed(0)
        model = LanguageModel(259, d_model=64, n_layers=2, n_seq=64, **fields).eval()
        ids = torch.randint(259, (1, 50))
        expected, got = model(ids).logits, decoded(Engine(model, int8=True), ids)[0]
        assert 0 < (got - expected).abs().max() < 0.03 * expected.abs().max()


def test_tokens_outside_the_vocabulary_are_refused():
    engine = Engine(checks.build())
    for token in (-1, 31):
        with pytest.raises(IndexError, match=r"allowed 0 to 30"):
            engine.step([token], engine.start())


@pytest.mark.parametrize("op", [Op.CONV, Op.SCAN, Op.BONDS, Op.GATED_NORM, Op.SWIGLU, Op.LINEAR, Op.NORM, Op.SIGMOID])
@torch.no_grad()
def test_a_missing_instruction_is_caught(op):
    """The comparison with the model can fail."""
    model = checks.build()
    engine, ids = Engine(model), checks.tokens(model, 2, 20)
    code = engine.arrays[0]
    code[np.flatnonzero(code[:, 0] == op)[-1], 0] = 0
    with pytest.raises(AssertionError):
        checks.close(decoded(engine, ids)[0], model(ids).logits, "without an instruction")
