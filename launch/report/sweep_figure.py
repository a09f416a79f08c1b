"""The curves of a sweep as one picture: accuracy and reverse KL over steps, and where the runs of each value ended."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import FuncFormatter, NullLocator

from launch.report.figures import BLUE, MUTED, SERIES, EndLabel, label_ends, percent, short_number, whole_steps
from launch.report.sweep_table import NUMBER, Figure, Sweep, SweepArm, accuracy, divergence, number

_DECADE = 9.0  # a greater span of values gets a logarithmic axis

Panel = Callable[[Axes], None]


def draw(picture: Picture, sweep: Sweep, tall: bool = False) -> None:
    """One picture for each figure that was measured: side by side, or `tall`, one below the other."""
    panels = _panels(sweep, tall)
    if not panels:
        picture.text(0.5, 0.5, "no evaluation yet", ha="center", color=MUTED)
        return
    shape = (len(panels), 1) if tall else (1, len(panels))
    grid = picture.subplots(*shape, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=True):
        panel(axes)


def highlighted(sweep: Sweep) -> list[SweepArm]:
    """Arms with a color and a name: all of a few, otherwise those that ended best."""
    return sweep.arms if len(sweep.arms) <= len(SERIES) else sweep.ranked[: len(SERIES)]


def _panels(sweep: Sweep, tall: bool) -> list[Panel]:
    measured = [
        figure
        for figure in (accuracy, divergence)
        if any(figure(point) is not None for run in sweep.runs for point in run.points)
    ]
    curves = [partial(_curves, sweep=sweep, figure=figure, named=tall or figure is measured[-1]) for figure in measured]
    key = _numeric_key(sweep)
    return [*([partial(_by_value, sweep=sweep, key=key)] if key and accuracy in measured else []), *curves]


def _numeric_key(sweep: Sweep) -> str:
    """The setting whose values are an axis: the only one that varies beside the seed, if its values are numbers."""
    if len(sweep.keys) != 1:
        return ""
    values = [number(arm.values.get(sweep.keys[0], "")) for arm in sweep.arms]
    return sweep.keys[0] if len(values) > 1 and all(value is not None for value in values) else ""


def _curves(axes: Axes, sweep: Sweep, figure: Figure, named: bool) -> None:
    """A figure over steps, the mean over seeds, shaded from the least to the greatest."""
    colors = _colors(sweep)
    labels: list[EndLabel] = []
    for arm in sorted(sweep.arms, key=lambda arm: arm.label in colors):  # those with a color above the others
        steps, values = _over_steps(arm, figure)
        if not len(steps):
            continue
        color, mean = colors.get(arm.label, MUTED), values.mean(axis=0)
        plain = arm.label not in colors
        axes.plot(steps, mean, color=color, marker="" if plain else "o", markersize=4, linewidth=0.9 if plain else 1.9,
                  alpha=0.45 if plain else 1, clip_on=False)  # fmt: skip
        if not plain and len(values) > 1:
            axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0)
        if not plain:
            end = f"{mean[-1]:.0%}" if figure is accuracy else f"{mean[-1]:.2g}"
            labels.append(
                EndLabel(
                    y=float(mean[-1]),
                    text=f"{f'{NUMBER} {arm.number}' if sweep.numbered else arm.label}  {end}",
                    color=color,
                )
            )
    whole_steps(axes)
    if figure is accuracy:
        _accuracies(axes, sweep, labels)
    else:
        axes.set_title("reverse KL to the teacher", loc="left", fontsize=11, fontweight="bold")
        axes.set_ylim(bottom=0)
    if named:
        label_ends(axes, labels, gap=0.07)


def _accuracies(axes: Axes, sweep: Sweep, labels: list[EndLabel]) -> None:
    axes.set_title("accuracy at T=1", loc="left", fontsize=11, fontweight="bold")
    axes.set_ylim(0, 1.02)
    percent(axes)
    if sweep.teacher is not None and sweep.teacher.mean_at_k is not None:
        goal = sweep.teacher.mean_at_k
        axes.axhline(goal, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
        labels.append(EndLabel(y=goal, text=f"teacher  {goal:.0%}", color=MUTED))


def _over_steps(arm: SweepArm, figure: Figure) -> tuple[list[int], np.ndarray]:
    """Steps at which every run of the arm was measured, and a row of values for each run."""
    found = [{p.step: v for p in run.points if (v := figure(p)) is not None} for run in arm.runs]
    found = [one for one in found if one]
    if not found:
        return [], np.empty((0, 0))
    steps = sorted(set.intersection(*(set(one) for one in found)))
    return steps, np.asarray([[one[step] for step in steps] for one in found])


def _by_value(axes: Axes, sweep: Sweep, key: str) -> None:
    """Accuracy at the end against the value of a setting; a point for every seed."""
    ended = [(number(arm.values[key]) or 0.0, arm.ends(accuracy)) for arm in sweep.arms if arm.ends(accuracy)]
    ended.sort(key=lambda pair: pair[0])
    axes.set_title(f"at the end, by {sweep.short[key]}", loc="left", fontsize=11, fontweight="bold")
    axes.set_ylim(0, 1.02)
    percent(axes)
    axes.set_xlabel(key)
    axes.plot([x for x, _ in ended], [float(np.mean(ys)) for _, ys in ended], color=BLUE, clip_on=False)
    for x, ys in ended:
        axes.plot([x] * len(ys), ys, color=BLUE, marker="o", markersize=5, linestyle="", clip_on=False)
    _value_axis(axes, [x for x, _ in ended])


def _value_axis(axes: Axes, values: Sequence[float]) -> None:
    if values and min(values) > 0 and max(values) / min(values) >= _DECADE:
        axes.set_xscale("log")
    axes.set_xticks(
        values if len(values) <= 5 else [values[i] for i in np.linspace(0, len(values) - 1, 5).round().astype(int)]
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: short_number(x)))


def _colors(sweep: Sweep) -> Mapping[str, str]:
    return {arm.label: SERIES[i] for i, arm in enumerate(highlighted(sweep))}
