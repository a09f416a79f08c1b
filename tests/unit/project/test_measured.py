"""The table of measured methods: written from the figures that are kept, and every method has its place in it."""

import json
import re
import runpy
from typing import Any

import pytest

from launch.config.shipped_files import groups
from tests.command import ROOT


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts/measure_methods.py"))


def test_every_method_is_in_one_part_on_the_shop(script: dict[str, Any]) -> None:
    named = [m for part in script["PARTS"].values() if part.stage is script["SHOP"] for m in part.methods]
    assert sorted(named) == sorted(groups()["method"])


def test_every_part_has_methods_to_compare(script: dict[str, Any]) -> None:
    assert not [name for name, part in script["PARTS"].items() if len(part.methods) < 2], "`opd compare` takes two"


def test_the_page_is_that_of_the_figures(script: dict[str, Any]) -> None:
    if any(script["FIGURES"].glob("*.json")):  # there is no page before the first part is measured
        assert script["PAGE"].read_text() == script["page"](), "record it with `python -m tests.records`"


def test_figures_are_of_all_methods_of_their_part_and_three_seeds(script: dict[str, Any]) -> None:
    for file in script["FIGURES"].glob("*.json"):
        figures = json.loads(file.read_text())
        assert {arm["arm"] for arm in figures["arms"]} == set(script["PARTS"][file.stem].methods)
        assert {(run["arm"], run["seed"]) for run in figures["runs"]} == {
            (method, seed) for method in script["PARTS"][file.stem].methods for seed in (0, 1, 2)
        }


@pytest.mark.parametrize(
    ("page", "section"),
    [("locks_self", "The student as its own teacher"), ("noisy", "A teacher that is wrong on a third")],
)
def test_figures_of_a_stage_page_are_the_measured_ones(script: dict[str, Any], page: str, section: str) -> None:
    table = script["PAGE"].read_text().partition(f"## {section}")[2].partition("\n## ")[0]
    measured = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    shown = re.sub(r"^\| GRPO[^|]*", "| `grpo_token_mean` ", (ROOT / f"docs/stages/{page}.md").read_text(), flags=re.M)
    rows = re.findall(
        r"^\| `(\w+)`[^|]*\| ((?:[\d.]+, ){2}[\d.]+ %) \| ([\d., ]+ %) \|(?: ([\d.]+ T) \|)?$", shown, re.M
    )
    assert {method for method, *_ in rows} == set(measured)
    for method, sampled, greedy, flops in rows:
        assert f"| {sampled} | {greedy} |" in measured[method] and flops in measured[method]
