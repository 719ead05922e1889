"""A body becomes a request, or one line that says what is wrong with it."""

import json

import pytest

pytest.importorskip("serving", exc_type=ImportError)

from resnet_bk.inference.sampling import Sampling
from resnet_bk.serve.requests import RequestError, check_ids, parsed


def request(**fields):
    return parsed(json.dumps({"model": "m", "prompt": "a", **fields}).encode())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_of_every_kind(prompt, expected):
    assert request(prompt=prompt).prompt == expected


def test_defaults_are_those_of_openai_and_null_is_the_default():
    for fields in ({}, {"temperature": None, "stop": None, "n": None, "stream": None, "suffix": None, "user": "x"}):
        found = request(**fields)
        assert found.sampling == Sampling(temperature=1.0)
        assert (found.max_tokens, found.n, found.stop, found.stream, found.seed) == (16, 1, [], False, None)


def test_fields_that_ask_for_nothing_are_allowed():
    request(presence_penalty=0, frequency_penalty=0.0, logit_bias={}, suffix="", best_of=2, n=2, stop=["a"] * 4)
    assert request(stop="ab").stop == ["ab"]
    assert request(temperature=0).temperature == 0


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": 101}, "temperature", "temperature: got 101, input should be less than or equal to 100"),
        ({"temperature": 1e-9}, "temperature", "temperature: got 1e-09, allowed 0, or 1e-06 to 100"),
        ({"temperature": "1"}, "temperature", "temperature: got '1', input should be a valid number"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens: got 0, allowed 1 or more, or 0 with echo = true"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens: got 1.5, input should be a valid integer"),
        ({"n": 1000}, "n", "n: got 1000, input should be less than or equal to 128"),
        ({"n": 2, "best_of": 3}, "best_of", "best_of: got 3, allowed the value of n, 2; choose among n texts"),
        ({"logprobs": 21}, "logprobs", "logprobs: got 21, input should be less than or equal to 20"),
        ({"stop": ["a"] * 5}, "stop", "stop: got ['a', 'a', 'a', 'a', 'a'], allowed a text, or a list of at most 4"),
        ({"stop": [""]}, "stop", "stop: got [''], allowed a text, or a list of at most 4 texts, none of them empty"),
        ({"prompt": 3}, "prompt", "prompt: got 3, allowed a text, a list of texts, a list of token ids"),
        ({"prompt": []}, "prompt", "prompt: got [], allowed"),
        ({"prompt": ["a", [1]]}, "prompt", "prompt: got ['a', [1]], allowed a text, a list of texts"),
        ({"prompt": [[1], ["a"]]}, "prompt", "prompt: got [[1], ['a']], allowed a text"),
        ({"presence_penalty": 1}, "presence_penalty", "presence_penalty: got 1, allowed 0; repetition_penalty is"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias: got {'5': 1}, allowed {}"),
        ({"suffix": "x"}, "suffix", "suffix: got 'x', allowed '': the model only reads what comes before"),
        ({"top_p": 0}, "top_p", "top_p: got 0, input should be greater than or equal to"),
        ({"seed": -1}, "seed", "seed: got -1, input should be greater than or equal to 0"),
        ({"temprature": 1}, "temprature", "completions: unknown field 'temprature'; did you mean 'temperature'?"),
        ({"stream_options": {}}, "stream_options", "stream_options: got options without a stream, allowed with"),
        (
            {"stream": True, "stream_options": {"includ_usage": True}},
            "stream_options",
            "completions.stream_options: unknown field 'includ_usage'; did you mean 'include_usage'?",
        ),
    ],
)
def test_a_wrong_field_is_one_line(fields, param, message):
    with pytest.raises(RequestError) as caught:
        request(**fields)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert caught.value.param == param
    assert caught.value.content()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "body: is not JSON"),
        (b"{", "body: is not JSON"),
        (b"[" * 100_000, "body: is not JSON"),
        (b'{"model": "m", "prompt": "\xff"}', "body: is not JSON"),
        (b'{"model": "m", "prompt": "\\ud800"}', "body: is not JSON"),
        (b"[]", "body: got [], allowed a JSON object"),
        (b'{"prompt": "a"}', "model: is missing; give one"),
        (b'{"model": "m", "prompt": null}', "prompt: is missing; give one"),
        (b'{"model": "m", "prompt": "a", "temperature": NaN}', "temperature: got nan, input should be a finite number"),
        (b'{"model": "m", "prompt": "a", "n": 1' + b"0" * 3000 + b"}", "n: got 1000"),
    ],
)
def test_a_body_that_is_no_request_is_one_line(body, message):
    with pytest.raises(RequestError) as caught:
        parsed(body)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_ids_outside_the_vocabulary_are_refused():
    check_ids([0, 9], 10)
    check_ids([], 10)
    with pytest.raises(RequestError, match=r"got the token id 1000+\.\.\., allowed 0 to 9"):
        check_ids([3, 10**4200], 10)
    for wrong in (-1, 10, 10**30):
        with pytest.raises(RequestError, match=f"got the token id {wrong}, allowed 0 to 9"):
            check_ids([3, wrong], 10)
