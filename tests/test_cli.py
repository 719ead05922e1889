"""The command line: bad input gives one line on standard error and exit code 2, never a traceback."""

import io
import itertools
import json
import os
import random
import re
import shutil
import string
import subprocess
import sys
import time

import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from resnet_bk import __version__, cli
from resnet_bk.checkpoint import MANIFEST, seal
from resnet_bk.cli import main
from resnet_bk.config import AttentionConfig, ConfigError, TrainConfig, shown, visible
from resnet_bk.hf import ResNetBKConfig, ResNetBKForCausalLM, byte_tokenizer

# A list of a few lines that expands to a billion items.
BOMB = "&a [1], " + ", ".join(f"&{y} [{', '.join([f'*{x}'] * 10)}]" for x, y in itertools.pairwise("abcdefghi"))


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))


@pytest.fixture
def refused(capsys):
    """Run a command that must be refused. Returns its one line on standard error."""

    def run(*arguments):
        capsys.readouterr()
        assert main(arguments) == 2
        line = capsys.readouterr().err
        assert line.startswith("resnet-bk: error: ")
        assert line.count("\n") == 1
        assert line.endswith("\n")
        assert len(line) < 1100
        return line.removeprefix("resnet-bk: error: ").rstrip("\n")

    return run


@pytest.fixture
def parsed(monkeypatch):
    """Parse a command line without running the command. Returns the command and its configuration."""
    calls = []
    monkeypatch.setattr(cli, "_run", lambda command, config: calls.append((command, config)) or 0)

    def run(*arguments):
        assert main(arguments) == 0
        return calls[-1]

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a tiny model."""
    folder = tmp_path_factory.mktemp("model")
    model = ResNetBKForCausalLM(ResNetBKConfig(d_model=8, n_layers=1, num_experts=1))
    byte_tokenizer().save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def model(trained, tmp_path):
    """Return a copy of that folder, for tests that damage it."""
    return shutil.copytree(trained, tmp_path / "model")


# ---------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command; commands: train, adapt, eval, generate, serve, inspect, report, tune, ablate, seal"),
        (["trian"], "unknown command 'trian'; did you mean train?"),
        (
            ["zzz"],
            "unknown command 'zzz'; commands: train, adapt, eval, generate, serve, inspect, report, tune, ablate, seal",
        ),
        (
            [""],
            "unknown command ''; commands: train, adapt, eval, generate, serve, inspect, report, tune, ablate, seal",
        ),
        (["--versoin"], "command line: unknown option '--versoin'; did you mean --version?"),
        (["eval"], "eval.checkpoint: missing; usage: resnet-bk eval CHECKPOINT"),
        (["tune"], "tune.base: missing; usage: resnet-bk tune BASE"),
        (["generate", "x"], "generate.prompt: missing; usage: resnet-bk generate CHECKPOINT PROMPT"),
        (["eval", "--checkpoint", "x"], "eval: checkpoint is given without its name: resnet-bk eval CHECKPOINT"),
        (["train", "x"], "train: unexpected argument 'x'; settings are given as --name value"),
        (["generate", "x", "y", "z"], "generate: unexpected argument 'z'; settings are given as --name value"),
        (["report", "--runs", "a"], "report: runs is given without its name: resnet-bk report RUN..."),
        (
            ["report", "a", "--output", "o", "b"],
            "report: unexpected argument 'b'; give all of RUN... in one place: resnet-bk report RUN... --name value",
        ),
        (["train", "--max_steps"], "train.max_steps: got nothing, allowed an integer or null"),
        (["train", "--model.d_model"], "model.d_model: got nothing, allowed an integer"),
        (
            ["train", "--model.d_model.x", "3"],
            "train: unknown option '--model.d_model.x'; model.d_model has no fields",
        ),
        (["seal"], "seal.folder: missing; usage: resnet-bk seal FOLDER"),
        (
            ["train"],
            "train: neither max_steps nor max_seconds is set; give one, so that training ends",
        ),
    ],
)
def test_a_wrong_command_line(refused, arguments, message):
    assert refused(*arguments) == message


@pytest.mark.parametrize(
    ("command", "wrong", "right"),
    [
        ("train", "--max_stps", "--max_steps"),
        ("train", "--model.d_modle", "--model.d_model"),
        ("train", "--model.nlayers", "--model.n_layers"),
        ("train", "--data.sorce", "--data.source"),
        ("train", "--confg", "--config"),
        ("eval", "--sourc", "--source"),
        ("generate", "--temprature", "--temperature"),
        ("tune", "--objectvie", "--objective"),
    ],
)
@pytest.mark.parametrize("form", ["{} 3", "{}=3", "{}"])
def test_an_unknown_option_names_the_nearest(refused, command, wrong, right, form):
    positional = {"train": [], "generate": ["x", "y"]}.get(command, ["x"])
    message = refused(command, *positional, *form.format(wrong).split())
    assert message == f"{command}: unknown option {wrong!r}; did you mean {right}?"


def test_an_unknown_option_like_no_other_points_to_the_help(refused):
    assert refused("train", "--zzz", "1") == "train: unknown option '--zzz'; see resnet-bk train --help"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max_steps", "x", "train.max_steps: got 'x', allowed an integer or null"),
        ("--max_steps", "1.5", "train.max_steps: got '1.5', allowed an integer or null"),
        ("--max_steps", "true", "train.max_steps: got 'true', allowed an integer or null"),
        ("--max_steps", "0", "train.max_steps: got 0, allowed an integer from 1 to 1000000000"),
        ("--max_steps", "-5", "train.max_steps: got -5, allowed an integer from 1 to 1000000000"),
        ("--max_seconds", "1e999", "train.max_seconds: got inf, allowed 1 to 100000000"),
        ("--learning_rate", "high", "train.learning_rate: got 'high', allowed a number"),
        ("--learning_rate", "nan", "train.learning_rate: got 'nan', allowed a number"),
        ("--learning_rate", "11", "train.learning_rate: got 11.0, allowed 1e-08 to 10"),
        ("--beta2", "1", "train.beta2: got 1.0, allowed 0 to 0.999999"),
        ("--resume", "maybe", "train.resume: got 'maybe', allowed true or false"),
        ("--dtype", "float16", "train.dtype: got 'float16', allowed 'float32' or 'bfloat16'"),
        ("--optimizer", "sgd", "train.optimizer: got 'sgd', allowed 'adamw' or 'muon'"),
        ("--model.readout", "foo", "model.readout: got 'foo', allowed 'propagator' or 'diagonal'"),
        ("--model.energy", "foo", "model.energy: got 'foo', allowed 'bonds' or 'real' or 'complex' or null"),
        ("--model.d_model", "abc", "model.d_model: got 'abc', allowed an integer"),
        ("--model.d_model", "1\n2\n3", "model.d_model: got '1 2 3', allowed an integer"),
        ("--model.d_model", "65537", "model.d_model: got 65537, allowed an integer from 1 to 65536"),
        ("--model.n_heads", "3", "model.n_heads: got 3, allowed a divisor of d_model = 64"),
        ("--model.causal", "2", "model.causal: got '2', allowed true or false"),
        ("--data.val_fraction", "0", "data.val_fraction: got 0.0, allowed 1e-06 to 0.5"),
        ("--data.source", "", "data.source: is empty; give at least one character"),
        ("--data.source", "a\0b", "data.source: got 'a\\x00b', allowed UTF-8 text without NUL characters"),
        ("--output_dir", "", "train.output_dir: is empty; give at least one character"),
        ("--sample", "", "train.sample: is empty; give at least one character"),
    ],
)
def test_a_bad_value_names_field_value_and_what_is_allowed(refused, option, value, message):
    assert refused("train", "--max_steps", "1", option, value) == message


@pytest.mark.parametrize("value", ["1e-7", "1e-300", "-0.1", "101", ".nan"])
def test_a_temperature_that_sampling_cannot_use(refused, value):
    message = refused("generate", "x", "y", "--temperature", value)
    assert message.startswith(f"generate.temperature: got {float(value.removeprefix('.'))}, allowed 0")


@pytest.mark.parametrize("digits", [20, 400, 5000])
def test_huge_integers_are_refused(refused, digits):
    message = refused("train", "--max_steps", "1", "--model.n_seq", "9" * digits)
    assert message.startswith("model.n_seq: ")
    assert "allowed an integer" in message
    assert len(message) < 300


@pytest.mark.parametrize("value", ["{", "null", "3", "[1]", "{d_model: 8}", "nowhere.yaml", "os.system"])
@pytest.mark.parametrize("section", ["model", "data", "model.multiscale"])
def test_a_section_is_not_given_whole(refused, section, value):
    message = f"{section}: give its fields one by one, as --{section}.FIELD VALUE, or in a --config file"
    assert refused("train", "--max_steps", "1", f"--{section}", value) == message
    assert refused("train", "--max_steps", "1", f"--{section}={value}") == message


@pytest.mark.parametrize("option", ["--max_s", "--max_step", "--conf", "--model.d_m"])
def test_the_beginning_of_an_option_is_refused(refused, option):
    assert f"train: unknown option '{option}'; did you mean --" in refused("train", option, "3")


# -------------------------------------------------------------------------------- configuration files


def test_a_configuration_file_and_the_command_line_after_it(parsed, tmp_path):
    (tmp_path / "run.yaml").write_text("max_steps: 5\nseed: 1\nmodel:\n  d_model: 96\ndata:\n  source: x\n")
    command, config = parsed("train", "--config", "run.yaml", "--seed", "2", "--model.n_layers=3")
    assert command == "train"
    assert isinstance(config, TrainConfig)
    assert (config.max_steps, config.seed, config.data.source) == (5, 2, "x")
    assert (config.model.d_model, config.model.n_layers, config.model.heads) == (96, 3, 3)


def test_a_configuration_file_may_hold_what_is_given_by_position(parsed, tmp_path):
    (tmp_path / "eval.yaml").write_text("checkpoint: runs/train\n")
    assert parsed("eval", "--config", "eval.yaml")[1].checkpoint == "runs/train"


@pytest.mark.parametrize("prompt", ["null", "5", "a: b", "[1", "{a: 1}", "- a", "@x", "true", "é😀"])
def test_a_prompt_is_taken_as_it_is(parsed, prompt):
    assert parsed("generate", "x", prompt)[1].prompt == prompt


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_stps: 3", "c.yaml: unknown field 'max_stps'; did you mean 'max_steps'?"),
        ("model:\n  d_modle: 3", "c.yaml.model: unknown field 'd_modle'; did you mean 'd_model'?"),
        ("data: {sorce: x}", "c.yaml.data: unknown field 'sorce'; did you mean 'source'?"),
        ("model: 3", "c.yaml.model: got 3, allowed a mapping of fields to values"),
        ("model:\nmax_steps: 1", "c.yaml.model: got None, allowed a mapping of fields to values"),
        ("model: [1]", "c.yaml.model: got [1], allowed a mapping of fields to values"),
        ("- 1\n- 2", "c.yaml: got [1, 2], allowed a mapping of fields to values"),
        ("hello", "c.yaml: got 'hello', allowed a mapping of fields to values"),
        ("", "--config: c.yaml is empty; write settings as 'name: value', or leave --config out"),
        ("# a comment", "--config: c.yaml is empty; write settings as 'name: value', or leave --config out"),
        ("a: &a [x]\nb: *a", "--config: c.yaml has a YAML alias (*name), not allowed; write the value out"),
        ("[" * 5000, "--config: c.yaml nests deeper than the 10 levels allowed"),
        ("max_steps: x", "train.max_steps: got 'x', allowed an integer or null"),
        ("max_steps: 0", "train.max_steps: got 0, allowed an integer from 1 to 1000000000"),
        ("max_steps: 1\nmodel: {d_model: x}", "model.d_model: got 'x', allowed an integer"),
        ("max_steps: 1\noutput_dir: 5", "train.output_dir: got '5', allowed text"),
        ("seed: 1", "train: neither max_steps nor max_seconds is set; give one, so that training ends"),
        ("seed: 1\nseed: 2", "--config: c.yaml has 'seed' a second time, at line 2; keep one of them"),
        ("data:\n  - {a: 1, b: [{c: 1, c: 1}]}", "--config: c.yaml has 'c' a second time, at line 2; keep one of them"),
    ],
    ids=range(19),
)
@pytest.mark.parametrize("form", [["--config", "c.yaml"], ["--config=c.yaml"]], ids=["two", "one"])
def test_a_bad_configuration_file(refused, tmp_path, text, message, form):
    (tmp_path / "c.yaml").write_text(text)
    assert refused("train", *form) == message


@pytest.mark.parametrize(("text", "got"), [("[1]", "1"), ("[a, [b]]", "['b']"), ("[null]", "None")])
def test_a_list_of_other_items(refused, tmp_path, text, got):
    (tmp_path / "c.yaml").write_text(f"runs: {text}\n")
    assert refused("report", "--config", "c.yaml") == f"report.runs: got {shown(got)}, allowed a list, each text"


@pytest.mark.parametrize("text", ["model: [1,", "a: b: c", "\tx", "'", "%", "a: 'b\nc"])
def test_broken_yaml_names_file_line_and_column(refused, tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    assert refused("train", "--config", "c.yaml").startswith("--config: c.yaml is not plain YAML at line ")


@pytest.mark.parametrize("name", ["missing.yaml", ".", "", "a\0b", "missing/too.yaml"])
def test_a_configuration_file_that_is_not_a_file(refused, name):
    assert refused("train", "--config", name) == (
        f"--config: {name!r} is not a file; give a YAML file, or one of plain, quality, balanced, fast"
    )


def test_a_configuration_that_is_a_pipe(refused, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert refused("train", "--config", "pipe").startswith("--config: 'pipe' is not a file; give a YAML file")


@pytest.mark.parametrize(
    "text", ["a: 1\n" * 13_000, "[" + "1," * 32_000 + "]", "a: " + "1:" * 32_000 + "1"], ids=range(3)
)
def test_the_largest_configuration_file_does_not_take_long(refused, tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    started = time.monotonic()
    refused("train", "--config", "c.yaml")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--max_steps", "1", "--model.d_model"),
        ("train", "--max_steps", "1", "--model.multiscale.factors"),
        ("tune", "x", "--space"),
        ("ablate", "x", "--seeds"),
        ("ablate", "x", "--techniques"),
        ("generate", "x", "y", "--seed"),
    ],
    ids=" ".join,
)
def test_aliases_in_an_argument_do_not_fill_the_memory(refused, arguments):
    for value in (f"[{BOMB}]", f"{{learning_rate: [{BOMB}]}}", "&a [*a]"):
        assert f": got {shown(value)[:60]}" in refused(*arguments, value)


def test_text_in_an_argument_may_look_like_aliases(parsed):
    assert parsed("generate", "x", f"[{BOMB}]")[1].prompt == f"[{BOMB}]"
    assert parsed("train", "--max_steps", "1", "--sample", "&a [*a]")[1].sample == "&a [*a]"


def test_a_configuration_file_that_is_not_utf8(refused, tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"seed: 1\n\xff")
    assert refused("train", "--config", "c.yaml") == "--config: c.yaml is not UTF-8 at byte 8; save it as UTF-8"


def test_a_configuration_file_that_is_too_large(refused, tmp_path):
    with (tmp_path / "c.yaml").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    assert refused("train", "--config", "c.yaml") == f"--config: c.yaml has {1 << 40} bytes, allowed at most 65536"


@pytest.mark.parametrize(
    "text",
    [
        "output_dir: !!python/object/apply:os.system ['touch canary']",
        "output_dir: !!python/object/new:os.system ['touch canary']",
        "output_dir: !!python/object/apply:subprocess.check_output [['touch', 'canary']]",
        "output_dir: !!python/name:os.system",
        "output_dir: !!python/module:os",
        "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['canary']]",
        "model: !!python/object:resnet_bk.config.ModelConfig {d_model: 8}",
        "model: {class_path: os.system, init_args: {command: touch canary}}",
        "model: {_target_: os.system, command: touch canary}",
        "data: {__class__: os.system}",
        "config: other.yaml",
    ],
    ids=range(11),
)
def test_a_configuration_file_never_runs_code(refused, tmp_path, text):
    (tmp_path / "c.yaml").write_text(text + "\n")
    assert "c.yaml" in refused("train", "--max_steps", "1", "--config", "c.yaml")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "value", ["evil.Model", "evil", "evil.yaml", "!!python/object/apply:os.system ['touch canary']"]
)
def test_no_value_imports_or_runs_anything(monkeypatch, tmp_path, value):
    monkeypatch.setattr(cli, "_run", lambda command, config: 0)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('canary').touch()\n")
    for setting in cli._settings("train"):
        main(["train", "--max_steps", "1", f"--{setting}={value}"])
        section, _, field = setting.rpartition(".")
        settings = {section: {field: value}} if section else {field: value}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
        main(["train", "--max_steps", "1", "--config", "c.yaml"])
    for setting in cli._settings("tune"):
        main(["tune", "x", f"--{setting}={value}"])
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({setting: value}))
        main(["tune", "x", "--config", "c.yaml"])
    assert "evil" not in sys.modules
    assert not (tmp_path / "canary").exists()


# --------------------------------------------------------------------------------------------- data


def train(*arguments):
    return ["train", "--max_steps", "1", "--output_dir", "run", *arguments]


def test_a_source_that_does_not_exist(refused, tmp_path):
    assert "data.source: 'nowhere.txt' is not a file, a folder" in refused(*train("--data.source", "nowhere.txt"))
    assert not (tmp_path / "run").exists()


def test_several_sources_on_the_command_line_and_in_a_file(parsed, tmp_path):
    given = parsed("train", "--max_steps", "1", "--data.sources", "{stdlib: 0.7, docs/a.md: 3}")[1].data
    assert given.sources == {"stdlib": 0.7, "docs/a.md": 3}
    (tmp_path / "c.yaml").write_text("max_steps: 1\ndata:\n  sources:\n    stdlib: 0.7\n    owner/name:config: 1\n")
    given = parsed("train", "--config", "c.yaml")[1].data
    assert given.sources == {"stdlib": 0.7, "owner/name:config": 1}
    assert parsed("train", "--config", "c.yaml", "--data.sources", "null")[1].data.shares == {"stdlib": 1.0}


def test_what_lists_of_texts_and_mappings_of_settings_allow(refused):
    assert refused(*train("--data.include", "3")).endswith("allowed a list of texts")
    found = refused("adapt", "runs/base", "--techniques", "3", "--max_steps", "1")
    assert (
        found == "adapt.techniques: got '3', allowed a mapping of settings to values, such as {depth: {policy: exit}}"
    )


def test_bad_sources_on_the_command_line(refused, tmp_path):
    allowed = "allowed a mapping of sources to weights, such as {stdlib: 0.7, docs: 0.3} or null"
    for value in ("x", "[a, b]", "{a: b}", "{a: [1]}"):
        message = refused(*train("--data.sources", value))
        assert message.startswith("data.sources: got ")
        assert message.endswith(allowed)
    assert refused(*train("--data.sources", "{a: 0}")) == "data.sources['a']: got 0.0, allowed 1e-06 to 1000000.0"
    assert refused(*train("--data.sources", "{stdlib: 1, nowhere: 1}")).startswith(
        "data.sources: 'nowhere' is not a file, a folder or 'stdlib', nor a hub dataset"
    )
    assert not (tmp_path / "run").exists()


def test_an_empty_source(refused, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    assert "'empty.txt' is empty (0 bytes in 1 files)" in refused(*train("--data.source", "empty.txt"))
    assert "'folder' is empty (0 bytes in 0 files)" in refused(*train("--data.source", "folder"))
    assert not (tmp_path / "run").exists()


def test_a_corpus_too_small_for_a_batch(refused, tmp_path):
    (tmp_path / "small.txt").write_text("x" * 1000)
    message = refused(*train("--data.source", "small.txt"))
    assert message.startswith("data.source: 951 tokens make 7 windows of 128, fewer than one batch of 12; give more")
    assert not (tmp_path / "run").exists()


def test_a_hub_dataset_without_the_package(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'resnet-bk[data]'" in refused(*train("--data.source", "owner/name"))


def test_a_text_tokenizer_on_bytes_names_the_offset(refused, tmp_path):
    backend = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "words")
    (tmp_path / "binary").write_bytes(b"a " * 500 + b"\xff" + b"a " * 500)
    message = refused(*train("--data.source", "binary", "--data.tokenizer", "words"))
    assert "is not UTF-8 at byte 1000;" in message
    assert "use data.tokenizer: byte" in message


def test_a_tokenizer_folder_without_a_tokenizer(refused, tmp_path):
    (tmp_path / "nothing").mkdir()
    message = refused(*train("--data.tokenizer", "nothing"))
    assert message.startswith("data.tokenizer: 'nothing': folder has no usable tokenizer")


@pytest.mark.parametrize(
    ("name", "message"), [("run", "is not a folder"), ("run/thesis.txt", "is not a run of this program")]
)
def test_an_output_folder_that_holds_something_else_is_left_alone(refused, tmp_path, name, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    assert refused(*train()) == f"train.output_dir: run exists and {message}; choose another"
    assert path.read_text() == "mine"


def test_a_run_that_exists_is_not_overwritten(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine")
    assert "run holds a run already; pass --resume true to continue it" in refused(*train())
    assert (tmp_path / "run" / "config.yaml").read_text() == "mine"


@pytest.mark.parametrize("text", ["[1", "- 1", "!!python/name:os.system", "\0", "a: &a [1]\nb: *a"])
def test_an_unfinished_run_with_a_damaged_configuration(refused, tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text)
    assert refused(*train("--resume", "true")).startswith("train.output_dir: run/config.yaml ")


# --------------------------------------------------------------------------------------- checkpoints

READERS = [["eval", "model", "--source", "stdlib"], ["generate", "model", "x"]]


@pytest.fixture(params=READERS, ids=["eval", "generate"])
def reader(request):
    return request.param


def test_an_intact_model_is_read(model, capsys):
    assert main(["generate", "model", "def ", "--max_new_tokens", "2"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("def ")
    assert re.fullmatch(r"([\d,]+ tokens in [\d.]+ s, [\d,]+ a second, \d+% of the blocks\n)?", said.err)


def test_settings_of_depth_need_a_model_that_has_it(refused, model):
    for arguments in (("eval", "model", "--source", "stdlib"), ("generate", "model", "x")):
        message = refused(*arguments, "--depth_threshold", "0.5")
        assert message.startswith("depth_threshold: got 0.5, but ")
        assert message.endswith("model has no adaptive depth; leave it out")
    greedy = ("generate", "model", "x", "--temperature", "0", "--speculate", "4")
    assert refused(*greedy).startswith("generate.speculate: model: has no early exit to draft with")


def test_drafts_do_not_change_the_text(tmp_path, capsys):
    depth = {"policy": "exit", "threshold": 0.1}
    ResNetBKForCausalLM(ResNetBKConfig(d_model=8, n_layers=3, num_experts=1, depth=depth)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    seal(tmp_path)
    greedy = ["generate", str(tmp_path), "def ", "--max_new_tokens", "20", "--temperature", "0"]
    said = []
    for others in (["--depth_threshold", "1"], ["--speculate", "3"]):
        assert main([*greedy, *others]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert said[0].startswith("def ")


def test_a_checkpoint_that_does_not_exist(refused, reader):
    assert refused(*reader) == "model: no such checkpoint folder"


def test_a_checkpoint_that_is_a_file(refused, reader, tmp_path):
    (tmp_path / "model").write_text("text")
    assert refused(*reader) == "model: no such checkpoint folder"


def test_a_checkpoint_folder_that_is_empty(refused, reader, tmp_path):
    (tmp_path / "model").mkdir()
    assert refused(*reader).startswith("model/manifest.json: missing; the folder is not a finished checkpoint")


def test_attention_is_set_like_any_section(parsed, refused):
    _, config = parsed("train", "--model.attention.every", "4", "--model.attention.window", "96", "--max_steps", "1")
    assert config.model.attention == AttentionConfig(every=4, window=96)
    assert not parsed("train", "--max_steps", "1")[1].model.attention.every
    window = ("--model.attention.window", "0")
    assert "model.attention.window: got 0, allowed an integer from 1" in refused("train", "--max_steps", "1", *window)


def test_a_run_without_a_checkpoint(refused, reader, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.yaml").write_text("{}")
    assert refused(*reader) == "model: the run has neither a finished model nor an intact checkpoint"


def test_a_run_whose_checkpoints_are_damaged_says_how(refused, reader, tmp_path):
    (tmp_path / "model" / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "model" / "config.yaml").write_text("{}")
    assert "skipping checkpoint-5: model/checkpoints/checkpoint-5/manifest.json: missing" in refused(*reader)


def test_a_damaged_checkpoint_is_passed_over_with_a_message(trained, tmp_path, capsys):
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (10, 20):
        shutil.copytree(trained, checkpoints / f"checkpoint-{step}")
    (tmp_path / "run" / "config.yaml").write_text("{}")
    (checkpoints / "checkpoint-20" / "model.safetensors").write_bytes(b"")
    assert main(["generate", "run", "x", "--max_new_tokens", "1"]) == 0
    first, *others = capsys.readouterr().err.splitlines()
    assert first.startswith(
        "resnet-bk: skipping checkpoint-20: run/checkpoints/checkpoint-20/model.safetensors: expected "
    )
    assert others == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", MANIFEST])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_model(refused, reader, model, name, damage):
    path = model / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(data[:-1])
    message = refused(*reader)
    assert message.startswith("model/")
    if damage == "truncated":
        assert f"got {len(data) - 1}" in message
    assert "missing" in message if damage == "missing" else "expected" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b""),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "llama"}'),
        ("config.json", b'{"model_type": "resnet_bk", "d_model": -1}'),
        ("config.json", b'{"model_type": "resnet_bk", "d_modle": 8}'),
        ("config.json", b'{"model_type": "resnet_bk", "d_model": 16}'),
        ("config.json", b'{"model_type": "resnet_bk", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}'),
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 100),
        ("model.safetensors", b"\x80\x04cos\nsystem\n(S'touch canary'\ntR."),
        ("tokenizer.json", b"{}"),
    ],
    ids=range(11),
)
def test_a_sealed_model_of_other_content_is_refused_without_running_it(refused, model, tmp_path, name, content):
    (model / name).write_bytes(content)
    (model / "evil.py").write_text("import pathlib; pathlib.Path('canary').touch()")
    seal(model)
    refused("generate", "model", "x")
    assert not (tmp_path / "canary").exists()


def test_pickled_weights_are_never_read(refused, model, tmp_path):
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.")
    refused("seal", "model")
    refused("generate", "model", "x")
    assert not (tmp_path / "canary").exists()


def test_a_text_goes_unchanged_into_a_pipe(model, capsys):
    prompt = "a[/b]c :smile:\r\n\tred \x1b[31m\x07 \u202egpj.exe\n"
    assert main(["generate", "model", prompt, "--max_new_tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith(prompt)


def test_a_prompt_on_standard_input_is_utf8_whatever_the_locale(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é\r\n".encode()), "ascii"))
    assert main(["generate", "model", "-", "--max_new_tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith("é\r\n")


class Endless(io.BytesIO):
    """Standard input of `yes | resnet-bk`."""

    def read(self, size=-1):
        assert size >= 0, "reads all of an endless text"
        return b"y" * size


def test_an_endless_prompt_is_refused(refused, model, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Endless()))
    assert refused("generate", "model", "-").startswith("generate.prompt: got more than 16777216 bytes")


@pytest.mark.parametrize("command", [["generate", "no\x1b[2J\u202e", "x"], ["inspect", "model", "no\x1b[2J\u202e"]])
def test_names_in_error_messages_do_not_reach_the_terminal_as_control_characters(refused, model, command):
    message = refused(*command)
    assert visible(message) == message
    assert "no␛[2J\\u202e" in message


def test_a_text_that_exceeds_a_bound_is_one_line(tmp_path, capsys):
    chunks = {"factors": [4], "boundaries": "whitespace", "bound": 0.1}
    ResNetBKForCausalLM(ResNetBKConfig(d_model=8, n_layers=3, num_experts=1, multiscale=chunks)).save_pretrained(
        "bound"
    )
    byte_tokenizer().save_pretrained("bound")
    seal(tmp_path / "bound")
    capsys.readouterr()
    assert main(["generate", "bound", "a b c d " * 40]) == 1
    said = capsys.readouterr().err
    assert said.startswith("resnet-bk: error: generate: model.TECHNIQUE.bound: more positions selected than capacity")
    assert said.count("\n") == 1


def test_an_empty_prompt(refused, model):
    assert refused("generate", "model", "") == "generate.prompt: is empty; give at least one character"


@pytest.mark.parametrize(
    ("text", "errors", "message"),
    [
        (b"", "strict", "generate.prompt: is empty; give at least one character"),
        (b"ab\xff", "strict", "generate.prompt: standard input is not UTF-8 at byte 2; save it as UTF-8"),
        (b"ab\xff", "surrogateescape", "generate.prompt: standard input is not UTF-8 at byte 2; save it as UTF-8"),
        (b"ab\0", "strict", "generate.prompt: got 'ab\\x00', allowed UTF-8 text without NUL characters"),
    ],
)
def test_a_standard_input_that_cannot_be_a_prompt(refused, model, monkeypatch, text, errors, message):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), "utf-8", errors))
    assert refused("generate", "model", "-") == message


def test_a_model_without_a_run_has_no_held_out_text(refused, model):
    assert refused("eval", "model").startswith("eval.source: model is not a run folder, so it has no held-out text")


@pytest.mark.parametrize(
    "text", ["", "[1", "- 1", "{}", "data: 5", "data: {sorce: x}", "data: {val_fraction: 7}", "a: &a [1]\ndata: *a"]
)
def test_a_run_with_a_damaged_configuration(refused, model, tmp_path, text):
    (tmp_path / "run").mkdir()
    shutil.move(model, tmp_path / "run" / "model")
    (tmp_path / "run" / "config.yaml").write_text(text)
    said = refused("eval", "run")
    assert said.startswith(("run/config.yaml: ", "eval.checkpoint: run/config.yaml ", "data.val_fraction: "))


# ----------------------------------------------------------------------------------- errors while running


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("a: got 1,\n allowed 2"), 2, "a: got 1, allowed 2"),
        (FileNotFoundError(2, "No such file", "x"), 1, "x: No such file"),
        (OSError(28, "No space left on device"), 1, "[Errno 28] No space left on device"),
        (MemoryError(), 1, "train: out of memory; lower batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: x"), 1, "train: out of memory; lower batch_size"),
    ],
    ids=range(5),
)
def test_errors_of_the_machine_are_one_line(monkeypatch, capsys, error, code, message):
    def fail(config, console):
        raise error

    monkeypatch.setattr("resnet_bk.study.run.train", fail)
    assert main(train()) == code
    said = capsys.readouterr().err
    assert said.startswith(f"resnet-bk: error: {message}")
    assert said.count("\n") == 1


def test_a_bug_is_not_hidden(monkeypatch):
    def fail(config, console):
        raise RuntimeError("a bug")

    monkeypatch.setattr("resnet_bk.study.run.train", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(train())


# ------------------------------------------------------------------------------------------- help, fuzz


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["eval", "-h"], ["generate", "--help"], ["tune", "-h"]]
)
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: resnet-bk")
    if arguments[0] == "train":
        assert "Width of the residual stream." in said
    if arguments[0] == "tune":
        for name in cli._settings("tune"):
            assert re.search(rf"^  (--)?{name}\b", said, re.MULTILINE), name


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert __version__ in capsys.readouterr().out


def test_the_printed_configuration_can_be_read_again(capsys, tmp_path, parsed):
    with pytest.raises(SystemExit) as left:
        main(["train", "--max_steps", "7", "--print_config"])
    assert left.value.code == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert parsed("train", "--config", "c.yaml")[1] == TrainConfig(max_steps=7)


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\nfrom resnet_bk.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'numba', 'matplotlib', 'optuna'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


FIELDS = [
    *("--max_steps", "--seed", "--dtype", "--learning_rate", "--resume", "--sample", "--output_dir", "--config"),
    *("--model", "--model.d_model", "--model.readout", "--model.n_heads", "--model.multiscale.factors"),
    *("--data", "--data.val_fraction", "--data.source", "--source", "--window", "--max_bytes", "--top_p"),
    *("--temperature", "--text", "--output", "--runs", "--base", "--space", "--trials", "--techniques", "--seeds"),
    *("--folder", "--help"),
]
VALUES = [
    *("", "0", "1", "-1", "-0.0", "1e999", "1e-300", "nan", "-.inf", "0.1", "0x1", "1_0", "1:30", "²", "٣"),
    *("null", "true", "x", "[", "{}", "{a: 1}", "{a: 1, a: 2}", "[1, 2]", "[0, 0]", "[[1], {b: c}]", "a: b: c"),
    *("{learning_rate: [1, 2]}", "{model.d_model: [1, 10]}"),
    *("!!python/name:os", "!!int ''", "9" * 4999, "[" * 300, f"[{BOMB}]", "*a", "&a b", "&a [*a]", "<<: {a: 1}"),
    *("\n", "\t", "\0", "\x1b[31m", "\u202e", "é", "\udcff", "\ud800", "'", '"', "%", "--", "-", "---", "-x"),
    *("? a", "@x"),
    *("float32", "c.yaml", ".", "/dev/null", "a" * 5000, "depth", "x y"),
]
COMMANDS = [
    *(["train", "--max_steps", "1"], ["train"], ["eval", "x"], ["generate", "x", "y"], ["inspect", "x", "y"]),
    *(["report", "x"], ["tune", "x"], ["ablate", "x"], ["seal", "x"], [""], ["trian"], ["--"], []),
]


def random_arguments(draw):
    line = list(draw.choices(COMMANDS, [8, 2, 4, 4, 4, 4, 4, 4, 2, 1, 1, 1, 1])[0])
    for _ in range(draw.randrange(4)):
        option = draw.choice(FIELDS)
        if draw.random() < 0.2:
            i = draw.randrange(len(option))
            option = option[:i] + draw.choice(string.printable) + option[i + draw.randrange(2) :]
        value = draw.choice(VALUES)
        line += draw.choice([[option, value], [f"{option}={value}"], [option], [value]])
    return line


def random_yaml(draw, depth=0):
    kind = draw.randrange(4 if depth < 3 else 2)
    if kind == 0:
        return draw.choice(["", "x", 0, -1, 1.5, None, True, "float32", 10**30, "é"])
    if kind == 1:
        return draw.choice(VALUES)
    if kind == 2:
        return [random_yaml(draw, depth + 1) for _ in range(draw.randrange(3))]
    names = ["max_steps", "model", "data", "seed", "d_model", "source", "checkpoint", "prompt", "config", "x", 5, None]
    return {draw.choice(names): random_yaml(draw, depth + 1) for _ in range(draw.randrange(5))}


def random_file(draw):
    """Return the bytes of a configuration file: sound, of odd values, or damaged."""
    values = random_yaml(draw)
    if draw.random() < 0.6:
        name = draw.choice(["sample", "output_dir", "seed", "data", "learning_rate", "resume"])
        values = {"max_steps": 1, name: random_yaml(draw, depth=draw.choice([0, 3]))}
    text = yaml.safe_dump(values, allow_unicode=True) if draw.random() < 0.7 else json.dumps(values)
    if draw.random() < 0.2:
        i = draw.randrange(len(text))
        text = text[:i] + draw.choice([*VALUES, "\t", "\r\n", "max_steps: 1\n", "\n---\n"]) + text[i:]
    data = bytearray(text.encode(errors="surrogatepass"))
    if draw.random() < 0.2:
        data[draw.randrange(len(data))] = draw.randrange(256)
    return data


def answer(arguments, capsys):
    """Return the exit code of a command line. It must not raise, and must print one line if the code is not 0."""
    capsys.readouterr()
    try:
        code = main(arguments)
    except SystemExit as left:  # of --help and --print_config
        return left.code
    said = capsys.readouterr().err
    assert code in (0, 2), (arguments, said)
    assert said.count("\n") == (code == 2), (arguments, said)
    assert len(said) < 1100
    assert visible(said) == said
    return code


MANY = pytest.param(5000, marks=pytest.mark.soak)


@pytest.mark.parametrize("count", [300, MANY])
def test_random_command_lines(monkeypatch, capsys, tmp_path, count):
    monkeypatch.setattr(cli, "_run", lambda command, config: 0)
    (tmp_path / "c.yaml").write_text("max_steps: 3\n")
    draw = random.Random(count)
    codes = [answer(random_arguments(draw), capsys) for _ in range(count)]
    assert 0.05 < codes.count(0) / count < 0.5


@pytest.mark.parametrize("count", [150, MANY])
def test_random_configuration_files(monkeypatch, capsys, tmp_path, count):
    monkeypatch.setattr(cli, "_run", lambda command, config: 0)
    draw = random.Random(count)
    codes = []
    for _ in range(count):
        (tmp_path / "c.yaml").write_bytes(random_file(draw))
        codes.append(answer(["train", "--config", "c.yaml"], capsys))
    assert 0.05 < codes.count(0) / count < 0.5


def test_a_number_that_no_float_holds_is_one_line(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(f"final_learning_rate: 1{'0' * 400}\nmax_steps: 1\n")
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
