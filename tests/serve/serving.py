"""A server of a tiny model, in a thread of the test's process."""

import contextlib
import socket
import threading
import time

import httpx
import torch
import uvicorn

from resnet_bk.config import GenerateConfig, ServeConfig
from resnet_bk.data.byte_text import ByteText
from resnet_bk.engine.compiler import engine_of
from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM, byte_tokenizer
from resnet_bk.inference.generation import generate_text
from resnet_bk.serve.app import Served, create_app
from resnet_bk.serve.connections import Connection
from resnet_bk.serve.metrics import Metrics
from resnet_bk.serve.scheduler import Scheduler

NAME, ENDLESS = "tiny", 2**24


def tiny(**fields):
    """Return a model with random weights that writes all kinds of bytes."""
    torch.manual_seed(0)
    model = ResNetBKForCausalLM(ResNetBKConfig(d_model=16, n_layers=4, num_experts=1, **fields)).eval()
    torch.nn.init.normal_(model.model.embed.weight, std=0.3)
    return model


@torch.no_grad()
def scheduler_of(model, rows=4, queue=4):
    return Scheduler(engine_of(model.model), rows, queue, 1, Metrics())


@contextlib.contextmanager
def serving(model, key=None, ids=None, idle=5, **fields):
    """Run a server; yield a client of it. idle: seconds in which a connection must begin a request."""
    config = ServeConfig("x", name=NAME, **{"rows": 4, "queue": 4, "max_tokens": ENDLESS, **fields})
    scheduler = scheduler_of(model, config.rows, config.queue)
    code = scheduler.engine.code
    threshold = code.thresholds[0].first if code.thresholds else None
    served = Served(NAME, ids or ByteText(), code.vocabulary, code.blocks, threshold, scheduler)
    app, more = create_app(served, config, key), {"ws": "none", "http": Connection, "timeout_keep_alive": idle}
    settings = uvicorn.Config(app, log_config=None, **more)
    server, listening = uvicorn.Server(settings), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


def text_of(model, prompt, **fields):
    """Return what `resnet-bk generate` writes after a prompt."""
    settings = GenerateConfig("x", prompt, **{"max_new_tokens": 30, "temperature": 1.0, **fields})
    return generate_text(model.model, byte_tokenizer(), prompt, settings).removeprefix(prompt)


def gauge(client, name):
    """Return a number of /metrics."""
    line = next(x for x in client.get("/metrics").text.splitlines() if x.startswith(f"resnet_bk_{name} "))
    return float(line.split()[1])


def ask(client, prompt="ab", **fields):
    return client.post("/v1/completions", json={"model": NAME, "prompt": prompt, "max_tokens": 30, **fields})


def texts(answer):
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in answer.json()["choices"]]


def eventually(check, seconds=10):
    """Wait until a check is true."""
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.01)
