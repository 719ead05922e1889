"""The notebooks: each is in step with its source, and runs from its first to its last cell in short form."""

import os
import re
import shutil
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.ecosystem,
    pytest.mark.filterwarnings("ignore"),  # of packages that this project does not control
]
jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
NAMES = ["all_techniques", "what_each_byte_cost", "your_own_text"]
LARGEST = 1_000_000  # bytes, so that pages on GitHub open quickly

sources = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def cells(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def outputs(notebook) -> list[dict]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def flaws(notebook) -> list[dict]:
    """Errors, warnings, and widgets, which no reader of the saved file can see."""
    widget = "application/vnd.jupyter.widget-view+json"
    return [o for o in outputs(notebook) if "ename" in o or o.get("name") == "stderr" or widget in o.get("data", {})]


def test_every_notebook_has_a_source():
    assert [path.stem for path in SOURCES] == NAMES
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == NAMES


@sources
def test_the_notebook_is_in_step_with_its_source(source):
    path = source.with_suffix(".ipynb")
    notebook = nbformat.read(path, as_version=4)
    assert cells(notebook) == cells(jupytext.read(source)), "run: make notebooks"
    assert path.stat().st_size < LARGEST
    assert not flaws(notebook)


@sources
def test_it_opens_in_colab_and_installs_the_package_only(source):
    written = cells(jupytext.read(source))
    address = f"colab.research.google.com/github/resnet-bk/resnet-bk/blob/main/notebooks/{source.stem}.ipynb"
    assert f"](https://{address})" in written[0][1]
    first = next(text for kind, text in written if kind == "code")
    (package,) = re.findall(r'package = "(.*)"', first)
    assert package == "resnet-bk[train,cpu-fast] @ git+https://github.com/resnet-bk/resnet-bk"  # no torch, no pin
    assert set(re.findall(r"import (\w+)", first)) <= {"importlib", "subprocess", "sys"}  # before it is installed


@sources
def test_the_notebook_runs(source, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("RESNET_BK_NOTEBOOK_SECONDS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    copy = shutil.copy(source, tmp_path)
    client = nbclient.NotebookClient(
        jupytext.read(copy), timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    notebook = client.execute()
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert not flaws(notebook)
