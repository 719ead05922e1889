"""The benchmark of the server in miniature: its loads, its soak, and that it notices a wrong text."""

import asyncio

import pytest

pytest.importorskip("serving", exc_type=ImportError)

import serve
from serving import NAME


def test_loads_find_every_text_right_and_notice_a_wrong_one(client):
    async def loads():
        own = serve.Client(client.base_url.port, NAME)
        own.body = lambda seed, make=own.body, **fields: make(seed, **{"max_tokens": 40, **fields})
        expected = {seed: await own.stream(seed, serve.Load()) for seed in range(serve.SEEDS)}
        right = await serve.run(own, 4, 0.5, expected, leaving=0.3)
        wrong = await serve.run(own, 2, 0.2, {seed: f"{text}x" for seed, text in expected.items()})
        return right, wrong, await serve.fuzz(own, 60)

    right, wrong, statuses = asyncio.run(loads())
    assert right.total
    assert right.left
    assert right.wrong == 0
    assert wrong.wrong == len(wrong.total) > 0
    assert sum(statuses.values()) == 60
    assert set(statuses) <= {200, 400, 404}
