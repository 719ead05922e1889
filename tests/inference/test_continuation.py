"""A continuation shows whole characters, ends before stop strings, and never shows what may be the beginning of one."""

import numpy as np
import pytest

from resnet_bk.data.byte_text import ByteText
from resnet_bk.inference.continuation import Continuation
from resnet_bk.inference.sampling import Sampling


def logits(token):
    x = np.zeros(259, np.float32)
    x[token] = 5
    return x


def run(found, limit=100, **fields):
    """Return the pieces that can be shown after each token of `found`, and the continuation."""
    text = Continuation(ByteText(), [], 259, Sampling(), limit=limit, **fields)
    pieces = []
    for token in found:
        if text.finished:
            break
        assert text.add(logits(token)) == token
        pieces.append(text.take())
    return pieces, text


def ids(text):
    return [byte + 3 for byte in (text.encode() if isinstance(text, str) else text)]


def test_characters_come_whole():
    pieces, text = run(ids("hé€"), limit=6)
    assert pieces == ["h", "", "é", "", "", "€"]
    assert (text.finished, text.tokens) == ("length", ids("hé€"))


def test_what_is_within_a_character_comes_at_the_end():
    pieces, text = run([*ids(b"a\xe2\x82"), 1])
    assert pieces == ["a", "", "", "\ufffd"]
    assert (text.finished, len(text.tokens)) == ("stop", 3)
    assert run(ids(b"a\xe2\x82"), limit=3)[0] == ["a", "", "\ufffd"]


def test_invalid_bytes_come_as_they_are_found():
    assert run(ids(b"\xff\xffa\xe2a"))[0] == ["\ufffd", "\ufffd", "a", "", "\ufffda"]


def test_special_ids_have_no_text():
    pieces, text = run([0, 2, 100])
    assert pieces == ["", "", "a"]
    assert text.tokens == [0, 2, 100]


@pytest.mark.parametrize(
    ("stop", "found", "pieces"),
    [
        (["\n\n"], "a\nb\n\nc", ["a", "", "\nb", "", ""]),
        (["abc", "bcd"], "xababcz", ["x", "", "", "ab", "", ""]),
        (["bcd", "abc"], "abcd", ["", "", ""]),
        (["a"], "a", [""]),
        (["aab"], "aaab", ["", "", "a", ""]),
        (["é!"], "é?é!", ["", "", "é?", "", "", ""]),
        (["zz"], "az", ["a", ""]),
    ],
)
def test_stop_strings_end_a_text_and_are_not_shown(stop, found, pieces):
    got, text = run(ids(found), stop=stop)
    assert got == pieces
    assert text.finished == (None if stop == ["zz"] else "stop")


def test_what_was_held_back_comes_at_the_end():
    assert run([*ids("az"), 1], stop=["zz"])[0] == ["a", "", "z"]
    assert run(ids("az"), limit=2, stop=["zz"])[0] == ["a", "z"]
    pieces, text = run(ids(b"a\xe2"), limit=2, stop=["\ufffd"])
    assert (pieces, text.finished) == (["a", ""], "stop")
