"""A config.json that no model can have is an error of one line with the name of the file."""

import json

import pytest
from transformers import AutoConfig

from resnet_bk.config import ConfigError
from resnet_bk.hf import ResNetBKConfig


def write(folder, data):
    (folder / "config.json").write_bytes(data if isinstance(data, bytes) else json.dumps(data).encode())
    return folder / "config.json"


def refused(make, path, words):
    with pytest.raises(ConfigError, match=words) as caught:
        make(path.parent)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"d_model": [64]}, r"model\.d_model: got \[64\], allowed an integer"),
        ({"n_layers": 10**30}, r"model\.n_layers: got 1000"),
        ({"vocab_size": "x"}, r"model\.vocab_size: got 'x'"),
        ({"depth": [1]}, r"model\.depth: got \[1\], allowed a mapping"),
        ({"multiscale": {"factors": {"a": 1}}}, r"model\.multiscale\.factors"),
        ({"unknown": 1}, "model: unknown field 'unknown'"),
        ({"causal": False}, r"model\.causal: got False, allowed True"),
        ({"use_cache": "x"}, "use_cache: got 'x', allowed true or false"),
        ({"pad_token_id": [1]}, r"model\.pad_token_id: got \[1\]"),
        ({"eos_token_id": 259}, r"model\.eos_token_id: got 259, allowed an integer from 0 to 258"),
        ({"eos_token_id": [1, -1]}, r"model\.eos_token_id: got -1"),
        ({"bos_token_id": "a"}, r"model\.bos_token_id: got 'a'"),
        ({"dtype": [1]}, r"cannot be used by transformers \(IndexError"),
        ({"id2label": [1]}, r"cannot be used by transformers \(AttributeError"),
    ],
)
def test_a_bad_value_is_named_with_its_file(change, words, tmp_path):
    path = write(tmp_path, {**ResNetBKConfig().to_dict(), **change})
    refused(ResNetBKConfig.from_pretrained, path, words)
    refused(AutoConfig.from_pretrained, path, words)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"model_type": "gpt2"}, "model_type: got 'gpt2', allowed 'resnet_bk'"),
        (b"", "expected JSON in UTF-8"),
        (b"{x", "expected JSON in UTF-8"),
        (b'{"readout": "\xff"}', "expected JSON in UTF-8.*UnicodeDecodeError"),
        (b"[" * 100_000 + b"]" * 100_000, "expected JSON in UTF-8.*RecursionError"),
        (b'{"d_model": ' + b"9" * 5000 + b"}", "expected JSON in UTF-8"),
        ([1, 2], r"expected a mapping of fields to values, got \[1, 2\]"),
        (b"null", "expected a mapping of fields to values, got None"),
        (b" " * (1 << 20) + b"{}", "got 1048578 bytes, allowed at most 1048576"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(data, words, tmp_path):
    refused(ResNetBKConfig.from_pretrained, write(tmp_path, data), words)


def test_a_configuration_survives_as_a_mapping():
    config = ResNetBKConfig(d_model=32)
    assert ResNetBKConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_special_tokens_may_be_none_or_several(tmp_path):
    config = ResNetBKConfig(pad_token_id=None, eos_token_id=[1, 2])
    config.save_pretrained(tmp_path)
    assert ResNetBKConfig.from_pretrained(tmp_path).eos_token_id == [1, 2]
