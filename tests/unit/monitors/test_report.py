"""Reports: they stand alone, escape what models write, and say what the directory says."""

import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch.artifacts.evaluation_point import EvaluatedModel, EvaluationPoint
from launch.artifacts.run_data import RunData
from launch.artifacts.run_directory import RunDirectory, append_json
from launch.artifacts.samples import Sample
from launch.artifacts.summary import Outcome, RunSummary
from launch.report.curves import panels
from launch.report.figures import smooth, spread, thinned
from launch.report.report import _closed, _format, write_report
from launch.report.run_list import run_line
from opd.errors import DataError

EVIL = "<script>alert(1)</script>"
ESCAPED = "&lt;script&gt;alert(1)&lt;/script&gt;"


def point(step: int, sampled: float | None, *, tokens: int = 0, teacher: bool = False) -> EvaluationPoint:
    return EvaluationPoint(
        step=step,
        greedy=None if sampled is None else min(1.0, sampled + 0.1),
        mean_at_k=sampled,
        pass_at_k=sampled,
        k=4,
        reverse_kl=0.3,
        length_mean=50.0,
        truncation_rate=0.02,
        seconds=1.0,
        tokens=tokens or 3000 * step,
        flops=1e9 * step,
        cpu_s=1.0 * step,
        examinee=EvaluatedModel.TEACHER if teacher else EvaluatedModel.STUDENT,
    )


def step_line(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step, "actor/loss": 0.4 / step, "actor/entropy": 0.3, "distill/reverse_kl": 0.4 / step,
        "response_length/mean": 50.0, "response_length/max": 77.0, "response_length/clip_ratio": 0.02,
        "perf/step_s": 0.5, "timing_s/gen": 0.2, "timing_s/score": 0.1, "timing_s/update_actor": 0.15,
        "timing_s/param_sync": 0.05, "tokens/completion": 3000.0 * step, "flops/total": 1e9 * step,
        "cpu/total_s": 0.8 * step, "ledger/issued": 64.0 * step, **changes,
    }  # fmt: skip


def sample(step: int, text: str = "9") -> Sample:
    return Sample(
        step=step, prompt=f"has 3 7 {EVIL}", answer=EVIL, tokens=("Mon", f" {text}", " ok"),
        gaps=(0.0, -2.5, 0.4), reward=1.0, version=step - 1, stop="end", length=3,
    )  # fmt: skip


def summary(name: str, outcome: Outcome = Outcome.FINISHED, **changes: Any) -> RunSummary:
    values: dict[str, Any] = {
        "run_name": name, "method": "full_reverse_kl", "outcome": outcome, "steps": 20, "seed": 0,
        "wall_s": 754.0, "ready_s": 3.0, "first_step_s": 5.0, "cpu_s": 16.0, "tokens": 60_000, "flops": 2e10,
        "student_start": point(0, 0.3), "student_end": point(20, 0.9), "teacher": None,
        "facts": {"student": "0.31M parameters"}, "ledger": {"issued": 1280}, "versions": {"torch": "2.13"},
        "notes": ("The student was made weak on purpose.",),
        "utilization": {"perf/utilization_rollout": 0.612, "perf/bubble_frac": 0.345}, "verdict": "rollout-bound: go",
    }  # fmt: skip
    return RunSummary(**{**values, **changes})


def finished(root: Path, name: str = "first") -> RunDirectory:
    directory = RunDirectory.create(root, name)
    directory.write_config("steps: 20\nteacher:\n  api_key: geheim\n")
    for step in range(1, 21):
        append_json(directory.metrics, step_line(step))
        if step in (1, 10, 20):
            append_json(directory.samples, sample(step, EVIL).as_json())
    for at, sampled in ((0, 0.3), (10, 0.7), (20, 0.9)):
        append_json(directory.evaluations, point(at, sampled).as_json())
    append_json(directory.evaluations, point(0, 0.977, teacher=True).as_json())
    summary(name).write(directory)
    return directory


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run with its report; tests only read it."""
    directory = finished(tmp_path_factory.mktemp("runs"))
    write_report(directory, notes=["Read this first."])
    return directory


class Page(HTMLParser):
    """Reads a page as a browser would: tags in balance, attributes, text."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text())
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_stands_alone(page: Page) -> None:
    assert not {"script", "iframe", "object", "embed", "link", "img", "form"} & set(page.tags)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        assert "://" not in value, value
        if name in ("href", "src", "xlink:href"):
            assert value.startswith("#")
    assert "@import" not in page.text


