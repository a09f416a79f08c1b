"""Several runs side by side: accuracies at the end, and what the same accuracy cost, as intervals."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from launch.artifacts.evaluation_point import EvaluationPoint
from launch.artifacts.run_data import RunData
from launch.artifacts.run_directory import RunDirectory
from launch.artifacts.spending import Unit
from opd.errors import ConfigurationError, DataError

Cost = Callable[[EvaluationPoint], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A unit of cost, by its `title` in a picture and its `name` in a table."""

    title: str
    name: str
    cost: Cost


_STEPS = Axis(title="steps", name="steps", cost=lambda point: point.step)
_COMPLETION = Axis(title="completion tokens", name="tokens", cost=lambda point: point.tokens)
_TOKENS = Axis(title="tokens generated and learned", name="tokens", cost=lambda point: point.generated + point.learned)
_FLOPS = Axis(title="operations (FLOP)", name="FLOP", cost=lambda point: point.flops)
_CPU = Axis(title="processor seconds", name="CPU s", cost=lambda point: point.cpu_s)
_AXES: Mapping[Unit, tuple[Axis, ...]] = {
    Unit.STEPS: (_STEPS, _COMPLETION, _FLOPS),
    Unit.TOKENS: (_STEPS, _TOKENS, _FLOPS),
    Unit.FLOPS: (_STEPS, _COMPLETION, _FLOPS),
    Unit.CPU_S: (_STEPS, _FLOPS, _CPU),
}
_OF: Mapping[Unit, Axis] = {Unit.STEPS: _STEPS, Unit.TOKENS: _TOKENS, Unit.FLOPS: _FLOPS, Unit.CPU_S: _CPU}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One run to compare. Runs with the same `label` differ in their seed only and share a color."""

    label: str
    seed: int
    directory: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """The accuracy that all arms should reach, and the budget they have for it.

    `target` is the accuracy; None: what the arm `reference` ends with, averaged over its seeds. `reference` is also the
    arm whose cost the others are compared with. `amount` of `unit` is the budget of every run; 0: each had its own.
    """

    reference: str
    target: float | None = None
    unit: Unit = Unit.STEPS
    amount: float = 0.0

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Costs to show, that of the budget among them."""
        return _AXES[self.unit]

    @property
    def axis(self) -> Axis:
        """The cost of the budget."""
        return _OF[self.unit]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Costs between which a run, or the mean of several, came to the target.

    Above `low`, the last evaluation below the target, and at most `high`, the first one at or above it: between the
    two nothing was measured. `high` is infinite where the target was not reached (censored); `low` is then what was
    spent in all.
    """

    low: float
    high: float

    @property
    def censored(self) -> bool:
        """The target was not reached."""
        return math.isinf(self.high)

    def over(self, other: "Interval") -> "Interval":
        """Values that the ratio of a cost in here to one in `other` can have."""
        return Interval(
            low=0.0 if other.censored else self.low / other.high if other.high else math.inf,
            high=math.inf if self.censored or not other.low else self.high / other.low,
        )

    @classmethod
    def mean(cls, intervals: Sequence["Interval"]) -> "Interval":
        """Interval of the mean of the costs; its upper end is infinite if one of them is."""
        return cls(low=float(np.mean([i.low for i in intervals])), high=float(np.mean([i.high for i in intervals])))

    @classmethod
    def hull(cls, intervals: Sequence["Interval"]) -> "Interval":
        """The least interval that has all of them."""
        return cls(low=min(i.low for i in intervals), high=max(i.high for i in intervals))


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Accuracy (sampled at temperature 1) of one run against its cost; at least one point. `lr` is None if the run's
    configuration does not say.
    """

    label: str
    seed: int
    points: tuple[EvaluationPoint, ...]
    lr: float | None = None

    def reaches(self, target: float, cost: Cost) -> Interval:
        """The cost of the target."""
        at = next((i for i, point in enumerate(self.points) if accuracy(point) >= target), None)
        if at is None:
            return Interval(low=cost(self.points[-1]), high=math.inf)
        return Interval(low=cost(self.points[at - 1]) if at else 0.0, high=cost(self.points[at]))


@dataclass(frozen=True, slots=True, kw_only=True)
class SideBySide:
    """Curves of all arms, and the goal they are measured by."""

    curves: tuple[Curve, ...]
    goal: Goal
    teacher: EvaluationPoint | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.goal.reference not in self.labels:
            raise ConfigurationError(
                f"comparison needs its reference among the arms {self.labels}, but got {self.goal.reference!r}; "
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
        """The accuracy that all should reach."""
        if self.goal.target is not None:
            return self.goal.target
        return float(np.mean([accuracy(curve.points[-1]) for curve in self.of(self.goal.reference)]))

    def costs(self, label: str, cost: Cost) -> list[Interval]:
        """The cost of the target in every run of an arm."""
        return [curve.reaches(self.target, cost) for curve in self.of(label)]

    def advantage(self, label: str, cost: Cost) -> Interval | None:
        """Ratio of the reference's mean cost to this arm's; None for the reference itself."""
        if label == self.goal.reference:
            return None
        theirs = Interval.mean(self.costs(self.goal.reference, cost))
        return theirs.over(Interval.mean(self.costs(label, cost)))


def accuracy(point: EvaluationPoint) -> float:
    """Sampled accuracy of a point that has one."""
    assert point.mean_at_k is not None, "points without samples are left out when they are read"
    return point.mean_at_k


def read_arms(arms: Sequence[Arm], goal: Goal, notes: Sequence[str] = ()) -> SideBySide:
    """Curves of the run directories, below `notes`. The teacher is the first that was evaluated (all runs share it)."""
    found = {arm: RunData.read(RunDirectory.open(arm.directory)) for arm in arms}
    curves = []
    for arm, data in found.items():
        points = tuple(point for point in data.student if point.mean_at_k is not None)
        if not points:
            raise DataError(
                f"run {arm.directory} has no evaluation with samples and cannot be compared; repeat that run"
            )
        curves.append(Curve(label=arm.label, seed=arm.seed, points=points, lr=_rate(data.config)))
    teachers = [data.teacher for data in found.values() if data.teacher is not None]
    recorded = [note for data in found.values() if data.summary for note in data.summary.notes]
    return SideBySide(
        curves=tuple(curves),
        goal=goal,
        teacher=teachers[0] if teachers else None,
        notes=tuple(dict.fromkeys([*notes, *_short(curves, goal), *recorded])),
    )


def _rate(config: str) -> float | None:
    """The learning rate that a run's configuration names."""
    learner = (yaml.safe_load(config) or {}).get("learner")
    rate = learner.get("lr") if isinstance(learner, dict) else None
    return float(rate) if isinstance(rate, int | float) else None


def _short(curves: Sequence[Curve], goal: Goal) -> list[str]:
    """Sentences about runs that ended before they had spent their budget."""
    spent = {(c.label, c.seed): goal.axis.cost(c.points[-1]) for c in curves}
    return [
        f"{label} with seed {seed} ended by its planned steps, at {n / goal.amount:.1%} of the budget."
        for (label, seed), n in spent.items()
        if goal.amount and n < goal.amount
    ]
