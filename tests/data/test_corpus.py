"""Corpora: which files are read, in which order, and what is held out."""

import itertools
import os
import socket
import sys
import tracemalloc
from pathlib import Path

import pytest

from resnet_bk.config import ConfigError, DataConfig
from resnet_bk.data import corpus
from resnet_bk.data import hub as hub_module
from resnet_bk.data.corpus import Document, count_words, documents, held_out, without_copies
from resnet_bk.data.hub import hub_split, is_hub_name
from resnet_bk.data.tokens import cached, fingerprint


def split(source, val_source, val_fraction, **patterns):
    return corpus.split(DataConfig(source=source, val_source=val_source, val_fraction=val_fraction, **patterns))


def content(document):
    return b"".join(document.pieces())


def write(folder, **texts):
    """Write files: a name with "__" in it is a path."""
    for name, text in texts.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def refused(function, *arguments):
    """Return the message of a ConfigError: one line that a terminal can print."""
    with pytest.raises(ConfigError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message.isprintable()
    return message


def cannot_read(monkeypatch, name, owner, method, reason=(13, "Permission denied")):
    """Let a function of the file system fail for paths of one name: the tests may run as root, who may read all."""
    original = getattr(owner, method)

    def failing(path, *arguments, **more):
        if Path(path).name == name:
            raise OSError(*reason)
        return original(path, *arguments, **more)

    monkeypatch.setattr(owner, method, failing)


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


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ([], [], ["a.py", "docs/a.md", "docs/b.py", "lib/d.bin", "lib/docs/c.py"]),
        (["*.py"], [], ["a.py", "docs/b.py", "lib/docs/c.py"]),
        (["docs"], [], ["docs/a.md", "docs/b.py", "lib/docs/c.py"]),
        (["docs/"], ["*.md"], ["docs/b.py", "lib/docs/c.py"]),
        (["lib/*", "?.md"], [], ["docs/a.md", "lib/d.bin", "lib/docs/c.py"]),
        ([], ["lib/docs", "*.bin"], ["a.py", "docs/a.md", "docs/b.py"]),
        (["docs/*.py"], ["docs/*.py", "nothing"], None),
        (["*.PY"], [], None),
    ],
)
def test_patterns_choose_files(tmp_path, include, exclude, expected):
    write(tmp_path, **{"a.py": "1", "docs__a.md": "2", "docs__b.py": "3", "lib__docs__c.py": "4", "lib__d.bin": "5"})
    if expected is not None:
        assert [d.name for d in documents(str(tmp_path), include=include, exclude=exclude)] == expected
        return
    message = refused(documents, str(tmp_path), "data.source", include, exclude)
    assert f"data.include = {include} and data.exclude = {exclude} leave out all 5 files" in message


def test_patterns_hold_for_the_held_out_text_too(tmp_path):
    write(tmp_path, **{"new__a.txt": "1", "new__a.bin": "2", "old__b.txt": "3", "old__b.bin": "4"})
    found = split(str(tmp_path / "new"), str(tmp_path / "old"), 0.1, include=["*.txt"])
    assert [[d.name for d in part] for part in found[:2]] == [["a.txt"], ["b.txt"]]
    found = split(str(tmp_path), None, 0.5, exclude=["*.bin"])
    assert [[d.name for d in part] for part in found[:2]] == [["old/b.txt"], ["new/a.txt"]]


def test_patterns_are_for_files_only():
    message = refused(split, "owner/name", None, 0.05)
    assert "data.exclude" not in message
    with pytest.raises(
        ConfigError, match=r"^data\.exclude: got patterns for the hub dataset 'owner/name', allowed for files"
    ):
        split("owner/name", None, 0.05, exclude=["*.bin"])
    for wrong, message in (("*.py", "got '*.py', allowed a list"), ([1], "include[0]: got 1, allowed text")):
        with pytest.raises(ConfigError) as caught:
            DataConfig(include=wrong)
        assert message in str(caught.value)


def test_the_standard_library_comes_in_sorted_order_every_time():
    first, second = documents("stdlib"), documents("stdlib")
    assert first == second
    assert [d.name for d in first] == sorted(d.name for d in first)


def test_every_20th_file_is_held_out():
    found = documents("stdlib")
    once = set(without_copies(found))
    train, held_out, copies = split("stdlib", None, 0.05)
    assert held_out == [d for d in found[::20] if d in once]
    assert train == [d for i, d in enumerate(found) if i % 20 and d in once]
    assert copies == len(found) - len(once) < 10