# -- the report of a run


def test_a_finished_run(written: RunDirectory) -> None:
    page = Page(written.report)
    assert_stands_alone(page)
    for expected in (
        "first", "finished", "full_reverse_kl, 20 steps in 12 min 34 s", "Read this first.",
        "The student was made weak on purpose.", "step 0", "step 20", "teacher", "gap closed",
        "30.0%", "90.0%", "97.7%", "89%", "0.31M parameters", "torch", "1,280", "60 k", "20 GFLOP",
        "Accuracy", "Reverse KL to the teacher", "Completion length", "Completions cut by the token limit",
        "Seconds per step", "rollout busy", "61.2%", "34.5%", "rollout-bound: go", "Entropy of the student",
        "reward 1", "<redacted>",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert "geheim" not in written.report.read_text()
    assert written.curves.read_bytes().startswith(b"\x89PNG")


def test_one_evaluation_alone_has_a_column_and_nothing_that_it_would_have_changed(tmp_path: Path) -> None:
    """`evaluation.on_start=false`, or a run that has only begun."""
    directory = RunDirectory.create(tmp_path, "alone")
    directory.write_config("steps: 20\n")
    append_json(directory.metrics, step_line(20))
    append_json(directory.evaluations, point(20, 0.9).as_json())
    append_json(directory.evaluations, point(0, 0.977, teacher=True).as_json())
    summary("alone", student_start=None).write(directory)
    write_report(directory)
    text = "".join(Page(directory.report).text.split())
    assert "step20teacher" in text and "Solved,sampled90.0%97.7%" in text
    assert "gapclosed" not in text and "step0step" not in text
    assert run_line(directory.path).accuracy == (None, 0.9)


@pytest.mark.parametrize(
    ("start", "end", "goal", "sign", "closed"),
    [
        (0.3, 0.9, 1.0, 1, "86%"),
        (0.6, 0.02, 0.0, -1, "97%"),  # a divergence: the teacher's own is 0
        (0.6, 0.02, -0.00001, -1, "97%"),
        (0.9, 0.95, 0.8, 1, ""),  # the teacher is no better
        (0.0, 0.02, 0.0, -1, ""),
    ],
)
def test_the_gap_that_is_closed_is_of_accuracies_and_divergences(
    start: float, end: float, goal: float, sign: int, closed: str
) -> None:
    assert _closed(start, end, goal, sign) == closed


def test_nothing_is_minus_zero() -> None:
    assert [_format(value, ".4f") for value in (-0.00001, 0.0, -0.0001)] == ["0.0000", "0.0000", "-0.0001"]
    assert _format(-0.0001, ".1%") == "0.0%"


def test_what_models_write_is_text_and_nothing_else(written: RunDirectory) -> None:
    raw = written.report.read_text()
    assert EVIL not in raw
    assert raw.count(ESCAPED) == 3 * 2  # prompt, answer and completion of the first and the last step
    assert Page(written.report).text.count(EVIL) == 3 * 2


def test_tokens_are_colored_by_what_the_teacher_thinks(written: RunDirectory) -> None:
    raw = " ".join(written.report.read_text().split())
    assert f'<span class="down strongly" style="--a:0.50" title="teacher minus student: -2.50 nats">{ESCAPED}' in raw
    assert '<span class="up" style="--a:0.08" title="teacher minus student: +0.40 nats">ok</span>' in raw
    assert '<p class="text">Mon <span' in raw  # an equal opinion has no color, a space neither


def test_writing_it_again_gives_the_same_files(written: RunDirectory) -> None:
    before = written.report.read_bytes(), written.curves.read_bytes()
    write_report(RunDirectory.open(written.path), notes=["Read this first."])
    assert (written.report.read_bytes(), written.curves.read_bytes()) == before


def test_a_run_that_was_killed_has_a_report_too(tmp_path: Path) -> None:
    directory = finished(tmp_path)
    directory.summary.unlink()
    with directory.metrics.open("a") as file:
        file.write('{"step": 21, "act')
    write_report(directory)
    page = Page(directory.report)
    assert "20 steps so far" in page.text
    assert "1,280" in page.text  # the ledger of the last line


def test_on_a_phone_letters_of_charts_can_be_read_and_every_line_has_its_name(written: RunDirectory) -> None:
    """At 390 pixels a card has 342 for its picture. Nothing scrolls, so the names at the ends of lines are in view."""
    raw = written.report.read_text()
    assert "min-width: 540px" not in raw
    widths = [float(width) for width in re.findall(r'viewBox="0 0 ([\d.]+) ', raw)]
    letters = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", raw[raw.index("<svg") :])]
    assert len(widths) == raw.count("<figure") and letters
    assert min(letters) * 342 / max(widths) > 8


def test_a_run_that_failed_says_why(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "first")
    directory.write_config("steps: 20\n")
    summary("first", Outcome.FAILED, error=f"OpdError: {EVIL}").write(directory)
    write_report(directory)
    page = Page(directory.report)
    assert f"The run ended with an error. OpdError: {EVIL}" in page.text
    assert "script" not in page.tags


def test_a_run_without_a_step_has_a_page(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "first")
    directory.write_config("steps: 20\n")
    write_report(directory)
    assert "not evaluated yet" in Page(directory.report).text
    assert not directory.curves.exists()


@pytest.mark.parametrize(
    ("absent", "added", "title"),
    [
        ("distill/reverse_kl", {"reward/mean": 0.5}, "Reward while training"),
        ("distill/reverse_kl", {}, "Loss"),
    ],
)
def test_the_signal_is_what_the_method_has(tmp_path: Path, absent: str, added: dict[str, float], title: str) -> None:
    directory = RunDirectory.create(tmp_path, "first")
    directory.write_config("steps: 3\n")
    for step in (1, 2, 3):
        line = step_line(step, **added)
        del line[absent]
        append_json(directory.metrics, line)
    titles = [panel.title for panel in panels(RunData.read(directory))]
    assert titles[0] == title
    assert "Reverse KL to the teacher" not in titles


def test_numbers_that_are_none_and_steps_that_are_few(tmp_path: Path) -> None:
    directory = RunDirectory.create(tmp_path, "first")
    directory.write_config("steps: 2\n")
    append_json(directory.metrics, step_line(1, **{"actor/entropy": math.nan, "response_length/max": 50.0}))
    append_json(directory.evaluations, point(0, None).as_json())
    write_report(directory)
    text = Page(directory.report).text
    assert "Entropy of the student" not in text
    assert "Accuracy" not in text
    assert "Reverse KL (nats per token)" in text


def test_a_line_of_another_version_is_refused(tmp_path: Path) -> None:
    directory = finished(tmp_path)
    append_json(directory.evaluations, {"step": 3})
    with pytest.raises(DataError, match="lacks 'cpu_s'"):
        write_report(directory)


# -- drawing


@pytest.mark.parametrize("heights", [[], [0.5], [0.1, 0.5, 0.9], [0.95, 0.96, 1.0], [0.0, 0.0], [0.5] * 30])
def test_labels_are_apart_and_inside(heights: list[float]) -> None:
    moved = spread(heights, 0.08)
    assert len(moved) == len(heights)
    assert all(b - a >= 0.08 - 1e-9 for a, b in pairwise(moved))
    if len(heights) < 12:
        assert all(0 <= height <= 1 + 1e-9 for height in moved)


def test_labels_that_do_not_collide_stay() -> None:
    assert spread([0.1, 0.5, 0.9], 0.08) == pytest.approx([0.1, 0.5, 0.9])


@pytest.mark.parametrize("count", [1, 2, 10, 1000])
def test_a_running_mean_keeps_a_constant_and_the_ends(count: int) -> None:
    assert smooth(np.full(count, 0.7)) == pytest.approx(np.full(count, 0.7))
    at = thinned(count)
    assert (at[0], at[-1]) == (0, count - 1)
    assert len(at) == min(count, 400)


def test_alerts_are_shown_also_where_a_run_was_killed(tmp_path: Path) -> None:
    directory = finished(tmp_path)
    directory.summary.unlink()
    for step in range(21, 121):
        append_json(directory.metrics, step_line(step, **{"response_length/clip_ratio": 0.4}))
    write_report(directory)
    page = directory.report.read_text()
    assert page.count("Alert at step") == 1 and "40% of the completions are cut by the token limit" in page
