"""The server over HTTP: texts are those of `resnet-bk generate`, whoever else is served; nothing bad ends it."""

import contextlib
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("serving", exc_type=ImportError)

import torch
from serving import ENDLESS, NAME, ask, eventually, gauge, serving, text_of, texts, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from resnet_bk.hf import text_ids
from resnet_bk.serve import app

LISTED = f"allowed at most {ENDLESS + 65536}"


def chunks(answer):
    """Return the JSON of the events of a stream, which must end as one."""
    events = [line for line in answer.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def streamed(client, prompt="ab", **fields):
    body = {"model": NAME, "prompt": prompt, "max_tokens": 30, "stream": True, **fields}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return chunks(answer)


def open_stream(client, **fields):
    """Return a connection whose stream has begun."""
    body = json.dumps({"model": NAME, "prompt": "ab", "max_tokens": ENDLESS, "stream": True, **fields}).encode()
    connection = socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    connection.sendall(head.encode() + b"\r\n\r\n" + body)
    return connection


def error_of(answer):
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return error


# ------------------------------------------------------------------------------------------------ texts


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.8, "seed": 3},
        {"temperature": 0},
        {"temperature": 1, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "seed": 1},
    ],
)
def test_a_text_is_that_of_generate(client, model, fields):
    assert texts(ask(client, "déf", **fields)) == [text_of(model, "déf", **fields)]
    pieces = streamed(client, "déf", **fields)
    assert "".join(x["choices"][0]["text"] for x in pieces) == text_of(model, "déf", **fields)
    assert [x["choices"][0]["finish_reason"] for x in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"


def test_streams_at_the_same_time_do_not_mix(client, model):
    """Texts of different prompts, lengths, filters and thresholds join and leave while others run."""
    random.seed(0)
    asked = [
        {
            "prompt": "".join(random.choices("abc é\n", k=random.choice([1, 7, 700]))),
            "seed": random.randrange(1000),
            "max_tokens": random.choice([1, 20, 200]),
            "top_k": random.choice([0, 9]),
        }
        for _ in range(60)
    ]
    thresholds = [random.choice([None, 0.5, 1.0]) for _ in asked]

    def text(i):
        fields = asked[i] if thresholds[i] is None else asked[i] | {"depth_threshold": thresholds[i]}
        return "".join(x["choices"][0]["text"] for x in streamed(client, **fields))

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(text, range(len(asked))))
    layer = model.model.blocks[0]
    for fields, threshold, got in zip(asked, thresholds, found, strict=True):
        layer.threshold = 0.8 if threshold is None else threshold
        more = {"max_new_tokens": fields["max_tokens"], "seed": fields["seed"], "top_k": fields["top_k"]}
        assert got == text_of(model, fields["prompt"], **more)
    layer.threshold = 0.8
    assert gauge(client, "running_texts") == 0


def test_several_prompts_and_choices(client, model):
    answer = ask(client, ["ab", "cd"], n=2, seed=5)
    assert texts(answer) == [text_of(model, p, seed=s) for p in ("ab", "cd") for s in (5, 6)]
    found = answer.json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert found["usage"] == {"prompt_tokens": 4, "completion_tokens": 120, "total_tokens": 124}
    ids = [byte + 3 for byte in b"ab"]
    assert texts(ask(client, ids, seed=5)) == texts(ask(client, [ids], seed=5)) == texts(ask(client, "ab", seed=5))
    by_index = {}
    for chunk in streamed(client, ["ab", "cd"], seed=5):
        choice = chunk["choices"][0]
        by_index[choice["index"]] = by_index.get(choice["index"], "") + choice["text"]
    assert [by_index[0], by_index[1]] == [text_of(model, "ab", seed=5), text_of(model, "cd", seed=5)]


def test_texts_without_a_seed_differ(client):
    assert len({texts(ask(client))[0] for _ in range(3)}) == 3


