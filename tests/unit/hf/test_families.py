"""Every row of the table of architectures, as the plan refuses it or as student and teacher compute it.

Rows that are not fast are tried with `-m slow`. What engines make of new weights is tried in
tests/integration/engines/test_families.py.
"""

import re
from pathlib import Path

import pytest

from launch.plan.checks.engines import TRIED
from tests.fuzz.architectures import tried
from tests.fuzz.families import FAMILIES, make
from tests.fuzz.outcomes import REASONS, ROWS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "models.md"


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if row.fast else pytest.mark.slow) for name, row in ROWS.items()]
)
def test_a_family_is_what_the_table_says(tmp_path: Path, family: str) -> None:
    make(family, tmp_path)
    for role, reason in (("student", ROWS[family].student), ("teacher", ROWS[family].teacher)):
        outcome = tried(tmp_path, role)
        assert not outcome.wrong, outcome
        if reason:
            assert re.search(f"^{role} .*{REASONS[reason]}", outcome.refused), outcome
        else:
            assert outcome.gaps and max(outcome.gaps) <= 1.5, outcome  # a tenth in bfloat16 as a rule


def test_the_table_in_the_docs_has_these_rows() -> None:
    text = PAGE.read_text(encoding="utf-8").split("| tried |\n", 1)[1].split("\n\n", 1)[0]
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in text.splitlines()[1:]]
    assert rows == [(family, *row.cells()) for family, row in ROWS.items()]


def test_every_family_has_a_row_and_the_plan_knows_which_engines_were_tried() -> None:
    assert FAMILIES.keys() == ROWS.keys()
    assert {FAMILIES[family][0] for family, row in ROWS.items() if not row.student} == TRIED
