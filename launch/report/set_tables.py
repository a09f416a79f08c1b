"""Tables of a run's evaluation sets: every share at the start and now, and the teacher's, each with its interval."""

from dataclasses import dataclass

from launch.artifacts.evaluation_point import EvaluationPoint
from launch.artifacts.run_data import RunData
from opd.evaluation.estimates import LEVEL, Estimate

_ABSENT = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetRow:
    """A measure and its values, e.g. `SetRow(name="maj@8", cells=("41.2 % (37.0–45.6)",))`."""

    name: str
    cells: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SetTable:
    """Table of one evaluation set; `note` has the sampler."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[SetRow, ...]


def set_tables(data: RunData) -> list[SetTable]:
    """A table for each set that has shares with intervals; older runs have none."""
    tables = []
    for name, points in data.by_set.items():
        last = points[-1]
        if not last.estimates:
            continue
        shown = [*points[:1], *([last] if len(points) > 1 else [])]
        columns = [f"step {point.step}" for point in shown]
        if name in data.teacher_on:
            shown, columns = [*shown, data.teacher_on[name]], [*columns, "teacher"]
        measures = list(dict.fromkeys(measure for point in shown for measure in point.estimates))
        rows = [SetRow(name=label(m), cells=tuple(_cell(point.estimates.get(m)) for point in shown)) for m in measures]
        table = SetTable(title=name or "evaluation.prompts", note=_note(last), columns=tuple(columns), rows=tuple(rows))
        tables.append(table)
    return tables


def label(measure: str) -> str:
    """Short name of a measure, e.g. `maj@8` of `maj_at_8`."""
    return measure.replace("_at_", "@")


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return _ABSENT
    return f"{estimate.value:.1%} ({100 * estimate.low:.1f}–{100 * estimate.high:.1f})"


def _note(point: EvaluationPoint) -> str:
    limit = f", at most {point.max_tokens} tokens" if point.max_tokens else ""
    return (
        f"{point.problems} problems, {point.k} samples each at temperature {point.temperature:g}, top-p "
        f"{point.top_p:g}{limit}. In brackets: {LEVEL:.0%} bootstrap intervals over the problems."
    )
