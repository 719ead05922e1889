"""Run the code blocks of a Markdown page in the order in which a reader meets them.

    python page_blocks.py PAGE.md        in an empty folder

Blocks of `python` share one namespace; those of `sh` run in bash. An HTML comment on the line before a block changes
what happens to it:

    <!-- not run: REASON -->    it is only parsed
    <!-- file: NAME -->         it is written to this file
    <!-- background: URL -->    it is started, must answer at the URL, and is stopped at the end of the page

Blocks of other languages (`text`, a diagram) are for readers.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LANGUAGES = ("python", "sh")
MARKS = ("not run", "file", "background")
_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^:\n]*): (?P<value>[^\n]*) -->\n)?(?P<indent> *)```(?P<kind>[^\n]*)\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)
STARTS_WITHIN = 120  # seconds, of a block in the background


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        kind: its language.
        code: its text.
        line: number of the line of the page at which the code begins.
        mark: one of MARKS, from the comment before it, or None.
        value: what the comment says after the mark.
    """

    kind: str
    code: str
    line: int
    mark: str | None
    value: str | None


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a page. Raise ValueError for a comment with a mark that does not exist."""
    found = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code")) + 1
        if match["mark"] not in (None, *MARKS):
            raise ValueError(f"line {line}: {match['mark']!r} is none of {', '.join(MARKS)}")
        code = textwrap.dedent(match["code"])
        found.append(Block(match["kind"].strip(), code, line, match["mark"], match["value"]))
    return found


def commands(code: str) -> Iterator[list[str]]:
    """Yield the arguments of each `resnet-bk` in a shell block, those under torchrun and accelerate too."""
    for line in code.replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if not re.match(r"[A-Z_]+=", word)]
        if words[:1] == ["resnet-bk"]:
            yield words[1:]
        elif "resnet_bk" in words:  # torchrun ... -m resnet_bk
            yield words[words.index("resnet_bk") + 1 :]


@contextlib.contextmanager
def _background(block: Block) -> Iterator[None]:
    """Run a shell block until the context ends. Raise RuntimeError if it does not answer at its URL."""
    process = subprocess.Popen(["bash", "-euc", block.code], stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        end = time.monotonic() + STARTS_WITHIN
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(block.value, timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no answer at {block.value}, exit status {process.poll()}")
            time.sleep(0.2)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def run(page: Path) -> None:
    """Run all blocks of a page in the current folder. Raise what the first failing block raises."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    sys.path.insert(0, "")
    with contextlib.ExitStack() as stack:
        for block in blocks(page.read_text()):
            if block.mark == "file":
                Path(block.value).write_text(block.code)
            if block.mark in ("file", "not run") or block.kind not in LANGUAGES:
                continue
            print(f"--- {page.name}:{block.line}", flush=True)
            if block.mark == "background":
                stack.enter_context(_background(block))
            elif block.kind == "sh":
                subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True, stdin=subprocess.DEVNULL)
            else:
                code = "\n" * (block.line - 1) + block.code  # tracebacks then name the line of the page
                exec(compile(code, str(page), "exec"), namespace)


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]))
    except (Exception, SystemExit):
        traceback.print_exc()
        sys.exit(1)
