"""The text of `resnet-bk generate` comes in pieces that are whole characters, and together are the text."""

import pytest
import torch

from resnet_bk.config import ConfigError, GenerateConfig
from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.hf.tokenizer import byte_tokenizer
from resnet_bk.inference import generation
from resnet_bk.inference.generation import generate_text


@pytest.fixture
def model():
    torch.manual_seed(0)
    return ResNetBKForCausalLM(ResNetBKConfig(d_model=16, n_layers=2)).eval()


def settings(**fields):
    return GenerateConfig("model", "x", **{"max_new_tokens": 40, **fields})


def written(model, prompt, **fields):
    pieces = []
    text = generate_text(model, byte_tokenizer(), prompt, settings(**fields), pieces.append)
    assert "".join(pieces) == text
    return text, pieces


def test_pieces_are_the_prompt_and_then_the_text(model):
    text, pieces = written(model, "deé")
    assert pieces[0] == "deé"
    assert len(pieces) > 5
    assert text == generate_text(model, byte_tokenizer(), "deé", settings())  # without a function that is called
    assert text != written(model, "deé", seed=1)[0]


def test_greedy_text_is_that_of_transformers(model):
    ids = byte_tokenizer()("ab", return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=40, do_sample=False)
    assert written(model, "ab", temperature=0)[0] == byte_tokenizer().decode(expected[0], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("found", "text", "pieces"),
    [
        ("hé€".encode(), "xhé€", ["x", "h", "é", "€"]),
        (b"a\xe2\x82", "xa\ufffd", ["x", "a", "\ufffd"]),  # it ends within a character
        (b"\xff\xffa", "x\ufffd\ufffda", None),
        (b"", "x", ["x"]),
    ],
)
def test_characters_are_written_whole(model, monkeypatch, found, text, pieces):
    monkeypatch.setattr(generation, "_tokens", lambda *arguments: iter(byte + 3 for byte in found))
    got, own = written(model, "x")
    assert got == text
    assert pieces is None or own == pieces


def test_weights_in_int8_give_a_text(model, monkeypatch):
    text = written(model, "deé", weights="int8", temperature=0)[0]
    assert text.startswith("deé")
    monkeypatch.setenv("RESNET_BK_ENGINE", "0")
    with pytest.raises(ConfigError, match=r"generate\.weights: got 'int8', allowed with the engine"):
        written(model, "deé", weights="int8")


def test_the_end_of_a_text_ends_it(model, monkeypatch):
    tokens = iter([100, 101, 1, 102])
    monkeypatch.setattr(generation, "choose", lambda *arguments: torch.tensor([next(tokens)]))
    assert written(model, "x")[0] == "xab"


def test_a_prompt_without_a_token_is_refused(model):
    with pytest.raises(ConfigError, match=r"generate\.prompt: got '', which has no token"):
        generate_text(model, byte_tokenizer(), "", settings())
