"""OpenAI's own client reads the answers, the streams and the errors."""

import pytest

pytest.importorskip("serving", exc_type=ImportError)

from serving import NAME, serving, text_of

openai = pytest.importorskip("openai")


@pytest.fixture
def api(client):
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="x", max_retries=0) as api:
        yield api


def test_completions_and_models(api, model):
    assert [found.id for found in api.models.list()] == [NAME]
    assert api.models.retrieve(NAME).id == NAME
    found = api.completions.create(model=NAME, prompt="ab", max_tokens=30, seed=4, logprobs=2, n=2, stop=["\0"])
    assert [choice.text for choice in found.choices] == [
        text_of(model, "ab", seed=s, stop=["\x01\x02"]) for s in (4, 5)
    ]
    assert len(found.choices[0].logprobs.tokens) == found.usage.completion_tokens // 2 == 30
    assert found.choices[0].finish_reason == "length"


def test_a_stream(api, model):
    options = {"include_usage": True}
    stream = api.completions.create(
        model=NAME, prompt="ab", max_tokens=30, seed=4, stream=True, stream_options=options, extra_body={"top_k": 7}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks[:-1]) == text_of(model, "ab", seed=4, top_k=7)
    assert chunks[-1].usage.completion_tokens == 30


def test_errors(api, client):
    with pytest.raises(openai.BadRequestError, match=r"temperature: got -1\.0, input should be greater"):
        api.completions.create(model=NAME, prompt="ab", temperature=-1.0)
    with pytest.raises(openai.NotFoundError, match="model: got 'x'"):
        api.completions.create(model="x", prompt="ab")


def test_a_key(model):
    with serving(model, key="right") as client:
        for key in ("wrong", "right"):
            with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key=key, max_retries=0) as api:
                if key == "right":
                    assert api.completions.create(model=NAME, prompt="ab", max_tokens=2).choices
                else:
                    with pytest.raises(openai.AuthenticationError, match="got no valid key"):
                        api.models.list()
