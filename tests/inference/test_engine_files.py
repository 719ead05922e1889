"""`resnet-bk generate` finds compiled models in the cache, and then needs no torch. Only intact ones that fit count."""

import io
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from resnet_bk import files
from resnet_bk.checkpoint import CheckpointError, seal
from resnet_bk.cli import main
from resnet_bk.config import GenerateConfig
from resnet_bk.data.byte_text import ByteText
from resnet_bk.engine.decoder import decoder_of
from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM
from resnet_bk.hf.tokenizer import byte_tokenizer
from resnet_bk.inference import engine_files, generation
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


@pytest.mark.parametrize("fault", ["a file", "a long name", "a full disk"])
def test_a_cache_that_cannot_be_used_is_no_error(text, tmp_path, monkeypatch, fault):
    save()
    if fault == "a file":
        (tmp_path / "cache").write_text("a file")
    elif fault == "a long name":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("x" * 300)))
    else:
        full = SafetensorError("Error while serializing: I/O error: No space left on device")
        monkeypatch.setattr(engine_files.Code, "save", lambda *arguments: (_ for _ in ()).throw(full))
    assert text(cached=False) == text(cached=False)


def test_a_file_with_a_valid_manifest_that_is_no_engine_is_written_again(text, tmp_path):
    save()
    expected = text(cached=False)
    (path,) = tmp_path.glob(f"cache/resnet-bk/engines/*/{engine_files.NAME}")
    path.write_bytes(b"junk")
    seal(path.parent, (engine_files.NAME,))
    assert text(cached=False) == expected
    assert text(cached=True) == expected


def test_a_model_that_is_saved_meanwhile_does_not_get_the_place_of_the_first(text, monkeypatch):
    """The newest checkpoint is chosen when the cache is searched, and again when the model is loaded."""
    save("run/checkpoints/checkpoint-1")
    engine_files.Path("run/config.yaml").write_text("{}")
    own, load_model = text(model="run/checkpoints/checkpoint-1", cached=False), generation._load
    shutil.rmtree(engine_files.cache_folder())
    with monkeypatch.context() as patch:
        patch.setattr(
            generation, "_load", lambda *rest: (save("run/checkpoints/checkpoint-2", 1), load_model(*rest))[1]
        )
        assert text(model="run", cached=False) != own
    assert text(model="run/checkpoints/checkpoint-1", cached=False) == own


def test_a_model_that_is_being_replaced_is_left_to_the_loader(text, monkeypatch):
    save()
    expected = text(cached=False)

    def missing(*arguments):
        raise CheckpointError("model/manifest.json: missing")

    monkeypatch.setattr(generation, "model_folder", missing)
    assert main(["generate", "model", "def é", "--max_new_tokens", "30"]) == 0
    assert expected


def test_another_tokenizer_is_noticed(text, capsys):
    save()
    text(cached=False)
    for name in engine_files.TOKENIZER:
        engine_files.Path("model", name).write_text("{broken")
    assert main(["generate", "model", "x"]) == 2
    assert "no usable tokenizer" in capsys.readouterr().err


def test_numba_that_cannot_start_leaves_the_cache_alone(tmp_path, monkeypatch):
    save()

    def broken():
        raise ValueError("No threading layer could be loaded.")

    monkeypatch.setattr(engine_files, "_version", broken)
    assert engine_files.place(tmp_path / "model", "float32", None) is None


def test_folders_of_killed_processes_are_removed_after_a_while(text, tmp_path):
    save()
    left = files.scratch(tmp_path / "cache" / "resnet-bk" / "engines" / "0")
    left.mkdir(parents=True)
    text(cached=False)
    assert left.exists()
    os.utime(left, (0, 0))
    save(seed=1)
    text(cached=False)
    assert not left.exists()


def test_the_engine_that_was_used_last_stays(text):
    for seed in range(engine_files.KEPT):
        save(f"model-{seed}", seed)
        text(model=f"model-{seed}", cached=False)
        time.sleep(0.01)
    text(model="model-0", cached=True)
    save("another", 99)
    text(model="another", cached=False)
    assert text(model="model-0", cached=True)
    assert text(model="model-1", cached=False)


def test_int8_reads_the_prompt_in_int8_with_and_without_the_cache(text):
    save(d_model=64)
    for seed in range(4):
        more = ("--weights", "int8", "--max_new_tokens", "200", "--seed", str(seed))
        shutil.rmtree(engine_files.cache_folder(), ignore_errors=True)
        assert text(*more, cached=False) == text(*more, cached=True)


def test_ids_beyond_the_bytes_have_no_text(text):
    """A vocabulary may be larger than the tokenizer's, as a multiple of 64 is."""
    save(vocab_size=320)
    assert text("--temperature", "1", "--max_new_tokens", "100", cached=False) == text(
        "--temperature", "1", "--max_new_tokens", "100", cached=True
    )
    assert ByteText().decode([100, 259, 319, 2]) == "a"


def test_logits_that_are_no_numbers_are_one_line(capsys):
    torch.manual_seed(0)
    model = ResNetBKForCausalLM(ResNetBKConfig(d_model=16, n_layers=3))
    with torch.no_grad():
        model.model.embed.weight *= 1e38
    model.save_pretrained("model")
    byte_tokenizer().save_pretrained("model")
    seal(engine_files.Path("model"))
    assert main(["generate", "model", "x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_prompt_without_a_token_continues_an_ended_text():
    class Reader:
        vocabulary, share, new_engine = 259, None, None

        def __init__(self):
            self.was_read = []

        def read(self, ids):
            self.was_read += ids
            return np.eye(259, dtype=np.float32)[ByteText.end] * 9

        def write(self, ids, sampler, count, end):
            return [sampler(self.read(ids))]

    for stop in ([], ["never"]):
        reader, config = Reader(), GenerateConfig("m", "ab", temperature=0, stop=stop)
        session = Session(reader, ByteText(), config, lambda piece: None)
        assert session.extend("ab") + session.extend("") + session.extend("c") == "abc"
        assert reader.was_read == ByteText().encode("abc")


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
