"""Utilization, waiting, and one sentence of advice, from the spans of finished steps.

Time counts inside steps only, from when the loop asks for a step's data to when its weights are live; what happens
between steps (evaluations, checkpoints) is no role's bubble. A role is busy while at least one of its spans lasts. That
is as fine as spans can see: an actor that idles while another of its role works counts as busy, so the bubbles given
here are lower bounds.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from opd.observability.spans import Span, Stage

STAFFED = (Stage.ROLLOUT, Stage.TEACHER, Stage.LEARNER)
"""The roles that have devices. Publishing holds those of rollout and learner."""

WORTH = 1.05  # a gain below this is not advised
_ACTOR = {Stage.ROLLOUT: "rollout actor", Stage.TEACHER: "teacher actor", Stage.LEARNER: "learner rank"}
Intervals = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCounts:
    """Number of actors of each role of `STAFFED`, and how many steps rollouts may run ahead (`max_staleness`)."""

    actors: Mapping[Stage, int] = field(default_factory=lambda: dict.fromkeys(STAFFED, 1))
    ahead: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Utilization:
    """Seconds of `steps` steps that took `wall_s`; adds up over steps.

    `busy`: at least one span of the role lasted. `held`: its devices were taken, by its own work or by publishing.
    `alone`: it was the only busy role. `limit_s`: least time of these steps by the roofline
    (`opd.observability.roofline`), 0 where the hardware is not known.
    """

    steps: int = 0
    wall_s: float = 0.0
    limit_s: float = 0.0
    busy: Mapping[Stage, float] = field(default_factory=lambda: dict.fromkeys(Stage, 0.0))
    held: Mapping[Stage, float] = field(default_factory=lambda: dict.fromkeys(STAFFED, 0.0))
    alone: Mapping[Stage, float] = field(default_factory=lambda: dict.fromkeys(Stage, 0.0))

    def plus(self, other: "Utilization") -> "Utilization":
        """Sum of both."""
        return Utilization(
            steps=self.steps + other.steps,
            wall_s=self.wall_s + other.wall_s,
            limit_s=self.limit_s + other.limit_s,
            busy={role: self.busy[role] + other.busy[role] for role in Stage},
            held={role: self.held[role] + other.held[role] for role in STAFFED},
            alone={role: self.alone[role] + other.alone[role] for role in Stage},
        )

    def utilization(self, role: Stage) -> float:
        """Share of the time in which the role was busy."""
        return self.busy[role] / self.wall_s

    def idle(self, role: Stage) -> float:
        """Share of the time in which nothing held the role's devices; the learner's is its waiting."""
        return 1.0 - self.held[role] / self.wall_s

    def bubble(self, actors: Mapping[Stage, int]) -> float:
        """`1 - sum_role n_role held_role / sum_role (n_role wall)`: the share of device-seconds without work
        (docs/performance.md, STEP).
        """
        devices = sum(actors[role] for role in STAFFED)
        return sum(actors[role] * self.idle(role) for role in STAFFED) / devices

    @property
    def overlap_efficiency(self) -> float:
        """`max_role busy_role / wall`: time of the slowest role over the time of the steps. 1 = the others' work is
        hidden behind it altogether.
        """
        return max(self.busy.values()) / self.wall_s

    @property
    def fraction_of_limit(self) -> float:
        """`limit / wall`: 1 = no schedule and no software on this hardware is faster."""
        return self.limit_s / self.wall_s


def step_utilization(start: float, end: float, spans: Sequence[Span], limit_s: float = 0.0) -> Utilization:
    """The step from `start` to `end`, given every span that touches it (others do no harm)."""
    touching: dict[Stage, list[tuple[float, float]]] = {role: [] for role in Stage}
    for span in spans:
        if span.start < end and span.end > start:
            touching[span.role].append((max(span.start, start), min(span.end, end)))
    cut = {role: _merged(touching[role]) for role in Stage}

    def together(roles: Sequence[Stage]) -> float:
        return _length(_merged([interval for role in roles for interval in cut[role]]))

    every_role = together(list(Stage))
    return Utilization(
        steps=1,
        wall_s=end - start,
        limit_s=limit_s,
        busy={role: _length(cut[role]) for role in Stage},
        held={role: together([role] if role is Stage.TEACHER else [role, Stage.PUBLISH]) for role in STAFFED},
        alone={role: every_role - together([other for other in Stage if other is not role]) for role in Stage},
    )


def _merged(intervals: Intervals) -> Intervals:
    """Union of intervals as disjoint ones in order; empty ones vanish."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def _length(intervals: Intervals) -> float:
    return sum((end - start for start, end in intervals), 0.0)


