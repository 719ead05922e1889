"""The page at `/`: self-contained, and in a browser (where there is one) it writes a text in colors."""

import json
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("serving", exc_type=ImportError)

from browser import SCHEMES, WIDTHS, browser, faults, opened
from serving import NAME, text_of

from resnet_bk.serve.page import headers, page


class Elements(HTMLParser):
    """Attributes of the elements of a page, by name."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_the_page_is_served_with_a_policy_that_allows_itself_only(client):
    answer = client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert answer.text == page(NAME, 4, 0.8, 2**24)


def test_nothing_comes_from_elsewhere():
    text = page("x", 4, None, 10)
    assert not re.search(r"https?://|//[a-z]|@import|url\(|style=\"|onclick=", text)
    elements = Elements(text).found
    assert not [tag for tag, attributes in elements if {"src", "href"} & set(attributes)]
    labels = {attributes["for"] for tag, attributes in elements if tag == "label" and "for" in attributes}
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert labels <= set(ids)
    assert len(ids) == len(set(ids))
    assert ("html", {"lang": "en"}) in elements
    assert any(attributes.get("name") == "viewport" for _, attributes in elements)
    assert "prefers-color-scheme: dark" in text


def test_a_name_cannot_leave_its_place():
    name = '</script><script>alert(1)</script>"'
    text = page(name, 4, 0.5, 10)
    assert text.count("<script") == 2
    data = re.search(r'<script type="application/json" id="model">(.*?)</script>', text)[1]
    assert json.loads(data) == {"name": name, "blocks": 4, "threshold": 0.5, "mostTokens": 10}
    assert headers()["Content-Security-Policy"].count("sha256-") == 2


@pytest.fixture(params=SCHEMES)
def tab(request, client):
    """Open the page in a browser; the test fails if its script fails or breaks its policy."""
    with browser() as started:
        tab = opened(started, str(client.base_url), 390, request.param)
        expect = pytest.importorskip("playwright.sync_api").expect
        tab.says = lambda text: expect(tab.locator("#status")).to_have_text(re.compile(text), timeout=20_000)
        yield tab
        assert tab.noted == []


def colors(tab):
    return set(tab.locator("#text span").evaluate_all("all => all.map(x => getComputedStyle(x).backgroundColor)"))


def test_in_a_browser(tab, model):
    """By the keyboard alone: a prompt, its settings, the text in colors, another threshold; an endless text stops."""
    tab.locator("#prompt").press("Control+a")
    tab.keyboard.type("ab")
    for value in ("60", "1", "5"):  # tokens, temperature, seed
        tab.keyboard.press("Tab")
        tab.keyboard.press("Control+a")
        tab.keyboard.type(value)
    tab.keyboard.press("Enter")
    tab.says("^60 tokens.* 4.0 of 4 blocks a token")
    assert tab.locator("#text").text_content() == "ab" + text_of(model, "ab", max_new_tokens=60, seed=5)
    titles = tab.locator("#text span").evaluate_all("all => all.map(x => x.title)")
    assert all(re.fullmatch(r"4( \+ 4)* of 4 blocks", title) for title in titles)
    before = colors(tab)
    tab.keyboard.press("Tab")  # the key
    tab.keyboard.press("Tab")  # the threshold
    tab.keyboard.press("Home")
    assert tab.locator("#shown").text_content() == "0.00"
    tab.keyboard.press("Tab")  # the button
    tab.keyboard.press("Enter")
    tab.says("^60 tokens.* 1.0 of 4 blocks a token")
    assert len(before) == len(colors(tab)) == len(before ^ colors(tab)) / 2 == 1
    tab.locator("#prompt").fill(" " * 400 + "x" * 400)
    tab.locator("#go").click()
    tab.says("^60 tokens")
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 800})
        assert faults(tab) == []
    tab.locator("#tokens").fill("9000000")
    tab.locator("#go").click()
    tab.says("^[0-9]{3,} tokens")
    tab.keyboard.press("Escape")
    tab.says("^stopped after [0-9]{3,} tokens")
    assert tab.locator("#go").is_enabled()


def test_the_blocks_of_each_byte_are_in_a_table(tab):
    tab.locator("#go").click()
    tab.says("^400 tokens")
    tab.locator("summary").press("Enter")
    spans = tab.locator("#text span").evaluate_all("all => all.map(x => [x.textContent, x.title])")
    rows = tab.locator("#rows tr").evaluate_all("all => all.map(x => [...x.cells].map(y => y.textContent))")
    spaces = str.maketrans({" ": "␠", "\n": "␊", "\t": "␉"})
    assert rows == [[str(i), text.translate(spaces), title] for i, (text, title) in enumerate(spans, 1)]
    assert len(rows) > 200
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 800})
        assert faults(tab) == []
    tab.locator("#go").click()
    tab.says("^400 tokens")
    assert tab.locator("#rows tr").count() == 0, "of the text before"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("document.documentElement.style.setProperty('--text', '#555')", "contrast"),
        ("document.querySelector('label').remove()", "no label: <textarea#prompt>"),
        ("document.getElementById('text').style.width = '3000px'", "pixels wide"),
        (
            "document.getElementById('stop').disabled = false; document.getElementById('stop').tabIndex = -1",
            "does not reach",
        ),
        ("document.getElementById('go').style.outline = 'none'", "focus cannot be seen: <button#go>"),
    ],
)
def test_a_planted_fault_is_found(client, script, message):
    with browser() as started:
        tab = opened(started, str(client.base_url), 390, "dark")
        assert faults(tab) == []
        tab.evaluate(script)
        assert [one for one in faults(tab) if message in one]


def test_an_error_is_shown_in_a_browser(tab):
    tab.locator("#prompt").fill("")
    tab.locator("#go").click()
    tab.says("^prompt: got one without a token")
    assert tab.locator("#go").is_enabled()
