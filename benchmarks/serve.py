"""The server under load on this machine: latencies, bytes a second, and whether every text is the one it should be.

``python benchmarks/serve.py RUN --out benchmarks/results/...`` starts ``resnet-bk serve`` and its clients. Each client
asks for one stream after the other; the text of each seed must be the one that the server gives to a single client.
``--minutes 10`` adds a soak of 64 streams, among them clients that hang up, and bodies that are no requests.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numba
from common import arguments, conditions, publish, table

from resnet_bk.config import ServeConfig
from resnet_bk.serve.command import load

CLIENTS = (1, 8, 64)
PROMPT, TOKENS, SEEDS = "def read(self, ", 256, 32
FUZZED, STEPS = 500, 1000


@dataclass
class Load:
    """What clients have measured, in seconds and bytes."""

    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    read: int = 0
    wrong: int = 0
    refused: int = 0
    left: int = 0


class Client:
    """A minimal client of streams: the benchmark shares its cores with the server."""

    def __init__(self, port: int, model: str):
        self.port, self.model = port, model

    def body(self, seed: int, **fields: Any) -> bytes:
        asked = {"model": self.model, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0.8, "seed": seed}
        return json.dumps({**asked, "stream": True, **fields}).encode()

    async def open(self, body: bytes, path: str = "/v1/completions") -> tuple[Any, Any, int]:
        """Send a request on a connection of its own; return its streams and the status."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        writer.write(head.encode() + b"\r\nConnection: close\r\n\r\n" + body)
        status = int((await reader.readuntil(b"\r\n")).split()[1])
        await reader.readuntil(b"\r\n\r\n")
        return reader, writer, status

    async def stream(self, seed: int, load: Load, leave: bool = False) -> str | None:
        """Return the text of a stream, or what there is of it when the client leaves; None if it was refused."""
        started, pieces = time.perf_counter(), []
        reader, writer, status = await self.open(self.body(seed))
        try:
            if status != 200:
                load.refused += 1
                return None
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    if not pieces:
                        load.first.append(time.perf_counter() - started)
                    pieces.append(json.loads(line[6:])["choices"][0]["text"])
                    if leave:
                        load.left += 1
                        return "".join(pieces)
                elif line.startswith(b"data: [DONE]"):
                    load.total.append(time.perf_counter() - started)
        finally:
            writer.close()
        text = "".join(pieces)
        load.read += len(text.encode())
        return text


async def run(client: Client, clients: int, seconds: float, expected: dict[int, str], leaving: float = 0.0) -> Load:
    """Let clients ask for streams for some seconds. leaving: the share of streams that their clients abandon."""
    load, end = Load(), time.perf_counter() + seconds

    async def ask(number: int) -> None:
        choose = random.Random(number)
        while time.perf_counter() < end:
            seed, leave = choose.randrange(SEEDS), choose.random() < leaving
            text = await client.stream(seed, load, leave)
            if text is not None:
                load.wrong += not expected[seed].startswith(text) if leave else text != expected[seed]

    await asyncio.gather(*(ask(number) for number in range(clients)))
    return load


def malformed(choose: random.Random, good: bytes) -> bytes:
    """Return a body that is not a request, or a request with something unusual in it."""
    kind = choose.randrange(5)
    if kind == 0:
        return choose.randbytes(choose.randrange(200))
    if kind == 1:
        return good[: choose.randrange(len(good))]
    if kind == 2:
        return b"[" * choose.randrange(1, 5000)
    values = [None, -1, 0, 1e308, "", "x", [], {}, [[]], [1, "a"], True, 10**30, ["\x00"], {"a": {"b": []}}]
    fields = json.loads(good)
    for name in choose.sample([*fields, "n", "stop", "logprobs", "echo", "top_p", "top_k", "x"], choose.choice((1, 2))):
        fields[name] = choose.choice(values)
    return json.dumps(fields).encode()


async def fuzz(client: Client, count: int) -> dict[int, int]:
    """Send malformed bodies and return how often each status came."""
    choose, found = random.Random(0), {}
    for _ in range(count):
        reader, writer, status = await client.open(malformed(choose, client.body(0, max_tokens=8)))
        found[status] = found.get(status, 0) + 1
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
    return found


def alone(checkpoint: str) -> str:
    """Return how long the engine takes for a token, without a server, on one thread."""
    engine = load(ServeConfig(checkpoint, threads=1)).scheduler.engine
    numba.set_num_threads(1)
    text, rows = [byte + 3 for byte in Path(__file__).read_bytes()], []
    for count in CLIENTS:
        state, times = engine.start(count), []
        for step in range(STEPS + 1):
            started = time.perf_counter()
            engine.read([text[step + 50 * row : step + 50 * row + 1] for row in range(count)], state)
            times.append(1e6 * (time.perf_counter() - started) / count)
        rows.append([count, f"{statistics.median(times[1:]):.1f}", f"{1e6 / statistics.median(times[1:]):,.0f}"])
    return "\n## The engine alone, one thread\n\n" + table(["rows", "µs a byte", "bytes/s"], rows)


