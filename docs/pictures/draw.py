"""Draw the pictures of the guides: python docs/pictures/draw.py writes the .svg files beside this script.

The pictures show ideas. They contain no measurement.
"""

from collections.abc import Callable
from html import escape
from pathlib import Path

HERE = Path(__file__).resolve().parent
DARK, LIGHT, WARM, GREY, INK = "#2f6690", "#cfe0ee", "#e09f3e", "#e6e6e6", "#222222"


class Picture:
    """An SVG file that grows by shapes."""

    def __init__(self, width: int, height: int, title: str):
        self.shapes = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            f'font-size="13" role="img">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        ]

    def box(self, x: float, y: float, w: float, h: float, text: str = "", fill: str = LIGHT, dashed: bool = False):
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="3" fill="{fill}" stroke="{INK}" '
            f'stroke-width="0.8"{dash}/>'
        )
        self.text(x + w / 2, y + h / 2 + 4.5, text, "#ffffff" if fill == DARK else INK)

    def circle(self, x: float, y: float, r: float, text: str = "", fill: str = LIGHT):
        self.shapes.append(f'<circle cx="{x:g}" cy="{y:g}" r="{r:g}" fill="{fill}" stroke="{INK}" stroke-width="0.8"/>')
        self.text(x, y + 4.5, text, "#ffffff" if fill == DARK else INK)

    def text(self, x: float, y: float, text: str, fill: str = INK, anchor: str = "middle"):
        if text:
            self.shapes.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>')

    def arrow(self, x: float, y: float, to_x: float, to_y: float, dashed: bool = False):
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        line = f'<path d="M{x:g} {y:g} {to_x:g} {to_y:g}" stroke="{INK}" marker-end="url(#tip)"{dash}/>'
        self.shapes.append(line)

    def line(self, path: str):
        self.shapes.append(f'<path d="{path}" fill="none" stroke="{INK}"/>')

    def __str__(self) -> str:
        return "\n".join([*self.shapes, "</svg>", ""])


def mixer() -> Picture:
    """A tridiagonal matrix, what is read of its inverses, and the two recurrences that compute it."""
    p, n, size = Picture(760, 290, "A tridiagonal matrix, its propagator, and two recurrences"), 6, 28
    hops = [1, 0.9, 0.8, 0.15, 0.9, 0.8]
    p.text(104, 26, "1. The chain as a matrix")
    p.text(330, 26, "2. What a reader keeps of a writer")
    p.text(600, 26, "3. Computed from left to right")
    for t in range(n):
        for s in range(n):
            near = DARK if s == t else LIGHT if abs(s - t) == 1 else "#ffffff"
            p.box(20 + size * s, 44 + size * t, size, size, "", near)
            if s <= t:
                weight = 1.0
                for j in range(s + 1, t + 1):
                    weight *= hops[j]
                red, green, blue = (round(255 + (dark - 255) * weight) for dark in (47, 102, 144))
                p.box(246 + size * s, 44 + size * t, size, size, "", f"rgb({red},{green},{blue})")
    p.text(104, 236, "diagonal: on-site energies")
    p.text(104, 254, "beside it: links to neighbours")
    p.text(330, 236, "row t reads column s ≤ t;")
    p.text(330, 254, "a weak link, here 3 to 4, ends the past")
    for t in range(4):
        x = 460 + 76 * t
        p.box(x, 56, 46, 30, f"g{t + 1}", LIGHT)
        p.box(x, 128, 46, 30, f"S{t + 1}", DARK)
        p.arrow(x + 23, 86, x + 23, 126)
        p.arrow(x + 23, 200, x + 23, 160)
        p.text(x + 23, 216, f"q k v {t + 1}")
        if t:
            p.arrow(x - 30, 71, x - 2, 71)
            p.arrow(x - 30, 143, x - 2, 143)
    p.text(600, 244, "g: one number for each site and head")
    p.text(600, 262, "S: one matrix for each head, read by q")
    return p


def memory() -> Picture:
    """Contexts of several lengths, looked up in one table."""
    p = Picture(720, 250, "The last bytes are looked up in a table of counts")
    text = "def __in"
    for i, letter in enumerate(text):
        p.box(24 + 28 * i, 30, 28, 28, letter.replace(" ", "␣"), LIGHT)
    p.text(262, 49, "?", anchor="start")
    for row, n in enumerate((2, 4, 8)):
        y = 78 + 44 * row
        left = 24 + 28 * (8 - n)
        p.line(f"M{left} {y - 10}V{y - 4}H248V{y - 10}")
        p.text(20, y + 14, f"order {n}", anchor="start")
        p.box(90, y, 158, 22, "hash of these bytes", "#ffffff")
        p.arrow(250, y + 11, 318, y + 11)
        p.box(320, y, 150, 22, "entry: what followed", LIGHT)
        for i, width in enumerate((46, 18, 9)):
            p.box(320 + 156, y + 1 + 7 * i, width, 6, "", WARM)
        p.arrow(530, y + 11, 598, 126)
    p.circle(612, 126, 12, "+", WARM)
    p.text(612, 78, "embedding")
    p.arrow(612, 84, 612, 111)
    p.arrow(625, 126, 652, 126)
    p.box(654, 104, 52, 44, "blocks", DARK)
    p.text(360, 228, "The table is counted from the training text, in seconds. It is not trained.")
    return p


