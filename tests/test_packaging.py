"""The distributions: what is in them, that they install and run, and that metadata, pages and files agree."""

import email
import email.message
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import bundle
import pytest
import yaml

from resnet_bk import __version__
from resnet_bk.config import PRESETS
from resnet_bk.folders import BUNDLED

# Looked up by name: once somebody looks for the module pip, setuptools, which torch needs, fails in this process.
for package in ("build", "hatchling", "hatch-fancy-pypi-readme", "pip"):
    if not list(metadata.distributions(name=package)):
        pytest.skip(f"{package} is not installed: pip install 'resnet-bk[dev]'", allow_module_level=True)
requirements = pytest.importorskip("packaging.requirements")

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
URLS = {"Homepage", "Documentation", "Source", "Changelog", "Issues"}


def run(*command: str | Path, **options) -> str:
    """Run a command. Returns its standard output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(folder: Path, *kinds: str) -> list[Path]:
    """Build distributions from the source tree without a network. Returns the files, the wheel last."""
    run(sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", folder, ROOT)
    return sorted(folder.iterdir(), key=lambda path: path.suffix == ".whl")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"), "--wheel")[0]


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> tuple[Path, Path]:
    """Source distribution, and the wheel that is built from it."""
    sdist, wheel = build(tmp_path_factory.mktemp("released"))
    return sdist, wheel


@pytest.fixture(scope="module")
def about(wheel) -> email.message.Message:
    """The metadata of the wheel."""
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(files.read(name))


@pytest.fixture(scope="module")
def scripts(wheel, tmp_path_factory) -> Path:
    """The folder of commands of an environment with the wheel. Other packages are those that run this test.

    A .pth file adds their folders to the path. Files of that kind in these folders are not read, so that a copy of this
    package that is installed from its sources stays hidden.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=os.name != "nt")
    base = {"base": str(folder), "platbase": str(folder)}
    scripts, packages = (Path(sysconfig.get_path(name, "venv", base)) for name in ("scripts", "purelib"))
    outer = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "outer.pth").write_text("\n".join(outer) + "\n")
    run(sys.executable, "-m", "pip", "--python", folder, "install", "--no-deps", "--no-index", wheel)
    return scripts


def contents(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as files:
        return {name: files.read(name) for name in files.namelist()}


def test_the_wheel_has_the_package_and_nothing_else(wheel):
    found = contents(wheel)
    package = {name: data for name, data in found.items() if not name.startswith(f"resnet_bk-{__version__}.dist-info/")}
    tree = [path for path in (SOURCES / "resnet_bk").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert package == {path.relative_to(SOURCES).as_posix(): path.read_bytes() for path in tree}
    needed = {
        "resnet_bk/py.typed",
        "resnet_bk/serve/page.html",
        *(f"resnet_bk/presets/{name}.yaml" for name in PRESETS),
    }
    needed |= {f"resnet_bk/models/{name}/model/model.safetensors" for name in BUNDLED}
    assert needed <= set(package)
    assert f"resnet_bk-{__version__}.dist-info/licenses/LICENSE" in found
    for name in BUNDLED:
        assert sum(len(data) for file, data in package.items() if f"/models/{name}/" in file) <= bundle.LARGEST


def test_a_wheel_of_the_source_distribution_is_the_same(wheel, released):
    assert released[1].name == wheel.name
    assert contents(released[1]) == contents(wheel)


def test_the_installed_wheel_runs_from_an_empty_folder(scripts, tmp_path):
    work = tmp_path / "empty"
    work.mkdir()
    # Neither the engine nor kernels: they would be compiled, because the files of the new folder are not in the cache.
    slow = {"RESNET_BK_BACKEND": "chunked", "RESNET_BK_ENGINE": "0", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | slow
    file = run(scripts / "python", "-c", "import resnet_bk; print(resnet_bk.__file__)", cwd=work, env=own)
    assert Path(file).is_relative_to(scripts.parent)
    assert __version__ in run(scripts / "resnet-bk", "--version", cwd=work, env=own)
    text = run(scripts / "resnet-bk", "generate", "fast-python", "def ", "--max_new_tokens", "9", cwd=work, env=own)
    assert text.startswith("def ")
    assert len(text) > len("def \n")
    assert not list(work.iterdir())


def test_one_version_everywhere(about):
    assert about["Version"] == __version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    top = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert top is not None
    assert top.groups() == (__version__, str(citation["date-released"]))
    assert citation["version"] == __version__


def test_the_metadata_is_complete(about):
    links = dict(entry.split(", ") for entry in about.get_all("Project-URL"))
    assert set(links) == URLS
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert links["Source"] == citation["repository-code"]
    assert all(link.startswith(links["Source"]) for link in links.values())
    for name in ("Documentation", "Changelog"):
        assert (ROOT / links[name].partition("/blob/main/")[2]).is_file()
    assert about["License-Expression"] == citation["license"]
    assert about["Author"] == citation["authors"][0]["name"]
    for name in ("Keywords", "Classifier", "License-File", "Summary"):
        assert about[name]


def test_links_of_the_readme_lead_into_the_repository(about):
    source = f"https://github.com/resnet-bk/resnet-bk/blob/v{__version__}/"
    found = re.findall(r"\]\(([^)]+)\)", about.get_payload())
    here = [link for link in found if link.startswith(source)]
    assert len(here) > 10
    assert all(link.startswith(("https://", "#")) for link in found)
    for link in here:
        assert (ROOT / link.removeprefix(source).partition("#")[0]).exists()


def test_twine_accepts_both_distributions(released):
    pytest.importorskip("twine", reason="twine is not installed: pip install 'resnet-bk[dev]'")
    assert run(sys.executable, "-m", "twine", "check", "--strict", *released).count("PASSED") == 2


def test_every_extra_that_is_named_exists(about):
    extras = set(about.get_all("Provides-Extra"))
    files = [*PAGES, ROOT / "Makefile", *sorted((ROOT / "configs").iterdir()), *sorted(SOURCES.rglob("*.py"))]
    text = "\n".join(path.read_text() for path in files)
    named = {name for group in re.findall(r"(?:resnet-bk|'\.)\[([a-z,-]+)\]", text) for name in group.split(",")}
    named |= set(re.findall(r"\bextra\(\"([\w-]+)\"\)", text))
    named |= {name for path in PAGES for name in re.findall(r"[Ee]xtra `([\w-]+)`", path.read_text())}
    assert {"all", "hf", "train", "data", "cpu-fast", "gpu", "dev", "ecosystem"} <= named <= extras
    table = (ROOT / "docs" / "install.md").read_text().partition("| extra | adds |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == extras - {"dev"}


def test_installed_packages_meet_the_requirements(about):
    entries = [requirements.Requirement(entry) for entry in about.get_all("Requires-Dist")]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {entry.name for entry in entries if entry.marker is None} == {"numpy", "pyyaml", "safetensors", "torch"}
    met = set()
    for entry in entries:
        assert entry.name != settings["name"]
        assert entry.url is None
        try:
            version = metadata.version(entry.name)
        except metadata.PackageNotFoundError:
            continue
        assert entry.specifier.contains(version, prereleases=True), f"{entry}, installed is {version}"
        met.add(entry.name)
    assert {"torch", "numpy", "transformers", "pytest"} <= met
