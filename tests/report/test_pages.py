"""The HTML pages in a real browser: at two widths, dark and light, by keyboard, and against results.json."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
from browser import SCHEMES, WIDTHS, browser, faults, opened

from resnet_bk.cli import main
from resnet_bk.report.html import LEVELS, STYLE
from resnet_bk.study import comparison, run

TEXT = "def add(a, b):\n    return a + b  # <sum> & more\n" * 8
MEASURE = run.measure
PAGES = ("run/report.html", "inspect.html", "compared.html")


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def place(chromium, tmp_path_factory):
    """Return a folder with three runs and the pages of train, inspect and report. chromium: skips without a browser."""
    place = tmp_path_factory.mktemp("pages")
    (place / "corpus").mkdir()
    for i in range(3):
        (place / "corpus" / f"{i}.py").write_text(f"# file {i}\n" + TEXT)
    shape = ("--model.d_model=16", "--model.n_layers=3", "--model.n_seq=32", "--model.num_experts=2")
    budget = ("--max_steps=6", "--log_every=1", "--eval_every=3", "--batch_size=2", "--data.source=corpus")
    runs = {
        "run": (),
        "again": ("--seed=1",),
        "deep": ("--model.multiscale.factors=[4]", "--model.multiscale.layers=[1,1,1]"),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "measure", lambda model, text, size: MEASURE(model, text, size, 1, 32, 2, 1))
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        patch.chdir(place)
        for name, settings in runs.items():
            assert main(["train", *shape, *budget, *settings, f"--output_dir={name}"]) == 0
        assert main(["inspect", "deep", "corpus/0.py", "--max_tokens=90"]) == 0
        assert main(["report", *runs, "--output=compared.html", "--max_tokens=60"]) == 0
    return place


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rows_of(tab, caption):
    """Return the cells of each row of a table, its head first if it has one."""
    table = tab.locator("table", has=tab.locator("caption", has_text=caption)).first
    return table.evaluate("table => [...table.rows].map(row => [...row.cells].map(cell => cell.textContent))")


def points_of(tab, name):
    """Return the points of a curve in the units of the page's drawing."""
    path = tab.locator(f"[id='{name}'] > path").first.get_attribute("d")
    return np.array(re.findall("[ML] ([-.0-9]+) ([-.0-9]+)", path), float)


def is_linear(drawn, values):
    """True where one straight line takes the values to the places where they are drawn."""
    slope, offset = np.polyfit(values, drawn, 1)
    return np.abs(slope * np.array(values) + offset - drawn).max() < 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_no_fault_and_all_that_opens_can_be_opened(place, chromium, page, width, scheme):
    tab = opened(chromium, (place / page).as_uri(), width, scheme)
    assert faults(tab) == []
    summaries = tab.locator("summary")
    assert summaries.count() == {"run/report.html": 0, "inspect.html": 1, "compared.html": 2}[page]
    for summary in summaries.all():
        summary.press("Enter")
        assert summary.evaluate("summary => summary.parentElement.open")
    assert faults(tab) == []
    tab.close()


def test_the_report_of_a_run_shows_its_results(place, chromium):
    tab = opened(chromium, (place / "run" / "report.html").as_uri())
    results, metrics = results_of(place / "run"), metrics_of(place / "run")
    scores, costs, training = (results[name] for name in ("held_out", "costs", "training"))
    shown = dict(rows_of(tab, "Times were measured"))
    assert shown["held-out bits per byte"] == f"{scores['bits_per_byte']:.4f}"
    assert shown["held-out perplexity per byte"] == f"{scores['perplexity_per_byte']:.4f}"
    assert shown["held-out text"] == f"{scores['bytes']:,} bytes in 1 document"
    speed = f"{training['bytes_per_second']:,.0f} bytes/s"
    assert shown["training"] == f"{training['steps']} steps in {training['seconds']:.0f} s, {speed}"
    for name in ("prefill", "decode"):
        assert shown[name] == f"{costs[name]:,.0f} bytes/s ({costs[f'{name}_setting']})"
    assert shown["parameters"] == f"{costs['parameters']:,}"
    assert shown["FLOPs per byte"] == f"{costs['flops_per_byte']:,.0f} (forward)"
    assert tab.locator("pre").text_content() == run.html.visible(results["sample"])
    scored = [line for line in metrics if "held_out_bits_per_byte" in line]
    assert len(metrics) == 6
    assert len(scored) == 2
    for name, lines, value in (
        ("loss", metrics, "bits_per_byte"),
        ("speed", metrics, "bytes_per_second"),
        ("held-out", scored, "held_out_bits_per_byte"),
    ):
        points = points_of(tab, name)
        assert len(points) == len(lines)
        assert is_linear(points[:, 0], [line["seconds"] for line in lines])
        assert is_linear(points[:, 1], [line[value] for line in lines])
    tab.close()


