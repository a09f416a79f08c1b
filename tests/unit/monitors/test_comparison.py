"""A comparison's table and page: costs are intervals, what was not reached is censored, seeds show their range."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from launch.artifacts.run_directory import RunDirectory, append_json
from launch.artifacts.spending import Unit
from launch.report.comparison import Arm, Curve, Goal, Interval, SideBySide, read_arms
from launch.report.comparison_figure import over_seeds
from launch.report.comparison_page import write_comparison
from launch.report.comparison_table import arms_table, as_markdown, cost_cell, ratio_cell, runs_table
from opd.errors import ConfigurationError, DataError
from tests.unit.monitors.test_report import EVIL, Page, assert_stands_alone, point, summary


def arm(root: Path, label: str, seed: int, scores: dict[int, float], config: str = "steps: 20\n") -> Arm:
    directory = RunDirectory.create(root, f"{label.replace('<', '')[:6]}-{seed}")
    directory.write_config(config)
    for step, score in scores.items():
        append_json(directory.evaluations, point(step, score).as_json())
    append_json(directory.evaluations, point(0, 0.977, teacher=True).as_json())
    summary(directory.name).write(directory)
    return Arm(label=label, seed=seed, directory=directory.path)


def two_arms(root: Path) -> list[Arm]:
    return [
        arm(root, "opd", 0, {0: 0.3, 20: 0.6, 40: 0.85, 60: 0.9}),
        arm(root, "opd", 1, {0: 0.3, 20: 0.8, 40: 0.9, 60: 0.95}),
        arm(root, "grpo", 0, {0: 0.3, 200: 0.6, 400: 0.8}),
        arm(root, "grpo", 1, {0: 0.3, 200: 0.7, 400: 0.7}),
    ]


def cells(sides: SideBySide, label: str) -> dict[str, str]:
    """Cells of an arm's row, a `×` with the axis before it."""
    table = arms_table(sides)
    names = [name if name != "×" else f"× {table.columns[i - 1]}" for i, name in enumerate(table.columns)]
    return dict(zip(names, next(row for row in table.rows if row[0] == label), strict=True))


def test_what_every_arm_needed_for_the_score_of_the_reference(tmp_path: Path) -> None:
    sides = read_arms(two_arms(tmp_path), Goal(reference="grpo"))
    assert sides.target == pytest.approx(0.75)
    opd, grpo = cells(sides, "opd"), cells(sides, "grpo")
    # 20-40 and 0-20 steps: 10 to 30 on average; grpo 200-400 and more than 400: more than 300.
    assert opd["steps"] == "0–40" and opd["reached"] == "2 of 2" and opd["× steps"] == "≥ 10.0"
    assert grpo["steps"] == "200 to ≥ 400" and grpo["reached"] == "1 of 2" and grpo["× steps"] == "–"
    assert opd["sampled"] == "92.5% (90.0–95.0)" and opd["tokens"] == "0–120 k"
    assert [row[6:] for row in runs_table(sides).rows] == [
        ["20–40", "60 k–120 k", "20 G–40 G"],
        ["0–20", "0–60 k", "0–20 G"],
        ["200–400", "600 k–1.2 M", "200 G–400 G"],
        ["≥ 400", "≥ 1.2 M", "≥ 400 G"],
    ]


def test_a_ratio_has_both_ends_where_both_arms_arrive(tmp_path: Path) -> None:
    arms = [arm(tmp_path, "opd", 0, {0: 0.3, 20: 0.6, 40: 0.9}), arm(tmp_path, "grpo", 0, {0: 0.3, 100: 0.6, 200: 0.8})]
    sides = read_arms(arms, Goal(reference="grpo"))
    assert cells(sides, "opd")["× steps"] == "2.5–10.0"
    harder = read_arms(arms, Goal(reference="opd", target=0.85))
    assert cells(harder, "grpo")["× steps"] == "≤ 0.2" and cells(harder, "grpo")["steps"] == "≥ 200"


def test_what_no_arm_reaches_has_no_ratio(tmp_path: Path) -> None:
    sides = read_arms(two_arms(tmp_path), Goal(reference="grpo", target=0.99))
    assert cells(sides, "opd")["× steps"] == "–" and cells(sides, "opd")["steps"] == "≥ 60"
    assert cells(sides, "opd")["reached"] == "0 of 2"


