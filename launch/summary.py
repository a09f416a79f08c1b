"""How a run ended, as it is stored and shown."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from launch.evaluation_point import EvaluationPoint
from launch.run_directory import RunDirectory, write_json
from opd.errors import DataError

_POINTS = ("student_start", "student_end", "teacher")


class Outcome(Enum):
    """Why a run ended."""

    FINISHED = "finished"
    STOPPED = "stopped"  # somebody asked it to (a signal); it can be resumed
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What `summary.json` says. `facts`, `versions` and `ledger` are shown as tables in the order given.

    Seconds count from the start of the program: until all processes were up (`ready_s`), until the first step
    began (`first_step_s`), until the end (`wall_s`). `cpu_s`, `tokens` (of completions) and `flops` are what
    training spent. An example stands in `tests/unit/test_report.py`.
    """

    run_name: str
    method: str
    outcome: Outcome
    steps: int
    seed: int
    wall_s: float
    ready_s: float
    first_step_s: float
    cpu_s: float
    tokens: int
    flops: float
    student_start: EvaluationPoint | None
    student_end: EvaluationPoint | None
    teacher: EvaluationPoint | None
    facts: Mapping[str, str]
    ledger: Mapping[str, int]
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    error: str = ""

    def write(self, directory: RunDirectory) -> None:
        """Replace the directory's summary at once."""
        values = {f.name: getattr(self, f.name) for f in fields(self)} | {"outcome": self.outcome.value}
        for name in _POINTS:
            values[name] = values[name] and values[name].as_json()
        write_json(directory.summary, values)

    @classmethod
    def read(cls, path: Path) -> "RunSummary":
        """The inverse of `write`."""
        try:
            values: dict[str, Any] = json.loads(path.read_text())
            for name in _POINTS:
                values[name] = values[name] and EvaluationPoint.from_json(values[name])
            return cls(**{**values, "outcome": Outcome(values["outcome"]), "notes": tuple(values["notes"])})
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} is no run summary ({error}); remove it, the report can do without"
            ) from error