def test_the_page_of_several_runs_shows_their_results(place, chromium):
    tab = opened(chromium, (place / "compared.html").as_uri())
    head, plain, deep = rows_of(tab, "One row for each group")
    found = [results_of(place / name) for name in ("run", "again", "deep")]
    for name, (measure, digits) in comparison.MEASURES.items():
        low, high = sorted(map(measure, found[:2]))
        numbers = [f"{value:,.{digits}f}" for value in ((low + high) / 2, low, high)]
        same = numbers[1] == numbers[2]
        expected = numbers[0] if same else "{} ({} to {})".format(*numbers)
        assert plain[head.index(name)] == expected
        assert deep[head.index(name)] == f"{measure(found[2]):,.{digits}f}"
    tokens = 2 * 32 / 1e6
    for group, number, folder in ((0, 0, "run"), (0, 1, "again"), (1, 0, "deep")):
        lines = metrics_of(place / folder)
        for x, places in enumerate(([line["seconds"] for line in lines], [line["step"] * tokens for line in lines])):
            points = points_of(tab, f"curve-{x}-{group}-{number}")
            assert len(points) == len(lines)
            assert is_linear(points[:, 0], places)
            assert is_linear(points[:, 1], np.log([line["bits_per_byte"] for line in lines]))
    tab.close()


def test_the_page_of_inspect_shows_each_character_on_its_level(place, chromium):
    tab = opened(chromium, (place / "inspect.html").as_uri())
    spans = tab.locator("pre span").evaluate_all("all => all.map(e => [e.textContent, e.className, e.title])")
    assert "".join(text for text, _, _ in spans) == ("# file 0\n" + TEXT)[:90]
    head, *rows = rows_of(tab, "What each piece of the text cost")
    assert head == ["number", "text", "cost and decisions"]
    assert [row[0] for row in rows] == [str(i) for i in range(1, 91)]
    assert [row[2] for row in rows] == [title for _, _, title in spans]
    assert rows[1][1] == "␠"
    costs = np.array([float(title.split()[0]) for _, _, title in spans])
    levels = [f"h{round(heat * 7)}" for heat in (costs - costs.min()) / np.ptp(costs)]
    close = [abs(int(shown[1]) - int(level[1])) <= 1 for (_, shown, _), level in zip(spans, levels, strict=True)]
    assert all(close), "by the rounded numbers of the notes"
    values = dict(rows_of(tab, "Means over the tokens"))
    flops = float(values["FLOPs per token"].replace(",", ""))
    used = flops * (1 - float(values["share of FLOPs on unused rows"]))
    assert used / 1e6 == pytest.approx(costs.mean(), abs=1e-3)
    layers = rows_of(tab, "in the order of the computation")[1:]
    total = sum(float(row[1].replace(",", "")) for row in layers)
    assert total / 90 == pytest.approx(flops, rel=1e-3)
    tab.close()


def test_text_of_a_figure_can_be_selected_and_printing_is_light(place, chromium, tmp_path):
    tab = opened(chromium, (place / "run" / "report.html").as_uri(), scheme="dark")
    tab.keyboard.press("Control+a")
    assert "seconds of training" in tab.evaluate("getSelection().toString()")
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)" != dark
    assert faults(tab) == []
    pdf = tab.pdf(format="A4")
    assert 1 <= len(re.findall(rb"/Type /Page\b", pdf)) <= 3
    tab.close()


