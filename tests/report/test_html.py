"""Pages and figures of the reports."""

from html.parser import HTMLParser

import pytest

from resnet_bk.config import visible
from resnet_bk.report import figures, html

VOID = {"meta", "link", "br", "img", "input", "hr", "wbr"}
METRICS = [
    {"step": i, "seconds": float(i), "bits_per_byte": 8.0 / i, "bytes_per_second": 1000.0 * i} for i in range(1, 5)
]


class Checker(HTMLParser):
    """Collect elements and text; fail on tags that do not nest."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.text += data


def parse(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def fetched(checker):
    """Return every address that a browser would load, except places in the page itself."""
    names = {"src", "href", "xlink:href", "data", "action", "poster", "srcset"}
    return [value for _, name, value in checker.attributes if name in names and not value.startswith("#")]


@pytest.fixture
def page():
    rows = [("held-out bits per byte", "1.2345"), ("context", "a < b & c")]
    sections = [
        ("Results", html.table_html(rows, "As <measured>.")),
        ("Curves", figures.figures_html(figures.training_curves(METRICS))),
        ("Sample", html.preformatted("def f():\n    '<script>'")),
        ("Heat", html.heat_map([("a<b", 0.0, 'say "1"'), ("\r\n", 1.0, "2")])),
    ]
    return html.page("Run <x>", "What & why", sections, ["torch 1", "cmd"])


def test_the_page_is_well_formed_and_shows_all_it_was_given(page):
    checker = parse(page)
    for text in (
        "Run <x>",
        "held-out bits per byte",
        "1.2345",
        "a < b & c",
        "def f():\n    '<script>'",
        "torch 1",
        "cmd",
        "What & why",
        "As <measured>.",
        "Curves",
        "a<b\N{SYMBOL FOR CARRIAGE RETURN}\n",
    ):
        assert text in checker.text
    assert checker.tags.count("svg") == 2
    assert checker.text.count("1.2345") == 1


def test_characters_that_a_browser_obeys_are_visible():
    odd = "\x00\x1b\r\x7f\x9b\u202e\u2066\udcff"
    parts = [html.preformatted(odd), html.heat_map([(odd, 0.5, odd)]), html.titled(odd, html.paragraph(odd))]
    parts += [html.table_html([(odd, odd)], odd, [odd]), html.scale(odd, [(odd, 0.5)])]
    page = html.page(odd, odd, [(odd, "".join(parts))], [odd])
    assert page.encode().decode() == page
    assert visible(page) == page
    assert page.count("␀␛␍␡\\u009b\\u202e\\u2066\\udcff") == 19
    parse(page)


def test_the_page_needs_no_script_and_no_network(page):
    checker = parse(page)
    assert not {"script", "iframe", "img", "link", "object", "embed"} & set(checker.tags)
    assert fetched(checker) == []
    assert "@import" not in page
    assert "url(http" not in page
    assert not [name for _, name, _ in checker.attributes if name.startswith("on")]


def test_a_policy_forbids_the_browser_to_load_anything(page):
    checker = parse(page)
    policy = next(
        value for tag, name, value in checker.attributes if (tag, name) == ("meta", "content") and "src" in value
    )
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline';")


def test_a_section_without_content_has_no_heading():
    page = html.page("t", "i", [("Training", figures.figures_html([]))], [])
    assert "<svg" not in page
    assert "Training" not in page


def test_the_level_of_a_piece_is_a_class_and_its_note_an_attribute(page):
    checker = parse(html.heat_map([("a", 0.0, 'say "1"'), (" \n", 0.5, "2"), ("b", 1.0, "3")]))
    found = {
        name: [v for tag, n, v in checker.attributes if tag == "span" and n == name] for name in ("class", "title")
    }
    assert found == {"class": ["h0", "h4", "h7"], "title": ['say "1"', "2", "3"]}
    assert checker.text.startswith("a \nbThe same as a table")
    assert checker.text.endswith('1asay "1"2␠␊23b3')
    assert all(f".h{level} {{ background: var(--h{level}); }}" in html.STYLE for level in range(html.LEVELS))


def test_a_table_has_a_caption_scopes_and_a_box_that_the_keyboard_scrolls():
    checker = parse(html.table_html([("a", "1"), ("b", "2")], "Of <x>", ["name", "n"]))
    box = {name: value for tag, name, value in checker.attributes if tag == "div"}
    assert box == {"class": "scrolls", "role": "region", "tabindex": "0", "aria-label": "Of <x>"}
    assert [value for tag, name, value in checker.attributes if (tag, name) == ("th", "scope")] == ["col"] * 2 + [
        "row"
    ] * 2
    assert checker.tags.count("caption") == 1


def test_a_table_of_columns_breaks_paths_and_keeps_parentheses_whole():
    checker = parse(html.table_html([("a<b", "runs/x/y", "1 (2 to 3)")], "", ["name", "folder", "n"]))
    assert checker.text == "namefolderna<bruns/x/y1 (2 to 3)"
    assert ("div", "class", "scrolls") in checker.attributes
    assert checker.tags.count("wbr") == 2
    assert ("span", "class", "whole") in checker.attributes
