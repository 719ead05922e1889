"""``resnet-bk inspect``: its output, its page, and its errors."""

import io
import os
import re
import sys

import pytest
import torch

from resnet_bk import LanguageModel
from resnet_bk.adaptive.depth import DepthRecord
from resnet_bk.checkpoint import seal
from resnet_bk.cli import main
from resnet_bk.config import ConfigError, read_text, visible
from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.hf.tokenizer import byte_tokenizer
from resnet_bk.layers.sparse import SparsityRecord
from resnet_bk.study.inspection import _decided, _pieces, check_output, decisions, heated
from resnet_bk.study.ledger import Ledger

ALL = {
    "n_layers": 5,
    "num_experts": 3,
    "experts": {"policy": "top_p", "zero": 1},
    "sparsity": {"target": 0.5},
    "multiscale": {"factors": [4], "layers": [1, 3, 1], "boundaries": "whitespace"},
    "depth": {"policy": "act"},
}
TEXT = "def read(self):\n    return 'a\u00df\u20ac <b> & c'\r\n"


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    ResNetBKForCausalLM(ResNetBKConfig(d_model=32, **ALL)).save_pretrained("model")
    byte_tokenizer().save_pretrained("model")
    seal(tmp_path / "model")
    (tmp_path / "text.py").write_bytes(TEXT.encode())
    return tmp_path


def test_the_whole_text_is_shown_with_what_it_cost(checkpoint, capsys):
    assert main(["inspect", "model", "text.py"]) == 0
    said = capsys.readouterr().out
    assert "def read(self):" in said
    for name in ("FLOPs per token", "of the plain model", "blocks per token", "tokens per chunk", "computing experts"):
        assert name in said
    page = (checkpoint / "inspect.html").read_text()
    shown = "".join(re.findall(r'title="[^"]*bits[^"]*">([^<]*)</span>', page))
    assert "ef read(self):\n    return &#x27;a\u00df\u20ac &lt;b&gt; &amp; c&#x27;" in shown
    for note in ("closes a chunk", "kept in ", "of 2 mixers", "experts", "chunk: "):  # two blocks are on bytes
        assert note in page
    assert "resnet-bk inspect model text.py" in page


def test_its_figures_are_the_ledgers(checkpoint, capsys):
    main(["inspect", "model", "text.py", "--max_tokens", "20"])
    said = capsys.readouterr().out
    model = ResNetBKForCausalLM.from_pretrained("model").eval().model
    ids = byte_tokenizer()(TEXT, return_tensors="pt")["input_ids"][:, :20]
    with torch.no_grad(), Ledger(model) as ledger:
        output = model(ids)
    assert f"{ledger.total / 20:,.0f}" in said
    assert "looked at the first 20 tokens" in said
    found = decisions(output.records)
    assert found["tokens per chunk"] > 1
    assert 0 <= found["share of sites left out"] <= 1


