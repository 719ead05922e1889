"""The command as a process: what it prints, its key, its port, and how signals end it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest

pytest.importorskip("serving", exc_type=ImportError)

import torch
from serving import tiny

from resnet_bk.cli import main
from resnet_bk.hf import byte_tokenizer

PREPARED = "from resnet_bk.data.byte_text import ByteText; ByteText.end = -1; "  # texts do not end
ENDLESS = 4_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "small"
    byte_tokenizer().save_pretrained(folder)
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def server(folder, tmp_path):
    """Start the command; return its process and the port."""
    running = []

    def start(*options, **environment):
        code = f"{PREPARED}import sys; from resnet_bk.__main__ import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "serve", str(folder), "--port", "0", "--max_tokens", str(ENDLESS)]
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)} | environment
        pipe = subprocess.PIPE
        running.append(subprocess.Popen([*command, *options], stdout=pipe, stderr=pipe, text=True, env=environment))
        line = running[-1].stdout.readline()
        match = re.fullmatch(
            r"small at http://127\.0\.0\.1:(\d+)/ and http://127\.0\.0\.1:\1/v1; Ctrl-C ends it\n", line
        )
        assert match, line + running[-1].stderr.read()
        return running[-1], int(match[1])

    yield start
    for process in running:
        process.kill()
        process.communicate()


def body(max_tokens=20, **fields):
    return {"model": "small", "prompt": "ab", "seed": 0, "max_tokens": max_tokens, **fields}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_texts_end_and_the_code_is_0(server, number):
    process, port = server("--grace", "0.5")
    url = f"http://127.0.0.1:{port}/v1/completions"
    assert len(httpx.post(url, json=body()).json()["choices"][0]["text"]) <= 20
    with httpx.stream("POST", url, json=body(ENDLESS, stream=True), timeout=30) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(number)
        last = [line for line in lines if line][-2:]
    assert json.loads(last[0].removeprefix("data: "))["error"]["message"].startswith("the server is stopping")
    assert last[1] == "data: [DONE]"
    assert process.wait(20) == 0
    assert process.stderr.read() == ""
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/healthz")


def test_a_second_signal_does_not_wait(server):
    process, port = server("--grace", "100")
    stream = socket.create_connection(("127.0.0.1", port))
    content = json.dumps(body(ENDLESS, stream=True)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    stream.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
    stream.recv(1000)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.wait(10)
    stream.close()


def test_a_client_that_does_not_read_is_left_quietly_at_the_end(server):
    process, port = server("--grace", "0")
    content = json.dumps(body(ENDLESS, stream=True, logprobs=20)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
    with socket.socket() as stream:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        stream.connect(("127.0.0.1", port))
        stream.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
        time.sleep(3)  # until the buffers between both are full
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert process.stderr.read() == ""


def test_the_second_start_needs_no_torch_and_writes_the_same(server, tmp_path):
    texts = []
    for _ in range(2):
        process, port = server()
        texts.append(httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body()).json()["choices"][0]["text"])
        process.terminate()
        assert process.wait(20) == 0
    assert texts[0] == texts[1]
    assert list((tmp_path / "resnet-bk" / "engines").iterdir())


def test_a_key_comes_from_the_environment_or_a_file(server, tmp_path):
    (tmp_path / "key").write_text("from-a-file\n")
    for key, options, environment in (
        ("from-a-file", ("--api_key_file", str(tmp_path / "key")), {"RESNET_BK_API_KEY": "other"}),
        ("from-outside", (), {"RESNET_BK_API_KEY": "from-outside"}),
    ):
        process, port = server(*options, **environment)
        for given, status in ((key, 200), ("other", 401)):
            answer = httpx.get(f"http://127.0.0.1:{port}/v1/models", headers={"Authorization": f"Bearer {given}"})
            assert answer.status_code == status
        process.terminate()


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main(["serve", *map(str, arguments)]) == 2
    line = capsys.readouterr().err
    assert line.startswith("resnet-bk: error: ")
    assert line.count("\n") == 1
    return line.removeprefix("resnet-bk: error: ").rstrip("\n")


def test_what_cannot_be_served_is_one_line(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = f"serve.host, serve.port: cannot listen on 127.0.0.1 port {port} (Address already in use); choose"
        assert refused(capsys, folder, "--port", port).startswith(message)
    for host in ("a" * 70, "a..b"):
        assert "(not a name)" in refused(capsys, folder, "--port", 0, "--host", host)
    assert refused(capsys, folder, "--port", 70_000) == "serve.port: got 70000, allowed an integer from 0 to 65535"
    (tmp_path / "key").write_text("\n")
    found = refused(capsys, folder, "--port", 0, "--api_key_file", tmp_path / "key")
    assert found == "serve.api_key_file: allowed one line of printable ASCII characters as a key; write one"
    assert "is not a file" in refused(capsys, folder, "--port", 0, "--api_key_file", tmp_path / "none")
    assert "depth_threshold: got 0.5, but" in refused(capsys, folder, "--port", 0, "--depth_threshold", 0.5)
    monkeypatch.setenv("RESNET_BK_ENGINE", "0")
    assert refused(capsys, folder, "--port", 0).startswith("RESNET_BK_ENGINE: got '0', allowed 1 for serve")
    monkeypatch.delenv("RESNET_BK_ENGINE")
    monkeypatch.setitem(sys.modules, "resnet_bk.engine.compiler", None)
    assert "run: pip install 'resnet-bk[cpu-fast]'" in refused(capsys, folder, "--port", 0)


def test_half_precision_is_served_in_single_precision(tmp_path, monkeypatch):
    from resnet_bk.config import ServeConfig
    from resnet_bk.serve.command import load

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    byte_tokenizer().save_pretrained(tmp_path / "half")
    tiny().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    served = load(ServeConfig(str(tmp_path / "half"), rows=2))
    assert (served.name, served.vocabulary, served.blocks, served.threshold) == ("half", 259, 4, None)