def multi_scale() -> Picture:
    """Blocks on bytes, then on words, then back on bytes."""
    p = Picture(660, 290, "Inner blocks run once for each word")
    words, x = ["for ", "item ", "in ", "shelf:"], 26
    for i, word in enumerate(words):
        start = x
        for letter in word:
            p.box(x, 30, 32, 28, letter.replace(" ", "␣"), LIGHT)
            x += 32
        p.box(start + 6, 126, x - start - 12, 40, f"chunk {i + 1}", DARK)
        p.arrow(x - 16, 92, x - 16, 124)
        p.arrow(x - 16, 166, x - 16, 206)
    p.box(26, 64, x - 26, 26, "blocks on bytes: run 18 times", "#ffffff")
    p.box(26, 208, x - 26, 26, "back on bytes: each byte gets the last closed chunk", "#ffffff")
    p.text(330, 264, "Blocks on words run 4 times. A chunk reaches the byte at which it closes, and later ones.")
    return p


def learned_length() -> Picture:
    """Windows that chose different numbers of positions."""
    p = Picture(720, 210, "Each window chooses how many of its positions run all blocks")
    for w, (kept, kind) in enumerate(((3, "an easy window"), (7, "a window that gains"), (2, "an easy window"))):
        left = 24 + 232 * w
        for i in range(8):
            p.box(left + 27 * i, 40, 27, 28, "", DARK if i < kept else "#ffffff", dashed=i >= kept)
        p.text(left + 108, 92, f"{kind}: length {kept}")
    p.box(24, 122, 27, 20, "", DARK)
    p.text(60, 137, "runs the trunk and the deep blocks", anchor="start")
    p.box(24, 152, 27, 20, "", "#ffffff", dashed=True)
    p.text(60, 167, "runs the trunk and the bypass, a small feed-forward", anchor="start")
    p.text(420, 152, "Every position gets a prediction.", anchor="start")
    return p


def adaptive_depth() -> Picture:
    """Bytes that stop after different numbers of blocks."""
    p = Picture(720, 290, "Each byte stops after a number of blocks")
    for i, (letter, depth) in enumerate(zip("return x + 1", (6, 4, 2, 2, 2, 2, 2, 8, 4, 4, 2, 8), strict=True)):
        x = 110 + 42 * i
        for block in range(8):
            ran = block < depth
            p.box(x, 226 - 24 * block, 34, 20, "", DARK if ran else "#ffffff", dashed=not ran)
        p.text(x + 17, 264, letter.replace(" ", "␣"))
    for block in range(0, 8, 2):
        p.text(100, 241 - 24 * block, f"block {block + 1}", anchor="end")
        if block:
            p.line(f"M104 {249 - 24 * block}H612")
            p.text(618, 253 - 24 * block, "decision", anchor="start")
    p.text(360, 284, "Blocks above a byte's stop run on the packed sequence of the other bytes only.")
    return p


def sparsity() -> Picture:
    """A chain with sites left out."""
    p = Picture(720, 200, "A chain with sites left out")
    kept = (1, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1)
    before = None
    for t, keep in enumerate(kept):
        x = 50 + 60 * t
        if t:
            p.line(f"M{x - 45} 100H{x - 15}")
        p.circle(x, 100, 15, str(t + 1), DARK if keep else "#ffffff")
        if keep:
            if before is not None and x - before > 60:
                p.line(f"M{before} 82C{before + 20} 40 {x - 20} 40 {x} 82")
            before = x
    p.text(140, 38, "product of the links")
    p.text(530, 38, "product of the links")
    p.circle(40, 160, 9, "", DARK)
    p.text(58, 165, "kept: query and key, writes and reads", anchor="start")
    p.circle(350, 160, 9, "", "#ffffff")
    p.text(368, 165, "left out: the state passes, its output is filled in", anchor="start")
    return p


def experts() -> Picture:
    """A router that is sure takes one expert, another takes two."""
    p = Picture(720, 250, "A token takes as many experts as its router is unsure")
    for i, (name, shares) in enumerate((("an easy byte", (70, 14, 8, 8)), ("a hard byte", (34, 30, 20, 16)))):
        left = 30 + 350 * i
        p.box(left - 16, 100, 100, 34, name, LIGHT)
        p.text(left + 150, 30, "router")
        total = 0
        for e, share in enumerate(shares):
            y, taken = 44 + 46 * e, total < 50
            total += share
            p.box(left + 116, y, share, 26, "", WARM if taken else GREY)
            if taken:
                p.arrow(left + 118 + share, y + 13, left + 226, y + 13)
            p.box(left + 228, y, 80, 26, f"expert {e + 1}", DARK if taken else "#ffffff", dashed=not taken)
        p.arrow(left + 84, 117, left + 112, 117)
    p.text(360, 240, "The likeliest experts run until their probabilities add up to top_p, here 0.5.")
    return p


PICTURES: dict[str, Callable[[], Picture]] = {
    f.__name__.replace("_", "-"): f
    for f in (mixer, memory, multi_scale, learned_length, adaptive_depth, sparsity, experts)
}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (HERE / f"{name}.svg").write_text(str(draw()), encoding="utf-8")