def test_stop_and_echo(client, model):
    whole = text_of(model, "ab", seed=2)
    stop = whole[10:12]
    answer = ask(client, seed=2, stop=stop, echo=True)
    assert texts(answer) == ["ab" + whole[: whole.index(stop)]]
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert "".join(x["choices"][0]["text"] for x in streamed(client, seed=2, stop=[stop, "zzz"], echo=True)) == (
        "ab" + whole[: whole.index(stop)]
    )


def test_usage_comes_at_the_end_of_a_stream(client):
    found = streamed(client, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in found[:-1]] == [None] * (len(found) - 1)
    assert found[-1]["choices"] == []
    assert found[-1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 30, "total_tokens": 32}


@torch.no_grad()
def test_logprobs_are_the_models(client, model):
    answer = ask(client, "abc", max_tokens=5, temperature=0, logprobs=3, echo=True, depth_threshold=0.8).json()
    found = answer["choices"][0]["logprobs"]
    ids = [byte + 3 for byte in b"abc"]
    text = torch.tensor([ids])
    for _ in range(5):
        text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
    expected = model(text).logits[0].log_softmax(-1)
    scores = expected[:-1].gather(1, text[0, 1:, None])[:, 0]
    assert found["token_logprobs"][0] is None
    assert found["tokens"][:3] == ["a", "b", "c"]
    assert len(found["tokens"]) == 8
    torch.testing.assert_close(torch.tensor(found["token_logprobs"][1:]), scores, atol=1e-4, rtol=0)
    assert found["top_logprobs"][0] is None
    for top, row in zip(found["top_logprobs"][1:], expected, strict=False):
        assert sorted(top.values())[-3:] == pytest.approx(sorted(row.topk(3)[0].tolist()), abs=1e-4)
    assert found["text_offset"][:4] == [0, 1, 2, 3]
    only = ask(client, "abc", max_tokens=0, logprobs=0, echo=True).json()
    assert only["choices"][0]["text"] == "abc"
    assert only["choices"][0]["logprobs"]["token_logprobs"][1:] == pytest.approx(scores[:2].tolist(), abs=1e-4)
    assert only["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("prompt", [[0xC3], [0xC3, 0xA9, 0xF0, 0x9F], [0xFF, 0x61]])
def test_offsets_count_characters_where_a_prompt_ends_within_one(client, prompt):
    ids = [byte + 3 for byte in prompt]
    choice = ask(client, ids, max_tokens=6, logprobs=0, echo=True, seed=1).json()["choices"][0]
    assert choice["text"].startswith(bytes(prompt).decode(errors="replace"))
    found, only = choice["logprobs"], ask(client, ids, max_tokens=6, seed=1).json()["choices"][0]["text"]
    assert found["text_offset"][len(ids)] == len(choice["text"]) - len(only)


def test_blocks_are_those_that_the_threshold_lets_run(client):
    def blocks(threshold):
        choice = ask(client, seed=0, blocks=True, depth_threshold=threshold).json()["choices"][0]
        assert "".join(text for text, _ in choice["blocks"]) == choice["text"]
        assert len(choice["blocks"]) == 30
        return [count for _, count in choice["blocks"]]

    assert set(blocks(1.0)) == {4}
    assert set(blocks(0.0)) == {1}
    parts = [choice for chunk in streamed(client, blocks=True, seed=0) for choice in chunk["choices"]]
    assert "".join(text for part in parts for text, _ in part["blocks"]) == "".join(part["text"] for part in parts)


def test_a_model_of_words_is_served():
    words = ["[UNK]", "</s>", *(f"w{i}" for i in range(18))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="[UNK]")
    with serving(tiny(vocab_size=20), ids=text_ids(tokenizer)) as client:
        answer = ask(client, "w1 w2", seed=1, max_tokens=8, logprobs=0).json()
        assert answer["usage"]["prompt_tokens"] == 2
        assert set(answer["choices"][0]["text"].split()) <= set(words)
        assert set(answer["choices"][0]["logprobs"]["tokens"]) <= {*words, "<0>", "<1>"}
        assert (
            "".join(x["choices"][0]["text"] for x in streamed(client, "w1 w2", seed=1, max_tokens=8))
            == (answer["choices"][0]["text"])
        )


# ------------------------------------------------------------------------------------- places, hang-ups


def test_what_has_no_place_gets_429_and_a_hang_up_frees_its_place(client):
    streams = [open_stream(client) for _ in range(8)]
    eventually(lambda: gauge(client, "waiting_texts") == 4)
    busy = ask(client)
    assert busy.status_code == 429
    assert int(busy.headers["retry-after"]) >= 1
    assert error_of(busy)["code"] == "server_busy"
    streams.pop().close()  # one that waits or runs
    eventually(lambda: gauge(client, "running_texts") + gauge(client, "waiting_texts") == 7)
    for stream in streams:
        stream.close()
    eventually(lambda: gauge(client, "running_texts") + gauge(client, "waiting_texts") == 0)
    assert ask(client).status_code == 200


def test_a_client_that_waits_for_a_whole_text_may_hang_up(client):
    stream = open_stream(client, stream=False)
    eventually(lambda: gauge(client, "running_texts") == 1)
    before = gauge(client, "cancelled_texts_total")
    stream.close()
    eventually(lambda: gauge(client, "running_texts") == 0)
    assert gauge(client, "cancelled_texts_total") == before + 1


def test_a_long_prompt_does_not_stall_the_others(client):
    """While a prompt of 60,000 bytes is read, a short text begins and ends."""
    done = []
    long = threading.Thread(target=lambda: done.append(ask(client, "ab " * 20_000, max_tokens=1).status_code))
    long.start()
    eventually(lambda: gauge(client, "running_texts") == 1)
    started = time.monotonic()
    assert ask(client, max_tokens=4).status_code == 200
    short = time.monotonic() - started
    was_reading = not done
    long.join()
    assert done == [200]
    assert short < 0.5 or not was_reading


def test_a_request_that_takes_too_long_ends(model):
    with serving(model, timeout=0.3) as client:
        answer = ask(client, max_tokens=ENDLESS)
        assert answer.status_code == 504
        assert "longer than the 0.3 s allowed" in error_of(answer)["message"]
        assert "longer than" in streamed(client, max_tokens=ENDLESS)[-1]["error"]["message"]
        eventually(lambda: gauge(client, "running_texts") == 0)


def test_a_client_that_does_not_read_is_left(model, monkeypatch):
    monkeypatch.setattr(app, "_LATE", 0.2)
    with serving(model, timeout=0.5) as client:
        with open_stream(client, blocks=True) as stream:
            time.sleep(2)
            with contextlib.suppress(ConnectionError):
                while stream.recv(1 << 20):
                    pass
        assert ask(client).status_code == 200


def test_a_damaged_model_is_an_error_and_the_server_goes_on():
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with serving(model) as client:
        answer = ask(client)
        assert answer.status_code == 503
        assert "one is NaN or infinite" in error_of(answer)["message"]
        assert "NaN" in streamed(client)[-1]["error"]["message"]
        assert client.get("/healthz").text == "ok\n"


# --------------------------------------------------------------------------------------- what is refused


def test_a_key_is_needed_where_there_is_one(model):
    with serving(model, key="sëcret".encode().hex()) as client:
        key = "sëcret".encode().hex()
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}):
            for path in ("/v1/models", "/metrics"):
                answer = client.get(path, headers=headers)
                assert answer.status_code == 401
                assert error_of(answer)["code"] == "invalid_api_key"
            assert client.post("/v1/completions", headers=headers, json={}).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert [client.get(path).status_code for path in ("/", "/healthz")] == [200, 200]


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"model": "other"}, 404, "model: got 'other', allowed 'tiny'"),
        ({"prompt": ""}, 400, "prompt: got one without a token; give another text"),
        ({"prompt": [3, 999]}, 400, "prompt: got the token id 999, allowed 0 to 258"),
        ({"prompt": "a" * 70_000}, 400, "prompt: got 70000 tokens, allowed at most 65536"),
        ({"prompt": ["a"] * 9}, 400, "prompt: got 9 prompts with n = 1, allowed at most 8 texts"),
        ({"max_tokens": ENDLESS + 1}, 400, f"max_tokens: got {ENDLESS + 1}, allowed at most {ENDLESS}"),
        *(
            ({name: value, "n": 3}, 400, f"{name}: got {3 * ENDLESS} tokens to list in all texts, {LISTED}")
            for name, value in (("logprobs", 0), ("blocks", True))
        ),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty: got 0.5, allowed 0; repetition_penalty is similar"),
    ],
)
def test_requests_that_are_refused(client, fields, status, message):
    answer = ask(client, **({"max_tokens": ENDLESS} | fields))
    assert (answer.status_code, error_of(answer)["message"]) == (status, message)
    assert error_of(answer)["param"] == next(iter(fields))


