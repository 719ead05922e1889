"""Pages and figures of the reports."""

import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from resnet_bk.config import visible
from resnet_bk.report import html

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
        ("Curves", html.figures_html([html.training_curves(METRICS)])),
        ("Sample", html.preformatted("def f():\n    '<script>'")),
        ("Heat", html.heat_map([("a<b", 0.0, 'say "1"'), ("\r\n", 1.0, "2")])),
    ]
    return html.page("Run <x>", rows, sections, ["torch 1", "cmd"])


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
        "Curves",
        "a<b\N{SYMBOL FOR CARRIAGE RETURN}\n",
    ):
        assert text in checker.text
    assert checker.tags.count("svg") == 1


def test_characters_that_a_browser_obeys_are_visible():
    odd = "\x00\x1b\r\x7f\x9b\u202e\u2066\udcff"
    sections = [
        (odd, html.preformatted(odd) + html.heat_map([(odd, 0.5, odd)]) + html.titled(odd, html.paragraph(odd)))
    ]
    page = html.page(odd, [(odd, odd)], sections, [odd])
    assert page.encode().decode() == page
    assert visible(page) == page
    assert page.count("␀␛␍␡\\u009b\\u202e\\u2066\\udcff") == 11
    parse(page)


def test_the_page_needs_no_script_and_no_network(page):
    checker = parse(page)
    assert not {"script", "iframe", "img", "link", "object", "embed"} & set(checker.tags)
    assert fetched(checker) == []
    assert "@import" not in page
    assert "url(http" not in page
    assert not [name for _, name, _ in checker.attributes if name.startswith("on")]


def test_a_figure_is_one_svg_element():
    element = ElementTree.fromstring(html.figure_svg(html.training_curves(METRICS)))
    assert element.tag.endswith("svg")


def test_a_run_without_metrics_still_has_a_page():
    assert "<svg" not in html.page("t", [], [("Training", html.figures_html([]))], [])


def test_heat_goes_from_white_to_orange_and_notes_are_attributes(page):
    checker = parse(page)
    found = {
        name: [v for tag, n, v in checker.attributes if tag == "span" and n == name] for name in ("style", "title")
    }
    assert found["style"] == ["background:rgb(255,255,255)", "background:rgb(236,112,20)"]
    assert found["title"] == ['say "1"', "2"]


def test_importing_the_report_leaves_the_plotting_backend_alone():
    program = "import resnet_bk.report.html, sys; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_trade_off_shows_all_points_the_front_and_the_chosen_one():
    points = [(2.0, 9.0), (2.5, 4.0), (2.6, 8.0), (3.0, 1.0)]
    (axes,) = html.trade_off(points, [3, 1, 0], 1, "prefill, ms per kB").axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("prefill, ms per kB", "held-out bits per byte")
    assert [tuple(xy) for xy in axes.collections[0].get_offsets()] == [(time, bits) for bits, time in points]
    front, chosen = axes.lines
    assert [tuple(xy) for xy in front.get_xydata()] == [(1.0, 3.0), (4.0, 2.5), (9.0, 2.0)]
    assert [tuple(xy) for xy in chosen.get_xydata()] == [(4.0, 2.5)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["trials", "Pareto front", "chosen"]


def test_compared_curves_have_a_color_a_name_and_both_scales():
    curves = {"a": [[(1.0, 0.1, 4.0), (2.0, 0.2, 3.0)], [(1.5, 0.1, 3.5)]], "b": [[(3.0, 0.3, 2.0)]]}
    figure = html.compared_curves(curves, "million bytes read")
    assert [axes.get_xlabel() for axes in figure.axes] == ["seconds of training", "million bytes read"]
    for x, axes in enumerate(figure.axes):
        drawn = [[tuple(xy) for xy in line.get_xydata()] for line in axes.lines]
        assert drawn == [[(line[x], line[2]) for line in run] for runs in curves.values() for run in runs]
        first, second, other = (line.get_color() for line in axes.lines)
        assert first == second != other
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]


@pytest.mark.parametrize("count", [1, 3, 12])
def test_the_pareto_figure_has_a_point_and_a_name_for_each_and_the_front(count):
    points = {f"name {i}": ((2.0 + i, 1.5 + i, 2.5 + i), (9.0 - i / 2, 8.0 - i / 2, 9.5)) for i in range(count)}
    front = list(range(count))[::-1]
    (axes,) = html.pareto(points, front, "decode, us per byte").axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("decode, us per byte", "held-out bits per byte")
    line, *rest = axes.lines
    assert [tuple(xy) for xy in line.get_xydata()] == [(9.0 - i / 2, 2.0 + i) for i in front]
    dots = [dot for dot in rest if dot.get_marker() == "o"]
    assert [tuple(dot.get_xydata()[0]) for dot in dots] == [(9.0 - i / 2, 2.0 + i) for i in range(count)]
    assert len({tuple(dot.get_color()) for dot in dots}) == count
    assert [(text.get_text(), text.xy) for text in axes.texts] == [
        (f"name {i}", (9.0 - i / 2, 2.0 + i)) for i in range(count)
    ]


ODD = ["a$b$c", "$\\frac", "$\\frac$", "a\\$b", "%_^{&", "a\nb", "--><script>"]


def test_names_are_not_read_as_formulas():
    places = {name: ((2.0 + i,) * 3, (9.0 - i,) * 3) for i, name in enumerate(ODD)}
    pareto = html.pareto(places, [0], "cost")
    curves = html.compared_curves({name: [[(1.0, 0.1, 4.0), (2.0, 0.2, 3.0)]] for name in ODD}, "bytes")
    for figure, texts in ((pareto, pareto.axes[0].texts), (curves, curves.legends[0].get_texts())):
        assert [text.get_text() for text in texts] == ODD
        assert not any(text.get_parse_math() for text in texts)
        drawn = html.figure_svg(figure)
        assert ElementTree.fromstring(drawn).tag.endswith("svg")
        assert "<script" not in drawn


def test_names_of_any_characters_are_drawn_without_a_warning():
    names = ["漢字 😀", "a\x1b[31m\x00", "\u202egpj.exe", "\udcff"]
    pareto = html.pareto({name: ((2.0 + i,) * 3, (9.0 - i,) * 3) for i, name in enumerate(names)}, [0], "cost")
    curves = html.compared_curves({name: [[(1.0, 0.1, 4.0), (2.0, 0.2, 3.0)]] for name in names}, "bytes")
    for figure in (pareto, curves):
        drawn = html.figure_svg(figure)
        assert visible(drawn) == drawn
        assert ElementTree.fromstring(drawn).tag.endswith("svg")


def test_names_keep_off_each_other_and_stay_within_the_axes():
    points = {name: ((bits,) * 3, (cost,) * 3) for name, bits, cost in (("aaaa", 2, 1), ("bbbb", 2, 1.1), ("cc", 3, 5))}
    figure = html.pareto(points, [0], "cost")
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not boxes[0].overlaps(boxes[1])
    assert axes.get_window_extent().x1 >= boxes[2].x1


def test_a_table_of_columns_scrolls_and_breaks_paths():
    checker = parse(html.table_html([("a<b", "runs/x/y", "1")], ["name", "folder", "n"]))
    assert checker.text == "namefolderna<bruns/x/y1"
    assert ("div", "class", "scrolls") in checker.attributes
    assert checker.tags.count("wbr") == 2
