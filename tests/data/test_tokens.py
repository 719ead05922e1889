"""Byte ids and back; token files: exact ids, one file per content and tokenizer, no partial files, little memory."""

import json
import random
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from resnet_bk import decode, encode
from resnet_bk.config import ConfigError
from resnet_bk.data import corpus, tokens
from resnet_bk.data.corpus import Document, documents
from resnet_bk.data.tokens import byte_ids, cached, fingerprint, read, tokenizer_digest, write
from resnet_bk.hf import byte_tokenizer

CODE = "def f(x):\n    if x:\n\n        return f(x - 1)  # é €\n\n\nclass A:\n    pass\n\n"


def text_tokenizer(lowercase=False, eos="<end>"):
    """A byte-level BPE of 300 ids, with merges over runs of spaces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([CODE], trainer)
    if lowercase:
        from tokenizers import normalizers

        backend.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)


class OneCharacter:
    """A tokenizer with `size` ids: a character's code point, but `first` for the first character of each piece."""

    eos_token_id = 0

    def __init__(self, size, first=1):
        self.size, self.first = size, first

    def __len__(self):
        return self.size

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return [self.first, *map(ord, text[1:])]

    def get_vocab(self):
        return {}


def test_a_byte_is_its_value_plus_3():
    ids = byte_ids(bytes(range(256)))
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(range(3, 259))


@given(st.text())
def test_encode_gives_the_ids_of_the_byte_tokenizer_and_decode_inverts_it(text):
    tokenizer = byte_tokenizer()
    ids = encode(text)
    assert ids.dtype == torch.int64
    assert ids.shape == (len(text.encode()),)
    assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False)
    assert torch.equal(encode(text.encode()), ids)
    assert decode(ids) == decode(ids.tolist()) == tokenizer.decode(ids) == text


@given(st.lists(st.integers(0, 258)))
def test_decode_drops_special_ids_and_replaces_what_is_not_utf8(ids):
    assert decode(ids) == byte_tokenizer().decode(ids, skip_special_tokens=True)
    assert decode(ids) == bytes(i - 3 for i in ids if i > 2).decode(errors="replace")


@pytest.mark.parametrize("kind", [np.uint16, np.int64, torch.int32, torch.uint8])
def test_decode_reads_every_type_of_integer(kind):
    make = torch.tensor if isinstance(kind, torch.dtype) else np.array
    assert decode(make([100, 101], dtype=kind)) == "ab"
    assert decode(range(100, 103)) == "abc"


