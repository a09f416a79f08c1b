"""The page of every setting is what the dataclasses say, and has all that `--help` finds."""

import runpy
from enum import Enum

import pytest

from actors.config import StudentConfig
from launch.config.composition.compose import compose
from launch.config.composition.keys import keys
from launch.config.run_config import RunConfig
from launch.config.settings import ClusterConfig, EvaluationConfig, EvaluationSet
from learner.config import LearnerConfig
from opd.settings.declared import settings
from opd.settings.ranges import In
from opd.settings.validation import fields_of, parts_of
from teacher_service.config import TeacherConfig
from tests.command import ROOT

CLASSES = [RunConfig, StudentConfig, TeacherConfig, LearnerConfig, ClusterConfig, EvaluationConfig, EvaluationSet]


def test_the_page_is_what_the_dataclasses_say() -> None:
    source = runpy.run_path(str(ROOT / "scripts/settings_reference.py"))
    written = source["PAGE"].read_text()
    assert written == source["page"](), "record it with `python -m tests.records`"
    of_the_run = [key.name for key in keys(compose(source["CHOSEN"]))]
    elsewhere = ("method.", "graders.", "evaluation.prompts.")  # parts, and the prompts once more
    assert not [name for name in of_the_run if not name.startswith(elsewhere) and f"| `{name}`" not in written]
    without_a_line = [line for line in written.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert len(without_a_line) < 8, without_a_line
    assert "number from 1e-12 to 1 (Adam moves" in written, "ranges, and why"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_help_has_the_range_or_the_choices_that_are_checked(cls: type) -> None:
    """Help reads sources without importing them; a range made of a constant's name is left out there."""
    shown, compared = settings(f"{cls.__module__}.{cls.__name__}"), 0
    assert shown is not None
    for name, hint in fields_of(cls).items():
        base, marks = parts_of(hint)
        bounds = shown[name].bounds if name in shown else ""
        if not bounds:
            continue
        for mark in marks:
            if isinstance(mark, In):
                assert bounds == mark.says("").strip(), name
                compared += 1
        if isinstance(base, type) and issubclass(base, Enum):
            assert bounds == f"({', '.join(base.__members__)})", name
            compared += 1
    assert compared >= 3
