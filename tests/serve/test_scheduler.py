"""Texts join and leave between steps, and each one is what it would be alone."""

import threading
import time

import numpy as np
import pytest

pytest.importorskip("serving", exc_type=ImportError)

from serving import eventually, scheduler_of, text_of

from resnet_bk.data.byte_text import ByteText
from resnet_bk.inference.sampling import Sampling
from resnet_bk.serve.scheduler import PROMPT, BusyError, StoppingError
from resnet_bk.serve.texts import Text, Wanted

FOREVER = 10**9


@pytest.fixture
def scheduler(model):
    scheduler = scheduler_of(model, rows=3, queue=2)
    scheduler.start(lambda texts: [text.wake() for text in texts])
    yield scheduler
    scheduler.stop(0)
    scheduler.join()


def new(prompt="ab", limit=30, **fields):
    """Return a text whose event `ended` is set at its end."""
    ended = threading.Event()
    wanted = Wanted(Sampling(temperature=1.0), limit, **fields)
    text = Text(ByteText(), ByteText().encode(prompt), 259, wanted, lambda: _end(text, ended))
    text.ended = ended
    return text


def _end(text, ended):
    if text.news and (text.news[-1].finished or text.news[-1].error):
        ended.set()


def whole(text):
    assert text.ended.wait(20)
    assert text.news[-1].error is None
    return "".join(piece.text for piece in text.news)


def test_texts_that_join_and_leave_are_each_the_one_alone(scheduler, model):
    prompts = ["a", "b" * (3 * PROMPT + 5), "cd", "e" * PROMPT, "f"]
    limits = [5, 40, 300, 1, 90]
    for _ in range(3):
        texts = [new(p, n, seed=i) for i, (p, n) in enumerate(zip(prompts, limits, strict=True))]
        scheduler.submit(texts)
        for i, text in enumerate(texts):
            assert whole(text) == text_of(model, prompts[i], max_new_tokens=limits[i], seed=i)
    eventually(lambda: not scheduler._running)


def test_what_has_no_place_is_refused_as_a_whole(scheduler):
    scheduler.submit([new(limit=FOREVER) for _ in range(3)])
    with pytest.raises(BusyError):
        scheduler.submit([new() for _ in range(3)])
    waiting = [new() for _ in range(2)]
    scheduler.submit(waiting)
    with pytest.raises(BusyError):
        scheduler.submit([new()])
    scheduler.cancel(waiting[:1])
    scheduler.submit([new()])  # a text that waits frees its place at once
    assert not waiting[0].news


def test_a_cancelled_text_leaves_and_the_next_one_takes_its_row(scheduler, model):
    endless = [new(limit=FOREVER) for _ in range(3)]
    scheduler.submit(endless)
    text = new(seed=7)
    scheduler.submit([text])
    assert not text.ended.wait(0.1)
    scheduler.cancel(endless[1:2])
    assert whole(text) == text_of(model, "ab", seed=7)
    assert scheduler.metrics.cancelled._value.get() == 1
    assert not any(piece.finished for piece in endless[0].news)


def test_stopping_lets_texts_end_within_a_limit(model):
    scheduler = scheduler_of(model, rows=2, queue=4)
    scheduler.start(lambda texts: [text.wake() for text in texts])
    short, endless, waits = new(limit=2000, seed=3), new(limit=FOREVER), new()
    scheduler.submit([short, endless, new(limit=FOREVER), waits])
    scheduler.stop(1.0)
    with pytest.raises(StoppingError, match="the server is stopping"):
        scheduler.submit([new()])
    started = time.monotonic()
    scheduler.join()
    assert time.monotonic() - started < 5
    assert whole(short) == text_of(model, "ab", max_new_tokens=2000, seed=3)
    assert "the server is stopping" in endless.news[-1].error


def test_an_error_of_a_step_ends_its_texts_only(scheduler, model, monkeypatch, caplog):
    read = scheduler.engine.read
    monkeypatch.setattr(scheduler.engine, "read", lambda *a: 1 / 0)
    text = new()
    scheduler.submit([text])
    assert text.ended.wait(10)
    assert text.news[-1].error == "decoding failed: division by zero"
    assert "a step of 1 texts failed" in caplog.text
    monkeypatch.setattr(scheduler.engine, "read", read)
    again = new(seed=1)
    scheduler.submit([again])
    assert whole(again) == text_of(model, "ab", seed=1)


def test_a_text_whose_logits_are_not_finite_ends_alone(scheduler, model, monkeypatch, caplog):
    read = scheduler.engine.read

    def damaged(pieces, state):
        logits = read(pieces, state)
        for row, piece in enumerate(pieces):
            if 3 in piece:  # the byte 0, which a prompt has
                state.numbers[row] = np.nan
        return np.where(np.isnan(state.numbers).any(1, keepdims=True), np.float32(np.nan), logits)

    monkeypatch.setattr(scheduler.engine, "read", damaged)
    texts = [new("ab", seed=1, limit=40), new("a\0" * 300), new("cd", seed=2, limit=50), new("e\0")]
    scheduler.submit(texts)
    assert whole(texts[0]) == text_of(model, "ab", seed=1, max_new_tokens=40)
    assert whole(texts[2]) == text_of(model, "cd", seed=2, max_new_tokens=50)
    for text in texts[1::2]:
        assert text.ended.wait(10)
        assert text.news[-1].error.startswith("decoding failed: logits: one is NaN")
    assert "a text failed" in caplog.text
    eventually(lambda: not scheduler._running)


def test_counts_of_texts_balance(scheduler, monkeypatch):
    """Every text that was accepted has ended, was cancelled, or has failed; never two of them."""
    texts = [new(limit=10 + i, seed=i) for i in range(5)]
    scheduler.submit(texts)
    whole(texts[0])
    scheduler.cancel(texts)
    eventually(lambda: not scheduler._running)
    read = scheduler.engine.read

    def step(pieces, state):  # both texts end in the step in which their client leaves
        scheduler.cancel(ending)
        return read(pieces, state)

    monkeypatch.setattr(scheduler.engine, "read", step)
    ending = [new(limit=1), new(limit=1)]
    scheduler.submit(ending)
    eventually(lambda: not scheduler._running and not scheduler._waiting)
    monkeypatch.setattr(scheduler.engine, "read", lambda *a: 1 / 0)
    scheduler.submit([new()])
    count = scheduler.metrics.registry.get_sample_value
    eventually(lambda: count("resnet_bk_failed_texts_total") == 1)
    ended = count("resnet_bk_text_seconds_count")
    assert count("resnet_bk_texts_total") == 8 == ended + count("resnet_bk_cancelled_texts_total") + 1


def test_prompts_share_the_tokens_of_a_step(scheduler, monkeypatch):
    sizes, read = [], scheduler.engine.read
    monkeypatch.setattr(scheduler.engine, "read", lambda p, s: (sizes.append([len(x) for x in p]), read(p, s))[1])
    texts = [new("a" * 1000, 2), new("b" * 900, 2), new("c", 50)]
    scheduler.submit(texts)
    for text in texts:
        whole(text)
    assert max(map(sum, sizes)) <= PROMPT + scheduler.rows
    assert [PROMPT // 2, PROMPT // 2, 1] in sizes
