"""Several runs side by side: cost of the same accuracy in steps, tokens and operations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from launch.artifacts.evaluation_point import EvaluationPoint
from launch.artifacts.run_data import RunData
from launch.artifacts.run_directory import RunDirectory, write_bytes, write_text
from launch.report.figures import MUTED, SERIES, EndLabel, label_ends, percent, short_number, to_png, to_svg
from launch.report.page import render_comparison
from opd.errors import ConfigurationError, DataError

_MARKERS = ("o", "s", "^", "D", "v")
_LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
_ABSENT = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One run to compare. Runs with the same `label` differ in their seed only and share a color."""

    label: str
    seed: int
    directory: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Accuracy (sampled at temperature 1) of one run against its cost; at least one point."""

    label: str
    seed: int
    points: tuple[EvaluationPoint, ...]

    def first_at(self, target: float) -> EvaluationPoint | None:
        """The first evaluation at or above `target`."""
        return next((point for point in self.points if _accuracy(point) >= target), None)

    def last_below(self, target: float) -> EvaluationPoint:
        """The last evaluation before that one; of a run that never gets there, its last."""
        at = next((i for i, point in enumerate(self.points) if _accuracy(point) >= target), len(self.points))
        return self.points[max(0, at - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SideBySide:
    """Curves of all arms; `reference` names the arm whose final accuracy all others should reach."""

    curves: tuple[Curve, ...]
    reference: str
    teacher: EvaluationPoint | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.reference not in self.labels:
            raise ConfigurationError(
                f"comparison needs its reference among the arms {self.labels}, but got {self.reference!r}; "
                "name one of them"
            )

    @property
    def labels(self) -> list[str]:
        """The arms, in the order given."""
        return list(dict.fromkeys(curve.label for curve in self.curves))

    def of(self, label: str) -> list[Curve]:
        """The seeds of an arm."""
        return [curve for curve in self.curves if curve.label == label]

    @property
    def target(self) -> float:
        """The reference's final accuracy, averaged over its seeds."""
        return float(np.mean([_accuracy(curve.points[-1]) for curve in self.of(self.reference)]))


def read_arms(arms: Sequence[Arm], reference: str, notes: Sequence[str] = ()) -> SideBySide:
    """Curves of the run directories, below `notes`. The teacher is the first that was evaluated (all runs share it)."""
    found = {arm: RunData.read(RunDirectory.open(arm.directory)) for arm in arms}
    curves = []
    for arm, data in found.items():
        points = tuple(point for point in data.student if point.mean_at_k is not None)
        if not points:
            raise DataError(
                f"run {arm.directory} has no evaluation with samples and cannot be compared; repeat that run"
            )
        curves.append(Curve(label=arm.label, seed=arm.seed, points=points))
    teachers = [data.teacher for data in found.values() if data.teacher is not None]
    recorded = [note for data in found.values() if data.summary for note in data.summary.notes]
    return SideBySide(
        curves=tuple(curves),
        reference=reference,
        teacher=teachers[0] if teachers else None,
        notes=tuple(dict.fromkeys([*notes, *recorded])),
    )


