"""Connections without a request, with too much of one, with something else, and with several at once."""

import contextlib
import json
import logging
import re
import socket
import time

import pytest

pytest.importorskip("serving", exc_type=ImportError)

from serving import ENDLESS, NAME, ask, eventually, gauge, serving

from resnet_bk.serve.connections import HEAD_LIMIT

GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"


def post(**fields):
    body = json.dumps({"model": NAME, "prompt": "ab", "max_tokens": 3, **fields}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def connect(client):
    return socket.create_connection((client.base_url.host, client.base_url.port), timeout=20)


def received(connection):
    """Return all bytes until the server closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(2**16):
            found += piece
    return found


@pytest.mark.parametrize("head", [b"", b"GET /healthz HTTP/1.1\r\nX: ", b"\r\n", GET + b"GET /"])
def test_a_connection_whose_request_does_not_come_is_closed(model, head):
    with serving(model, idle=1) as client, connect(client) as connection:
        started = time.monotonic()
        connection.sendall(head)
        for _ in range(5):  # what comes slowly is no reason to wait longer
            time.sleep(0.15)
            connection.sendall(b"a" if head.strip() else b"\r\n")
        assert received(connection).count(b"200 OK") == head.count(GET)
        assert 0.9 < time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("sent", "more"),
    [
        (GET, b"\r\n"),
        (GET.replace(b"\r\n\r\n", b"\r\nContent-Length: 9\r\n\r\n"), b"a"),
        (post().replace(b"application/json", b"text/plain")[:-5], b"a"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999\r\n\r\n", b"a"),
    ],
    ids=["an empty line", "a body of GET", "another type", "too large"],
)
def test_a_byte_after_an_answer_does_not_keep_a_connection(model, sent, more):
    with serving(model, idle=1) as client, connect(client) as connection:
        connection.sendall(sent)
        assert connection.recv(2**16)
        started = time.monotonic()
        connection.sendall(more)
        received(connection)
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("further", [b"", post() + GET[:10]], ids=["alone", "with the start of another request"])
def test_a_stream_may_be_longer_than_the_time_for_a_request(model, further):
    with serving(model, idle=1, timeout=2.5) as client, connect(client) as connection:
        connection.sendall(post(max_tokens=ENDLESS, stream=True) + further)
        found = b""
        while b"longer than the 2.5 s" not in found:
            piece = connection.recv(2**16)
            assert piece
            found = found[-100:] + piece


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"GET / HTTP/9.9\r\n\r\n", "Invalid HTTP request"),
        (b"\x16\x03\x01\x02\x00\x01", "Invalid HTTP request"),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", "Invalid HTTP request"),
        (post().replace(b"Host: x", b"Content-Length: -1"), "Invalid HTTP request"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * HEAD_LIMIT, f"HTTP: got more than {HEAD_LIMIT} bytes of headers"),
    ],
)
def test_what_is_not_http_gets_an_error_in_the_form_of_all_others(client, sent, message):
    with connect(client) as connection:
        connection.sendall(sent)
        head, _, body = received(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].startswith(message)


def test_a_body_far_beyond_the_limit_gets_its_answer(client):
    """The server reads what is still on its way. If it closed the connection, the client would see a reset."""
    headers = {"Content-Type": "application/json"}
    assert client.post("/v1/completions", content=b" " * 20_000_000, headers=headers).status_code == 413
    pieces = (b" " * 60_000 for _ in range(99))
    assert client.post("/v1/completions", content=pieces, headers=headers).status_code == 413


def test_requests_sent_at_once_are_answered_in_turn(client):
    with connect(client) as connection:
        connection.sendall(post() * 20 + post(prompt="") + GET.replace(b"Host", b"Connection: close\r\nHost"))
        found = received(connection)
    assert re.findall(rb"HTTP/1.1 (\d+)", found) == [b"200"] * 20 + [b"400", b"200"]


def test_a_hang_up_with_further_requests_sent_frees_the_place_of_the_one_that_runs(client, caplog):
    with caplog.at_level(logging.ERROR):
        with connect(client) as connection:
            connection.sendall(post(max_tokens=ENDLESS, stream=True) + post() * 3)
            connection.recv(1000)
            eventually(lambda: gauge(client, "running_texts") == 1)
        eventually(lambda: gauge(client, "running_texts") == 0)
        assert ask(client).status_code == 200
    assert not caplog.records
