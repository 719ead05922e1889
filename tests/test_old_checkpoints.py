"""Checkpoints written before still load: one of version 0.1, three steps into a run, is kept in tests/fixtures."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from resnet_bk import LanguageModel, encode
from resnet_bk.checkpoint import verify
from resnet_bk.hf import ResNetBKForCausalLM, load_tokenizer
from resnet_bk.training.states import load_optimizer_state, load_weights

CHECKPOINT = Path(__file__).parent / "fixtures" / "checkpoint-0.1"
LOSS, LOGITS = 4.420323371887207, [-0.3580307066440582, 0.5414189696311951, -1.2602919340133667, 0.0725390836596489]


def check(model):
    """The numbers that version 0.1 computed with these weights."""
    ids = encode("def add(a, b): return a + b").unsqueeze(0)
    with torch.no_grad():
        output = model.eval()(ids, targets=ids)
    assert output.loss.item() == pytest.approx(LOSS, abs=1e-5)
    torch.testing.assert_close(output.logits[0, -1, :4], torch.tensor(LOGITS), rtol=1e-4, atol=1e-4)


def test_the_model_loads():
    verify(CHECKPOINT)
    model = ResNetBKForCausalLM.from_pretrained(CHECKPOINT)
    assert model.model.config.num_experts == 2
    assert model.model.config.techniques == ["length", "sparsity", "experts"]
    check(model.model)
    assert len(load_tokenizer(str(CHECKPOINT))) == 259


def test_weights_and_moments_load_into_a_run_that_continues():
    config = ResNetBKForCausalLM.config_class.from_pretrained(CHECKPOINT)
    network = ResNetBKForCausalLM(config)
    load_weights(network, CHECKPOINT)
    check(network.model)
    optimizer = torch.optim.AdamW(network.parameters())
    load_optimizer_state(network, optimizer, CHECKPOINT)
    saved = load_file(CHECKPOINT / "optimizer.safetensors")
    assert sum(len(state) for state in optimizer.state.values()) == len(saved) > 100
    for name, parameter in network.named_parameters():
        assert set(optimizer.state[parameter]) == {"exp_avg", "exp_avg_sq", "step"}, name


def test_a_state_dict_of_plain_pytorch_loads_under_its_old_names():
    model = LanguageModel.from_config(ResNetBKForCausalLM.from_pretrained(CHECKPOINT).model.config)
    saved = load_file(CHECKPOINT / "model.safetensors")
    plain = {name.removeprefix("model."): x for name, x in saved.items()}
    assert any(".way_out." in name for name in plain)
    model.load_state_dict(plain | {"head.weight": plain["embed.weight"]})
    check(model)