@pytest.mark.parametrize("text", [None, 5, ["a"], bytearray(b"a")])
def test_only_text_is_encoded(text):
    with pytest.raises(TypeError, match=rf"^text: got {type(text).__name__}, allowed str or bytes$"):
        encode(text)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([3, 259], "ids: got 259, allowed 0 to 258"),
        (torch.tensor([-1, 3]), "ids: got -1, allowed 0 to 258"),
        ([[3, 4]], "ids: got int64 of shape (1, 2), allowed integers of shape (N,)"),
        (torch.tensor(3), "ids: got int64 of shape (), allowed integers of shape (N,)"),
        (torch.tensor([3.0]), "ids: got float64 of shape (1,), allowed integers of shape (N,)"),
        ([True], "ids: got bool of shape (1,), allowed integers of shape (N,)"),
        ([10**30], "ids: got object of shape (1,), allowed integers of shape (N,)"),
        (b"abc", "ids: got bytes24 of shape (), allowed integers of shape (N,)"),
        (None, "ids: got object of shape (), allowed integers of shape (N,)"),
    ],
    ids=str,
)
def test_only_byte_ids_are_decoded(ids, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        decode(ids)
    assert str(caught.value) == message


def test_encode_and_decode_need_no_transformers():
    code = "import sys; sys.modules['transformers'] = None; from resnet_bk import *; print(decode(encode('a')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "a\n", done.stderr


def test_a_token_file_holds_every_document_and_its_end(tmp_path):
    texts = [b"first", b"\x00\xff", "é\n".encode(), b"x" * 1000]
    write([Document(f"d{i}", text=text) for i, text in enumerate(texts)], tmp_path / "file", None)
    file = read(tmp_path / "file")
    assert isinstance(file.ids, np.memmap)
    assert not file.ids.flags.writeable
    assert file.ids.dtype == np.uint16
    assert file.names == ("d0", "d1", "d2", "d3")
    assert file.sizes.tolist() == list(map(len, texts))
    assert file.bytes == sum(map(len, texts))
    assert file.starts.tolist() == [0, 6, 9, 13, 1014]
    for i, text in enumerate(texts):
        assert file.document(i).tolist() == [*(byte + 3 for byte in text), 1]
    assert len(file.ids) == 1014


@pytest.mark.parametrize(("size", "dtype"), [(259, "uint16"), (1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_the_narrowest_type_that_holds_the_vocabulary(tmp_path, size, dtype):
    write([Document("d", text=b"abc")], tmp_path / "file", OneCharacter(size, first=size - 1))
    file = read(tmp_path / "file")
    assert file.ids.dtype == dtype
    assert file.ids.tolist() == [size - 1, ord("b"), ord("c"), 0]


def test_an_id_beyond_the_vocabulary_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="65537, allowed 0 to 299"):
        write([Document("d", text=b"abc")], tmp_path / "file", OneCharacter(300, first=(1 << 16) + 1))
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no end-of-text token"):
        write([Document("d", text=b"abc")], tmp_path / "file", text_tokenizer(eos=None))


def test_text_is_tokenised_as_the_tokenizer_does(tmp_path):
    tokenizer = text_tokenizer()
    write([Document("a", text=CODE.encode()), Document("b", text="é".encode())], tmp_path / "file", tokenizer)
    file = read(tmp_path / "file")
    assert file.document(0).tolist() == [*tokenizer.encode(CODE, add_special_tokens=False), tokenizer.eos_token_id]
    assert tokenizer.decode(file.document(1)[:-1]) == "é"
    assert len(file.document(0)) < len(CODE)


def test_pieces_of_a_long_text_give_the_ids_of_the_whole(tmp_path):
    tokenizer = text_tokenizer()
    draw = random.Random(0)
    lines = [
        " " * draw.choice([0, 0, 4, 8]) + draw.choice(["x = 1", "", "return é", "# €", ")"]) for _ in range(80_000)
    ]
    path = tmp_path / "long.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    assert path.stat().st_size > 2 * tokens._TEXT_PIECE
    write(documents(str(path)), tmp_path / "file", tokenizer)
    expected = tokenizer.encode("\n".join(lines), add_special_tokens=False)
    assert np.array_equal(read(tmp_path / "file").ids[:-1], expected)


@pytest.mark.parametrize(
    ("text", "limit", "cut"),
    [
        ("ab\ncd\nef", 7, 6),
        ("ab\ncd\nef", 5, 3),
        ("ab\ncd\n\nef", 8, 3),
        ("ab\ncd\n  ef", 8, 3),
        ("ab\n\ncdefgh", 8, 4),
        ("\nabcdefgh", 5, 1),
        ("abcdefgh", 5, 5),
    ],
)
def test_where_text_is_cut(text, limit, cut):
    assert tokens._cut(text, limit) == cut


@pytest.mark.parametrize("where", [0, 1, 1000, corpus._PIECE - 1, corpus._PIECE, corpus._PIECE + 5])
def test_text_that_is_not_utf8_names_the_byte(tmp_path, where):
    path = tmp_path / "text"
    path.write_bytes(b"a" * where + b"\xff" + b"b" * 100)
    with pytest.raises(ConfigError, match=f"text is not UTF-8 at byte {where}; .* use data.tokenizer: byte"):
        write(documents(str(path)), tmp_path / "file", text_tokenizer())
    assert [p.name for p in tmp_path.iterdir()] == ["text"]


def test_a_character_cut_off_at_the_end_names_the_byte(tmp_path):
    with pytest.raises(ConfigError, match="d is not UTF-8 at byte 3;"):
        write([Document("d", text=b"abc\xe2\x82")], tmp_path / "file", text_tokenizer())


def test_a_byte_offset_counts_from_the_start_of_the_file(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"0123456789\xff")
    with pytest.raises(ConfigError, match="is not UTF-8 at byte 10;"):
        write([Document("end", path, 4, 11)], tmp_path / "file", text_tokenizer())


def test_characters_on_the_border_of_two_reads_are_whole(tmp_path):
    text = "a" + "€" * (corpus._PIECE // 3 + 100)
    path = tmp_path / "text"
    path.write_text(text, encoding="utf-8")
    tokenizer = OneCharacter(1 << 20, first=ord("€"))
    write(documents(str(path)), tmp_path / "file", tokenizer)
    ids = read(tmp_path / "file").ids
    assert len(ids) == len(text) + 1
    assert (ids[1:-1] == ord("€")).all()


def test_the_cache_is_made_once(tmp_path, monkeypatch):
    source = [Document("d", text=b"abc")]
    first, key = cached(source, tmp_path / "cache", "byte", None)
    monkeypatch.setattr(tokens, "write", None)  # a second call would raise
    second, again = cached(source, tmp_path / "cache", "byte", None)
    assert first.ids.tolist() == second.ids.tolist() == [100, 101, 102, 1]
    assert key == again
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [key[:32]]


def test_the_key_depends_on_every_byte_name_border_and_tokenizer():
    keys = [
        fingerprint([Document("d", text=b"abc")], "byte"),
        fingerprint([Document("d", text=b"abd")], "byte"),
        fingerprint([Document("e", text=b"abc")], "byte"),
        fingerprint([Document("d", text=b"abc")], "other"),
        fingerprint([Document("d", text=b"ab"), Document("d", text=b"c")], "byte"),
        fingerprint([Document("d", text=b"abc"), Document("d", text=b"abc")], "byte"),
    ]
    assert len(set(keys)) == len(keys)
    assert fingerprint([Document("d", text=b"abc")], "byte") == keys[0]


def test_the_key_of_a_file_is_that_of_its_bytes(tmp_path):
    path = tmp_path / "d"
    path.write_bytes(b"abc")
    assert fingerprint(documents(str(path)), "byte") == fingerprint([Document("d", text=b"abc")], "byte")
    path.write_bytes(b"abd")
    assert fingerprint(documents(str(path)), "byte") != fingerprint([Document("d", text=b"abc")], "byte")


def test_names_that_are_not_utf8_have_a_key_and_survive_the_cache(tmp_path):
    file, _ = cached([Document("\udcff.txt", text=b"abc")], tmp_path, "byte", None)
    assert file.names == ("\udcff.txt",)


def test_tokenizers_of_one_vocabulary_that_make_other_ids_have_other_digests():
    plain, lower = text_tokenizer(), text_tokenizer(lowercase=True)
    assert plain.get_vocab() == lower.get_vocab()
    assert tokenizer_digest(plain) != tokenizer_digest(lower)
    before = tokenizer_digest(plain)
    plain(["a", "bb ccc"], padding=False, truncation=True, max_length=2)
    assert tokenizer_digest(plain) == before == tokenizer_digest(text_tokenizer())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    class Broken(Document):
        def pieces(self):
            yield b"half"
            raise error

    source = [Document("d", text=b"whole"), Broken("d", text=b"half and half")]
    with pytest.raises(error):
        write(source, tmp_path / "file", None)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_leaves_nothing(tmp_path, monkeypatch):
    def seal(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokens, "seal", seal)
    with pytest.raises(OSError, match="No space left"):
        cached([Document("d", text=b"abc")], tmp_path, "byte", None)
    assert list(tmp_path.iterdir()) == []


def test_what_a_kill_left_does_not_stop_the_next_write(tmp_path, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 7)
    (tmp_path / "file.partial-7").mkdir()
    (tmp_path / "file.partial-7" / "tokens.bin").write_bytes(b"half")
    write([Document("d", text=b"abc")], tmp_path / "file", None)
    assert read(tmp_path / "file").ids.tolist() == [100, 101, 102, 1]


def test_a_second_writer_of_the_same_tokens_does_no_harm(tmp_path):
    for _ in range(2):
        write([Document("d", text=b"abc")], tmp_path / "file", None)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert read(tmp_path / "file").ids.tolist() == [100, 101, 102, 1]


@pytest.mark.parametrize("name", ["tokens.bin", "index.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "empty"])
def test_a_damaged_cache_is_made_anew(tmp_path, name, damage):
    source = [Document("d", text=b"abcdef" * 100)]
    file, key = cached(source, tmp_path, "byte", None)
    expected = file.ids.tolist()
    path = tmp_path / key[:32] / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(data[: -1 if damage == "cut" else 0])
    file, _ = cached(source, tmp_path, "byte", None)
    assert file.ids.tolist() == expected
    assert file.names == ("d",)


def test_no_other_type_is_read_than_is_written(tmp_path):
    from resnet_bk.checkpoint import seal

    write([Document("d", text=b"abcd" * 8)], tmp_path / "file", None)
    index = tmp_path / "file" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"dtype": "O"}))
    seal(tmp_path / "file")
    with pytest.raises(KeyError):
        read(tmp_path / "file")


def test_a_file_of_32_mb_on_one_line_takes_less_than_40_mb(tmp_path):
    path = tmp_path / "line"
    path.write_bytes(bytes(range(11, 251)) * ((32 << 20) // 240))
    tracemalloc.start()
    try:
        file, _ = cached(documents(str(path)), tmp_path / "cache", "byte", None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20
    assert file.bytes == path.stat().st_size
    assert np.array_equal(file.ids[1000:2000], byte_ids(path.read_bytes()[1000:2000]))


def test_a_text_of_8_mb_on_one_line_takes_less_than_20_mb(tmp_path):
    path = tmp_path / "line"
    path.write_bytes(b"x" * (8 << 20))

    class Counting(OneCharacter):
        def encode(self, text, *, add_special_tokens):
            assert len(text) <= tokens._TEXT_PIECE
            return np.ones(len(text), np.uint16)

    tracemalloc.start()
    try:
        write(documents(str(path)), tmp_path / "file", Counting(300))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 << 20
    assert len(read(tmp_path / "file").ids) == (8 << 20) + 1