def write_comparison(
    root: Path, arms: Sequence[Arm], reference: str, console: Console, notes: Sequence[str] = ()
) -> None:
    """Write `comparison.html` and `comparison.png` into `root`, and print the table.

    Can be repeated at any time: it reads nothing but the run directories.
    """
    sides = read_arms(arms, reference, notes)
    draw = partial(_draw, sides=sides)
    write_bytes(root / "comparison.png", to_png(draw, 13.0, 4.3))
    title, note, columns, rows = table(sides)
    page = render_comparison(
        {
            "title": root.name,
            "subtitle": f"{', '.join(sides.labels)}; {len(sides.of(reference))} seeds each",
            "notes": sides.notes,
            # Markup: our own drawing, in which matplotlib has escaped every text.
            "svg": Markup(to_svg(draw, 11.6, 4.0, "comparison")),
            "tall": Markup(to_svg(partial(draw, tall=True), 5.0, 9.0, "tall")),
            "caption": "Held-out accuracy of samples at temperature 1. Thin: seeds; thick: their mean. "
            f"Dotted: the final score of {reference}. Dashed: the teacher. Horizontal axes are logarithmic, "
            "with the start apart.",
            "table_title": title,
            "columns": columns,
            "rows": rows,
            "table_note": note,
        }
    )
    write_text(root / "comparison.html", page)
    printed = Table(
        title=title,
        caption=note,
        caption_justify="left",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for i, column in enumerate(columns):
        printed.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        printed.add_row(*row)
    console.print(printed)


_Cost = Callable[[EvaluationPoint], float]
_AXES: tuple[tuple[str, str, _Cost], ...] = (
    ("steps", "steps", lambda point: point.step),
    ("completion tokens", "tokens", lambda point: point.tokens),
    ("operations (FLOP)", "FLOP", lambda point: point.flops),
)


def table(sides: SideBySide) -> tuple[str, str, list[str], list[list[str]]]:
    """Title, note, columns and cells of every run's cost to reach the target."""
    target = sides.target
    columns = ["arm", "seed", "greedy", "sampled"]
    for _, name, _ in _AXES:
        columns += [name, "≥ ×"]
    least = {name: _least(sides, cost) for _, name, cost in _AXES}
    rows = [
        [
            label,
            str(curve.seed),
            _percent(curve.points[-1].greedy),
            _percent(curve.points[-1].mean_at_k),
            *(cell for _, name, cost in _AXES for cell in _cost_cells(sides, curve, cost, least[name])),
        ]
        for label in sides.labels
        for curve in sides.of(label)
    ]
    title = f"Cost of reaching {target:.1%} (sampled), where {sides.reference} ended"
    note = (
        "greedy, sampled: accuracy at the end of the run. "
        "Counted up to the first evaluation at or above that score: at most one interval too high, or too "
        f"low by luck; >: not reached by then. ×: at least so many times less than the mean of {sides.reference}'s "
        "seeds, each of them counted up to its last evaluation below the score (to its end, where that is not reached)."
    )
    return title, note, columns, rows


def _least(sides: SideBySide, cost: _Cost) -> float:
    """Least cost of the reference's seeds up to the target score, averaged."""
    return float(np.mean([cost(curve.last_below(sides.target)) for curve in sides.of(sides.reference)]))


def _cost_cells(sides: SideBySide, curve: Curve, cost: _Cost, least: float) -> tuple[str, str]:
    at = curve.first_at(sides.target)
    if at is None:
        return f"> {short_number(cost(curve.points[-1]))}", _ABSENT
    spent, other = cost(at), curve.label != sides.reference
    return short_number(spent), f"{least / spent:.1f}" if spent and least and other else _ABSENT


def _accuracy(point: EvaluationPoint) -> float:
    assert point.mean_at_k is not None, "points without samples are left out when they are read"
    return point.mean_at_k


def _percent(value: float | None) -> str:
    return _ABSENT if value is None else f"{value:.1%}"


def _draw(figure: Figure, sides: SideBySide, tall: bool = False) -> None:
    """One picture per axis of `_AXES`: side by side, or `tall`, one below the other."""
    count = len(_AXES)
    row = figure.subplots(*((count, 1) if tall else (1, count)), sharey=True, gridspec_kw={"wspace": 0.06})
    goal = sides.teacher.mean_at_k if sides.teacher else None
    for position, (axes, (name, _, cost)) in enumerate(zip(row, _AXES, strict=True)):
        labels = _draw_arms(axes, sides, cost)
        axes.axhline(sides.target, color=MUTED, linestyle=":", linewidth=1.2)
        if goal is not None:
            axes.axhline(goal, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
            labels.append(EndLabel(y=goal, text=f"teacher {goal:.0%}", color=MUTED))
        axes.set_title(f"by {name}", loc="left", fontsize=11, fontweight="bold")
        axes.set_ylim(0, 1.02)
        percent(axes)
        if tall or position == count - 1:
            label_ends(axes, labels, gap=0.062)


def _draw_arms(axes: Axes, sides: SideBySide, cost: _Cost) -> list[EndLabel]:
    """Draw every seed thin, their mean thick; returns the labels of the line ends."""
    spent = [cost(point) for curve in sides.curves for point in curve.points if cost(point) > 0]
    start = min(spent, default=1.0) / 2  # where 0 stands on a logarithmic axis
    labels = []
    for label, (color, marker, line) in _looks(sides.labels).items():
        curves = sides.of(label)
        if len(curves) > 1:
            for curve in curves:
                xs = [max(cost(point), start) for point in curve.points]
                axes.plot(xs, [_accuracy(p) for p in curve.points], color=color, linewidth=0.9, alpha=0.45)
        mean = _mean_curve(curves, cost)
        xs, ys = [max(x, start) for x, _ in mean], [y for _, y in mean]
        axes.plot(xs, ys, color=color, marker=marker, linestyle=line, markersize=4.5, clip_on=False)
        labels.append(EndLabel(y=ys[-1], text=f"{label} {ys[-1]:.0%}", color=color))
    _log_with_start(axes, start, max(spent, default=1.0))
    return labels


def _looks(labels: Sequence[str]) -> dict[str, tuple[str, str, object]]:
    """Color, marker and line of every arm.

    A few arms get a color each. In a sweep (`opd_1e-3`, `opd_2e-3`, ...) arms that differ after the last
    underscore share a color and differ in their line.
    """
    if len(labels) <= len(SERIES):
        return {label: (SERIES[i], _MARKERS[i], _LINES[0]) for i, label in enumerate(labels)}
    families = list(dict.fromkeys(label.rpartition("_")[0] or label for label in labels))
    members = dict.fromkeys(families, 0)
    looks: dict[str, tuple[str, str, object]] = {}
    for label in labels:
        family = label.rpartition("_")[0] or label
        color = SERIES[families.index(family) % len(SERIES)]
        number = members[family]
        looks[label] = (color, _MARKERS[number % len(_MARKERS)], _LINES[number % len(_LINES)])
        members[family] += 1
    return looks


def _mean_curve(curves: Sequence[Curve], cost: _Cost) -> list[tuple[float, float]]:
    """Mean cost and accuracy at the steps at which every seed was evaluated."""
    at_step = [{point.step: point for point in curve.points} for curve in curves]
    common = sorted(set.intersection(*(set(points) for points in at_step)))
    return [
        (
            float(np.mean([cost(points[step]) for points in at_step])),
            float(np.mean([_accuracy(points[step]) for points in at_step])),
        )
        for step in common
    ]


def _log_with_start(axes: Axes, start: float, end: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(start * 0.9, end * 1.15)
    candidates = LogLocator(subs=(1.0, 2.0, 5.0)).tick_values(start, end)
    ticks = [tick for tick in candidates if 1.8 * start <= tick <= end * 1.1]
    axes.set_xticks([start, *ticks[:: -(-len(ticks) // 6) or 1]])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: "0" if abs(x - start) < 1e-9 * start else short_number(x))
    )