@pytest.mark.parametrize(("fraction", "every"), [(0.5, 2), (0.25, 4), (0.1, 10), (0.4, 2), (1e-6, 10**6)])
def test_the_share_held_out_of_a_folder(folder, fraction, every):
    train, held_out, _ = split(str(folder), None, fraction)
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


def test_pipes_and_sockets_are_left_out(folder):
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(folder / "socket"))  # the name of a socket may have 108 bytes
        assert len(documents(str(folder))) == 40
    assert f"data.source: '{folder}/pipe' is not a file" in refused(documents, str(folder / "pipe"))


@pytest.mark.parametrize("target", ["nowhere", "link", "00/x"])
def test_a_link_to_nothing_is_an_error(tmp_path, target):
    write(tmp_path, a="a", b__c="c")
    (tmp_path / "b" / "link").symlink_to(target)
    message = refused(documents, str(tmp_path))
    assert message.startswith(f"data.source: '{tmp_path}/b/link' cannot be read (")
    assert message.endswith("; make it readable, or take it out of the text, and start again")


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    write(tmp_path, source__a="a", source__b__c="c", outside__d="d", outside__z__e="e", outside__hidden="h", next="n")
    (tmp_path / "outside" / "hidden").rename(tmp_path / "outside" / ".hidden")
    links = {"source/up": "..", "source/b/loop": "../../source", "source/0": "b", "source/l": "../outside"}
    links |= {"source/m": "../outside", "outside/back": "../source", "outside/z/self": "."}
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    found = documents(str(tmp_path / "source"))
    assert {d.name: content(d) for d in found} == {"a": b"a", "b/c": b"c", "l/d": b"d", "l/z/e": b"e"}


def test_a_link_to_a_folder_is_a_source(tmp_path):
    write(tmp_path, real__a="a")
    (tmp_path / "link").symlink_to("real")
    assert [d.name for d in documents(str(tmp_path / "link"))] == ["a"]


@pytest.mark.parametrize("source", ["folder", "stdlib"])
def test_a_folder_that_cannot_be_listed_is_an_error(folder, monkeypatch, source):
    name, given = ("part1", str(folder)) if source == "folder" else ("json", "stdlib")
    cannot_read(monkeypatch, name, os, "scandir")
    message = refused(documents, given, "data.val_source")
    assert message.startswith("data.val_source: '")
    assert f"{name}' cannot be read (Permission denied); make it readable" in message
    assert str(folder if source == "folder" else Path(os.__file__).parent) in message


def test_a_file_that_cannot_be_read_is_an_error(folder, monkeypatch):
    cannot_read(monkeypatch, "07.txt", Path, "open", (5, "Input/output error"))
    found = next(d for d in documents(str(folder)) if d.name.endswith("07.txt"))
    assert refused(content, found).startswith(f"data: '{folder}/part1/07.txt' cannot be read (Input/output error); ")


def test_a_file_that_is_deleted_before_it_is_read_is_an_error(folder):
    found = documents(str(folder))
    found[3].path.unlink()
    assert refused(content, found[3]).startswith(f"data: {str(found[3].path)!r} cannot be read (No such file or dir")


def test_a_source_whose_folder_may_not_be_entered(tmp_path, monkeypatch):
    cannot_read(monkeypatch, "text", Path, "stat")
    message = refused(documents, str(tmp_path / "text"), "eval.source")
    assert message.startswith(f"eval.source: '{tmp_path}/text' cannot be read (Permission denied); ")
    assert "cannot be read (File name too long)" in refused(documents, "x" * 300)


def test_names_of_any_bytes_are_read_and_shown_on_one_line(tmp_path):
    names = [b"new\nline", b"\xff\xfe", b"\x1b[31m", "\u202e".encode()]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(name)
    found = documents(str(tmp_path))
    assert sorted(map(content, found)) == sorted(names)
    for document in found:
        document.path.unlink()
        refused(content, document)


def test_a_name_that_is_not_utf8_does_not_end_the_command(tmp_path):
    source = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n")
    refused(documents, source)
    Path(source).mkdir()
    refused(documents, source)
    (Path(source) / "a").write_text("a")
    refused(split, source, None, 0.05)


