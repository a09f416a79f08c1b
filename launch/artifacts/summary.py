"""Outcome of a run, as it is stored and shown."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from launch.artifacts.evaluation_point import EvaluationPoint
from launch.artifacts.run_directory import RunDirectory, write_json
from launch.artifacts.untrusted_files import read_json, record

_POINTS = ("student_start", "student_end", "teacher")


class Outcome(Enum):
    """Reason why a run ended."""

    FINISHED = "finished"
    STOPPED = "stopped"  # a signal requested it; it can be resumed
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """Content of `summary.json`. `facts`, `versions` and `ledger` are shown as tables in the order given.

    `wall_s` counts from the start of the program, `ready_s` until all actors answered, `first_step_s` until
    the first training step began. `cpu_s`, `tokens` (of completions) and `flops` are those of training:
    start-up, evaluation and export apart. An evaluation that was not
    reached is None. `alerts` are the sentences of `opd.observability.alerts`, each with its first step. `utilization`
    has the figures of `opd.observability.utilization` over all steps under the names of the metrics, `verdict` its
    sentence.

    Example: `RunSummary(run_name="shop", method="full_reverse_kl", outcome=Outcome.FINISHED, steps=100,
    seed=0, wall_s=151.0, ready_s=21.0, first_step_s=33.0, cpu_s=48.0, tokens=346_000, flops=1.8e12, ...)`.
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
    alerts: tuple[str, ...] = ()
    error: str = ""
    utilization: Mapping[str, float] = field(default_factory=dict)
    verdict: str = ""

    def write(self, directory: RunDirectory) -> None:
        """Replace the directory's summary atomically."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        points = {name: values[name] and values[name].as_json() for name in _POINTS}
        write_json(directory.summary, values | points | {"outcome": self.outcome.value})

    @classmethod
    def read(cls, path: Path) -> "RunSummary":
        """Inverse of `write`."""
        advice = "remove it, the report can do without"
        values = read_json(path, advice)
        points = {n: EvaluationPoint.from_json(values[n], f"{n} of {path}") for n in _POINTS if values.get(n)}
        return record(cls, values | points, f"{path} is no run summary: it", advice)
