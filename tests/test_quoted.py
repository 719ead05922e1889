"""Numbers in the tables of README.md and docs are those of the pages in benchmarks/results, rounded."""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?!\w*[a-wyz]|\.\d)")  # as in 12, 1,200, 0.51 and 12.7x
PAGE = re.compile(r"\((?:\.\./)?(benchmarks/results/[^)]+\.md)\)")
SVG = "{http://www.w3.org/2000/svg}"
LINK = re.compile(r"results\.md#([\w-]+)\)")
SECTION = re.compile(r"\(docs/results\.md#([^)]+)\)")


def numbers(text):
    return [found.replace(",", "") for found in NUMBER.findall(text)]


def unknown(quoted, known):
    """Return the quoted numbers that no known one, perhaps a thousand times as large, rounds to."""
    values = [factor * float(x) for x in known for factor in (1, 1000)]
    half = {x: 0.5001 * 10.0 ** -len(x.partition(".")[2]) for x in quoted}  # of the last digit; 14.45 is 14.4 or 14.5
    return [x for x in quoted if not any(abs(value - float(x)) <= half[x] for value in values)]


def sections(text):
    """Map the anchor of each section of a document, of any depth, to its text."""
    parts = re.split(r"^#{2,3} (.+)$", text, flags=re.MULTILINE)
    anchors = (re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in parts[1::2])
    return dict(zip(anchors, parts[2::2], strict=True))


PAGES = [
    ROOT / "docs/faq.md",
    *(path for part in ("tutorials", "techniques") for path in (ROOT / "docs" / part).glob("*.md")),
]
RESULTS = sections((ROOT / "docs/results.md").read_text("utf-8"))


def pages_of(section):
    return [number for page in PAGE.findall(section) for number in numbers((ROOT / page).read_text("utf-8"))]


@pytest.mark.parametrize("anchor", [name for name, text in RESULTS.items() if "|" in text])
def test_tables_of_results_are_those_of_their_pages(anchor):
    rows = [line for line in RESULTS[anchor].splitlines() if line.startswith("|")]
    assert unknown(numbers("\n".join(rows)), pages_of(RESULTS[anchor])) == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_tables_of_the_site_are_those_of_the_sections_that_stand_before_them(path):
    section = ""
    for part in re.split(r"\n\s*\n", path.read_text("utf-8")):
        section = "".join(RESULTS[name] for name in LINK.findall(part)) or section
        rows = [line for line in part.splitlines() if line.lstrip().startswith("|")]
        assert unknown(numbers("\n".join(rows)), numbers(section) + pages_of(section)) == []


def test_results_in_the_readme_are_those_of_the_sections_that_they_link():
    rows = [line for line in (ROOT / "README.md").read_text("utf-8").splitlines() if line.startswith("| [")]
    linked = [(row, RESULTS[SECTION.search(row)[1]]) for row in rows if SECTION.search(row)]
    assert len(linked) >= 5
    for row, section in linked:
        quoted = numbers(re.sub(r"\([^)]*\.md[^)]*\)", "", row))
        assert unknown(quoted, numbers(section) + pages_of(section)) == [], row


def test_the_figure_of_the_readme_is_drawn_from_the_pages(tmp_path):
    overview = pytest.importorskip("overview")
    overview.draw(tmp_path / "overview.svg")
    shown, drawn = (ET.parse(path) for path in (ROOT / "docs/overview.svg", tmp_path / "overview.svg"))
    assert texts(shown) == texts(drawn)
    first, second = (
        [float(x) for path in figure.iter(f"{SVG}path") for x in re.findall(r"-?\d+\.?\d*", path.get("d"))]
        for figure in (shown, drawn)
    )
    assert len(first) > 200
    assert first == pytest.approx(second, abs=1)  # points; another version of matplotlib may move them a little


def texts(figure):
    return [element.text for element in figure.iter(f"{SVG}text")]


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 130
    assert len(numbers(re.sub(r"\([^)\s]*\)|https?:\S+", "", text))) <= 60
    assert text.count("](") >= 8


def test_a_wrong_number_is_found():
    assert unknown(["1.02", "12.5", "7"], ["1.0231", "12.49"]) == ["7"]
    assert numbers("| 0.51x | 1,200 s | fast2 | 4-2-0 |") == ["0.51", "1200", "4", "2", "0"]