# ------------------------------------------------------------------------------- copies


def copied(folder):
    """Add to the forty files a link next to its target, a copy elsewhere, and files of equal size with other text."""
    (folder / "part0" / "00.txt-link").symlink_to("00.txt")
    write(folder, z__copy="text 33\n", z__z__again="text 33\n", z__other="text 99\n")
    return folder


def test_each_content_is_in_the_text_once(folder):
    before = split(str(folder), None, 0.1)
    assert (before.copies, before.note) == (0, "")
    found = documents(str(copied(folder)))
    train, held_out, copies = text = split(str(folder), None, 0.1)
    contents = [content(d) for d in train + held_out]
    assert sorted(contents) == sorted({content(d) for d in found})
    assert (copies, text.note) == (3, "documents left out because another one has the same content: 3")
    assert not {"part0/00.txt-link", "z/copy", "z/z/again"} & {d.name for d in train + held_out}


def test_copies_do_not_move_other_files_between_training_and_held_out_text(folder):
    found = documents(str(copied(folder)))
    kept = [d for i, d in enumerate(found) if d.name not in ("part0/00.txt-link", "z/copy", "z/z/again")]
    train, held_out, _ = split(str(folder), None, 0.1)
    assert held_out == [d for d in kept if found.index(d) % 10 == 0]
    assert train == [d for d in kept if found.index(d) % 10]


def test_the_order_in_which_the_system_lists_files_does_not_matter(folder, monkeypatch):
    expected = split(str(copied(folder)), None, 0.1)
    scandir = os.scandir

    class Reversed(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", lambda path: Reversed(list(scandir(path))[::-1]))
    assert split(str(folder), None, 0.1) == expected


def test_copies_of_one_text_are_cut_like_a_single_file(tmp_path):
    write(tmp_path, a="0123456789", b="0123456789", c__d="0123456789", empty="")
    train, held_out, copies = split(str(tmp_path), None, 0.2)
    assert ([content(d) for d in train + held_out], copies) == ([b"01234567", b"89"], 2)


def test_held_out_text_is_left_out_of_the_training_text(tmp_path):
    write(tmp_path, source__a="first", source__b="again", source__c="again", source__d="other", held__x="first")
    write(tmp_path, held__y="first")
    train, held_out, copies = split(str(tmp_path / "source"), str(tmp_path / "held"), 0.05)
    assert [d.name for d in train] == ["b", "d"]
    assert [d.name for d in held_out] == ["x"]
    assert copies == 3


def test_a_part_of_the_source_is_held_out_text(folder):
    train, held_out, copies = split(str(folder), str(folder / "part1"), 0.05)
    assert {Path(d.name).parent.name for d in train} == {"part0", "part2"}
    assert len(held_out) == copies == 13


@pytest.mark.parametrize("held_out", ["a", "."])
def test_no_text_is_left_to_train_on(tmp_path, monkeypatch, held_out):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, a="text", b="text")
    message = refused(split, "b" if held_out == "a" else ".", held_out, 0.05)
    assert message.startswith("data.source: nothing of '")
    assert message.endswith("; give more text, or another data.val_source")


def test_all_that_is_not_held_out_is_a_copy(tmp_path):
    write(tmp_path, a="1", b="1", c="2", d="2")
    assert refused(split, str(tmp_path), None, 0.5).startswith("data.source: nothing of ")


def test_only_files_of_equal_size_are_read_to_find_copies(tmp_path, monkeypatch):
    write(tmp_path, a="1", b="22", c="333", d="44", e="4444")
    found, read, pieces = documents(str(tmp_path)), [], Document.pieces
    monkeypatch.setattr(Document, "pieces", lambda self: read.append(self.name) or pieces(self))
    assert without_copies(found) == found
    assert read == ["b", "d"]


def test_a_text_to_score_has_each_content_once(folder, monkeypatch):
    text = held_out(str(copied(folder)), "eval.source")
    assert (len(text.held_out), text.train, text.copies) == (41, [], 3)
    monkeypatch.setitem(sys.modules, "datasets", hub := Hub(validation=Rows(["text"], ["b"])))
    assert [content(d) for d in held_out("owner/name", "eval.source").held_out] == [b"b"]
    assert hub.asked == [("owner/name", None, "validation")]
    assert refused(held_out, "owner/other:x y", "eval.source").startswith("eval.source: 'owner/other:x y' is not")


