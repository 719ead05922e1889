"""The end of ``resnet-bk train``: results and report are on the disk before anything about them is printed."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from resnet_bk.config import DataConfig, ModelConfig, TrainConfig
from resnet_bk.study import run

MEASURE = run.measure
TEXT = "def add(a, b):\n    return a + b  # sum\n" * 40


class Failing(io.StringIO):
    """A terminal that goes away when the results are printed."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        if "held-out bits per byte" in text:
            raise self.error
        return super().write(text)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Return the settings of a run in a folder whose name is odd in every way."""
    monkeypatch.setattr(run, "measure", lambda model, text, size: MEASURE(model, text, size, 1, 32, 2, 1))
    (tmp_path / "text").write_text(TEXT)
    data = DataConfig(source=str(tmp_path / "text"), cache=str(tmp_path / "cache"))
    model = ModelConfig(d_model=8, n_layers=1, n_seq=16)
    folder = tmp_path / "a[/b]c [bold]:smile: 'é' \x1b"
    return TrainConfig(model=model, data=data, output_dir=str(folder), batch_size=2, max_steps=2, log_every=1)


def test_a_folder_of_any_name_on_a_console_of_the_user(settings):
    console = Console(file=io.StringIO(), width=200)
    results = run.train(settings, console)
    assert results["training"]["steps"] == 2
    printed = console.file.getvalue()
    assert "a[/b]c [bold]:smile: 'é' ␛" in printed
    assert "resnet-bk serve " in printed  # what to do next
    assert "\x1b" not in printed


def test_a_speed_that_was_not_logged_is_null(settings):
    run.train(dataclasses.replace(settings, log_every=10), Console(quiet=True))
    text = (Path(settings.output_dir) / "results.json").read_text()
    results = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert results["training"]["bytes_per_second"] is None


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), UnicodeEncodeError("ascii", "é", 0, 1, "x")])
def test_the_results_are_written_before_they_are_printed(settings, error):
    with pytest.raises(type(error)):
        run.train(settings, Console(file=Failing(error)))
    folder = Path(settings.output_dir)
    assert json.loads((folder / "results.json").read_text())["training"]["steps"] == 2
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert report.endswith("</html>\n")
    assert "b]c [bold]:smile: &#x27;é&#x27; ␛" in report
    assert "\x1b" not in report
