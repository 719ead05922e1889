"""What no file of this package may contain: code that runs code from data."""

import ast
from pathlib import Path

import pytest

import resnet_bk

SOURCES = sorted(Path(resnet_bk.__file__).parent.rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {("torch", "load"), ("torch", "save"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load")}
METHODS |= {("np", "load"), ("numpy", "load"), ("os", "system"), ("os", "popen")}


def findings(source):
    """Line and name of each banned construct."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [module] if module.split(".")[0] in MODULES else []
            names += [alias.name for alias in node.names if (module, alias.name) in METHODS]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [f"{node.value.id}.{node.attr}"] if (node.value.id, node.attr) in METHODS else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = [node.func.id] if node.func.id in CALLS else []
        if isinstance(node, ast.keyword) and not (isinstance(node.value, ast.Constant) and node.value.value is False):
            names += [node.arg] if node.arg == "trust_remote_code" else []
        if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and node.value.value is False:
            names += [node.arg] if node.arg == "weights_only" else []
        found += [(node.lineno, name) for name in names]
    return found


def test_there_are_sources_to_look_at():
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_source_runs_code_from_data(path):
    assert findings(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from dill.settings import x",
        "torch.load(path)",
        "from torch import load",
        "f = torch.load",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "from yaml import load",
        "np.load(path)",
        "eval('1')",
        "exec('x')",
        "compile('x', '', 'exec')",
        "__import__('os')",
        "os.system('x')",
        "f(name, trust_remote_code=True)",
        "f(name, trust_remote_code=flag)",
        "f(name, weights_only=False)",
    ],
)
def test_each_banned_construct_is_found(line):
    assert len(findings(line)) == 1


@pytest.mark.parametrize(
    "line",
    ["model.eval()", "torch.compile(f)", "yaml.safe_load(text)", "f(trust_remote_code=False)", "re.compile('x')"],
)
def test_what_only_looks_alike_is_not_found(line):
    assert findings(line) == []
