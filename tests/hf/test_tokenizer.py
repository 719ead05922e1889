"""Tokenizers: exact byte ids, lossless text, saving and loading."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from resnet_bk.config import ConfigError, DataConfig
from resnet_bk.hf import byte_tokenizer, load_tokenizer
from resnet_bk.hf.tokenizer import token_cache

TOKENIZER = byte_tokenizer()


def encode(text):
    return TOKENIZER(text)["input_ids"]


@settings(max_examples=300)
@given(st.text())
def test_ids_are_bytes_plus_three_and_decode_to_the_same_text(text):
    assert encode(text) == [byte + 3 for byte in text.encode()]
    assert TOKENIZER.decode(encode(text)) == text


@pytest.mark.parametrize(
    "text", ["</s>", "a<pad>b", "<unk></s>", "\r\n\t\0 \x7f", "  two  spaces  ", "e\u0301 \u00e9 \U0001f600"]
)
def test_names_of_special_tokens_and_odd_spaces_are_plain_text(text):
    assert encode(text) == [byte + 3 for byte in text.encode()]
    assert TOKENIZER.decode(encode(text), skip_special_tokens=True) == text


def test_every_byte_has_its_own_id_and_decodes_to_itself():
    assert len(TOKENIZER) == 259
    for byte in range(128):
        assert TOKENIZER.decode([byte + 3]) == chr(byte)
    for code in range(0x80, 0x800):  # every continuation byte, and every lead byte of two
        assert TOKENIZER.decode([byte + 3 for byte in chr(code).encode()]) == chr(code)
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(259))


def test_ids_are_those_of_byt5():
    from transformers import ByT5Tokenizer

    byt5 = ByT5Tokenizer(extra_ids=0)
    text = "Grüße, 世界!\n"
    assert encode(text) == byt5(text, add_special_tokens=False)["input_ids"]
    for name in ("pad_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(TOKENIZER, name) == getattr(byt5, name)


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character():
    assert TOKENIZER.decode([0xFF + 3, ord("a") + 3]) == "\ufffda"


def test_prompts_are_padded_on_the_left():
    batch = TOKENIZER(["abc", "a"], padding=True)
    assert batch["input_ids"] == [[100, 101, 102], [0, 0, 100]]
    assert batch["attention_mask"] == [[1, 1, 1], [0, 0, 1]]


def test_special_ids_are_left_out_of_decoded_text():
    assert TOKENIZER.decode([0, 0, 100, 1], skip_special_tokens=True) == "a"


@pytest.mark.parametrize("load", [AutoTokenizer.from_pretrained, load_tokenizer])
def test_saved_and_loaded_it_is_the_same(load, tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.padding_side == "left"
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
    for text in ("tabs\t and ünïcode 🙂\n", "</s> is text"):
        assert loaded(text)["input_ids"] == encode(text)
        assert loaded.decode(encode(text), skip_special_tokens=True) == text


def test_a_folder_without_a_tokenizer_is_an_error_naming_it(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*folder has no usable tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_folder_inside_one_that_cannot_be_read_is_an_error_naming_it(monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_dir", denied)
    with pytest.raises(ConfigError, match=r"data\.tokenizer: '/private/words': no readable folder"):
        load_tokenizer("/private/words")


def test_without_a_home_directory_a_setting_names_the_folder_of_token_files(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(ConfigError, match=r"^data\.cache: .*set data\.cache or XDG_CACHE_HOME"):
        token_cache(DataConfig())
    assert token_cache(DataConfig(cache="here")) == Path("here")
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert token_cache(DataConfig()) == Path("/there/resnet-bk")
