"""The picture of the system is what its source draws, and true of the tree."""

import re
import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[3]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def source() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts/architecture_svg.py"))


@pytest.fixture(scope="module")
def drawn(source: dict[str, Any]) -> ElementTree.Element:
    return ElementTree.fromstring(source["picture"]())


def test_the_picture_is_what_its_source_draws(source: dict[str, Any]) -> None:
    assert source["PICTURE"].read_text() == source["picture"](), "record it with `python -m tests.records`"


def test_its_rooms_are_folders(drawn: ElementTree.Element) -> None:
    rooms = [one.text or "" for one in drawn.iter(f"{SVG}text") if "room" in one.get("class", "")]
    assert len(rooms) == 6
    assert not [room for room in rooms if not (ROOT / room).is_dir()]


def test_text_is_large_enough_for_a_phone(source: dict[str, Any], drawn: ElementTree.Element) -> None:
    sizes = [int(size) for size in re.findall(r"(\d+)px", source["STYLE"])]
    assert sizes and min(sizes) * 358 / source["WIDTH"] >= 10  # 390 pixels less a page's margins
    assert not [one for one in drawn.iter() if "font-size" in one.attrib or "style" in one.attrib]


def test_it_asks_nothing_of_the_network(source: dict[str, Any]) -> None:
    text = source["picture"]()
    assert not re.search(r"url\(|@import|href|<script", text)
    assert "prefers-color-scheme: dark" in text
