"""The site: a warning of Sphinx fails the build, and every setting and public name is on a page."""

import importlib
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from html import unescape
from pathlib import Path

import pytest

import resnet_bk
from resnet_bk.config import all_fields, is_section

ROOT = Path(__file__).resolve().parents[2]
DOCS, SITE = ROOT / "docs", ROOT / "docs" / "_build" / "html"


@pytest.fixture
def cli():
    return pytest.importorskip("resnet_bk.cli")


def test_every_section_and_command_has_its_place(cli):
    sections = {name for name, kind in all_fields(cli.TrainConfig).items() if is_section(kind)}
    written = (DOCS / "reference" / "settings.md").read_text()
    assert set(re.findall(r"^```\{settings\} (.*)$", written, flags=re.MULTILINE)) == sections
    written = (DOCS / "reference" / "commands.md").read_text()
    assert re.findall(r"^```\{command\} (.*)$", written, flags=re.MULTILINE) == list(cli.COMMANDS)


def test_every_public_name_has_its_place():
    written = "".join(path.read_text() for path in (DOCS / "reference" / "python").glob("*.md"))
    listed = set(re.findall(r"^\.\. [\w:]+:: ([\w.]+)", written, flags=re.MULTILINE))
    assert {f"resnet_bk.{name}" for name in resnet_bk.__all__} <= listed
    hf, ops = importlib.import_module("resnet_bk.hf"), importlib.import_module("resnet_bk.ops")
    internal = {"ResNetBKModel", "Tokenizer", "on_device", "quiet_transformers", "text_ids", "token_file"}
    assert {f"resnet_bk.hf.{name}" for name in set(hf.__all__) - internal} <= listed
    assert {f"resnet_bk.ops.{name}" for name in ops.__all__} <= listed


@pytest.mark.docs
def test_every_setting_of_every_command_is_on_the_site(cli):
    if not SITE.is_dir():
        pytest.skip("make docs builds the site first")
    pages = "".join((SITE / "reference" / f"{name}.html").read_text() for name in ("commands", "settings"))
    texts = dict(re.findall(r'id="cmdoption-resnet-bk-([^"]*)">(.*?)</dd>', pages, flags=re.DOTALL))
    texts = {name: " ".join(unescape(re.sub("<[^>]*>", "", text)).split()) for name, text in texts.items()}
    missing = []
    for command, (kind, _) in cli.COMMANDS.items():
        for name in all_fields(kind):
            owner, f = kind, None
            for part in name.split("."):
                f = next(f for f in fields(owner) if f.name == part)
                owner = f.type
            if is_section(f.type):
                continue
            required = f.default is f.default_factory is MISSING
            text = texts.get(f"{command}-arg-{name.upper()}" if required else f"{command}-{name}", "")
            if len(text.split()) < 5 or not re.search(r"; required \w" if required else r"; default \S* ?\S", text):
                missing.append((command, name, text))
    assert not missing


MISTAKES = {
    "a file that is not there": "[a](b.md)",
    "a heading that is not there": "[a](#b)",
    "a heading of another page": "[a](other.md#b)",
    "a picture": "![a](b.svg)",
    "a name that Python does not have": "```{eval-rst}\n.. autofunction:: resnet_bk.encoder\n```",
    "a reference of a docstring": "```{eval-rst}\n:class:`resnet_bk.LanguageModels`\n```",
    "a setting that does not exist": "```{settings} model.depths\n```",
}


@pytest.mark.docs
@pytest.mark.parametrize("text", [*MISTAKES.values(), "[a](other.md#other)"], ids=[*MISTAKES, "none"])
def test_a_mistake_fails_the_build(text, tmp_path):
    pytest.importorskip("furo")
    (tmp_path / "index.md").write_text(f"# Index\n\n{text}\n\n```{{toctree}}\nother\n```\n")
    (tmp_path / "other.md").write_text("# Other\n\nText.\n")
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "--conf-dir", str(DOCS)]
    done = subprocess.run(
        [*command, str(tmp_path), str(tmp_path / "html")], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode == 0) == (text not in MISTAKES.values()), done.stderr