def test_a_threshold_without_adaptive_depth_is_refused():
    with serving(tiny()) as client:
        message = error_of(ask(client, depth_threshold=0.5))["message"]
        assert message == "depth_threshold: got 0.5, but tiny has no adaptive depth; leave it out"


def test_other_addresses_methods_types_and_sizes_are_refused(client):
    assert error_of(client.get("/v2/models"))["message"].startswith("GET /v2/models: Not Found; see /v1/models")
    assert client.get("/v2/models").status_code == 404
    assert (found := client.get("/v1/completions")).status_code == 405
    assert found.headers["allow"] == "POST"
    assert client.head("/healthz").status_code == 200  # what monitors ask
    assert error_of(client.get("/v1/models/x"))["code"] == "model_not_found"
    assert client.get(f"/v1/models/{NAME}").json()["id"] == NAME
    assert client.post("/v1/completions", content=b"{}").status_code == 415  # what any page could send
    headers = {"Content-Type": "application/json"}
    other = client.post("/v1/completions", content=b"{}", headers={"Content-Type": "x" * 9999})
    assert len(error_of(other)["message"]) < 200
    large = client.post("/v1/completions", content=b" " * (2**20 + 1), headers=headers)
    assert large.status_code == 413
    assert "allowed at most" in error_of(large)["message"]


