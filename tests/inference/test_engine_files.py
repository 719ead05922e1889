"""`resnet-bk generate` finds compiled models in the cache, and then needs no torch. Only intact ones that fit count."""

import io
import os
import subprocess
import sys

import pytest
import torch

from resnet_bk.checkpoint import seal
from resnet_bk.cli import main
from resnet_bk.config import GenerateConfig
from resnet_bk.data.byte_text import ByteText
from resnet_bk.engine.decoder import decoder_of
from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.hf.tokenizer import byte_tokenizer
from resnet_bk.inference import engine_files
from resnet_bk.inference.generation import Session
from resnet_bk.inference.loading import load
from resnet_bk.inference.readers import EngineReader, ModelReader
from resnet_bk.ops import available_backends

if "numba" not in available_backends():
    pytest.skip("needs numba", allow_module_level=True)

from resnet_bk.engine.compiler import engine_of

DEPTH = {"policy": "exit", "threshold": 0.05}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def save(name="model", seed=0, **fields):
    torch.manual_seed(seed)
    model = ResNetBKForCausalLM(ResNetBKConfig(**{"d_model": 16, "n_layers": 3, "depth": DEPTH, **fields}))
    model.save_pretrained(name)
    byte_tokenizer().save_pretrained(name)
    seal(engine_files.Path(name))


@pytest.fixture
def text(capsys):
    """Run the command and return its text; check whether it has imported torch's model."""

    def run(*more, model="model", cached):
        calls = []
        with pytest.MonkeyPatch.context() as patch:
            found = engine_files.stored
            patch.setattr(engine_files, "stored", lambda folder: calls.append(found(folder)) or calls[-1])
            assert main(["generate", model, "def é", "--max_new_tokens", "30", *more]) == 0
        assert [engine is not None for engine in calls] == [cached]
        return capsys.readouterr().out

    return run


def test_the_text_is_the_same_with_a_stored_engine(text):
    save()
    for more in ((), ("--depth_threshold", "1"), ("--weights", "int8"), ("--seed", "3")):
        first = text(*more, cached=more[:1] == ("--seed",))
        assert text(*more, cached=True) == first
    assert text("--depth_threshold", "0.01", cached=False)


def test_another_model_has_another_engine(text):
    save()
    one = text(cached=False)
    save(seed=1)
    other = text(cached=False)
    assert other == text(cached=True) != one


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_engine_is_not_used_and_written_again(text, tmp_path, damage):
    save()
    expected = text(cached=False)
    (path,) = tmp_path.glob(f"cache/resnet-bk/engines/*/{engine_files.NAME}")
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + (b"" if damage == "cut" else b"x"))
    assert text(cached=False) == expected
    assert text(cached=True) == expected


def test_a_cache_that_cannot_be_written_is_no_error(text, tmp_path):
    save()
    (tmp_path / "cache").write_text("a file")
    assert text(cached=False) == text(cached=False)


def test_a_damaged_model_is_refused_although_its_engine_is_stored(text, tmp_path, capsys):
    save()
    text(cached=False)
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert main(["generate", "model", "x"]) == 2
    assert "damaged" in capsys.readouterr().err


def test_checkpoints_that_are_passed_over_are_named_with_a_stored_engine_too(text, capsys):
    save("run/checkpoints/checkpoint-1")
    save("run/checkpoints/checkpoint-2")
    engine_files.Path("run/config.yaml").write_text("{}")
    engine_files.Path("run/checkpoints/checkpoint-2/model.safetensors").write_bytes(b"")
    for cached in (False, True):
        capsys.readouterr()
        assert main(["generate", "run", "x", "--max_new_tokens", "4"]) == 0
        assert capsys.readouterr().err.count("skipping checkpoint-2") == 1, cached


def test_only_the_newest_engines_stay(text, tmp_path):
    for seed in range(engine_files.KEPT + 2):
        save(seed=seed)
        text(cached=False)
    assert len(list(tmp_path.glob("cache/resnet-bk/engines/*"))) == engine_files.KEPT
    assert text(cached=True)


def test_a_stored_engine_needs_no_torch(text, tmp_path):
    save()
    expected = text(cached=False)
    script = (
        "import sys; from resnet_bk.__main__ import main\n"
        "sys.argv = ['resnet-bk', 'generate', 'model', 'def é', '--max_new_tokens', '30']\n"
        "code = main(); assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=os.environ, check=False)
    assert (done.returncode, done.stdout.decode()) == (0, expected), done.stderr.decode()


def test_lines_of_standard_input_continue_the_text(text, monkeypatch, tmp_path):
    """With the engine from the cache, and with the model, which is put there."""
    save()
    texts = []
    for cached in (False, True):
        monkeypatch.setattr(sys, "stdin", io.StringIO("x = 1\n\ny"))
        texts.append(text("--temperature", "0", "--interactive", "true", cached=cached))
    assert texts[0] == texts[1]
    begin = text("--temperature", "0", cached=True).removesuffix("\n")
    assert texts[0].startswith(begin + "x = 1\n")
    assert len(texts[0]) > len(begin) + 6 + 3 * 10


def test_a_line_is_read_after_the_whole_text_before():
    """The last token of a continuation was chosen, but not read, when the next line comes."""
    save(seed=2)
    model, _ = load("model")
    for reader in (EngineReader(engine_of(model.model)), ModelReader(model.model, decoder_of(model.model))):
        config, pieces = GenerateConfig("model", "ab", max_new_tokens=7, temperature=0), []
        session = Session(reader, ByteText(), config, pieces.append)
        whole = session.extend("ab") + session.extend("cd")
        assert whole == "".join(pieces)
        assert len(session._tokens) == 18
        ids = torch.tensor([session._tokens[:-7]])
        expected = model.generate(ids, max_new_tokens=7, do_sample=False)[0, -7:].tolist()
        assert session._tokens[-7:] == expected