@pytest.mark.parametrize("character", ["a", "é", "€", "😀"])
@pytest.mark.parametrize("offset", range(4))
def test_a_single_file_is_cut_between_two_characters(tmp_path, character, offset):
    text = "x" * offset + character * 300
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    (train,), (held_out,), _ = split(str(path), None, 0.1)
    assert (content(train) + content(held_out)).decode() == text
    assert content(train).decode() + content(held_out).decode() == text
    assert abs(len(held_out) - 0.1 * len(text.encode())) <= 4
    assert train.name != held_out.name


@pytest.mark.parametrize(
    ("text", "fraction", "cut"), [("aaaa€", 0.1, 4), ("aaaa€", 0.3, 4), ("aa😀", 0.2, 2), ("éé", 0.2, 2)]
)
def test_the_last_character_is_not_cut(tmp_path, text, fraction, cut):
    (tmp_path / "text").write_text(text, encoding="utf-8")
    (train,), (held_out,), _ = split(str(tmp_path / "text"), None, fraction)
    assert (content(train), content(held_out)) == (text.encode()[:cut], text.encode()[cut:])


@pytest.mark.parametrize("text", ["€", "😀"])
def test_a_single_character_is_too_small_to_hold_out_from(tmp_path, text):
    (tmp_path / "text").write_text(text, encoding="utf-8")
    assert "too few to hold out 0.4" in refused(split, str(tmp_path / "text"), None, 0.4)


