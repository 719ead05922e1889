"""The committed pictures are those that docs/pictures/draw.py draws."""

import runpy
from pathlib import Path
from xml.etree import ElementTree

PICTURES = Path(__file__).resolve().parents[2] / "docs" / "pictures"


def test_pictures_are_as_drawn():
    drawn = {name: str(draw()) for name, draw in runpy.run_path(str(PICTURES / "draw.py"))["PICTURES"].items()}
    assert drawn == {path.stem: path.read_text(encoding="utf-8") for path in PICTURES.glob("*.svg")}
    assert all(ElementTree.fromstring(text).find("{*}title").text for text in drawn.values())
