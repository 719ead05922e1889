"""Byte ids and back; token files: exact ids, one file per content and tokenizer, no partial files, little memory."""

import errno
import json
import random
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from resnet_bk import decode, encode
from resnet_bk.checkpoint import CheckpointError, seal
from resnet_bk.config import ConfigError
from resnet_bk.data import corpus, tokens
from resnet_bk.data.corpus import Document, documents
from resnet_bk.data.tokens import byte_ids, cached, fingerprint, read, tokenizer_digest
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


def written(documents, cache, tokenizer=None):
    return cached(documents, cache, "tokenizer", tokenizer)[0]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


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
    file = written([Document(f"d{i}", text=text) for i, text in enumerate(texts)], tmp_path)
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
    file = written([Document("d", text=b"abc")], tmp_path, OneCharacter(size, first=size - 1))
    assert file.ids.dtype == dtype
    assert file.ids.tolist() == [size - 1, ord("b"), ord("c"), 0]


def test_an_id_beyond_the_vocabulary_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="65537, allowed 0 to 299"):
        written([Document("d", text=b"abc")], tmp_path, OneCharacter(300, first=(1 << 16) + 1))
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no end-of-text token"):
        written([Document("d", text=b"abc")], tmp_path, text_tokenizer(eos=None))


def test_text_is_tokenised_as_the_tokenizer_does(tmp_path):
    tokenizer = text_tokenizer()
    file = written([Document("a", text=CODE.encode()), Document("b", text="é".encode())], tmp_path, tokenizer)
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
    file = written(documents(str(path)), tmp_path, tokenizer)
    expected = tokenizer.encode("\n".join(lines), add_special_tokens=False)
    assert np.array_equal(file.ids[:-1], expected)


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
    with pytest.raises(ConfigError, match=f"'text' is not UTF-8 at byte {where}; .* use data.tokenizer: byte"):
        written(documents(str(path)), tmp_path, text_tokenizer())
    assert [p.name for p in tmp_path.iterdir()] == ["text"]


def test_a_character_cut_off_at_the_end_names_the_byte(tmp_path):
    with pytest.raises(ConfigError, match="'d' is not UTF-8 at byte 3;"):
        written([Document("d", text=b"abc\xe2\x82")], tmp_path, text_tokenizer())


def test_a_byte_offset_counts_from_the_start_of_the_file(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"0123456789\xff")
    with pytest.raises(ConfigError, match="is not UTF-8 at byte 10;"):
        written([Document("end", path, 4, 11)], tmp_path, text_tokenizer())


def test_characters_on_the_border_of_two_reads_are_whole(tmp_path):
    text = "a" + "€" * (corpus._PIECE // 3 + 100)
    path = tmp_path / "text"
    path.write_text(text, encoding="utf-8")
    tokenizer = OneCharacter(1 << 20, first=ord("€"))
    ids = written(documents(str(path)), tmp_path, tokenizer).ids
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


# ------------------------------------------------- a text that changes while it is read


def before_writing(monkeypatch, action):
    """Call `action` between the first pass over the text, which only hashes it, and the second, which tokenises it."""
    original = tokens.write

    def changed(*arguments):
        action()
        return original(*arguments)

    monkeypatch.setattr(tokens, "write", changed)


@pytest.mark.parametrize("tokenizer", [None, OneCharacter(300)])
def test_a_text_that_changes_is_stored_under_the_hash_of_what_was_tokenised(tmp_path, monkeypatch, tokenizer):
    path, cache = tmp_path / "text", tmp_path / "cache"
    path.write_bytes(b"before")
    found = documents(str(path))
    before_writing(monkeypatch, lambda: path.write_bytes(b"behind"))
    file, key = cached(found, cache, "name", tokenizer)
    monkeypatch.undo()
    assert key == fingerprint([Document("text", text=b"behind")], "name")
    assert file.ids[1:6].tolist() == [x + 3 * (tokenizer is None) for x in b"ehind"]
    assert names(cache) == [key[:32]]
    path.write_bytes(b"before")
    file, key = cached(found, cache, "name", tokenizer)
    assert key == fingerprint([Document("text", text=b"before")], "name")
    assert file.ids[1:6].tolist() == [x + 3 * (tokenizer is None) for x in b"efore"]


@pytest.mark.parametrize("tokenizer", [None, OneCharacter(300)])
def test_a_text_that_changes_between_two_reads_has_the_hash_of_what_was_tokenised(tmp_path, tokenizer):
    class Changing(Document):
        def pieces(self):
            for i, piece in enumerate(super().pieces()):
                yield piece
                self.path.write_bytes(bytes([98 + i]) * len(self))

    path = tmp_path / "text"
    path.write_bytes(b"a" * (2 * corpus._PIECE))
    file, key = cached([Changing("text", path, 0, 2 * corpus._PIECE)], tmp_path / "cache", "name", tokenizer)
    text = b"b" * corpus._PIECE  # the first pass ended with c, so the second began with it
    assert key == fingerprint([Document("text", text=b"c" * corpus._PIECE + text)], "name")
    first, last = file.ids[1], file.ids[-2]
    assert [first, last] == [x + 3 * (tokenizer is None) for x in b"cb"]


def test_a_text_that_grows_is_stored_to_its_first_length(tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_bytes(b"abc")
    found = documents(str(path))
    before_writing(monkeypatch, lambda: path.write_bytes(b"xyz and more"))
    file, key = cached(found, tmp_path / "cache", "name", None)
    assert decode(file.ids).encode() == b"xyz"
    assert key == fingerprint([Document("text", text=b"xyz")], "name")


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda path: path.write_bytes(b"x"), "became shorter by 2 bytes while it was read; start again"),
        (lambda path: path.unlink(), "cannot be read (No such file or directory); make it readable"),
    ],
    ids=["shorter", "deleted"],
)
def test_a_text_that_is_gone_is_an_error_that_names_it(tmp_path, monkeypatch, action, message):
    path = tmp_path / "text"
    path.write_bytes(b"abc")
    found = documents(str(path))
    before_writing(monkeypatch, lambda: action(path))
    with pytest.raises(ConfigError) as caught:
        cached(found, tmp_path / "cache", "name", None)
    assert str(caught.value).startswith(f"data: '{path}' {message}")
    assert names(tmp_path / "cache") == []