class UtilizationLog:
    """Utilization of finished steps, each computed once all work during it is recorded.

    A step's spans are added when it ends, but work for the `ahead` steps after it may have gone on at the same time; so
    a step is settled `ahead` steps later, and `recent` lags by as much. `whole` is exact when the run has ended.
    """

    def __init__(self, ahead: int, window: int = 20) -> None:
        self._ahead = ahead
        self._open: deque[tuple[float, float, float, Sequence[Span]]] = deque()
        self._settled: deque[Utilization] = deque(maxlen=window)
        self._total = Utilization()

    def add(self, start: float, end: float, spans: Sequence[Span], limit_s: float = 0.0) -> None:
        """Add a step from `start` to `end`, with the spans of all work for it."""
        self._open.append((start, end, limit_s, spans))
        if len(self._open) > self._ahead:
            usage = self._first(0)
            self._open.popleft()
            self._settled.append(usage)
            self._total = self._total.plus(usage)

    @property
    def recent(self) -> Utilization:
        """The last settled steps, at most `window`; `steps` is 0 before there is one."""
        return _sum(list(self._settled))

    def whole(self) -> Utilization:
        """All steps so far."""
        return _sum([self._total, *(self._first(i) for i in range(len(self._open)))])

    def _first(self, i: int) -> Utilization:
        """Utilization of the `i`-th open step: work for steps before it had ended when it began."""
        start, end, limit_s, _ = self._open[i]
        later = [span for *_, spans in list(self._open)[i:] for span in spans]
        return step_utilization(start, end, later, limit_s)


def _sum(usages: Sequence[Utilization]) -> Utilization:
    total = Utilization()
    for usage in usages:
        total = total.plus(usage)
    return total


def gain_of_another(usage: Utilization, role: Stage, staffing: DeviceCounts) -> float:
    """Speedup of steps from one more actor of `role`, on a device of its own (estimate).

    Its work shrinks to `n/(n+1)`. Where steps may overlap, until another role is the slowest:
    `T' = T - min(busy/(n+1), busy - busy_next)`. In lock-step only what it did alone counts: `T' = T - alone/(n+1)`.
    """
    saved = usage.busy[role] / (staffing.actors[role] + 1)
    if not staffing.ahead:
        saved = usage.alone[role] / (staffing.actors[role] + 1)
    else:
        others = max(seconds for other, seconds in usage.busy.items() if other is not role)
        saved = min(saved, max(0.0, usage.busy[role] - others))
    return usage.wall_s / max(usage.wall_s - saved, 1e-12)


def gain_of_overlap(usage: Utilization) -> float:
    """Upper bound of the speedup if all roles work at once: `wall / max held`."""
    return usage.wall_s / max(*usage.held.values(), 1e-12)


def verdict(usage: Utilization, staffing: DeviceCounts) -> str:
    """One sentence: the role that bounds the steps, those that wait for it, and the remedy; "" without a step.

    Example: "teacher-bound: the learner waited 41 % of the time; a second teacher actor would give about 1.5x".
    """
    if usage.wall_s <= 0 or not any(usage.busy.values()):
        return ""
    role = max(Stage, key=lambda r: usage.busy[r])
    waiting = (
        f"rollout devices were idle {usage.idle(Stage.ROLLOUT):.0%} of the time"
        if role is Stage.LEARNER
        else f"the learner waited {usage.idle(Stage.LEARNER):.0%} of the time"
    ).replace("%", " %")
    another = gain_of_another(usage, role, staffing) if role in STAFFED else 1.0
    overlap = gain_of_overlap(usage) if not staffing.ahead else 1.0
    if max(another, overlap) < WORTH:
        share = f"{usage.utilization(role):.0%}".replace("%", " %")
        return f"balanced: {role.value}, the busiest, worked {share} of the time; another would give less than {WORTH}x"
    if overlap > another:
        help_ = f"letting rollouts run ahead (max_staleness=1 or more) would give at most {overlap:.1f}x"
    else:
        help_ = f"{_another(staffing.actors[role])} {_ACTOR[role]} would give about {another:.1f}x"
    return f"{role.value}-bound: {waiting}; {help_}"


def _another(count: int) -> str:
    return {1: "a second", 2: "a third"}.get(count, "one more")