def memory(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    lines = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", lines)[1]) / 1024


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def server(checkpoint: str, options: list[str]) -> Any:
    """Run the server; yield its process and a client."""
    command = [sys.executable, "-m", "resnet_bk", "serve", checkpoint, "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        name, port = re.match(r"(.*) at http://[^/]*:(\d+)/", process.stdout.readline()).groups()
        yield process, Client(int(port), name)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, "the server did not stop by itself"
    finally:
        process.kill()


async def measured(client: Client, pid: int, seconds: float) -> str:
    """Return the table of the loads of a server."""
    expected = {seed: await client.stream(seed, Load()) for seed in range(SEEDS)}
    rows, speeds = [], {}
    for clients in CLIENTS:
        await run(client, clients, 1.0, expected)  # warm
        started, used = time.perf_counter(), cpu_seconds(pid)
        load = await run(client, clients, seconds, expected)
        used = 1e6 * (cpu_seconds(pid) - used) / load.read
        speeds[clients] = load.read / (time.perf_counter() - started)
        cells = []
        for times in (load.first, load.total):
            cuts = statistics.quantiles(times, n=100)
            cells += [f"{1e3 * cuts[49]:.1f}", f"{1e3 * cuts[98]:.1f}"]
        rows.append(
            [clients, len(load.total), *cells, f"{speeds[clients]:,.0f}", f"{used:.1f}", load.wrong, load.refused]
        )
    head = ["clients", "streams", "first byte, p50 ms", "p99", "whole text, p50 ms", "p99", "bytes/s", "CPU, µs a byte"]
    ratio = speeds[CLIENTS[-1]] / speeds[CLIENTS[0]]
    note = f"{CLIENTS[-1]} clients get {ratio:.1f} times as many bytes a second as one."
    return table([*head, "wrong", "refused"], rows) + f"\n{note}\n"


async def soaked(client: Client, pid: int, minutes: float) -> str:
    """Return the table of some minutes with everything that may disturb a server."""
    expected = {seed: await client.stream(seed, Load()) for seed in range(SEEDS)}
    rows, statuses = [], {}
    parts = max(2, round(minutes))
    for part in range(parts):
        both = asyncio.gather(
            run(client, CLIENTS[-1], 60 * minutes / parts, expected, leaving=0.2), fuzz(client, FUZZED // parts)
        )
        load, found = await both
        for status, count in found.items():
            statuses[status] = statuses.get(status, 0) + count
        rows.append([part + 1, len(load.total), load.left, load.wrong, load.refused, f"{memory(pid):.0f}"])
    answers = ", ".join(f"{count} times {status}" for status, count in sorted(statuses.items()))
    return (
        f"\n## {minutes:g} minutes, {CLIENTS[-1]} clients, a fifth of the streams abandoned\n\n"
        + table(["part", "streams", "abandoned", "wrong", "refused", "memory, MB"], rows)
        + f"\nMeanwhile {sum(statuses.values())} malformed or unusual bodies were answered with: {answers}.\n"
    )


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__)
    parser.add_argument("checkpoint", help="folder of a run or of a model")
    parser.add_argument("--seconds", type=float, default=12.0, help="of each load")
    parser.add_argument("--minutes", type=float, default=0.0, help="of the soak")
    parser.add_argument("--threads", type=int, action="append", help="of the engine; may be given several times")
    options = parser.parse_args()
    command = ["python benchmarks/serve.py RUN", *(f"--threads {threads}" for threads in options.threads or [])]
    command += [f"--minutes {options.minutes:g}"] if options.minutes else []
    page = "# Serving\n\n" + conditions(" ".join(command))
    page += f"\nStreams of {TOKENS} bytes. Each client asks for one stream after the other, on the same cores. "
    page += f"Load of the machine before: {os.getloadavg()[0]:.1f}.\n"
    page += alone(options.checkpoint)
    for threads in options.threads or [1]:
        with server(options.checkpoint, ["--threads", str(threads)]) as (process, client):
            found = asyncio.run(measured(client, process.pid, options.seconds))
        page += f"\n## Threads of the engine: {threads}\n\n{found}"
    if options.minutes:
        with server(options.checkpoint, []) as (process, client):
            page += asyncio.run(soaked(client, process.pid, options.minutes))
    publish(page, options.out)


if __name__ == "__main__":
    main()