def test_a_file_of_3_gib_is_cut(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(3 << 30)
    (train,), (held_out,), copies = split(str(tmp_path / "sparse"), None, 0.1)
    assert (train.stop, held_out.start, held_out.stop) == (len(train), len(train), 3 << 30)
    assert (len(held_out), copies) == (round(0.1 * (3 << 30)), 0)


def test_a_single_binary_file_is_cut_too(tmp_path):
    path = tmp_path / "binary"
    path.write_bytes(b"\x80" * 100)
    (train,), (held_out,), _ = split(str(path), None, 0.1)
    assert (len(train), len(held_out)) == (90, 10)


def test_a_folder_of_one_file_is_cut_like_the_file(tmp_path):
    (tmp_path / "only.txt").write_text("0123456789")
    train, held_out, _ = split(str(tmp_path), None, 0.2)
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
    train, held_out, _ = split(str(folder / "part1"), str(other), 0.05)
    assert train == documents(str(folder / "part1"))
    assert [content(d) for d in held_out] == [b"held out"]


@pytest.mark.parametrize("held_out", ["nowhere.txt", "owner/name"])
def test_held_out_text_that_is_missing(folder, held_out):
    message = f"data.val_source: {held_out!r} is not a file, a folder or 'stdlib'; give one of them"
    assert refused(split, str(folder), held_out, 0.05) == message


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
        ("./name", False),
        ("../name", False),
        ("owner/.name", False),
        ("x/" + "y" * 300, True),
    ],
)
def test_hub_names(source, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(source) is expected


def test_a_folder_that_exists_is_not_a_hub_name(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_name("owner/name")
    (tmp_path / "owner" / "broken").symlink_to("nowhere")
    assert not is_hub_name("owner/broken")


def test_a_hub_dataset_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"'owner/name' needs the package datasets: pip install 'resnet-bk\[data\]'"):
        split("owner/name", None, 0.05)


class Rows:
    """Stands in for `datasets.Dataset`. rows: a list, or a range whose rows `text` makes when they are read."""

    def __init__(self, column_names, rows, text=None):
        self.column_names, self.rows, self.text, self.read = column_names, rows, text, 0

    def __len__(self):
        return len(self.rows)

    def select_columns(self, names):
        assert names == ["text"]
        return self

    def __getitem__(self, rows):
        found = self.rows[rows]
        self.read = max(self.read, len(found))
        return {"text": [self.text(i) for i in found] if self.text else found}


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
    train, held_out, _ = split("owner/name:config", None, 0.05)
    assert [content(d) for d in train + held_out] == [b"a", "é".encode(), b"b"]
    assert [d.name for d in train + held_out] == [
        "owner/name/train[0]",
        "owner/name/train[2]",
        "owner/name/validation[0]",
    ]
    assert hub.asked == [("owner/name", "config", "train"), ("owner/name", "config", "validation")]


def test_empty_rows_are_left_out_and_copies_too(monkeypatch):
    rows = ["a", "", None, "b", "a", " ", "held", "b"]
    hub = Hub(train=Rows(["id", "text"], rows), validation=Rows(["text"], ["held", "", "held"]))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    train, held_out, copies = split("owner/name", None, 0.05)
    assert [(d.name, content(d), len(d)) for d in train] == [
        ("owner/name/train[0]", b"a", 1),
        ("owner/name/train[3]", b"b", 1),
        ("owner/name/train[5]", b" ", 1),
    ]
    assert ([content(d) for d in held_out], copies) == ([b"held"], 4)


@pytest.mark.parametrize("size", [1, 3, 2**20])
def test_rows_that_are_lines_are_one_document(monkeypatch, size):
    monkeypatch.setattr(hub_module, "_PIECE", size)
    monkeypatch.setattr(hub_module, "_BLOCK", 3)
    rows = ["", " = Title = \n", None, None, None, "", None, "é" * 5, "", "", "last", None]
    hub = Hub(train=Rows(["text"], rows), validation=Rows(["text"], [None, "b", None]))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    (train,), (validation,), _ = split("owner/name", None, 0.05, rows="lines")
    assert content(train).decode() == "\n".join(row for row in rows if row is not None)
    assert len(train) == len(content(train))
    assert max(map(len, train.pieces())) <= size
    assert (train.name, validation.name, content(validation)) == ("owner/name/train", "owner/name/validation", b"b")
    text = held_out("owner/name", "eval.source", "lines")
    assert [content(d) for d in text.held_out] == [b"b"]


def test_rows_make_the_token_file_of_their_texts(monkeypatch, tmp_path):
    rows = ["def f():", "", "é\n", None] * 50 + ["last"]
    monkeypatch.setitem(sys.modules, "datasets", Hub(train=Rows(["text"], rows), validation=Rows(["text"], "v")))
    found = hub_split("owner/name", "train")
    file, key = cached(found, tmp_path, "byte", None)
    texts = [Document(f"owner/name/train[{i}]", text=row.encode()) for i, row in enumerate(rows) if row]
    assert key == fingerprint(texts, "byte")
    assert [bytes((file.document(i)[:-1] - 3).astype("uint8")) for i in range(101)] == [d.text for d in texts]
    assert file.names == tuple(d.name for d in texts)
    lines = hub_split("owner/name", "train", "lines")
    joined = "\n".join(row for row in rows if row is not None).encode()
    assert fingerprint(lines, "byte") == fingerprint([Document("owner/name/train", text=joined)], "byte")
    assert count_words(lines) == count_words([Document("", text=joined)])


def test_rows_of_more_than_a_piece_are_read_in_pieces(monkeypatch):
    long = "é" * hub_module._PIECE
    monkeypatch.setitem(sys.modules, "datasets", Hub(train=Rows(["text"], ["a", long]), validation=Rows(["text"], "b")))
    document = split("owner/name", None, 0.05).train[1]
    assert content(document).decode() == long
    assert max(map(len, document.pieces())) <= hub_module._PIECE


def test_a_hundred_thousand_rows_stay_on_the_disk(monkeypatch):
    """Each row has 500 characters, and all rows are of equal size, so that each is compared with the others."""
    count = 100_000
    train = Rows(["text"], range(count), lambda i: f"{i:06}" + "x" * 494)
    validation = Rows(["text"], range(count, count + 10), train.text)
    monkeypatch.setitem(sys.modules, "datasets", Hub(train=train, validation=validation))
    tracemalloc.start()
    try:
        found = split("owner/name", None, 0.05)
        assert sum(len(piece) for document in found.train for piece in document.pieces()) == 500 * count
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(found.train), len(found.held_out), found.copies) == (count, 10, 0)
    assert peak < 500 * count * 0.6
    assert train.read <= 64


def test_a_hub_dataset_without_a_validation_split_works_with_held_out_text(monkeypatch, tmp_path):
    (tmp_path / "held.txt").write_text("held out")
    monkeypatch.setitem(sys.modules, "datasets", Hub(train=Rows(["text"], ["a"])))
    train, held_out, _ = split("owner/name", str(tmp_path / "held.txt"), 0.05)
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


# ------------------------------------------------------------------------------- several sources


