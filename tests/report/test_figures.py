"""Figures of the reports: what they show, in which styles, as which SVG."""

import itertools
import re
import subprocess
import sys
from xml.etree import ElementTree

import matplotlib
import pytest

from resnet_bk.config import visible
from resnet_bk.report import figures
from resnet_bk.report.html import STYLE

METRICS = [
    {"step": i, "seconds": float(i), "bits_per_byte": 8.0 / i, "bytes_per_second": 1000.0 * i} for i in range(1, 5)
]


def drawn(svg, name):
    """Return the points of a curve in an <svg>."""
    path = re.search(rf'<g id="{name}">\s*<path d="([^"]*)"', svg)[1]
    return re.findall("[ML] ([-.0-9]+) ([-.0-9]+)", path)


def test_a_figure_is_one_svg_element_with_a_name_and_text_as_text():
    loss, speed = map(figures.figure_svg, figures.training_curves(METRICS))
    for text, axis in ((loss, "bits per byte"), (speed, "training speed, kB per second")):
        element = ElementTree.fromstring(text)
        assert element.tag.endswith("svg")
        assert element.attrib["role"] == "img"
        assert element.attrib["aria-label"] == f"Chart: {axis} over seconds of training"
        found = ["".join(part.itertext()).strip() for part in element.iter("{http://www.w3.org/2000/svg}text")]
        assert {axis, "seconds of training"} <= set(found)
        assert len(drawn(text, {loss: "loss", speed: "speed"}[text])) == len(METRICS)


@pytest.mark.parametrize("salt", [None, "of the user"])
def test_ids_are_unique_among_figures_and_colors_are_the_pages(salt):
    metrics = [line | {"held_out_bits_per_byte": 3.0} for line in METRICS]
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        page = figures.figures_html([*figures.training_curves(metrics), *figures.compared_curves(CURVES, "bytes")])
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = {*re.findall('href="#([^"]+)"', page), *re.findall(r"url\(#([^)]+)\)", page)}
    assert used
    assert used <= set(ids)
    assert not re.search("#[0-9a-f]{6}", page)
    for name in re.findall(r"var\(--(\w+)\)", page):
        assert STYLE.count(f"--{name}: ") == 2, "one for light, one for dark"


def test_captions_say_what_the_curves_show():
    metrics = [
        line | ({"held_out_bits_per_byte": value} if value else {})
        for line, value in zip(METRICS, (0, 5, 2, 3), strict=True)
    ]
    loss, speed = figures.training_curves(metrics)
    assert "8.000 at first, 2.000 at last" in loss.get_label()
    assert "5.000 at first, 3.000 at last, 2.000 at best" in loss.get_label()
    assert "1.0 to 4.0 kB, median 2.5 kB" in speed.get_label()
    assert all("A point is a line of metrics.jsonl." in figure.get_label() for figure in (loss, speed))


@pytest.mark.parametrize(("lines", "left", "every"), [(1, 1, 1), (1000, 1000, 1), (1001, 501, 2), (2500, 834, 3)])
def test_long_curves_are_thinned_and_keep_their_end(lines, left, every):
    kept, step = figures.thinned(range(lines))
    assert (len(kept), step, kept[-1]) == (left, every, lines - 1)
    metrics = [METRICS[0] | {"seconds": float(i)} for i in range(lines)]
    loss, _ = figures.training_curves(metrics)
    assert len(drawn(figures.figure_svg(loss), "loss")) == left
    assert (f"A point is one in {every} lines" in loss.get_label()) == (every > 1)


def test_the_legend_hides_no_point():
    (loss, _) = figures.training_curves([line | {"held_out_bits_per_byte": 8.0} for line in METRICS])
    curves = {f"a long name of a group, number {i}": [[(1.0, 0.1, 4.0), (2.0, 0.2, 3.0)]] for i in range(12)}
    for figure in (loss, *figures.compared_curves(curves, "bytes")):
        figure.draw_without_rendering()
        (axes,), (legend,) = figure.axes, figure.legends
        assert not legend.get_window_extent().overlaps(axes.get_window_extent())
        assert figure.bbox.x1 >= legend.get_window_extent().x1
        assert axes.get_window_extent().height > 150


def test_series_differ_by_more_than_color():
    styles = [tuple(figures._series(i).values()) for i in range(60)]
    assert len(set(styles)) == 60
    for one, other in itertools.pairwise(styles):
        assert all(a != b for a, b in zip(one[1:], other[1:], strict=True))


CURVES = {"a": [[(1.0, 0.1, 4.0), (2.0, 0.2, 3.0)], [(1.5, 0.1, 3.5)]], "b": [[(3.0, 0.3, 2.0)]]}


