"""The table of a comparison: one row for every arm, and one for every run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.artifacts.evaluation_point import EvaluationPoint
from launch.report.comparison import Curve, Interval, SideBySide, accuracy
from launch.report.figures import short_number

_ABSENT = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """A table as text: its title, a note on how to read it, and its cells; the `whole` columns are not folded."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    whole: Sequence[int] = (0,)


def arms_table(sides: SideBySide) -> Cells:
    """A row for every arm: accuracies at the end, and the cost of the target."""
    columns = ["arm", "sampled", "greedy", "reached"]
    for axis in sides.goal.axes:
        columns += [axis.name, "×"]
    reference = sides.goal.reference
    own = f", where {reference} ended on average" if sides.goal.target is None else ""
    return Cells(
        title=f"Cost of reaching {sides.target:.1%} (sampled){own}",
        note=f"sampled, greedy: accuracy at the end, the mean over seeds, and in brackets the least and the greatest. "
        "reached: runs that came to the target. Costs lie between the last evaluation below the target and the "
        "first at or above it, of all seeds together; ≥: not reached within the budget (censored). "
        f"×: how many times less than {reference}, by the means over seeds of both, between the least and the greatest "
        "value that these intervals allow; ≥ or ≤ where one end is not known.",
        columns=columns,
        rows=[_arm_row(sides, label) for label in sides.labels],
    )


def runs_table(sides: SideBySide) -> Cells:
    """A row for every run."""
    axes = sides.goal.axes
    return Cells(
        title="Every run",
        note="The same for single runs, with the learning rate each was trained with; end: what it spent in all.",
        columns=["arm", "seed", "rate", "sampled", "greedy", f"end ({sides.goal.axis.name})", *(a.name for a in axes)],
        rows=[
            [
                curve.label,
                str(curve.seed),
                _ABSENT if curve.lr is None else f"{curve.lr:g}",
                _percent(curve.points[-1].mean_at_k),
                _percent(curve.points[-1].greedy),
                short_number(sides.goal.axis.cost(curve.points[-1])),
                *(cost_cell([curve.reaches(sides.target, axis.cost)]) for axis in axes),
            ]
            for curve in sides.curves
        ],
    )


def _arm_row(sides: SideBySide, label: str) -> list[str]:
    ends = [curve.points[-1] for curve in sides.of(label)]
    reached = sum(not interval.censored for interval in sides.costs(label, sides.goal.axis.cost))
    row = [label, _spread([p.mean_at_k for p in ends]), _spread([p.greedy for p in ends]), f"{reached} of {len(ends)}"]
    for axis in sides.goal.axes:
        row += [cost_cell(sides.costs(label, axis.cost)), ratio_cell(sides.advantage(label, axis.cost))]
    return row


def cost_cell(intervals: Sequence[Interval]) -> str:
    """Costs of several runs as one interval, e.g. `20–40`; `≥ 240` if none has reached the target, and `20 to ≥ 240`
    if some have.
    """
    hull = Interval.hull(intervals)
    if not hull.censored:
        low, high = short_number(hull.low), short_number(hull.high)
        return high if low == high else f"{low}–{high}"
    least_spent = short_number(min(interval.low for interval in intervals if interval.censored))
    open_ended = all(interval.censored for interval in intervals)
    return f"≥ {least_spent}" if open_ended else f"{short_number(hull.low)} to ≥ {least_spent}"


def ratio_cell(ratio: Interval | None) -> str:
    """Ends of a ratio, rounded away from each other: `3.4–7.1`, `≥ 3.4`, `≤ 7.1`; a dash where neither is known."""
    if ratio is None or math.isinf(ratio.low):
        return _ABSENT
    low, high = f"{math.floor(10 * ratio.low) / 10:.1f}", ratio.high
    if math.isinf(high):
        return f"≥ {low}" if ratio.low > 0 else _ABSENT
    top = f"{math.ceil(10 * high) / 10:.1f}"
    return f"{low}–{top}" if ratio.low > 0 else f"≤ {top}"


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return _ABSENT
    mean, low, high = (f"{100 * value:.1f}" for value in (float(np.mean(known)), min(known), max(known)))
    return f"{mean}%" if low == high else f"{mean}% ({low}–{high})"


def _percent(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.1%}"


def as_markdown(name: str, sides: SideBySide) -> str:
    """Both tables and the notes as a page of Markdown."""
    return markdown(name, sides.notes, (arms_table(sides), runs_table(sides)))


def markdown(name: str, notes: Sequence[str], tables: Sequence[Cells]) -> str:
    """Tables below their notes as a page of Markdown."""
    parts = [f"# {_plain(name)}", *map(_plain, notes)]
    for cells in tables:
        lines = [cells.columns, ["---"] * len(cells.columns), *cells.rows]
        parts += [
            f"## {_plain(cells.title)}",
            "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines),
            _plain(cells.note),
        ]
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text that means nothing else in Markdown: no cell ends, no markup begins."""
    return " ".join(text.translate({ord("|"): "\\|", ord("<"): "&lt;", ord("`"): "'"}).split())


def as_json(name: str, sides: SideBySide) -> dict[str, Any]:
    """All figures of a comparison; what is not known (the cost of what was not reached) is null."""
    goal = sides.goal
    return {
        "name": name,
        "target": sides.target,
        "reference": goal.reference,
        "budget": {"unit": goal.unit.value, "amount": goal.amount or None},
        "notes": list(sides.notes),
        "arms": [_arm_json(sides, label) for label in sides.labels],
        "runs": [_run_json(sides, curve) for curve in sides.curves],
    }


def _arm_json(sides: SideBySide, label: str) -> Mapping[str, Any]:
    ends = [accuracy(curve.points[-1]) for curve in sides.of(label)]
    return {
        "arm": label,
        "sampled": {"mean": float(np.mean(ends)), "min": min(ends), "max": max(ends), "runs": len(ends)},
        "times_less_than_reference": {
            axis.title: _ends(ratio)
            for axis in sides.goal.axes
            if (ratio := sides.advantage(label, axis.cost)) is not None
        },
    }


def _run_json(sides: SideBySide, curve: Curve) -> Mapping[str, Any]:
    return {
        "arm": curve.label,
        "seed": curve.seed,
        "learning_rate": curve.lr,
        "target_reached": not curve.reaches(sides.target, sides.goal.axis.cost).censored,
        "cost_of_target": {axis.title: _ends(curve.reaches(sides.target, axis.cost)) for axis in sides.goal.axes},
        "evaluations": [_point_json(point) for point in curve.points],
    }


def _ends(interval: Interval) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in (interval.low, interval.high)]


def _point_json(point: EvaluationPoint) -> Mapping[str, Any]:
    return point.as_json()