def mixed(sources, **settings):
    text, starts = corpus.split_by_source(DataConfig(sources=dict.fromkeys(sources, 1.0), **settings))
    bounds = [*starts, len(text.train)]
    return text, [text.train[a:b] for a, b in itertools.pairwise(bounds)]


def test_each_source_is_divided_as_if_it_were_alone(folder, tmp_path, monkeypatch):
    (tmp_path / "single").write_text("0123456789" * 4)
    hub = Hub(train=Rows(["text"], ["row 1", "row 2"]), validation=Rows(["text"], ["row 3"]))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    sources = [str(folder / "part1"), "owner/name", str(tmp_path / "single"), str(folder / "part2")]
    text, groups = mixed(sources, val_fraction=0.1)
    alone = [split(source, None, 0.1) for source in sources]
    for group, one in zip(groups, alone, strict=True):
        assert [(d.name, content(d)) for d in group] == [(d.name, content(d)) for d in one.train]
    assert [content(d) for d in text.held_out] == [content(d) for one in alone for d in one.held_out]
    assert text.copies == 0


def test_a_content_is_in_one_source_only_and_not_in_the_held_out_text(tmp_path):
    write(tmp_path, a__0="0", a__1="1", a__2="2", b__3="3", b__4="1", b__5="0", b__6="4")
    text, groups = mixed([str(tmp_path / "a"), str(tmp_path / "b")], val_fraction=0.5)
    assert [[content(d) for d in group] for group in groups] == [[b"1"], [b"4"]]
    contents = [content(d) for d in text.train + text.held_out]
    assert sorted(contents) == [b"0", b"1", b"2", b"3", b"4"]
    assert text.copies == 2


def test_one_held_out_text_for_all_sources(tmp_path):
    write(tmp_path, a__0="0", a__1="1", b__2="2", held__x="1", held__y="9")
    text, groups = mixed([str(tmp_path / "a"), str(tmp_path / "b")], val_source=str(tmp_path / "held"))
    assert [[content(d) for d in group] for group in groups] == [[b"0"], [b"2"]]
    assert [content(d) for d in text.held_out] == [b"1", b"9"]


def test_a_source_without_text_of_its_own_is_refused(tmp_path):
    write(tmp_path, a__0="0", a__1="1", b__0="0", b__1="1")
    message = refused(mixed, [str(tmp_path / "a"), str(tmp_path / "b")])
    assert message == (
        f"data.sources: nothing of '{tmp_path}/b' is left to train on: all of its text is held out, too, or in a "
        "source before it; give more text, or another data.val_source"
    )
    assert refused(mixed, [str(tmp_path / "a"), "nowhere"]).startswith("data.sources: 'nowhere' is not a file, a fold")
    (tmp_path / "tiny").write_text("x")
    assert "data.sources: '" in refused(mixed, [str(tmp_path / "a"), str(tmp_path / "tiny")])


def test_patterns_hold_for_the_files_of_several_sources(tmp_path, monkeypatch):
    write(tmp_path, **{"a__0.py": "0", "a__1.py": "1", "a__2.md": "2"})
    hub = Hub(train=Rows(["text"], ["row"]), validation=Rows(["text"], ["other"]))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    _, groups = mixed([str(tmp_path / "a"), "owner/name"], include=["*.py"])
    assert [[content(d) for d in group] for group in groups] == [[b"1"], [b"row"]]
    message = refused(lambda: mixed(["owner/name", "owner/other"], include=["*.py"]))
    assert message.startswith("data.include: got patterns for the hub dataset 'owner/name', 'owner/other', allowed for")


# -------------------------------------------------------------------------------- words


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("text", [b"", b"one", b" two words\n\nand three more \n", b"\xff\xa0 \x0b x\r\ny", b"\n \t"])
def test_words_and_line_ends_are_counted_across_reads(tmp_path, monkeypatch, text, size):
    monkeypatch.setattr(corpus, "_PIECE", size)
    (tmp_path / "text").write_bytes(text)
    document = Document("text", tmp_path / "text", 0, len(text))
    words = len(text.split()) + text.count(b"\n")
    assert count_words([document, Document("memory", text=text)]) == 2 * words


def test_a_word_of_many_reads_takes_no_memory(tmp_path):
    (tmp_path / "text").write_bytes(b"x" * (16 * corpus._PIECE))
    tracemalloc.start()
    try:
        assert count_words(documents(str(tmp_path))) == 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * corpus._PIECE