def test_importing_the_report_leaves_the_plotting_backend_alone():
    program = "import resnet_bk.report.figures, sys; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_trade_off_shows_all_points_the_front_and_the_chosen_one():
    points = [(2.0, 9.0), (2.5, 4.0), (2.6, 8.0), (3.0, 1.0)]
    figure = figures.trade_off(points, [3, 1, 0], 1, "prefill, ms per kB")
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("prefill, ms per kB", "held-out bits per byte")
    assert [tuple(xy) for xy in axes.collections[0].get_offsets()] == [(time, bits) for bits, time in points]
    front, chosen = axes.lines
    assert [tuple(xy) for xy in front.get_xydata()] == [(1.0, 3.0), (4.0, 2.5), (9.0, 2.0)]
    assert [tuple(xy) for xy in chosen.get_xydata()] == [(4.0, 2.5)]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["trials", "Pareto front", "chosen"]


def test_compared_curves_have_a_style_a_name_and_both_scales():
    found = figures.compared_curves(CURVES, "million bytes read")
    assert [figure.axes[0].get_xlabel() for figure in found] == ["seconds of training", "million bytes read"]
    for x, figure in enumerate(found):
        (axes,) = figure.axes
        shown = [[tuple(xy) for xy in line.get_xydata()] for line in axes.lines]
        assert shown == [[(line[x], line[2]) for line in run] for runs in CURVES.values() for run in runs]
        first, second, other = ((line.get_color(), line.get_marker()) for line in axes.lines)
        assert first == second != other
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
        assert "a 3.000 and 3.500; b 2.000." in figure.get_label()


@pytest.mark.parametrize("count", [1, 3, 12])
def test_the_pareto_figure_has_a_point_and_a_name_for_each_and_the_front(count):
    points = {f"name {i}": ((2.0 + i, 1.5 + i, 2.5 + i), (9.0 - i / 2, 8.0 - i / 2, 9.5)) for i in range(count)}
    front = list(range(count))[::-1]
    figure = figures.pareto(points, front, "decode, us per byte")
    (axes,) = figure.axes
    assert "Bars span the runs" in figure.get_label()
    assert figure.get_label().endswith(f"cheapest first: {'; '.join(f'name {i}' for i in front)}.")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("decode, us per byte", "held-out bits per byte")
    line, *rest = axes.lines
    assert [tuple(xy) for xy in line.get_xydata()] == [(9.0 - i / 2, 2.0 + i) for i in front]
    dots = [dot for dot in rest if dot.get_marker() not in ("None", None)]
    assert [tuple(dot.get_xydata()[0]) for dot in dots] == [(9.0 - i / 2, 2.0 + i) for i in range(count)]
    assert len({(dot.get_color(), dot.get_marker()) for dot in dots}) == count
    assert [(text.get_text(), text.xy) for text in axes.texts] == [
        (f"name {i}", (9.0 - i / 2, 2.0 + i)) for i in range(count)
    ]


ODD = ["a$b$c", "$\\frac", "$\\frac$", "a\\$b", "%_^{&", "a\nb", "--><script>"]


def test_names_are_not_read_as_formulas():
    places = {name: ((2.0 + i,) * 3, (9.0 - i,) * 3) for i, name in enumerate(ODD)}
    pareto = figures.pareto(places, [0], "cost")
    curves = figures.compared_curves({name: [[(1.0, 0.1, 4.0), (2.0, 0.2, 3.0)]] for name in ODD}, "bytes")
    for figure, texts in ((pareto, pareto.axes[0].texts), *((curve, curve.legends[0].get_texts()) for curve in curves)):
        assert [text.get_text() for text in texts] == ODD
        assert not any(text.get_parse_math() for text in texts)
        drawn = figures.figure_svg(figure)
        assert ElementTree.fromstring(drawn).tag.endswith("svg")
        assert "<script" not in drawn


def test_names_of_any_characters_are_drawn_without_a_warning():
    names = ["漢字 😀", "a\x1b[31m\x00", "\u202egpj.exe", "\udcff"]
    pareto = figures.pareto({name: ((2.0 + i,) * 3, (9.0 - i,) * 3) for i, name in enumerate(names)}, [0], "cost")
    curves = figures.compared_curves({name: [[(1.0, 0.1, 4.0), (2.0, 0.2, 3.0)]] for name in names}, "bytes")
    for figure in (pareto, *curves):
        drawn = figures.figure_svg(figure)
        assert visible(drawn) == drawn
        assert ElementTree.fromstring(drawn).tag.endswith("svg")


def test_names_keep_off_each_other_and_stay_within_the_axes():
    points = {name: ((bits,) * 3, (cost,) * 3) for name, bits, cost in (("aaaa", 2, 1), ("bbbb", 2, 1.1), ("cc", 3, 5))}
    figure = figures.pareto(points, [0], "cost")
    (axes,) = figure.axes
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not boxes[0].overlaps(boxes[1])
    assert axes.get_window_extent().x1 >= boxes[2].x1
