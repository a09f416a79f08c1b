"""Rows of a self-test: outcome, figure and limit of each check; as a table and as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from rich.table import Table

from opd.errors import DataError


class Outcome(Enum):
    """Outcome of a check."""

    PASS = "pass"
    FAIL = "FAIL"
    NOT_HERE = "not here"  # the machine lacks what it needs
    MEASURED = "measured"  # a figure without a limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One result: `figure` is what was found, `limit` what it may be at most; `said` a sentence, if there is one."""

    check: str
    name: str
    outcome: Outcome
    figure: str = ""
    limit: str = ""
    said: str = ""

    @classmethod
    def at_most(cls, check: str, name: str, found: float, limit: float) -> "Row":
        """A figure that must not be above `limit`; NaN is above everything."""
        outcome = Outcome.PASS if found <= limit else Outcome.FAIL
        return cls(check=check, name=name, outcome=outcome, figure=f"{found:.2g}", limit=f"{limit:.2g}")


def dumped(rows: Sequence[Row]) -> str:
    """Rows as JSON, one list."""
    return json.dumps([{**asdict(row), "outcome": row.outcome.value} for row in rows], indent=1)


def loaded(text: str) -> list[Row]:
    """Rows out of `dumped`.

    Raises:
        DataError: it is something else.
    """
    try:
        return [Row(**{**one, "outcome": Outcome(one["outcome"])}) for one in json.loads(text)]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"rows of a self-test need what `dumped` writes, got {error}; run opd selftest again"
        ) from error


def table(rows: Sequence[Row]) -> Table:
    """Table of all rows."""
    shown = Table("check", "", "outcome", "found", "at most", pad_edge=False)
    before = ""
    for row in rows:
        found = " ".join(part for part in (row.figure, row.said) if part)
        shown.add_row(row.check if row.check != before else "", row.name, row.outcome.value, found, row.limit)
        before = row.check
    return shown


def verdict(rows: Sequence[Row]) -> str:
    """One sentence about all rows."""
    count = {outcome: sum(row.outcome is outcome for row in rows) for outcome in Outcome}
    parts = [f"{count[outcome]} {outcome.value}" for outcome in Outcome if count[outcome]]
    return f"self-test: {', '.join(parts)}"


def write_json(path: Path, facts: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """The file to attach to a bug report."""
    whole = {**facts, "verdict": verdict(rows), "rows": json.loads(dumped(rows))}
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
