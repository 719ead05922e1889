"""The text of `resnet-bk generate` comes in pieces that are whole characters, and together are the text."""

import copy

import pytest
import torch

from resnet_bk.config import ConfigError, GenerateConfig
from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.hf.tokenizer import byte_tokenizer
from resnet_bk.inference.generation import generate_text, session


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ResNetBKForCausalLM(ResNetBKConfig(d_model=16, n_layers=2)).eval()


def settings(**fields):
    return GenerateConfig("model", "x", **{"max_new_tokens": 40, **fields})


def written(model, prompt, **fields):
    pieces = []
    text = generate_text(model.model, byte_tokenizer(), prompt, settings(**fields), pieces.append)
    assert "".join(pieces) == text
    return text, pieces


def test_pieces_are_the_prompt_and_then_the_text(model):
    text, pieces = written(model, "deé")
    assert pieces[0] == "deé"
    assert len(pieces) > 5
    assert text == generate_text(model.model, byte_tokenizer(), "deé", settings())  # without a function that is called
    assert text != written(model, "deé", seed=1)[0]


def test_greedy_text_is_that_of_transformers(model):
    ids = byte_tokenizer()("ab", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=40, do_sample=False)
    assert written(model, "ab", temperature=0)[0] == byte_tokenizer().decode(expected[0], skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [0, 0.9])
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_many_tokens_at_a_time_give_the_text_of_one_at_a_time(model, temperature, weights):
    """What could stop the text has its tokens chosen one by one. The next prompt goes on from the last token."""
    pieces, texts = [], []
    for stop in ([], ["nothing like it"]):
        config = settings(temperature=temperature, stop=stop, weights=weights, max_new_tokens=60)
        text = session(model.model, byte_tokenizer(), config, pieces.append)
        texts.append(text.extend("ab") + text.extend("cd") + text.extend("e"))
        assert text.made > 90
        assert text.share == 1
    assert texts[0] == texts[1]


def test_weights_in_int8_give_a_text(model, monkeypatch):
    text = written(model, "deé", weights="int8", temperature=0)[0]
    assert text.startswith("deé")
    monkeypatch.setenv("RESNET_BK_ENGINE", "0")
    model = copy.deepcopy(model)  # a model has one decoder, which has read the variable
    with pytest.raises(ConfigError, match=r"generate\.weights: got 'int8', allowed with the engine"):
        written(model, "deé", weights="int8")


def test_a_prompt_without_a_token_is_refused(model):
    with pytest.raises(ConfigError, match=r"generate\.prompt: got '', which has no token"):
        generate_text(model.model, byte_tokenizer(), "", settings())
