"""The house rules that a machine can check: sizes, words, and docstrings that begin with a sentence."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PROSE = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "src").rglob("*.md"))]
PROSE = [path for path in PROSE if "_build" not in path.parts]  # built pages have copies

FILE_LINES, FUNCTION_LINES, PARAMETERS = 420, 60, 7
# Kernels and the registered operators take one argument for each tensor, and are one loop.
KERNELS = re.compile(
    r"ops/(chunked|delta|gates|kernels|naive|numba_\w+|sparse|triton_\w+)\.py$"
    r"|engine/(interpreter|layers|mixers|techniques)\.py$"
)
# transformers calls forward with these names; the propagator takes one argument for each tensor of the core.
FIXED_SIGNATURES = {("modeling.py", "forward"), ("core.py", "propagate")}

# What the glossary's last table names by words that have other, good uses; the rest is read from the table.
PATTERNS = {
    "real (of positions)": r"\breal (positions?|tokens?)\b",
    "seen (as a noun)": r"\bSeen\b",
    "waiting (for the host)": r"\bhost (that |must |to )?waits?\b|\bhave the host wait\b|\bwait for the host\b",
    'docstrings that begin with "Of", "What", "Whether", "Those"': None,  # a test of its own
}


def retired_words() -> dict[str, re.Pattern]:
    table = (ROOT / "docs" / "glossary.md").read_text().partition("## Not used any more")[2]
    terms = [row.split("|")[1].strip() for row in table.splitlines() if row.startswith("| ")]
    found = {}
    for term in terms:
        pattern = PATTERNS.get(term, rf"\b{term.partition(' (')[0]}s?\b")
        if pattern and term != "not":  # the table's head
            found[term] = re.compile(pattern, re.IGNORECASE if pattern != r"\bSeen\b" else 0)
    return found


RETIRED = retired_words()


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold code: not blank, not a comment, not part of a docstring."""
    held = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            held |= set(range(node.lineno, node.end_lineno + 1))
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in empty:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - held


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_files_and_functions_fit_one_reading(path):
    text = path.read_text()
    assert text.count("\n") <= FILE_LINES
    if KERNELS.search(path.as_posix()):
        return
    lines = code_lines(text)
    for function in functions(path):
        length = len(lines & set(range(function.lineno, function.end_lineno + 1)))
        assert length <= FUNCTION_LINES, f"{function.name} has {length} lines of code"
        arguments = function.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        names += [a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None]
        names = [name for name in names if name not in ("self", "cls", "ctx")]
        if (path.name, function.name) not in FIXED_SIGNATURES:
            assert len(names) <= PARAMETERS, f"{function.name} has {len(names)} parameters"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_docstrings_begin_with_a_sentence(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            assert not re.match(r"(Of|What|Whether|Those|As)\b(?! is$)", text), f"{text.splitlines()[0]!r}"


@pytest.mark.parametrize("path", [*SOURCES, *PROSE], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_retired_word_is_left(path):
    text = path.read_text()
    if path.name == "glossary.md":
        text = text.partition("## Not used any more")[0]
    for term, pattern in RETIRED.items():
        match = pattern.search(text)
        line = text[: match.start()].count("\n") + 1 if match else 0
        assert match is None, f"{path.name}:{line}: {match[0]!r}, see docs/glossary.md: {term}"


def test_the_glossary_names_the_words_that_went():
    assert {"room", "way out", "told", "speaks", "spent", "alike", "placed"} <= set(RETIRED)
    assert RETIRED["room"].search("as many rooms as fit")
    assert not RETIRED["room"].search("broom")
