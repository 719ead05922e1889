"""``resnet-bk report``: what the page shows of which runs, how runs are grouped, what is refused."""

import gc
import json
import math
import re
import shutil
import weakref
from pathlib import Path

import pytest
import yaml

from resnet_bk.cli import main
from resnet_bk.config import shown
from resnet_bk.inference import loading
from resnet_bk.study import comparison, run
from resnet_bk.study.finished import LARGEST_METRICS, LARGEST_RESULTS, grouped, read_runs

TEXT = "def add(a, b):\n    return a + b  # <sum> & more\n" * 8
MEASURE = run.measure
AGAIN = "It was read again from the run&#x27;s data source, as that is now."


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a folder with a corpus, one of whose texts is held out, and a run of a few steps."""
    place = tmp_path_factory.mktemp("trained")
    (place / "corpus").mkdir()
    for i in range(3):
        (place / "corpus" / f"{i}.py").write_text(f"# file {i}\n" + TEXT)
    shape = ("--model.d_model=16", "--model.n_layers=2", "--model.n_seq=32", "--model.num_experts=1")
    budget = ("--max_steps=4", "--log_every=1", "--batch_size=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "measure", lambda model, text, size: MEASURE(model, text, size, 1, 32, 2, 1))
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        patch.chdir(place)
        assert main(["train", *shape, *budget, "--data.source=corpus", "--output_dir=run"]) == 0
    shutil.rmtree(place / "run" / "checkpoints")
    return place


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "corpus", tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make(trained, place, monkeypatch):
    """Make finished runs: the trained one with other settings and results, which are given by dotted name.

    Figures are not drawn, because that takes longer than everything else.
    """
    monkeypatch.setattr(comparison.figures, "figure_svg", lambda figure: "<svg></svg>")

    def make(name, bits=2.0, prefill=1e5, settings=(), **changed):
        folder = shutil.copytree(trained / "run", place / name)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        values = json.loads((folder / "results.json").read_text())
        for target, changes in ((config, dict(settings)), (values, changed)):
            for dotted, value in changes.items():
                *sections, last = dotted.replace("__", ".").split(".")
                inner = target
                for section in sections:
                    inner = inner[section]
                inner[last] = value
        values["held_out"]["bits_per_byte"], values["costs"]["prefill"] = bits, prefill
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "results.json").write_text(json.dumps(values))
        return name

    return make


@pytest.fixture
def refused(capsys):
    """Run a command that must be refused. Returns its one line on standard error."""

    def refused(*arguments):
        capsys.readouterr()
        assert main(["report", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said.removeprefix("resnet-bk: error: ").rstrip()

    return refused


def page_of(*arguments):
    assert main(["report", *arguments]) == 0
    return Path("report.html").read_text()


def lines_of(page):
    """Return the cells of each row of the table, its head first."""
    table = re.sub("<wbr>|</?span[^>]*>", "", re.search(r'<table class="columns">(.*?)</table>', page)[1])
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in re.findall(r"<tr>(.*?)</tr>", table)]


def colored(page):
    """Return the text of each section in colors, all levels, and all notes."""
    maps = re.findall(r"<pre>(<span.*?)</pre>", page, re.DOTALL)
    texts = ["".join(re.findall(r">([^<]*)</span>", one)) for one in maps]
    return (
        texts,
        re.findall(r'class="(h\d)"', "".join(maps)),
        re.findall(r'title="([^"]+)"', "".join(maps)),
    )


def test_a_page_needs_nothing_but_itself_and_shows_every_part(trained, place):
    shutil.copytree(trained / "run", place / "run")
    page = page_of("run")
    results = json.loads((place / "run" / "results.json").read_text())
    head, line = lines_of(page)
    shown = dict(zip(head, line, strict=True))
    costs, training = results["costs"], results["training"]
    assert shown == {
        "techniques": "plain",
        "runs": "run (seed 0)",
        "parameters": f"{costs['parameters']:,}",
        "held-out bits per byte": f"{results['held_out']['bits_per_byte']:.3f}",
        "perplexity per byte": f"{results['held_out']['perplexity_per_byte']:,.3f}",
        "FLOPs per byte": f"{costs['flops_per_byte']:,.0f}",
        "prefill, us per byte": f"{1e6 / costs['prefill']:,.1f}",
        "decode, us per byte": f"{1e6 / costs['decode']:,.1f}",
        "training, s": f"{training['seconds']:,.1f}",
        "training, bytes/s": f"{training['bytes_per_second']:,.0f}",
    }
    assert page.count("<svg") == page.count("</svg>") == 6
    for part in (
        "<h1>Runs compared: 1 run in 1 group</h1>",
        "resnet-bk train --config run/config.yaml",
        "resnet-bk report run --output report.html --max_tokens 600",
        f"<br>torch {results['versions']['torch']}<br>",
    ):
        assert part in page
    assert not re.search(r"<script|<img|<link|<iframe|@import|url\(http|\son\w+=", page)
    assert not re.search(r'(src|href)="(?!#)', page)


def test_runs_that_differ_in_the_seed_only_are_a_group(make):
    seeds = [make(f"s{i}", settings=[("seed", i), ("output_dir", f"runs/{i}"), ("resume", True)]) for i in range(3)]
    others = [
        make("heads", settings=[("model.n_heads", 2)]),
        make("longer", settings=[("max_steps", 9)]),
        make("deep", settings=[("model.depth.policy", "act")]),
        make("other", training__train_sha256="0"),
    ]
    groups = grouped(read_runs("x", [seeds[0], *others, *seeds[1:]]))
    assert [[one.folder for one in group.runs] for group in groups] == [seeds, *([other] for other in others)]
    names = ["plain (s0)", "plain (heads)", "plain (longer)", "depth", "plain (other)"]
    assert [group.name for group in groups] == names


def test_the_line_of_a_group_has_medians_and_spreads(make):
    for i, (bits, cost) in enumerate(((2.0, 5), (2.3, 1), (2.1, 2))):
        make(f"s{i}", bits, 1e6 / cost, [("seed", i)])
    head, plain, deep = lines_of(page_of("s0", "s1", make("deep", settings=[("model.depth.policy", "act")]), "s2"))
    assert (plain[0], deep[0]) == ("plain", "depth")
    found = dict(zip(head, plain, strict=True))
    assert found["runs"] == "s0 (seed 0), s1 (seed 1), s2 (seed 2)"
    assert found["held-out bits per byte"] == "2.100 (2.000 to 2.300)"
    assert found["perplexity per byte"] == "4.287 (4.000 to 4.925)"
    assert found["prefill, us per byte"] == "2.0 (1.0 to 5.0)"
    assert found["parameters"] == dict(zip(head, deep, strict=True))["parameters"]


def test_each_front_is_that_of_the_medians(make, monkeypatch):
    drawn = {}
    figure = comparison.figures.pareto

    def keep(points, front, label):
        drawn[label] = (points, front)
        return figure(points, front, label)

    monkeypatch.setattr(comparison.figures, "pareto", keep)
    make("a0", 2.0, 1e6 / 3)
    make("a1", 1.8, 1e6 / 5, [("seed", 1)])
    make("slow", 2.4, 1e6 / 9, [("model.n_heads", 2)])  # worse than a in both
    make("fast", 2.2, 1e6 / 1, [("model.depth.policy", "act")], training__seconds=9e9)
    page_of("a0", "a1", "slow", "fast")
    points, front = drawn["prefill, us per byte"]
    assert list(points) == ["plain (a0)", "plain (slow)", "depth"]
    assert points["plain (a0)"] == (pytest.approx((1.9, 1.8, 2.0)), pytest.approx((4, 3, 5)))
    assert front == [2, 0]
    assert drawn["training, s"][1] == [0]
    assert set(drawn) == {"prefill, us per byte", "decode, us per byte", "training, s", "FLOPs per byte"}


def test_curves_are_over_seconds_and_over_bytes_read(make, monkeypatch):
    calls = []
    figure = comparison.figures.compared_curves
    monkeypatch.setattr(comparison.figures, "compared_curves", lambda *args: calls.append(args) or figure(*args))
    make("a")
    make("short", settings=[("seed", 1)], training__bytes_per_second=math.nan)
    metrics = [json.loads(line) for line in Path("a/metrics.jsonl").read_text().splitlines()]
    Path("short/metrics.jsonl").unlink()
    page = page_of("a", "short")
    ((curves, read),) = calls
    expected = [(line["seconds"], i * 2 * 32 / 1e6, line["bits_per_byte"]) for i, line in enumerate(metrics, 1)]
    assert curves == {"plain": [expected]}
    assert read == "million bytes read"
    assert "Too short for a log line: short." in page


@pytest.mark.parametrize("speed", [None, math.nan], ids=["null", "NaN, as earlier versions wrote it"])
def test_a_run_without_a_log_line_has_neither_speed_nor_curve(make, speed):
    make("short", training__bytes_per_second=speed)
    Path("short", "metrics.jsonl").unlink()
    page = page_of("short")
    assert lines_of(page)[1][-1] == "not logged"
    assert page.count("<svg") == 4


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, "x", None], ids=repr)
def test_the_speed_of_a_run_with_log_lines_is_a_positive_number(make, refused, value):
    make("a", training__bytes_per_second=value)
    said = f"a/results.json: training.bytes_per_second: got {value!r}, allowed 1e-12 to 1e+24"
    assert refused("a") == said


@pytest.mark.parametrize("value", [5.0, 0, math.inf, "x"], ids=repr)
def test_a_run_without_a_log_line_has_no_other_speed(make, refused, value):
    make("a", training__bytes_per_second=value)
    Path("a", "metrics.jsonl").unlink()
    said = f"a/results.json: training.bytes_per_second: got {value!r}, allowed null: no speed was logged"
    assert refused("a") == said


def test_one_text_is_colored_by_the_costs_of_each_group_on_one_scale(make, monkeypatch):
    make("a")
    make("b", settings=[("model.n_heads", 2)])
    make("c", settings=[("seed", 1)])
    spend, factors = comparison.spend, iter((1, 2))

    def scaled(*arguments):
        spending = spend(*arguments)
        spending.cost.mul_(next(factors))
        return spending

    monkeypatch.setattr(comparison, "spend", scaled)
    page = page_of("a", "b", "c", "--max_tokens", "40")
    texts, levels, notes = colored(page)
    held_out = ("# file 0\n" + TEXT)[:40]  # before anything that HTML escapes
    assert texts == [held_out] * 2
    assert re.findall("<h3>(.*?)</h3>", page) == ["plain (a)", "plain (b)"]
    assert "The beginning of 0.py" in page
    assert AGAIN in page
    assert set(levels[40:]) == {"h7"}
    assert "h7" not in levels[:40]
    assert "1.00 of the mean; " in notes[1]


def test_only_one_model_is_in_memory_at_a_time(make, monkeypatch):
    models, alive = [], []

    def load(folder):
        gc.collect()
        alive.append(sum(model() is not None for model in models))
        model, tokenizer = loading.load(folder)
        models.append(weakref.ref(model.model))  # a ledger refers to it
        return model, tokenizer

    monkeypatch.setattr(comparison, "load", load)
    page_of(*(make(f"a{i}", settings=[("max_steps", i + 1)]) for i in range(4)))
    assert max(alive) == 1


def test_the_text_may_be_given(make, refused):
    make("a")
    Path("mine.txt").write_text("x < y")
    page = page_of("a", "--text", "mine.txt")
    assert colored(page)[0] == ["x &lt; y"]
    assert AGAIN not in page
    Path("mine.txt").write_text("")
    assert refused("a", "--text", "mine.txt") == "report.text: mine.txt has no token; give a longer text"
    assert refused("a", "--text", "none") == "report.text: none is not a file; give a text file, or '-'"


def test_without_a_text_or_a_model_the_page_says_so(make):
    make("a")
    make("b", settings=[("model.n_heads", 2)])
    shutil.rmtree("b/model")
    page = page_of("a", "b")
    assert len(colored(page)[0]) == 1
    assert "plain (b): no colors, the model of b cannot be loaded: b: the run has neither a finished model" in page
    shutil.rmtree("a/model")
    assert "<pre>" not in page_of("a", "b")
    shutil.rmtree("corpus")
    assert "No text to color: data.source: &#x27;corpus&#x27; is not a file, a folder" in page_of("a", "b")


def test_versions_that_differ_are_shown_with_their_runs(make):
    make("a", versions__torch="1.0", versions__machine="m")
    make("b", settings=[("seed", 1)], versions__torch="2.0", versions__machine="m")
    make("c d", settings=[("seed", 2)], versions__torch="1.0", versions__machine="m")
    footer = page_of("a", "b", "c d").partition("<footer>")[2]
    assert "<br>torch 1.0 (a, c d); torch 2.0 (b)<br>" in footer
    assert "<br>machine m<br>" in footer
    assert "<br>resnet-bk train --config &#x27;c d/config.yaml&#x27;<br>" in footer
    assert "<br>resnet-bk report a b &#x27;c d&#x27; --output report.html --max_tokens 600</footer>" in footer


def test_times_of_different_machines_are_not_compared(make):
    said = "The runs were timed on different machines or with different numbers of threads"
    make("a", versions__machine="m, 2 threads")
    make("b", settings=[("seed", 1)], versions__machine="m, 2 threads")
    make("c", settings=[("seed", 2)], versions__machine="m, 1 threads")
    assert said not in page_of("a", "b")
    assert page_of("a", "b", "c").count(said) == 1


def test_runs_that_cannot_be_compared(make, refused):
    make("a")
    make("b", training__held_out_sha256="0")
    assert refused("a", "b").startswith("report.runs: a and b were scored on different held-out text")
    assert refused("a", "./a") == "report.runs: a and ./a are the same run; give each once"
    Path("link").symlink_to("a")
    assert refused("a", "link") == "report.runs: a and link are the same run; give each once"


def test_folders_without_a_finished_run(make, refused):
    assert refused() == "report.runs: missing; usage: resnet-bk report RUN..."
    assert refused("none") == "report.runs: none is not a run of `resnet-bk train`: none/config.yaml is missing"
    assert refused("corpus").startswith("report.runs: corpus is not a run")
    make("a")
    Path("a/results.json").unlink()
    command = "resnet-bk train --config a/config.yaml --resume true"
    assert refused("a") == f"report.runs: a is not finished: a/results.json is missing; resume with: {command}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "a/config.yaml: train: got None, allowed a mapping of fields to values"),
        (b"- 1", "a/config.yaml: train: got [1], allowed a mapping of fields to values"),
        (b"[1", "report.runs: a/config.yaml is not plain YAML at line 1"),
        (b"\xff", "report.runs: a/config.yaml is not UTF-8 at byte 0"),
        (b"max_steps: 3", "a/config.yaml: is damaged (KeyError: 'model')"),
        (b"model: {d_modle: 8}", "a/config.yaml: train.model: unknown field 'd_modle'; did you mean 'd_model'?"),
        (b"model: {d_model: x}\ndata: {}", "a/config.yaml: model.d_model: got 'x', allowed an integer from 1"),
        (b"model: {}\ndata: {}\nmax_steps: x", "a/config.yaml: train.max_steps: got 'x', allowed an integer from 1"),
        (b"model: {}\ndata: {source: 5}\nmax_steps: 1", "a/config.yaml: data.source: got 5, allowed text"),
        (b"x: !!python/object/apply:os.system ['touch canary']", "report.runs: a/config.yaml is not plain YAML at"),
        (b"x: &x [1]\ny: *x", "report.runs: a/config.yaml has a YAML alias (*name), not allowed; write the value out"),
        (b"x: " + b"[" * 99, "report.runs: a/config.yaml nests deeper than the 10 levels allowed"),
        (b"x: " + b"1" * (1 << 16), "report.runs: a/config.yaml has 65539 bytes, allowed at most 65536"),
        (b"x: 1\nx: 2", "report.runs: a/config.yaml has 'x' a second time, at line 2; keep one of them"),
    ],
    ids=range(14),
)
def test_damaged_settings_of_a_run_are_one_line(make, refused, text, message):
    make("a")
    Path("a/config.yaml").write_bytes(text)
    assert refused("a").startswith(message)
    assert not Path("canary").exists()
    assert not Path("report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", b'{"step": 1, "sec', "is damaged (JSONDecodeError: "),
        ("metrics.jsonl", b"5", "is damaged (TypeError: "),
        ("metrics.jsonl", b'{"step": 1, "seconds": 1.0}', "is damaged (KeyError: 'bits_per_byte')"),
        (
            "metrics.jsonl",
            b'{"step": 1, "seconds": 1.0, "bits_per_byte": NaN}',
            "line 1.bits_per_byte: got nan, allowed",
        ),
        ("metrics.jsonl", b'{"step": 1, "seconds": 1.0, "bits_per_byte": 65}', "line 1.bits_per_byte: got 65, allowed"),
        ("results.json", b"", "is damaged (JSONDecodeError: "),
        ("results.json", b"{", "is damaged (JSONDecodeError: "),
        ("results.json", b"[]", "is damaged (TypeError: "),
        ("results.json", b"{}", "is damaged (KeyError: 'held_out')"),
        ("results.json", b"[" * 100_000, "is damaged (RecursionError: "),
    ],
    ids=range(10),
)
def test_a_damaged_file_is_named(make, refused, name, content, message):
    make("a")
    Path("a", name).write_bytes(content)
    assert refused("a").startswith(f"a/{name}: {message}")
    assert not Path("report.html").exists()


@pytest.mark.parametrize(("name", "limit"), [("results.json", LARGEST_RESULTS), ("metrics.jsonl", LARGEST_METRICS)])
def test_a_giant_file_is_not_read(make, refused, name, limit):
    make("a")
    with Path("a", name).open("wb") as file:
        file.truncate(1 << 40)  # sparse
    assert refused("a") == f"report.runs: a/{name} has {1 << 40} bytes, allowed at most {limit}"
    Path("a", name).write_bytes(b"\xff")
    assert refused("a") == f"report.runs: a/{name} is not UTF-8 at byte 0; save it as UTF-8"


@pytest.mark.parametrize("value", [None, "x", True, -1.0, 0, 1e-300, math.inf, 10**400, []], ids=range(9))
@pytest.mark.parametrize("name", ["costs.decode", "training.seconds"])
def test_a_result_of_another_kind_is_refused(make, refused, name, value):
    make("a", **{name: value})
    assert refused("a") == f"a/results.json: {name}: got {shown(value)}, allowed 1e-12 to 1e+24"


@pytest.mark.parametrize("bits", [-0.1, 64.1, 1e9, math.nan, None])
def test_bits_per_byte_are_from_0_to_64(make, refused, bits):
    make("a", bits)
    assert refused("a") == f"a/results.json: held_out.bits_per_byte: got {bits}, allowed 0 to 64"


@pytest.mark.parametrize("value", [None, 5, [], "", "\ud800"], ids=range(5))
@pytest.mark.parametrize(("name", "where"), [("versions.torch", "versions.version"), ("costs.decode_setting",) * 2])
def test_a_text_of_another_kind_is_refused(make, refused, name, where, value):
    make("a", **{name: value})
    assert refused("a").startswith(f"a/results.json: {where}: ")


def test_an_earlier_page_is_replaced_and_nothing_else(make, refused):
    make("a")
    Path("mine.html").write_text("<title>mine</title>")
    page_of("a")
    assert "in 1 group" in page_of("a")
    assert refused("a", "--output", "mine.html").startswith("report.output: mine.html exists and is not a page of")
    assert refused("a", "--output", "a/report.html").startswith("report.output: a/report.html exists and is not a page")
    assert refused("a", "--output", "a") == "report.output: a is a folder; name a file"
    assert refused("a", "--output", "no/x.html").startswith("report.output: folder no does not exist")
    assert refused("a", "--max_tokens", "0").startswith("report.max_tokens: got 0, allowed an integer from 1")
    assert refused("a", "") == "report.runs[1]: is empty; give at least one character"
    assert Path("mine.html").read_text() == "<title>mine</title>"


def test_the_help_has_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for part in ("RUN [RUN ...]", "RUN Folders of finished runs of", "--output", "--text", "--max_tokens"):
        assert part in said


def test_runs_may_be_given_in_a_configuration_file(make, refused):
    make("a")
    make("b", settings=[("seed", 1)])
    Path("report.yaml").write_text("runs: [a, b]\n")
    assert "2 runs in 1 group" in page_of("--config", "report.yaml")
    Path("report.yaml").write_text("runs: a\n")
    assert refused("--config", "report.yaml") == "report.yaml.runs: got 'a', allowed a list, each text"
    Path("report.yaml").write_text("runs: []\n")
    assert refused("--config", "report.yaml") == "report.runs: got [], allowed at least one"