# ----------------------------------------------------------------- faults of the cache


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    begun = []

    class Broken(Document):
        def pieces(self):
            begun.append(self)
            yield b"half"
            if len(begun) == 2:
                raise error

    source = [Document("d", text=b"whole"), Broken("d", text=b"half and half")]
    with pytest.raises(error):
        written(source, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("call", ["seal", "json.dumps", "np.dtype", "_put"])
def test_a_disk_that_is_full_leaves_nothing_and_is_named(tmp_path, monkeypatch, call):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"resnet_bk.data.tokens.{call}", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}[/']"):
        written([Document("d", text=b"abc")], tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("cache", ["file", "file/cache", "x" * 300])
def test_a_cache_that_cannot_be_made(tmp_path, cache):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        written([Document("d", text=b"abc")], tmp_path / cache)
    message = str(caught.value)
    assert message.startswith(f"data.cache: {str(tmp_path / cache)!r} cannot be written to (")
    assert message.endswith("); choose another folder")


def test_what_a_kill_left_is_removed_with_the_next_write_of_the_same_text(tmp_path, monkeypatch):
    monkeypatch.setattr("resnet_bk.files.remove", lambda folder: None)  # as if killed before
    with monkeypatch.context() as killed:
        killed.setattr(tokens, "seal", None)
        for text in (b"abc", b"xyz"):
            with pytest.raises(TypeError):
                written([Document("d", text=text)], tmp_path)
    monkeypatch.undo()
    assert len(left := names(tmp_path)) == 2
    assert decode(written([Document("d", text=b"abc")], tmp_path).ids).encode() == b"abc"
    assert len(set(names(tmp_path)) & set(left)) == 1  # perhaps another process writes the other text


@pytest.mark.parametrize("action", ["finishes", "removes the cache", "removes what is left over", "puts a file there"])
def test_another_process_at_the_same_text(tmp_path, monkeypatch, action):
    source, cache, write = [Document("d", text=b"abc")], tmp_path / "cache", tokens.write

    def disturbed(*arguments):
        key = write(*arguments)
        monkeypatch.setattr(tokens, "write", write)
        if action != "finishes":
            tokens.files.remove(cache if action == "removes the cache" else arguments[1].parent)
        if action == "puts a file there":
            (cache / key[:32]).write_text("not a folder")
        elif action != "removes the cache":
            written(source, cache)
        return key

    monkeypatch.setattr(tokens, "write", disturbed)
    file, key = cached(source, cache, "tokenizer", None)
    assert decode(file.ids).encode() == b"abc"
    assert names(cache) == [key[:32]]


def test_many_processes_that_replace_a_damaged_file(tmp_path):
    source = [Document("d", text=b"abc" * 1000)]
    _, key = cached(source, tmp_path, "tokenizer", None)
    (tmp_path / key[:32] / "index.json").write_text("{}")
    found = []
    threads = [threading.Thread(target=lambda: found.append(written(source, tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [decode(file.ids).encode() for file in found] == [b"abc" * 1000] * 8
    assert names(tmp_path) == [key[:32]]


@pytest.mark.parametrize("kind", ["file", "empty folder", "broken link", "link to a file", "loop"])
def test_an_entry_of_the_cache_that_is_no_token_file_is_replaced(tmp_path, kind):
    source, cache = [Document("d", text=b"abc")], tmp_path / "cache"
    _, key = cached(source, cache, "tokenizer", None)
    entry, other = cache / key[:32], tmp_path / "other"
    tokens.files.remove(entry)
    other.write_text("mine")
    if kind == "file":
        entry.write_text("a file")
    elif kind == "empty folder":
        entry.mkdir()
    else:
        entry.symlink_to({"broken link": "nowhere", "link to a file": other, "loop": entry.name}[kind])
    assert decode(written(source, cache).ids).encode() == b"abc"
    assert names(cache) == [key[:32]]
    assert other.read_text() == "mine"


def test_an_entry_of_the_cache_that_cannot_be_replaced_is_an_error(tmp_path, monkeypatch):
    source = [Document("d", text=b"abc")]
    _, key = cached(source, tmp_path, "tokenizer", None)
    (tmp_path / key[:32] / "index.json").write_text("{}")

    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.rename", refuse)
    with pytest.raises(PermissionError, match=rf"Operation not permitted: '{tmp_path}/{key[:32]}'"):
        written(source, tmp_path)
    assert names(tmp_path) == [key[:32]]


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


@pytest.mark.parametrize(
    "index",
    [
        *("", "[]", "null", "5", '"dtype"', "{}", "[" * 100_000, b"\xff"),
        *({"dtype": "O"}, {"dtype": "uint32"}, {"dtype": []}, {"dtype": None}),
        *({"starts": x} for x in (None, 5, [], [0, 4], [0, 4, 9, 9], [0, 9, 4, 14], [1, 4, 14], [0, 4, 15], "ab")),
        *({"starts": x} for x in ([0, -4, 14], [0, 1 << 62, 14], [0, 1 << 80, 14], [0, None, 14], [[0], [4], [14]])),
        *({"sizes": x} for x in (None, [3], [3, 9, 1], [-3, 9], [1 << 80, 9], ["3", {}], [[3], [9]])),
        *({"names": x} for x in (None, 5, ["a"], ["a", "b", "c"])),
    ],
    ids=lambda index: str(index)[:30],
)
def test_an_index_that_does_not_fit_is_written_again(tmp_path, index):
    source = [Document("a", text=b"abc"), Document("b", text=b"123456789")]
    _, key = cached(source, tmp_path, "tokenizer", None)
    path = tmp_path / key[:32] / "index.json"
    if isinstance(index, dict):
        index = json.dumps(json.loads(path.read_bytes()) | index)
    path.write_bytes(index if isinstance(index, bytes) else index.encode())
    seal(path.parent, ("tokens.bin", "index.json"))
    with pytest.raises(CheckpointError, match=f"^{path.parent}: expected ") as caught:
        read(path.parent, 259)
    assert "\n" not in str(caught.value)
    file = written(source, tmp_path)
    assert (file.starts.tolist(), file.sizes.tolist(), file.names) == ([0, 4, 14], [3, 9], ("a", "b"))


@pytest.mark.parametrize("ids", [[100, 259, 1, 1], [100] * 3, [100] * 5, [], [65535] * 4])
def test_ids_that_do_not_fit_are_written_again(tmp_path, ids):
    source = [Document("d", text=b"abc")]
    _, key = cached(source, tmp_path, "tokenizer", None)
    np.asarray(ids, np.uint16).tofile(tmp_path / key[:32] / "tokens.bin")
    seal(tmp_path / key[:32], ("tokens.bin", "index.json"))
    assert written(source, tmp_path).ids.tolist() == [100, 101, 102, 1]


def test_a_manifest_without_the_ids_is_written_again(tmp_path):
    source = [Document("d", text=b"abc")]
    _, key = cached(source, tmp_path, "tokenizer", None)
    (tmp_path / key[:32] / "tokens.bin").unlink()
    seal(tmp_path / key[:32], ("index.json",))
    assert written(source, tmp_path).ids.tolist() == [100, 101, 102, 1]


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
        file = written(documents(str(path)), tmp_path, Counting(300))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 << 20
    assert len(file.ids) == (8 << 20) + 1