FINE = st.lists(st.floats(0.0, 1.0), min_size=2, max_size=40)


@given(FINE, FINE, st.integers(1, 7), st.integers(1, 7))
def test_coarser_evaluations_give_wider_intervals_that_hold_the_finer_ones(
    mine: list[float], theirs: list[float], every: int, other: int
) -> None:
    """So a ratio is never one of how evaluations were rounded. Curves rise, as the claim needs."""

    def curve(label: str, scores: list[float], every: int) -> Curve:
        kept = [(i, s) for i, s in enumerate(sorted(scores)) if i % every == 0 or i == len(scores) - 1]
        return Curve(label=label, seed=0, points=tuple(point(i, s) for i, s in kept))

    def sides(every: int, other: int) -> SideBySide:
        goal = Goal(reference="b", target=0.5)
        return SideBySide(curves=(curve("a", mine, every), curve("b", theirs, other)), goal=goal)

    fine, coarse = sides(1, 1), sides(every, other)
    for label in "ab":
        (exact,), (rough,) = (s.costs(label, lambda p: p.step) for s in (fine, coarse))
        assert rough.low <= exact.low and exact.high <= rough.high and exact.censored == rough.censored
    narrow, wide = (s.advantage("a", lambda p: p.step) for s in (fine, coarse))
    assert narrow is not None and wide is not None
    assert wide.low <= narrow.low and narrow.high <= wide.high


def test_ends_of_a_ratio_are_rounded_away_from_each_other() -> None:
    assert ratio_cell(Interval(low=3.49, high=7.01)) == "3.4–7.1"
    assert ratio_cell(Interval(low=3.49, high=math.inf)) == "≥ 3.4"
    assert ratio_cell(Interval(low=0.0, high=0.81)) == "≤ 0.9"
    assert ratio_cell(Interval(low=0.0, high=math.inf)) == ratio_cell(None) == "–"


def test_the_cost_of_what_was_there_from_the_start_is_nothing() -> None:
    assert cost_cell([Curve(label="a", seed=0, points=(point(0, 0.9),)).reaches(0.5, lambda p: p.step)]) == "0"


def test_what_was_not_measured_at_the_start_may_have_been_there_from_the_start(tmp_path: Path) -> None:
    """`evaluation.on_start=false`: of a target that the first evaluation finds reached only the upper end is known."""
    arms = [arm(tmp_path, "opd", 0, {60: 0.9}), arm(tmp_path, "grpo", 0, {60: 0.8})]
    sides = read_arms(arms, Goal(reference="grpo"))
    opd, grpo = cells(sides, "opd"), cells(sides, "grpo")
    assert (opd["steps"], grpo["steps"]) == ("0–60", "0–60") and opd["× steps"] == "–"
    write_comparison(tmp_path, arms, Goal(reference="grpo"), Console(file=io.StringIO()), ())
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


def test_the_axis_of_the_budget_is_shown(tmp_path: Path) -> None:
    arms = two_arms(tmp_path)
    for unit, title in ((Unit.TOKENS, "tokens generated and learned"), (Unit.CPU_S, "processor seconds")):
        goal = Goal(reference="grpo", unit=unit)
        assert title in [axis.title for axis in goal.axes] and goal.axis in goal.axes
        assert len(arms_table(read_arms(arms, goal)).columns) == 4 + 2 * 3


def test_a_run_that_ended_before_its_budget_is_told(tmp_path: Path) -> None:
    sides = read_arms(two_arms(tmp_path), Goal(reference="grpo", unit=Unit.FLOPS, amount=61e9))
    assert [note for note in sides.notes if "budget" in note] == [
        "opd with seed 0 ended by its planned steps, at 98.4% of the budget.",
        "opd with seed 1 ended by its planned steps, at 98.4% of the budget.",
    ]


