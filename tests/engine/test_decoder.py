"""The decoder uses the engine where it can, and notices what it cannot compile and what has changed."""

import copy
import gc
import weakref

import pytest
import torch

from resnet_bk import LanguageModel
from resnet_bk.config import ConfigError
from resnet_bk.engine.conversion import to_torch
from resnet_bk.engine.decoder import Decoder, decoder_of
from resnet_bk.engine.state import EngineState
from resnet_bk.ops import available_backends, use_backend

pytestmark = pytest.mark.skipif("numba" not in available_backends(), reason="needs numba")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LanguageModel(259, d_model=32, n_layers=2, n_seq=32).eval()


def state_of(model, rows=1):
    with torch.no_grad():
        return model(torch.randint(3, 259, (rows, 9))).state


def compiled(decoder, state, rows=1):
    """Return whether a step runs on the engine, after a comparison of its logits with the model's."""
    ids = torch.randint(3, 259, (rows, 1))
    expected = decoder.model(ids, state=to_torch(state)).logits[:, 0]
    logits, after = decoder.step(ids, state)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    return isinstance(after, EngineState)


@torch.no_grad()
def test_a_step_runs_on_the_engine_and_goes_on_from_its_state(model):
    decoder, state = decoder_of(model), state_of(model)
    _, after = decoder.step(torch.tensor([[7]]), state)
    assert isinstance(after, EngineState)
    assert compiled(decoder, after.copy())
    assert decoder is decoder_of(model)


def test_gradients_training_autocast_and_other_backends_run_the_model(model):
    decoder, state = decoder_of(model), state_of(model)
    assert not compiled(decoder, state)  # gradients are enabled
    with torch.no_grad():
        assert compiled(decoder, state)
        with torch.autocast("cpu", torch.bfloat16):
            assert not isinstance(decoder.step(torch.tensor([[7]]), state)[1], EngineState)
        with use_backend("chunked"):
            assert not compiled(decoder, state)
        model.train()
        assert not compiled(decoder, state)
        half = model.eval().bfloat16()
        assert not isinstance(decoder.step(torch.tensor([[7]]), state_of(half))[1], EngineState)


def test_inference_mode():
    with torch.inference_mode():
        made_there = LanguageModel(259, d_model=32, n_layers=2).eval()
        assert not compiled(decoder_of(made_there), state_of(made_there))
    model = LanguageModel(259, d_model=32, n_layers=2).eval()
    with torch.inference_mode():
        assert compiled(decoder_of(model), state_of(model))


@torch.no_grad()
def test_hooks_and_unknown_modules_run_the_model(model):
    decoder, state = decoder_of(model), state_of(model)
    hook = model.blocks[0].register_forward_hook(lambda m, i, o: None)
    assert not compiled(decoder, state)
    hook.remove()
    assert compiled(decoder, state)

    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    adapter = Adapter(32, 32, bias=False)
    adapter.weight = model.blocks[0].mixer.out_proj.weight
    model.blocks[0].mixer.out_proj = adapter
    assert not compiled(decoder, state)

    model.blocks[0].mixer.out_proj = torch.nn.Linear(32, 32, bias=False)
    assert compiled(decoder, state)
    model.blocks[0].forward = lambda *arguments: type(model.blocks[0]).forward(model.blocks[0], *arguments)
    assert not compiled(decoder, state)


@torch.no_grad()
def test_a_state_of_another_model_is_refused(model):
    other = LanguageModel(259, d_model=32, n_layers=1).eval()
    _, state = decoder_of(other).step(torch.tensor([[7]]), state_of(other))
    decoder_of(model).step(torch.tensor([[7]]), state_of(model))
    with pytest.raises(ValueError, match="state: expected 2 entries, got 1"):
        decoder_of(model).step(torch.tensor([[7]]), state)


@torch.no_grad()
def test_states_of_half_precision_go_on(model):
    state = torch.utils._pytree.tree_map(lambda x: x.bfloat16() if x.is_floating_point() else x, state_of(model))
    state = [s._replace(core=s.core._replace(g=s.core.g.float())) for s in state]
    assert compiled(decoder_of(model), state)


@pytest.mark.parametrize("change", ["in place", "by data", "replaced", "loaded", "swapped", "reversed by data"])
@torch.no_grad()
def test_changed_weights_are_compiled_again(model, change):
    decoder, state = decoder_of(model), state_of(model)
    assert compiled(decoder, state)
    weight = model.blocks[1].feed_forward.up.weight
    if change == "in place":
        weight.mul_(1.5)
    elif change == "by data":
        weight.data.mul_(1.5)
    elif change == "swapped":
        model.embed.weight[[7, 8]] = model.embed.weight[[8, 7]].clone()
    elif change == "reversed by data":
        weight.data.copy_(weight.flip(1).clone())
    elif change == "replaced":
        model.blocks[1].feed_forward.up.weight = torch.nn.Parameter(1.5 * weight)
    else:
        model.load_state_dict({name: 1.5 * x for name, x in model.state_dict().items()})
    assert compiled(decoder, state)


@torch.no_grad()
def test_a_text_that_goes_on_sees_weights_that_change_in_place(model):
    decoder = decoder_of(model)
    _, state = decoder.step(torch.tensor([[7]]), state_of(model))
    model.blocks[1].feed_forward.up.weight.mul_(1.5)
    assert compiled(decoder, state)


@torch.no_grad()
def test_a_changed_threshold_counts():
    model = LanguageModel(259, d_model=32, n_layers=4, depth={"policy": "act"}).eval()
    decoder, state = decoder_of(model), state_of(model)
    assert compiled(decoder, state)
    engine = decoder.engine
    model.blocks[0].threshold = 0.01
    assert compiled(decoder, state)
    assert decoder.engine is not engine


@torch.no_grad()
def test_the_environment_chooses(model, monkeypatch):
    monkeypatch.setenv("RESNET_BK_ENGINE", "0")
    assert not compiled(Decoder(model), state_of(model))
    monkeypatch.setenv("RESNET_BK_ENGINE", "1")
    assert compiled(Decoder(model), state_of(model, 64), 64)
    monkeypatch.setenv("RESNET_BK_ENGINE", "yes")
    with pytest.raises(ConfigError, match=r"RESNET_BK_ENGINE: got 'yes', allowed"):
        Decoder(model)


@torch.no_grad()
def test_many_rows_are_measured_once_for_each_power_of_two(model):
    decoder = Decoder(model)
    for rows in (3, 4, 5):
        compiled(decoder, state_of(model, rows), rows)
    assert set(decoder._faster) == {4, 8}
    decoder._faster[4] = False
    assert not compiled(decoder, state_of(model, 4), 4)


@torch.no_grad()
def test_a_model_is_freed_and_copied(model):
    decoder_of(model).step(torch.tensor([[7]]), state_of(model))
    other = copy.deepcopy(model)
    other.embed.weight.mul_(2)
    assert compiled(decoder_of(other), state_of(other))
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