FAULTS = {
    "an element that is too wide": ("</h1>", '</h1><div style="width: 2000px">x</div>', "pixels wide"),
    "focus that cannot be seen": ("outline: 3px solid var(--accent)", "outline: none", "focus cannot be seen"),
    "a box that the keyboard skips": (
        'role="region" tabindex="0"',
        'tabindex="-1" style="width: 99px"',
        "does not reach",
    ),
    "faint text": ("--quiet: #595959", "--quiet: #999", "contrast 2.85"),
    "faint text in a chart": ("svg text { fill: var(--text); }", "svg text { fill: #bbb; }", "contrast"),
    "an image of elsewhere": ("</h1>", '</h1><img alt="" src="http://127.0.0.1:9/x.png">', "Content Security Policy"),
    "an image of elsewhere, allowed": (
        "<meta http-equiv",
        '<img alt="" src="http://127.0.0.1:9/x.png"><meta name',
        "a request to http://127.0.0.1:9/x.png",
    ),
    "a chart without a name": ('role="img" aria-label', "data-label", "without a name"),
    "a table without scopes": (' scope="row"', "", "no scope"),
    "a table without a caption": ("<table><caption>", "<table><caption></caption><caption>", "no caption"),
    "an id twice": ("<main>", '<main id="loss">', "twice: id loss"),
    "a heading that skips a level": ("h2>", "h4>", "a level is left out"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(place, chromium, tmp_path, fault):
    good, bad, message = FAULTS[fault]
    text = (place / "run" / "report.html").read_text()
    assert good in text
    (tmp_path / "page.html").write_text(text.replace(good, bad))
    tab = opened(chromium, (tmp_path / "page.html").as_uri(), 390)
    found = faults(tab)
    assert [one for one in found if message in one], found
    tab.close()


def test_planted_wrong_numbers_are_found(place, chromium, tmp_path):
    """The comparisons with results.json and metrics.jsonl fail where these say something else."""
    for spoil in (
        lambda results, lines: results["held_out"].update(bits_per_byte=results["held_out"]["bits_per_byte"] + 1e-3),
        lambda results, lines: results["costs"].update(parameters=1),
        lambda results, lines: lines.pop(),
        lambda results, lines: lines[3].update(bits_per_byte=lines[3]["bits_per_byte"] * 1.1),
    ):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copy(place / "run" / "report.html", folder)
        results, lines = results_of(place / "run"), metrics_of(place / "run")
        spoil(results, lines)
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(AssertionError):
            test_the_report_of_a_run_shows_its_results(tmp_path, chromium)


# ------------------------------------------------------------------------------------------------------ colors

# Linear RGB as people without cones for long (protan) or middle (deutan) wavelengths see it: Machado et al., 2009.
SIGHTS = {
    "all cones": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def lab(color, sight):
    """Return a color, "#rrggbb" or "#rgb", in CIELAB as someone sees it."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    rgb = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(SIGHTS[sight]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = to_xyz @ seen / np.array([0.9505, 1, 1.089])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def palette(prefix, count, scheme):
    """Return the variables of page.css whose names begin with a prefix."""
    light, dark = STYLE.split("@media screen and (prefers-color-scheme: dark)")
    style = {"light": light, "dark": dark}[scheme]
    return [re.search(rf"--{prefix}{i}: (#[0-9a-f]+)", style)[1] for i in range(count)]


def least_distance(colors, sight):
    pairs = itertools.combinations([lab(color, sight) for color in colors], 2)
    return min(np.linalg.norm(one - other) for one, other in pairs)


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_color_blind_people_tell_series_and_levels_apart(scheme, sight):
    assert least_distance(palette("s", 5, scheme), sight) > 15
    levels = [lab(color, sight) for color in palette("h", LEVELS, scheme)]
    steps = [np.linalg.norm(b - a) for a, b in itertools.pairwise(levels)]
    assert min(steps) > 5
    assert max(steps) < 2.1 * min(steps), "equal steps of cost look about equal"
    lightness = [level[0] for level in levels]
    assert lightness == sorted(lightness, reverse=scheme == "light"), "ordered without hue, too"


def test_colors_that_look_the_same_are_found():
    assert least_distance(["#1f77b4", "#9467bd"], "protan") < 15  # two of matplotlib's first five
    assert (
        least_distance(["#2e7d4f", "#b3541e"], "all cones") > 50 > 15 > least_distance(["#6d7d2f", "#8f6a1e"], "deutan")
    )