def test_seeds_evaluated_at_the_same_shares_are_drawn_together(tmp_path: Path) -> None:
    """Of a budget in tokens every seed has steps of its own."""
    a = Curve(label="a", seed=0, points=(point(0, 0.2), point(11, 0.5), point(20, 0.8)))
    b = Curve(label="a", seed=1, points=(point(0, 0.2), point(9, 0.7), point(22, 0.6)))
    together = over_seeds([a, b], lambda p: p.step)
    assert together.cost == [0, 10, 21] and together.mean == pytest.approx([0.2, 0.6, 0.7])
    assert (together.least, together.greatest) == ([0.2, 0.5, 0.6], [0.2, 0.7, 0.8])
    c = Curve(label="a", seed=2, points=(point(0, 0.2), point(20, 0.4)))
    assert over_seeds([a, c], lambda p: p.step).cost == [0, 20]


def test_the_page_of_a_comparison_stands_alone(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=140)
    arms = [*two_arms(tmp_path), arm(tmp_path, EVIL, 0, {0: 0.3, 20: 0.5})]
    write_comparison(tmp_path, arms, Goal(reference="grpo"), console)
    page = Page(tmp_path / "comparison.html")
    assert_stands_alone(page)
    assert EVIL not in (tmp_path / "comparison.html").read_text() + (tmp_path / "comparison.md").read_text()
    assert page.text.count("The student was made weak on purpose.") == 1
    ids = [value for name, value in page.attributes if name == "id"]
    meant = re.findall(r"#(\w+)[)\"]", (tmp_path / "comparison.html").read_text())
    assert meant and all(ids.count(name) == 1 for name in meant), "the wide picture and the tall one share ids"
    assert "Cost of reaching 75.0% (sampled), where grpo ended" in page.text
    assert "from the least to the greatest seed" in page.text and "mean over seeds" in page.text
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Cost of reaching 75.0%" in printed and "200 to ≥ 400" in printed


def test_json_and_markdown_say_the_same(tmp_path: Path) -> None:
    arms = two_arms(tmp_path)
    write_comparison(tmp_path, arms, Goal(reference="grpo"), Console(file=io.StringIO()), ["a | note"])
    said: dict[str, Any] = json.loads((tmp_path / "comparison.json").read_text())
    assert said["target"] == pytest.approx(0.75) and said["budget"] == {"unit": "steps", "amount": None}
    assert said["arms"][0]["sampled"] == {"mean": pytest.approx(0.925), "min": 0.9, "max": 0.95, "runs": 2}
    assert said["arms"][0]["times_less_than_reference"]["steps"] == [10.0, None]
    assert said["runs"][3]["cost_of_target"]["steps"] == [400, None] and not said["runs"][3]["target_reached"]
    text = as_markdown("x", read_arms(arms, Goal(reference="grpo"), ["a | note"]))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert "a \\| note" in text and any("200 to ≥ 400" in row for row in rows)
    assert len({row.count("|") for row in rows[:4]}) == 1


def test_the_rate_of_a_run_is_read_from_its_configuration(tmp_path: Path) -> None:
    arms = [arm(tmp_path, "a", 0, {0: 0.3}, "learner: {lr: 0.002}\n"), arm(tmp_path, "b", 0, {0: 0.3})]
    rows = runs_table(read_arms(arms, Goal(reference="a"))).rows
    assert [row[2] for row in rows] == ["0.002", "–"]


def test_a_sweep_of_many_arms_is_drawn(tmp_path: Path) -> None:
    labels = [f"{method}_{rate}" for method in ("opd", "grpo", "sft") for rate in ("5e-4", "1e-3", "2e-3", "4e-3")]
    arms = []
    for seed, label in enumerate(labels):
        arms.append(arm(tmp_path, label, seed, {0: 0.3, 50: 0.3 + seed / 20}))
    write_comparison(tmp_path, arms, Goal(reference="grpo_1e-3"), Console(file=io.StringIO()))
    assert (tmp_path / "comparison.html").exists()


def test_a_reference_that_is_no_arm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="comparison needs its reference among the arms"):
        read_arms(two_arms(tmp_path), Goal(reference="sft"))


def test_a_run_without_samples_cannot_be_compared(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "bare")
    directory.write_config("steps: 1\n")
    with pytest.raises(DataError, match="has no evaluation with samples"):
        read_arms([Arm(label="opd", seed=0, directory=directory.path)], Goal(reference="opd"))
