"""Corpora: which files are read, in which order, and what is held out."""

import os
import sys
from pathlib import Path

import pytest

from resnet_bk.config import ConfigError
from resnet_bk.data import corpus
from resnet_bk.data.corpus import Document, documents, is_hub_name, split


def content(document):
    return b"".join(document.pieces())


@pytest.fixture
def folder(tmp_path):
    """Forty files, and some that must not be read."""
    for i in range(40):
        path = tmp_path / f"part{i % 3}" / f"{i:02}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text {i}\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").write_text("secret")
    (tmp_path / "part0" / ".git").mkdir()
    (tmp_path / "part0" / ".git" / "config").write_text("secret")
    return tmp_path


def test_the_standard_library_has_more_than_500_files_and_no_tests():
    found = documents("stdlib")
    assert len(found) > 500
    for document in found:
        assert document.name.endswith(".py")
        assert not {"test", "tests", "idle_test", "site-packages", "__pycache__"} & set(Path(document.name).parts)
        assert len(document) > 0
    names = [document.name for document in found]
    assert "argparse.py" in names
    assert "json/decoder.py" in names


def test_the_standard_library_comes_in_sorted_order_every_time():
    first, second = documents("stdlib"), documents("stdlib")
    assert first == second
    assert [d.name for d in first] == sorted(d.name for d in first)


def test_every_20th_file_is_held_out():
    found = documents("stdlib")
    train, held_out = split("stdlib", None, 0.05)
    assert held_out == found[::20]
    assert train == [d for i, d in enumerate(found) if i % 20]


