"""Pages in a real browser, and checks of a page as a person meets it. Each check returns the faults that it finds."""

import contextlib
import re
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS, SCHEMES = (390, 1280), ("light", "dark")
LEAST_CONTRAST = 4.5  # of text, WCAG 2.2, level AA

# Relative luminance, colors behind an element, and a short name of it for messages.
_HELPERS = """
const parsed = (color) => { const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
const linear = (v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3]));
const behind = (element) => {
  const layers = [];
  for (let e = element; e; e = e.parentElement) layers.push(parsed(getComputedStyle(e).backgroundColor));
  return layers.reverse().reduce((under, top) => over(top, under), [255, 255, 255]);
};
const contrast = (one, other) => {
  const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (high + .05) / (low + .05);
};
const name = (e) => `<${e.tagName.toLowerCase()}${e.id ? "#" + e.id : ""}> ${e.textContent.trim().slice(0, 30)}`;
const shown = (e) => e.checkVisibility({ visibilityProperty: true });
"""

_FAINT = """
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const found = [];
for (let node; (node = walker.nextNode());) {
  const e = node.parentElement, style = getComputedStyle(e);
  if (!node.data.trim() || ["SCRIPT", "STYLE"].includes(e.tagName) || !shown(e) || e.disabled) continue;
  const ink = parsed(e instanceof SVGElement ? style.fill : style.color), under = behind(e);
  const value = contrast(over(ink, under), under);
  if (value < LEAST) found.push(`contrast ${value.toFixed(2)}: ${name(e)}`);
}
for (const e of document.querySelectorAll("[placeholder]")) {
  const value = contrast(parsed(getComputedStyle(e, "::placeholder").color), behind(e));
  if (shown(e) && value < LEAST) found.push(`contrast ${value.toFixed(2)}: placeholder of ${name(e)}`);
}
return found;
"""

_STRUCTURE = """
const found = [], all = (selector) => [...document.querySelectorAll(selector)];
if (all("h1").length !== 1 || all("main").length !== 1) found.push("not one h1 in one main");
let before = 0;
for (const e of all("h1, h2, h3, h4")) {
  if (Number(e.tagName[1]) > before + 1) found.push(`a level is left out before ${name(e)}`);
  before = Number(e.tagName[1]);
}
for (const e of all("table")) if (!e.caption || !e.caption.textContent.trim()) found.push(`no caption: ${name(e)}`);
for (const e of all("th")) if (!["row", "col"].includes(e.scope)) found.push(`no scope: ${name(e)}`);
for (const e of all("svg")) {
  if (e.getAttribute("role") !== "img" || !e.getAttribute("aria-label")) found.push("a chart without a name");
  if (!e.querySelector("text")) found.push("a chart whose text is no text");
  if (!e.closest("figure").querySelector("figcaption").textContent) found.push("a chart without a caption");
}
for (const e of all("input, textarea, select")) if (!e.labels.length) found.push(`no label: ${name(e)}`);
const ids = all("[id]").map(e => e.id);
for (const id of new Set(ids)) if (ids.filter(x => x === id).length > 1) found.push(`twice: id ${id}`);
if (document.documentElement.lang !== "en" || !document.title) found.push("no language or no title");
return found;
"""

# What the keyboard must reach: controls, and boxes that scroll.
_CONTROLS = """
const controls = [...document.querySelectorAll("a[href], button, input, textarea, select, summary, [tabindex='0']")];
const boxes = [...document.querySelectorAll("body *")].filter(e => e.scrollWidth > e.clientWidth + 1
  && ["auto", "scroll"].includes(getComputedStyle(e).overflowX) && !["TEXTAREA", "INPUT"].includes(e.tagName));
const wanted = new Set([...controls, ...boxes].filter(e => shown(e) && !e.disabled));
[...wanted].forEach((e, i) => { e.dataset.wanted = i; });
return [...wanted].map(name);
"""

_FOCUS = """
const e = document.activeElement, style = getComputedStyle(e);
const outline = parsed(style.outlineColor), under = behind(e.parentElement || e);
const visible = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2
  && contrast(over(outline, under), under) >= 3;
return [e.dataset.wanted ?? null, visible, name(e)];
"""


def ask(tab, script):
    """Return what a script of the tests returns in the page. It is text that only the tests write."""
    return tab.evaluate(f"(() => {{ {_HELPERS} {script} }})()")


def scrolls_sideways(tab):
    """Find a page that is wider than its window, and the elements that make it so."""
    width, room = tab.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    return [f"the page is {width} pixels wide in a window of {room}"] if width > room else []


def faint_text(tab):
    return ask(tab, _FAINT.replace("LEAST", str(LEAST_CONTRAST)))


def unnamed_parts(tab):
    """Find faults of structure: headings, captions, scopes, names of charts, labels, ids."""
    return ask(tab, _STRUCTURE)


def unreachable_parts(tab):
    """Press Tab through the page. Find controls that it does not reach, and those whose focus cannot be seen."""
    names, reached, found = ask(tab, _CONTROLS), set(), []
    tab.evaluate("() => { document.activeElement.blur(); window.getSelection().removeAllRanges(); scrollTo(0, 0); }")
    for _ in range(len(names) + 2):
        tab.keyboard.press("Tab")
        number, visible, name = ask(tab, _FOCUS)
        if number is not None:
            reached.add(int(number))
            if not visible:
                found.append(f"focus cannot be seen: {name}")
    return found + [f"the keyboard does not reach {name}" for i, name in enumerate(names) if i not in reached]


CHECKS = (scrolls_sideways, faint_text, unnamed_parts, unreachable_parts)


def faults(tab):
    """Return all faults of an open page, with the errors and requests noted since it was opened."""
    return [*(fault for check in CHECKS for fault in check(tab)), *tab.noted]


@contextlib.contextmanager
def browser():
    """Start a browser; the test is skipped where Playwright or a Chromium is missing."""
    api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield started
        finally:
            started.close()


def opened(started, address, width=1280, scheme="light"):
    """Open a page. `noted` of the result lists errors in its console, and requests to elsewhere."""
    tab = started.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    tab.noted = []
    own = re.match("[a-z]+://[^/]*", address)[0]

    def note_request(request):
        if not request.url.startswith((own, "data:")):
            tab.noted.append(f"a request to {request.url}")

    def note_message(message):
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            tab.noted.append(f"console: {message.text}")

    tab.on("request", note_request)
    tab.on("console", note_message)
    tab.on("pageerror", lambda error: tab.noted.append(f"script: {error}"))
    tab.goto(address)
    return tab
