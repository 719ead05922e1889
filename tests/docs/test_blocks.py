"""Every code block of the README and of the pages runs as it is written, in an empty folder for each page."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import page_blocks
import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]
# Blocks that do not run on any page together, so that they stay few.
NOT_RUN = 20


def name(path):
    return path.relative_to(ROOT).as_posix()


def runnable(page):
    return [b for b in page_blocks.blocks(page.read_text()) if b.kind in page_blocks.LANGUAGES and b.mark != "not run"]


def run(page, folder):
    """Run a page beside copies of what a clone has."""
    for part in ("configs", "docs", "examples", "benchmarks", "README.md"):
        if (source := ROOT / part).is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("_build", "__pycache__", "results"))
        else:
            shutil.copy(source, folder / part)
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, page_blocks.__file__, str(page)],
        cwd=folder,
        env=os.environ | {"PATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.docs
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=name)
def test_the_blocks_of_a_page_run(page, tmp_path):
    done = run(page, tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_that_do_not_run_are_right_as_far_as_that_can_be_seen(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    cli = pytest.importorskip("resnet_bk.cli")
    for block in page_blocks.blocks(page.read_text()):
        if block.mark == "not run":
            assert len(block.value) > 10, f"line {block.line}: say why it does not run"
        if block.kind == "python":
            compile(block.code, f"{page}:{block.line}", "exec")
        if block.kind == "sh" and block.mark == "not run":
            for arguments in page_blocks.commands(block.code):
                if "--help" not in arguments:
                    cli._parse(arguments)


def test_few_blocks_do_not_run():
    marked = [b for page in PAGES for b in page_blocks.blocks(page.read_text()) if b.mark == "not run"]
    assert len(marked) <= NOT_RUN


PLANTED = {
    "python": "```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n",
    "a name of another page": "```python\nprint(model)\n```\n",
    "sh": "```sh\ntrue\nls nothing-here\n```\n",
    "the middle of a pipe": "```sh\nfalse | cat\n```\n",
    "a command that refuses a setting": "```sh\nresnet-bk train --max_stepz 3\n```\n",
    "exit": "```python\nimport sys\nsys.exit()\n```\n",
    "a server that ends": "<!-- background: http://127.0.0.1:9 -->\n```sh\ntrue\n```\n",
}


@pytest.mark.parametrize("text", PLANTED.values(), ids=PLANTED)
def test_a_block_that_fails_fails_the_page(text, tmp_path):
    (tmp_path / "page.md").write_text("A text.\n\n" + text)
    done = run(tmp_path / "page.md", tmp_path)
    assert done.returncode == 1, done.stdout
    assert "page.md" in done.stdout


def test_blocks_share_names_files_and_servers(tmp_path):
    (tmp_path / "page.md").write_text(
        "<!-- file: made.py -->\n```python\nvalue = 3\n```\n"
        "```python\nfrom made import value\n```\n"
        "<!-- not run: there is no such command -->\n```sh\nno-such-command\n```\n"
        "<!-- background: http://127.0.0.1:8179/made.py -->\n```sh\npython3 -m http.server 8179 --bind 127.0.0.1\n```\n"
        "```sh\nwget -qO- http://127.0.0.1:8179/made.py || curl -s http://127.0.0.1:8179/made.py\n```\n"
        "```text\nnot code\n```\n"
        "1. A list.\n\n   ```python\n   assert value == 3\n   print('the', 'end')\n   ```\n"
    )
    done = run(tmp_path / "page.md", tmp_path)
    assert done.returncode == 0, done.stdout
    assert "value = 3" in done.stdout
    assert "the end" in done.stdout


def test_a_mark_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="'skip' is none of"):
        page_blocks.blocks("<!-- skip: slow -->\n```sh\nls\n```\n")