def test_bodies_of_any_kind_get_an_answer(client):
    choose = random.Random(0)
    good = {"model": NAME, "prompt": "ab", "max_tokens": 2, "seed": 0}
    values = [None, -1, 0, 1e308, "", "x", [], {}, [[]], [1, "a"], True, 10**30, ["\x00"], {"a": []}, "\ud800"]
    names = ["prompt", "max_tokens", "seed", "n", "stop", "logprobs", "echo", "top_p", "stream_options", "x"]
    statuses = set()
    for i in range(300):
        if i % 3 == 0:
            body = choose.randbytes(choose.randrange(100))
        elif i % 3 == 1:
            body = json.dumps(good | {name: choose.choice(values) for name in choose.sample(names, 1 + i % 2)}).encode()
        else:
            body = choose.choice([b"[", b'{"a":']) * choose.randrange(3000)
        answer = client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        statuses.add(answer.status_code)
        if answer.status_code != 200:
            assert len(error_of(answer)["message"]) < 500
    assert statuses <= {200, 400, 404}
    assert {200, 400} <= statuses
    assert ask(client).status_code == 200


def test_metrics_count(client):
    before = gauge(client, "generated_tokens_total")
    ask(client, max_tokens=7)
    assert gauge(client, "generated_tokens_total") >= before + 7
    found = client.get("/metrics").text
    assert 'resnet_bk_requests_total{path="/v1/completions",status="200"}' in found
    assert "resnet_bk_first_token_seconds_bucket" in found
