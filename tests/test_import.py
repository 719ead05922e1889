"""Importing the package is cheap, and a model needs neither transformers nor numba."""

import subprocess
import sys

import pytest

import resnet_bk


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, resnet_bk; print({'torch', 'transformers', 'numpy', 'numba'} & set(sys.modules))"
    assert python(code) == "set()\n"


def test_a_model_runs_without_transformers_and_numba():
    code = (
        "import sys\n"
        "sys.modules['transformers'] = sys.modules['numba'] = None\n"
        "import resnet_bk, torch\n"
        "print(tuple(resnet_bk.LanguageModel(259)(torch.tensor([[1, 2, 3]])).logits.shape))\n"
    )
    assert python(code) == "(1, 3, 259)\n"


def test_every_public_name_is_there():
    for name in resnet_bk.__all__:
        assert getattr(resnet_bk, name) is not None


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LangaugeModel'"):
        resnet_bk.LangaugeModel  # noqa: B018
