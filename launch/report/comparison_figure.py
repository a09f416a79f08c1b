"""The curves of a comparison as one picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from launch.report.comparison import Cost, Curve, SideBySide, accuracy
from launch.report.figures import MUTED, SERIES, EndLabel, label_ends, percent, short_number

_MARKERS = ("o", "s", "^", "D", "v")
_LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))


def draw(figure: Figure, sides: SideBySide, tall: bool = False) -> None:
    """One picture per axis of the goal: side by side, or `tall`, one below the other."""
    count = len(sides.goal.axes)
    row = figure.subplots(*((count, 1) if tall else (1, count)), sharey=True, gridspec_kw={"wspace": 0.06})
    goal = sides.teacher.mean_at_k if sides.teacher else None
    for position, (axes, axis) in enumerate(zip(row, sides.goal.axes, strict=True)):
        labels = _draw_arms(axes, sides, axis.cost)
        axes.axhline(sides.target, color=MUTED, linestyle=":", linewidth=1.2)
        if goal is not None:
            axes.axhline(goal, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
            labels.append(EndLabel(y=goal, text=f"teacher {goal:.0%}", color=MUTED))
        axes.set_title(f"by {axis.title}", loc="left", fontsize=11, fontweight="bold")
        axes.set_ylim(0, 1.02)
        percent(axes)
        if tall or position == count - 1:
            label_ends(axes, labels, gap=0.062)


def _draw_arms(axes: Axes, sides: SideBySide, cost: Cost) -> list[EndLabel]:
    """Draw the mean over seeds of every arm, and from the least to the greatest of few arms; returns the labels of the
    line ends.
    """
    spent = [cost(point) for curve in sides.curves for point in curve.points if cost(point) > 0]
    start = min(spent, default=1.0) / 2  # where 0 stands on a logarithmic axis
    labels = []
    few = len(sides.labels) <= len(SERIES)
    for label, (color, marker, line) in _looks(sides.labels).items():
        spread = over_seeds(sides.of(label), cost)
        xs = [max(x, start) for x in spread.cost]
        if few:
            axes.fill_between(xs, spread.least, spread.greatest, color=color, alpha=0.25, linewidth=0)
        axes.plot(xs, spread.mean, color=color, marker=marker, linestyle=line, markersize=4.5, clip_on=False)
        labels.append(EndLabel(y=spread.mean[-1], text=f"{label} {spread.mean[-1]:.0%}", color=color))
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Accuracy of an arm's seeds at each evaluation: mean, least and greatest, and the mean cost."""

    cost: list[float]
    mean: list[float]
    least: list[float]
    greatest: list[float]


def over_seeds(curves: Sequence[Curve], cost: Cost) -> Spread:
    """The seeds together, evaluation by evaluation.

    Runs that were evaluated equally often were so at the same shares of their budget; of others only the steps at
    which every one was evaluated are comparable.
    """
    if len({len(curve.points) for curve in curves}) == 1:
        together = list(zip(*(curve.points for curve in curves), strict=True))
    else:
        at_step = [{point.step: point for point in curve.points} for curve in curves]
        common = sorted(set.intersection(*(set(points) for points in at_step)))
        together = [tuple(points[step] for points in at_step) for step in common]
    scores = [[accuracy(point) for point in points] for points in together]
    return Spread(
        cost=[float(np.mean([cost(point) for point in points])) for points in together],
        mean=[float(np.mean(each)) for each in scores],
        least=[min(each) for each in scores],
        greatest=[max(each) for each in scores],
    )


def _log_with_start(axes: Axes, start: float, end: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(start * 0.9, end * 1.15)
    exponents = range(math.floor(math.log10(start)), math.ceil(math.log10(end)) + 1)
    candidates = [first * 10.0**exponent for exponent in exponents for first in (1, 2, 5)]
    ticks = [tick for tick in candidates if 1.8 * start <= tick <= end * 1.1] or [end]
    axes.set_xticks([start, *ticks[:: -(-len(ticks) // 6) or 1]])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: "0" if abs(x - start) < 1e-9 * start else short_number(x))
    )
