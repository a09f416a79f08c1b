"""All data of a run directory, read back for reports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from launch.artifacts.evaluation_point import MAIN, EvaluatedModel, EvaluationPoint
from launch.artifacts.run_directory import RunDirectory, read_steps
from launch.artifacts.samples import Sample
from launch.artifacts.summary import RunSummary
from launch.artifacts.untrusted_files import read_text
from opd.errors import DataError


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """One line of numbers per step. Raises `DataError` about a line that has anything else."""
    lines = read_steps(path)
    for line in lines:
        for name, value in line.items():
            if isinstance(value, bool) or not isinstance(value, int | float | None) or abs(value or 0) > _LARGEST:
                raise DataError(f"step {line['step']} in {path} has no number as {name[:60]!r}; remove that line")
    return lines


_LARGEST = 1e300


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One quantity over steps. Example: `Series(steps=[1, 2], values=[0.4, 0.3])`."""

    steps: np.ndarray
    values: np.ndarray

    def __bool__(self) -> bool:
        return len(self.steps) > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """Data of a run as far as it got; `summary` is None while it runs or when it was killed.

    `student` and `teacher` were measured on the set that stands for the run: that of `evaluation.prompts`, or else the
    first named one. `by_set` has the student's evaluations on every set in the order of the file, `teacher_on` the
    teacher's.
    """

    name: str
    metrics: Sequence[Mapping[str, float | None]]
    student: Sequence[EvaluationPoint]
    teacher: EvaluationPoint | None
    summary: RunSummary | None
    samples: Sequence[Sample]
    config: str
    by_set: Mapping[str, Sequence[EvaluationPoint]] = field(default_factory=dict)
    teacher_on: Mapping[str, EvaluationPoint] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: RunDirectory) -> "RunData":
        """Data of a directory; only the configuration must exist."""
        points = [
            EvaluationPoint.from_json(line, f"a line of {directory.evaluations}")
            for line in read_steps(directory.evaluations)
        ]
        teachers = [p for p in points if p.examinee is EvaluatedModel.TEACHER]
        by_set: dict[str, list[EvaluationPoint]] = {}
        for point in sorted((p for p in points if p.examinee is EvaluatedModel.STUDENT), key=lambda point: point.step):
            by_set.setdefault(point.set, []).append(point)
        names = list(dict.fromkeys(point.set for point in points))
        main = MAIN if MAIN in names or not names else names[0]
        teacher_on = {point.set: point for point in teachers}
        return cls(
            name=directory.name,
            metrics=read_metrics(directory.metrics),
            student=by_set.get(main, []),
            teacher=teacher_on.get(main),
            summary=RunSummary.read(directory.summary) if directory.summary.exists() else None,
            samples=[
                Sample.from_json(line, f"a line of {directory.samples}") for line in read_steps(directory.samples)
            ],
            config=read_text(directory.config, "give the directory of a run"),
            by_set={name: by_set[name] for name in names if name in by_set},
            teacher_on=teacher_on,
        )

    @property
    def before_training(self) -> EvaluationPoint | None:
        """The student's evaluation before the first step of the run; None without one (`evaluation.on_start`)."""
        first = self.metrics[0]["step"] if self.metrics else None
        known = self.student[0] if self.student else None
        return known if known is None or first is None or known.step < first else None

    def series(self, name: str) -> Series:
        """A metric over steps; steps without it (or where it was not a number) are left out."""
        pairs = [(line["step"], line[name]) for line in self.metrics if line.get(name) is not None]
        return _series(pairs)

    def evaluated(self, name: str) -> Series:
        """A field of the student's evaluations over steps, where it was measured."""
        pairs = [(point.step, getattr(point, name)) for point in self.student]
        return _series([(step, value) for step, value in pairs if value is not None])

    def last(self, name: str) -> float | None:
        """Newest value of a metric."""
        series = self.series(name)
        return float(series.values[-1]) if series else None


def _series(pairs: Sequence[tuple[float | None, float | None]]) -> Series:
    columns = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return Series(steps=columns[:, 0], values=columns[:, 1])
