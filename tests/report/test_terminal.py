"""What is printed: plain text, whatever it holds, on any console."""

import io

import pytest
from rich.console import Console

from resnet_bk.config import visible
from resnet_bk.report.tables import print_table
from resnet_bk.report.terminal import COLORS, colored, console, say, show

ODD = "a[/b]c [bold]:smile: \x1b[31mred\x07 \x7f \x9b0m \u202egpj.exe\u2066 \udcff tab\there\r\nend"
SEEN = "a[/b]c [bold]:smile: ␛[31mred␇ ␡ \\u009b0m \\u202egpj.exe\\u2066 \\udcff tab\there␍\nend"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(params=[{}, {"markup": False, "emoji": False, "highlight": False}], ids=["rich's own", "ours"])
def printed(request):
    """Return a console, as a user may bring it or as ours, and a function that returns what it has printed."""
    made = Console(file=io.StringIO(), width=80, **request.param)
    return made, lambda: made.file.getvalue()


def test_characters_that_a_terminal_obeys_are_visible():
    assert visible(ODD) == SEEN
    assert visible("é 漢 שלום 👩\u200d🔬\n\t") == "é 漢 שלום 👩\u200d🔬\n\t"
    hidden = [*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
    for code in hidden:
        if chr(code) not in "\n\t":
            assert visible(chr(code)).isprintable(), hex(code)


def test_a_line_is_plain_text_and_is_not_wrapped(printed):
    made, text = printed
    say(made, ODD + "x" * 200, style="bold")
    assert text() == SEEN.expandtabs() + "x" * 200 + "\n"


def test_a_table_is_plain_text(printed):
    made, text = printed
    print_table(made, "Run [/x] :smile:\x1b", [("[red]a[/red]", "\u202e:smile:")], ["[bold].x", "y\x1b"])
    for part in ("Run [/x] :smile:␛", "[red]a[/red]", "\\u202e:smile:", "[bold].", "y␛"):
        assert part in text()


@pytest.mark.parametrize("width", [1, 8, 20, 40])
def test_a_narrow_table_leaves_nothing_out(width):
    made = Console(file=io.StringIO(), width=width)
    print_table(made, "title", [("name of a value", "1234567890" * 5)])
    digits = "".join(character for character in made.file.getvalue() if character.isdigit())
    assert digits == "1234567890" * 5


def test_a_text_goes_unchanged_into_a_file_and_visible_into_a_terminal():
    file, terminal = Console(file=io.StringIO()), Console(file=Terminal(), color_system=None)
    for made in (file, terminal):
        show(made, ODD)
    assert file.file.getvalue() == ODD + "\n"
    assert terminal.file.getvalue() == SEEN.expandtabs() + "\n"
    quiet = Console(file=io.StringIO(), quiet=True)
    show(quiet, ODD)
    assert quiet.file.getvalue() == ""


def test_colored_text_is_visible():
    text = colored([("a\x1b", 0.0), ("\u202eb", 1.0)])
    assert text.plain == "a␛\\u202eb"
    assert [span.style for span in text.spans] == [COLORS[0], COLORS[-1]]


@pytest.mark.parametrize("value", ["0", "-1", "abc", "²", "٣", "", "9" * 5000])
def test_an_odd_size_of_the_terminal_is_passed_over(monkeypatch, capsys, value):
    monkeypatch.setenv("COLUMNS", value)
    monkeypatch.setenv("LINES", value)
    print_table(console(), "title", [("name", "value")])
    assert "value" in capsys.readouterr().out


def test_the_size_of_the_terminal_is_kept(monkeypatch):
    monkeypatch.setenv("COLUMNS", "123")
    assert console().width == 123