def test_an_earlier_page_is_replaced_and_nothing_else(checkpoint, capsys):
    assert main(["inspect", "model", "text.py", "--output", "a.html"]) == 0
    assert main(["inspect", "model", "text.py", "--output", "a.html"]) == 0
    (checkpoint / "mine.html").write_text("<title>mine</title>")
    os.mkfifo(checkpoint / "pipe")
    for arguments, message in (
        (["text.py", "--output", "mine.html"], "inspect.output: mine.html exists and is not a page of this command"),
        (["text.py", "--output", "."], "inspect.output: . is a folder"),
        (["text.py", "--output", "pipe"], "inspect.output: pipe is a device or a pipe; name a file"),
        (["text.py", "--output", "no/a.html"], "inspect.output: folder no does not exist"),
        (["none.txt"], "inspect.text: none.txt is not a file"),
        (["text.py", "--max_tokens", "0"], "inspect.max_tokens: got 0, allowed an integer from 1"),
    ):
        capsys.readouterr()
        assert main(["inspect", "model", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert (checkpoint / "mine.html").read_text() == "<title>mine</title>"


def test_a_text_without_a_character_and_one_that_is_not_utf8(checkpoint, capsys):
    (checkpoint / "empty").write_text("")
    (checkpoint / "latin").write_bytes(b"\xff")
    assert main(["inspect", "model", "empty"]) == 2
    assert "inspect.text: empty has no token" in capsys.readouterr().err
    assert main(["inspect", "model", "latin"]) == 2
    assert "inspect.text: latin is not UTF-8 at byte 0" in capsys.readouterr().err


def test_control_characters_reach_neither_the_terminal_nor_the_page(checkpoint, capsys):
    (checkpoint / "odd name").write_text("\x1b[31m\u202egpj.exe\x07\x9b [/b] :smile: é", encoding="utf-8")
    assert main(["inspect", "model", "odd name"]) == 0
    printed = capsys.readouterr().out
    page = (checkpoint / "inspect.html").read_text(encoding="utf-8")
    for text in (printed, re.sub("</?span[^>]*>", "", page)):
        assert "␛[31m\\u202egpj.exe␇\\u009b [/b] :smile: é" in text
        assert visible(text) == text
    assert "resnet-bk inspect model &#x27;odd name&#x27;" in page


def test_no_more_of_a_text_is_read_than_its_tokens_can_need(checkpoint, capsys):
    with (checkpoint / "giant").open("wb") as file:
        file.write(b"x" * 100)
        file.truncate(1 << 40)  # sparse
    assert main(["inspect", "model", "giant", "--max_tokens", "50"]) == 0
    assert "looked at the first 50 tokens" in capsys.readouterr().out


def test_a_character_that_the_limit_cuts_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("aé€", encoding="utf-8")
    read = [read_text("x", str(tmp_path / "a"), limit) for limit in range(1, 9)]
    assert read == ["a", "a", "aé", "aé", "aé", *["aé€"] * 3]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é".encode())))
    assert read_text("x", "-", 100) == "é"


def test_blocks_with_attention_are_in_the_table(checkpoint, capsys):
    ResNetBKForCausalLM(ResNetBKConfig(d_model=32, attention={"every": 2, "window": 9})).save_pretrained("model")
    assert main(["inspect", "model", "text.py"]) == 0
    said = capsys.readouterr().out
    assert all(f"blocks.{i} mixer" in said for i in range(4))
    row = next(line for line in said.splitlines() if "blocks.1 mixer" in line)
    n = len(TEXT.encode())
    flops = 8 * 32**2 * n + 4 * 32 * (9 + 9 - 1) * -(-n // 9) * 9
    assert f"{flops:,}" in row


def test_a_single_character(checkpoint):
    (checkpoint / "one").write_text("x")
    assert main(["inspect", "model", "one"]) == 0


@torch.no_grad()
def test_decisions_are_shown_at_each_token():
    torch.manual_seed(0)
    ids = torch.tensor([list(b"one two three fou")]) + 3
    deep = LanguageModel(259, d_model=16, n_layers=4, num_experts=1, depth={"policy": "skip"}).eval()
    record = deep(ids).records[0]
    assert _decided([record], 17) == [[f"{n} of 4 blocks"] for n in record.blocks[0].tolist()]
    words = LanguageModel(259, d_model=16, num_experts=1, depth={"policy": "act"}, multiscale=ALL["multiscale"]).eval()
    records = words(ids).records
    blocks = next(r.blocks[0].tolist() for r in records if isinstance(r, DepthRecord))
    phrases = _decided(records, 17)
    for i, chunk in enumerate([0] * 4 + [1] * 4 + [2] * 6):
        assert phrases[i][0] == f"chunk: {blocks[chunk]} of 3 blocks"
    assert [i for i in range(17) if "closes a chunk" in phrases[i]] == [3, 7, 13]
    assert phrases[14:] == [[]] * 3  # no block has run on the open chunk yet
    length = LanguageModel(259, d_model=16, n_layers=4, num_experts=1, length={"max_length": 16, "bins": 4}).eval()
    record = length(ids).records[0]
    expected = ["runs the deep blocks" if kept else "takes the bypass" for kept in record.kept[0]]
    assert _decided([record], 17) == [[phrase] for phrase in expected]
    both = LanguageModel(259, d_model=16, **ALL, length={"max_length": 16, "bins": 4}).eval()
    records = both(ids).records
    expected = ["runs the deep blocks" if kept else "takes the bypass" for kept in records[0].kept[0]]
    assert [first for first, *_ in _decided(records, 17)] == expected
    assert _decided([SparsityRecord(kept=torch.ones(1, 5), sites=torch.tensor(5))], 17) == [[]] * 17  # packed rows


def test_text_that_no_token_covers_is_shown_too():
    cost, bits, decided = torch.tensor([1.0, 2.0, 3.0]), torch.ones(2), [[], [], []]
    pieces = _pieces("a b  c", [(0, 1), (2, 3), (5, 6)], cost, bits, decided)
    assert [text for text, _, _ in pieces] == ["a", " b", "  c"]
    assert [own for _, own, _ in pieces] == [1.0, 2.0, 3.0]
    assert [heat for _, heat, _ in heated(pieces, 1.0, 5.0)] == [0.0, 0.25, 0.5]
    assert [heat for _, heat, _ in heated(pieces, 1.0, 1.0)] == [0.0] * 3


def test_only_the_beginning_of_a_giant_file_is_read(tmp_path):
    with (tmp_path / "a.html").open("wb") as file:
        file.write(b"<title>mine")
        file.truncate(1 << 40)  # sparse
    check_output("x", tmp_path / "a.html", "mine")
    with pytest.raises(ConfigError, match="exists and is not a page of this command"):
        check_output("x", tmp_path / "a.html", "yours")