@pytest.mark.parametrize(("fraction", "every"), [(0.5, 2), (0.25, 4), (0.1, 10), (0.4, 2), (1e-6, 10**6)])
def test_the_share_held_out_of_a_folder(folder, fraction, every):
    train, held_out = split(str(folder), None, fraction)
    assert len(train) + len(held_out) == 40
    assert len(held_out) == -(-40 // every)


def test_a_folder_is_read_in_sorted_order_without_hidden_and_empty_files(folder):
    found = documents(str(folder))
    assert [d.name for d in found] == sorted(f"part{i % 3}/{i:02}.txt" for i in range(40))
    assert sorted(map(content, found)) == sorted(f"text {i}\n".encode() for i in range(40))


def test_a_folder_below_a_hidden_one_is_read(tmp_path):
    (tmp_path / ".cache" / "texts").mkdir(parents=True)
    (tmp_path / ".cache" / "texts" / "a.txt").write_text("a")
    assert [d.name for d in documents(str(tmp_path / ".cache" / "texts"))] == ["a.txt"]


def test_broken_links_and_pipes_are_skipped(folder):
    (folder / "broken").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe")
    assert len(documents(str(folder))) == 40


@pytest.mark.parametrize("character", ["a", "é", "€", "😀"])
@pytest.mark.parametrize("offset", range(4))
def test_a_single_file_is_cut_between_two_characters(tmp_path, character, offset):
    text = "x" * offset + character * 300
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    (train,), (held_out,) = split(str(path), None, 0.1)
    assert (content(train) + content(held_out)).decode() == text
    assert content(train).decode() + content(held_out).decode() == text
    assert abs(len(held_out) - 0.1 * len(text.encode())) <= 4
    assert train.name != held_out.name


def test_a_single_binary_file_is_cut_too(tmp_path):
    path = tmp_path / "binary"
    path.write_bytes(b"\x80" * 100)
    (train,), (held_out,) = split(str(path), None, 0.1)
    assert (len(train), len(held_out)) == (90, 10)


def test_a_folder_of_one_file_is_cut_like_the_file(tmp_path):
    (tmp_path / "only.txt").write_text("0123456789")
    train, held_out = split(str(tmp_path), None, 0.2)
    assert [content(train[0]), content(held_out[0])] == [b"01234567", b"89"]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_file_too_small_to_hold_out_from(tmp_path, size):
    path = tmp_path / "tiny"
    path.write_bytes(b"x" * size)
    with pytest.raises(ConfigError, match=f"has {size} bytes, too few to hold out 0.05"):
        split(str(path), None, 0.05)


def test_a_separate_held_out_text(folder, tmp_path):
    other = tmp_path / "other.md"
    other.write_text("held out")
    train, held_out = split(str(folder / "part1"), str(other), 0.05)
    assert train == documents(str(folder / "part1"))
    assert [content(d) for d in held_out] == [b"held out"]


@pytest.mark.parametrize("held_out", ["nowhere.txt", ""])
def test_held_out_text_that_is_missing(folder, held_out):
    with pytest.raises(ConfigError, match="is not a file"):
        split(str(folder), held_out, 0.05)


@pytest.mark.parametrize("source", ["nowhere", "nowhere/at/all", "", "a\0b", "stdlib2"])
def test_a_source_that_does_not_exist(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is not a file") as caught:
        documents(source)
    assert repr(source) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("files", [[], ["empty"], ["empty", "sub/empty", ".hidden"]])
def test_a_source_without_a_byte(tmp_path, files):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("secret" if name.startswith(".") else "")
    with pytest.raises(ConfigError, match=r"is empty \(0 bytes in \d files\)"):
        documents(str(tmp_path))


def test_an_empty_file(tmp_path):
    path = tmp_path / "empty.txt"
    path.touch()
    with pytest.raises(ConfigError, match=r"empty\.txt' is empty \(0 bytes in 1 files\); give"):
        documents(str(path))


@pytest.mark.parametrize("size", [1, corpus._PIECE - 1, corpus._PIECE, corpus._PIECE + 1, 3 * corpus._PIECE])
def test_a_document_is_read_in_pieces(tmp_path, size):
    path = tmp_path / "long"
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    path.write_bytes(data)
    pieces = list(Document("long", path, 0, size).pieces())
    assert b"".join(pieces) == data
    assert max(map(len, pieces)) <= corpus._PIECE
    assert all(pieces)


def test_a_document_is_its_byte_range_of_the_file(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"0123456789")
    assert content(Document("middle", path, 3, 7)) == b"3456"


def test_a_document_in_memory():
    document = Document("memory", text=b"abc")
    assert (len(document), content(document)) == (3, b"abc")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"x" * (2 * corpus._PIECE))
    pieces = documents(str(path))[0].pieces()
    next(pieces)
    with path.open("r+b") as file:
        file.truncate(corpus._PIECE + 10)
    with pytest.raises(ConfigError, match=f"became shorter by {corpus._PIECE - 10} bytes while it was read"):
        list(pieces)


def test_a_file_that_grows_is_read_to_its_first_length(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"before")
    document = documents(str(path))[0]
    path.write_bytes(b"before and after")
    assert content(document) == b"before"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", True),
        ("owner/name:config", True),
        ("Salesforce/wikitext:wikitext-2-raw-v1", True),
        ("stdlib", False),
        ("/owner/name", False),
        ("a/b/c", False),
        ("owner/name:", False),
    ],
)
def test_hub_names(source, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(source) is expected


def test_a_folder_that_exists_is_not_a_hub_name(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name("owner/name")


def test_a_hub_dataset_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"'owner/name' needs the package datasets: pip install 'resnet-bk\[data\]'"):
        split("owner/name", None, 0.05)


class Rows:
    def __init__(self, column_names, rows):
        self.column_names, self.rows = column_names, rows

    def __getitem__(self, name):
        return self.rows


class Hub:
    """Stands in for the package `datasets`."""

    def __init__(self, **splits):
        self.splits, self.asked = splits, []

    def load_dataset(self, name, config, split):
        self.asked.append((name, config, split))
        if split not in self.splits:
            raise ValueError(f"Unknown split {split}\nwith more lines")
        return self.splits[split]


def test_a_hub_dataset_has_its_own_held_out_text(monkeypatch):
    hub = Hub(train=Rows(["text"], ["a", None, "é"]), validation=Rows(["text"], ["b"]))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    train, held_out = split("owner/name:config", None, 0.05)
    assert [content(d) for d in train + held_out] == ["a\né".encode(), b"b"]
    assert hub.asked == [("owner/name", "config", "train"), ("owner/name", "config", "validation")]


def test_a_hub_dataset_without_a_validation_split_works_with_held_out_text(monkeypatch, tmp_path):
    (tmp_path / "held.txt").write_text("held out")
    monkeypatch.setitem(sys.modules, "datasets", Hub(train=Rows(["text"], ["a"])))
    train, held_out = split("owner/name", str(tmp_path / "held.txt"), 0.05)
    assert [content(d) for d in train + held_out] == [b"a", b"held out"]


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        (Hub(), "cannot load split 'train' of 'owner/name' (ValueError: Unknown split train); without a network"),
        (Hub(train=Rows(["prose", "id"], [])), "has no column 'text', only prose, id"),
        (Hub(train=Rows(["text"], ["", None])), "split 'train' of 'owner/name' is empty (0 bytes)"),
    ],
    ids=["unknown", "column", "empty"],
)
def test_a_hub_dataset_that_cannot_be_used(monkeypatch, hub, message):
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(ConfigError) as caught:
        split("owner/name", None, 0.05)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
