"""Importing the package is cheap, and a model needs torch, numpy, safetensors and PyYAML only."""

import re
import subprocess
import sys

import pytest

import resnet_bk

OPTIONAL = [
    *("accelerate", "datasets", "docstring_parser", "huggingface_hub", "jsonargparse", "matplotlib", "numba", "optuna"),
    *("rich", "tokenizers", "transformers", "triton", "wrapt"),
]


def run(code, missing=()):
    """Run Python code in a new process in which some packages cannot be imported."""
    code = f"import sys\nsys.modules.update(dict.fromkeys({list(missing)}))\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def python(code, missing=()):
    """Run Python code in a new process. Returns its output."""
    done = run(code, missing)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy():
    code = "import resnet_bk; print({'torch', 'transformers', 'numpy', 'numba'} & set(sys.modules))"
    assert python(code) == "set()\n"


def test_a_model_trains_decodes_and_is_measured_without_optional_packages():
    code = """
import torch
from resnet_bk import LanguageModel
from resnet_bk.inference.decoding import generate
from resnet_bk.study.ledger import Ledger

model = LanguageModel(259, d_model=16, n_layers=2)
ids = torch.tensor([[1, 2, 3]])
model(ids, targets=ids).loss.backward()
with torch.no_grad(), Ledger(model.eval()) as ledger:
    logits = model(ids).logits
print(tuple(logits.shape), ledger.total > 0, tuple(generate(model, ids, 2).shape))
"""
    assert python(code, OPTIONAL) == "(1, 3, 259) True (1, 2)\n"


def test_an_import_without_its_extra_names_it():
    imports = {
        "from resnet_bk.hf import ResNetBKForCausalLM": "hf",
        "from resnet_bk.study import tune": "study",
        "from resnet_bk.report import figures": "train",
        "from resnet_bk.report.terminal import colored": "train",
    }
    code = f"""
from resnet_bk.extras import MissingExtraError
for code in {list(imports)}:
    try:
        exec(code)
    except MissingExtraError as error:
        print(error)
"""
    found = [
        re.search(r" is not installed; run: pip install 'resnet-bk\[(\w+)\]'$", line)
        for line in python(code, OPTIONAL).splitlines()
    ]
    assert [match[1] for match in found] == list(imports.values())


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        (OPTIONAL, ["train"], "train"),
        (["rich"], ["generate", "x", "y"], "train"),
        (["optuna"], ["tune", "base"], "study"),
        (["fastapi", "uvicorn", "prometheus_client", "pydantic"], ["serve", "x"], "serve"),
        (["accelerate", "peft"], ["train", "--config", "base"], "train"),
        (["matplotlib"], ["train", "--config", "base"], "train"),
    ],
    ids=["all", "rich", "optuna", "serve", "accelerate", "matplotlib"],
)
def test_a_command_without_its_extra_is_one_line(tmp_path, missing, arguments, extra):
    (tmp_path / "base").write_text("max_steps: 1\n")
    code = f"import os, runpy\nos.chdir({str(tmp_path)!r})\nsys.argv[1:] = {arguments}\n"
    done = run(f"{code}runpy.run_module('resnet_bk', run_name='__main__')", missing)
    assert done.returncode == 2
    assert re.fullmatch(
        rf"resnet-bk: error: \w+ is not installed; run: pip install 'resnet-bk\[{extra}\]'\n", done.stderr
    )


@pytest.mark.parametrize(
    ("missing", "first", "package"),
    [([], "from transformers import AutoConfig", "resnet_bk"), (["wrapt"], "", "resnet_bk.hf")],
    ids=["wrapt", "no wrapt"],
)
def test_the_auto_classes_know_the_model(missing, first, package):
    code = f"""
{first}
import {package}
from transformers import AutoConfig, AutoModelForCausalLM

config = AutoConfig.for_model("resnet_bk", d_model=8, n_layers=1)
print(type(AutoModelForCausalLM.from_config(config)).__name__)
"""
    assert python(code, missing) == "ResNetBKForCausalLM\n"


def test_a_transformers_that_is_too_old_is_one_line_and_breaks_nothing():
    code = """
import types, warnings

sys.modules["transformers"] = types.ModuleType("transformers")  # version 4 has no PreTrainedConfig
import resnet_bk.hf

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    resnet_bk.hf.register_config(None)
    resnet_bk.hf.register_model(None)
print(caught[0].message)
"""
    said = python(code)
    assert said.startswith("resnet_bk does not register with transformers: transformers cannot be used")
    assert "resnet-bk[hf]" in said


def test_every_public_name_exists():
    for name in resnet_bk.__all__:
        assert getattr(resnet_bk, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LangaugeModel'"):
        resnet_bk.LangaugeModel  # noqa: B018
