"""The curves of one run."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from launch.artifacts.evaluation_point import EvaluationPoint
from launch.artifacts.run_data import RunData, Series
from launch.monitors.step_metrics import PHASE_NAMES
from launch.report.figures import (
    BLUE,
    GREEN,
    MUTED,
    ORANGE,
    PURPLE,
    SURFACE,
    EndLabel,
    Panel,
    label_ends,
    percent,
    smooth,
    thinned,
    whole_steps,
)

_PHASES = {"rollout": BLUE, "score": ORANGE, "train": GREEN, "publish": PURPLE}


def panels(data: RunData) -> list[Panel]:
    """Panels for which the run has numbers, the most informative first."""
    made = [_accuracy(data), _sets(data), *_signals(data), *_lengths(data), _phases(data), _entropy(data)]
    return [panel for panel in made if panel is not None]


def draw_sheet(panels: Sequence[Panel], figure: Figure) -> None:
    """All panels on one sheet, two in a row."""
    rows = -(-len(panels) // 2)
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes, panel in zip(grid, panels, strict=False):
        panel.draw(axes)
        axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", pad=10)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()


def _accuracy(data: RunData) -> Panel | None:
    if not data.evaluated("greedy") and not data.evaluated("mean_at_k"):
        return None
    last = data.student[-1]
    which = f" (evaluation set {last.set})" if last.set else ""
    return Panel(
        title="Accuracy",
        note=f"Share of held-out prompts{which} the student solves, greedily and sampled at temperature "
        f"{last.temperature:g}. Dashed: the teacher. Hollow: the first evaluation.",
        draw=partial(_draw_accuracy, data=data),
    )


def _draw_accuracy(axes: Axes, data: RunData) -> None:
    labels = []
    for field, name, color, marker in (
        ("greedy", "greedy", BLUE, "o"),
        ("mean_at_k", "sampled", ORANGE, "s"),
    ):
        series = data.evaluated(field)
        if not series:
            continue
        axes.plot(series.steps, series.values, color=color, marker=marker, markersize=4.5, clip_on=False)
        axes.plot(
            series.steps[:1], series.values[:1], color=color, marker=marker, markersize=6.5,
            markerfacecolor=SURFACE, markeredgewidth=1.6, clip_on=False, zorder=5,
        )  # fmt: skip
        labels.append(EndLabel(y=series.values[-1], text=f"{name} {series.values[-1]:.0%}", color=color))
        goal = None if data.teacher is None else getattr(data.teacher, field)
        if goal is not None:
            axes.axhline(goal, color=color, linestyle=(0, (4, 3)), linewidth=1.2, alpha=0.75)
            labels.append(EndLabel(y=goal, text=f"teacher {name} {goal:.0%}", color=MUTED))
    axes.set_ylim(0, 1.02)
    percent(axes)
    whole_steps(axes)
    label_ends(axes, labels)


_SHOWN = (BLUE, ORANGE, GREEN, PURPLE)  # of so many sets curves can be told apart


def _sets(data: RunData) -> Panel | None:
    """Mean rewards on the named sets, where some were measured more than once."""
    curves = {name: _means(of) for name, of in data.by_set.items() if name}
    drawn = {name: curve for name, curve in curves.items() if len(curve.steps) > 1}
    if not drawn:
        return None
    more = f" The first {len(_SHOWN)} of {len(drawn)} sets." if len(drawn) > len(_SHOWN) else ""
    return Panel(
        title="Evaluation sets",
        note=f"mean@k on each named set with its own sampler; intervals stand in the tables.{more}",
        draw=partial(_draw_sets, curves=drawn),
    )


def _means(points: Sequence[EvaluationPoint]) -> Series:
    known = [(point.step, point.mean_at_k) for point in points if point.mean_at_k is not None]
    return Series(steps=np.array([step for step, _ in known]), values=np.array([value for _, value in known]))


def _draw_sets(axes: Axes, curves: Mapping[str, Series]) -> None:
    labels = []
    for (name, curve), color in zip(curves.items(), _SHOWN, strict=False):
        axes.plot(curve.steps, curve.values, color=color, marker="o", markersize=4.5, clip_on=False)
        labels.append(EndLabel(y=curve.values[-1], text=f"{name} {curve.values[-1]:.0%}", color=color))
    axes.set_ylim(0, 1.02)
    percent(axes)
    whole_steps(axes)
    label_ends(axes, labels)


def _signals(data: RunData) -> list[Panel | None]:
    """Minimized or maximized quantities: divergence and reward where the method has them, else the loss."""
    made = []
    if data.series("distill/reverse_kl"):
        made.append(
            Panel(
                title="Reverse KL to the teacher",
                note="Nats per token on the student's own text, as the objective estimates it; the line is a "
                "running mean, dots are held-out evaluations.",
                draw=partial(_draw_signal, data=data, name="distill/reverse_kl", checked="reverse_kl"),
            )
        )
    if data.series("reward/mean"):
        made.append(
            Panel(
                title="Reward while training",
                note="Mean task reward of the completions trained on; the line is a running mean.",
                draw=partial(_draw_signal, data=data, name="reward/mean", checked=None),
            )
        )
    if not made and data.series("actor/loss"):
        made.append(
            Panel(
                title="Loss",
                note="What is minimized, per step; the line is a running mean.",
                draw=partial(_draw_signal, data=data, name="actor/loss", checked=None),
            )
        )
    return made


def _draw_signal(axes: Axes, data: RunData, name: str, checked: str | None) -> None:
    series = data.series(name)
    line = smooth(series.values)
    at = thinned(len(line))
    axes.plot(series.steps[at], series.values[at], color=BLUE, linewidth=0.9, alpha=0.3)
    axes.plot(series.steps[at], line[at], color=BLUE)
    prefix = "training " if checked else ""
    labels = [EndLabel(y=line[-1], text=f"{prefix}{line[-1]:.2g}", color=BLUE)]
    dots = data.evaluated(checked) if checked else None
    if dots:
        axes.plot(dots.steps, dots.values, color=ORANGE, linestyle="none", marker="o", markersize=5)
        labels.append(EndLabel(y=dots.values[-1], text=f"held-out {dots.values[-1]:.2g}", color=ORANGE))
    _from_zero(axes)
    whole_steps(axes)
    label_ends(axes, labels)


def _lengths(data: RunData) -> list[Panel | None]:
    mean, cut = data.series("response_length/mean"), data.series("response_length/clip_ratio")
    made: list[Panel | None] = []
    if mean:
        made.append(
            Panel(
                title="Completion length",
                note="Tokens per completion of a step: the mean, and the longest above it.",
                draw=partial(_draw_lengths, mean=mean, longest=data.series("response_length/max")),
            )
        )
    if cut:
        made.append(
            Panel(
                title="Completions cut by the token limit",
                note="Share of a step's completions that did not end by themselves; line: running mean.",
                draw=partial(_draw_cut, cut=cut),
            )
        )
    return made


def _draw_lengths(axes: Axes, mean: Series, longest: Series) -> None:
    at = thinned(len(mean.steps))
    axes.plot(longest.steps[at], longest.values[at], color=MUTED, linewidth=1.0)
    axes.plot(mean.steps[at], mean.values[at], color=BLUE)
    _from_zero(axes)
    whole_steps(axes)
    label_ends(
        axes,
        [
            EndLabel(y=longest.values[-1], text=f"longest {longest.values[-1]:.0f}", color=MUTED),
            EndLabel(y=mean.values[-1], text=f"mean {mean.values[-1]:.1f}", color=BLUE),
        ],
    )


def _draw_cut(axes: Axes, cut: Series) -> None:
    at = thinned(len(cut.steps))
    line = smooth(cut.values)
    axes.plot(cut.steps[at], cut.values[at], color=BLUE, linewidth=0.9, alpha=0.3)
    axes.plot(cut.steps[at], line[at], color=BLUE)
    axes.set_ylim(0, max(0.05, float(cut.values.max()) * 1.1))
    percent(axes)
    whole_steps(axes)
    label_ends(axes, [EndLabel(y=line[-1], text=f"{line[-1]:.1%}", color=BLUE)])


def _phases(data: RunData) -> Panel | None:
    if not data.series("perf/step_s"):
        return None
    return Panel(
        title="Seconds per step",
        note="Stacked by phase. The line is the whole step: where the stack is higher, phases overlapped.",
        draw=partial(_draw_phases, data=data),
    )


def _draw_phases(axes: Axes, data: RunData) -> None:
    whole = data.series("perf/step_s")
    at = thinned(len(whole.steps))
    below = np.zeros(len(at))
    labels = []
    for phase, color in _PHASES.items():
        seconds = data.series(PHASE_NAMES[phase]).values
        if len(seconds) != len(whole.values):  # this run did not measure the phase at every step
            continue
        height = smooth(seconds)[at]
        axes.fill_between(whole.steps[at], below, below + height, color=color, alpha=0.75, linewidth=0)
        middle = float(below[-1] + height[-1] / 2)
        labels.append(EndLabel(y=middle, text=f"{phase} {seconds.mean():.2g} s", color=color))
        below = below + height
    line = smooth(whole.values)[at]
    axes.plot(whole.steps[at], line, color=MUTED, linewidth=1.2)
    axes.set_ylim(0, max(float(below.max()), float(line.max())) * 1.08)
    labels.append(EndLabel(y=float(line[-1]), text=f"step {whole.values.mean():.2g} s", color=MUTED))
    whole_steps(axes)
    label_ends(axes, labels)


def _entropy(data: RunData) -> Panel | None:
    if not data.series("actor/entropy"):
        return None
    return Panel(
        title="Entropy of the student",
        note="Nats per token at the trained tokens. Towards 0 it always writes the same.",
        draw=partial(_draw_signal, data=data, name="actor/entropy", checked=None),
    )


def _from_zero(axes: Axes) -> None:
    """Start the axis at 0 where all values are positive: a small change must look small."""
    low, high = axes.dataLim.intervaly
    if low >= 0:
        axes.set_ylim(0, high * 1.06 or 1.0)
