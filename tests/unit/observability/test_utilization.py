"""Utilization from spans: numbers by hand, and what must hold for any spans."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.observability.spans import Span, Stage
from opd.observability.utilization import (
    STAFFED,
    DeviceCounts,
    Utilization,
    UtilizationLog,
    gain_of_another,
    gain_of_overlap,
    step_utilization,
    verdict,
)

ROLLOUT, TEACHER, LEARNER, PUBLISH = Stage.ROLLOUT, Stage.TEACHER, Stage.LEARNER, Stage.PUBLISH


def span(role: Stage, start: float, end: float, step: int = 1) -> Span:
    return Span(role=role, step=step, start=float(start), end=float(end))


LOCK_STEP = [
    span(ROLLOUT, 0, 3), span(ROLLOUT, 0, 4), span(TEACHER, 3, 4), span(TEACHER, 4, 6),
    span(LEARNER, 6, 9), span(PUBLISH, 9, 10),
]  # fmt: skip


def test_a_step_in_lock_step_by_hand() -> None:
    usage = step_utilization(0.0, 10.0, LOCK_STEP)
    assert usage.busy == {ROLLOUT: 4.0, TEACHER: 3.0, LEARNER: 3.0, PUBLISH: 1.0}
    assert usage.held == {ROLLOUT: 5.0, TEACHER: 3.0, LEARNER: 4.0}
    assert usage.alone == {ROLLOUT: 3.0, TEACHER: 2.0, LEARNER: 3.0, PUBLISH: 1.0}
    assert usage.overlap_efficiency == 0.4
    assert usage.idle(LEARNER) == 0.6
    assert usage.bubble(dict.fromkeys(STAFFED, 1)) == pytest.approx(1 - 12 / 30)
    assert usage.bubble({ROLLOUT: 4, TEACHER: 2, LEARNER: 1}) == pytest.approx(1 - (20 + 6 + 4) / 70)


def test_what_lies_outside_the_step_does_not_count() -> None:
    usage = step_utilization(2.0, 8.0, LOCK_STEP)
    assert usage.busy == {ROLLOUT: 2.0, TEACHER: 3.0, LEARNER: 2.0, PUBLISH: 0.0}
    assert usage.wall_s == 6.0


def test_the_fraction_of_the_limit_adds_up_over_steps() -> None:
    both = step_utilization(0.0, 10.0, LOCK_STEP, 4.0).plus(step_utilization(20.0, 25.0, [], 2.0))
    assert both.fraction_of_limit == pytest.approx(6 / 15)
    assert both.steps == 2


TIMES = st.floats(0, 100, allow_nan=False, allow_subnormal=False)
SPANS = st.lists(
    st.builds(lambda role, a, b: span(role, min(a, b), max(a, b)), st.sampled_from(Stage), TIMES, TIMES), max_size=12
)


def close(one: Mapping[Stage, float], other: Mapping[Stage, float]) -> bool:
    return dict(one) == pytest.approx(dict(other), abs=1e-9)


@given(SPANS)
def test_shares_are_shares(spans: list[Span]) -> None:
    usage = step_utilization(10.0, 90.0, spans)
    assert all(0 <= usage.alone[role] <= usage.busy[role] + 1e-9 <= 80 + 2e-9 for role in Stage)
    assert all(usage.busy[role] <= usage.held[role] + 1e-9 for role in STAFFED)
    assert sum(usage.alone.values()) <= 80 + 1e-9
    assert 0 <= usage.overlap_efficiency <= 1 + 1e-9
    assert -1e-9 <= usage.bubble({ROLLOUT: 5, TEACHER: 2, LEARNER: 3}) <= 1


@given(SPANS, st.randoms(use_true_random=False), st.floats(10, 90))
def test_order_and_cuts_do_not_matter(spans: list[Span], order: Any, cut: float) -> None:
    """Shuffled spans, spans cut in two, and a step measured as two: the same seconds."""
    whole = step_utilization(10.0, 90.0, spans)
    pieces = [span(s.role, a, b) for s in spans for a, b in pairwise([s.start, (s.start + s.end) / 2, s.end])]
    order.shuffle(pieces)
    assert close(step_utilization(10.0, 90.0, pieces).busy, whole.busy)
    halves = step_utilization(10.0, cut, spans).plus(step_utilization(cut, 90.0, spans))
    for name in ("busy", "held", "alone"):
        assert close(getattr(halves, name), getattr(whole, name))


@given(SPANS, SPANS)
def test_more_work_never_makes_anybody_less_busy(spans: list[Span], more: list[Span]) -> None:
    before, after = step_utilization(10.0, 90.0, spans), step_utilization(10.0, 90.0, [*spans, *more])
    assert all(after.busy[role] >= before.busy[role] - 1e-9 for role in Stage)


@given(st.integers(0, 3), st.integers(1, 12), st.randoms(use_true_random=False))
def test_the_log_counts_work_that_ran_ahead(ahead: int, steps: int, draw: Any) -> None:
    """Steps of 10 s; work for step `s` may begin `ahead` steps earlier. The log says what all spans together say."""
    told: list[list[Span]] = []
    for step in range(steps):
        end = 10.0 * step + draw.uniform(1, 9)
        start = draw.uniform(max(0.0, 10.0 * (step - ahead)), end)
        told.append([span(ROLLOUT, start, end, step), span(LEARNER, end, 10.0 * step + 10, step)])
    log = UtilizationLog(ahead, window=1000)
    expected = Utilization()
    every = [s for spans in told for s in spans]
    for step, spans in enumerate(told):
        log.add(10.0 * step, 10.0 * step + 10, spans)
        expected = expected.plus(step_utilization(10.0 * step, 10.0 * step + 10, every))
        assert log.recent.steps == max(0, step + 1 - ahead)
    assert close(log.whole().busy, expected.busy) and close(log.whole().held, expected.held)
    assert log.whole().steps == steps and log.whole().wall_s == pytest.approx(10 * steps)


def test_only_the_last_steps_are_recent() -> None:
    log = UtilizationLog(0, window=2)
    for step in range(5):
        log.add(10.0 * step, 10.0 * step + 10, [span(LEARNER, 10 * step, 10 * step + step)])
    assert log.recent.busy[LEARNER] == 3 + 4 and log.whole().busy[LEARNER] == 10


def overlapped(rollout: float, teacher: float, learner: float) -> Utilization:
    return step_utilization(
        0.0, 100.0, [span(ROLLOUT, 0, rollout), span(TEACHER, 0, teacher), span(LEARNER, 100 - learner, 100)]
    )


def staffing(ahead: int, rollout: int = 1, teacher: int = 1, learner: int = 1) -> DeviceCounts:
    return DeviceCounts(actors={ROLLOUT: rollout, TEACHER: teacher, LEARNER: learner}, ahead=ahead)


@pytest.mark.parametrize(
    ("usage", "counts", "expected"),
    [
        (
            overlapped(60, 100, 59),
            staffing(1),
            "teacher-bound: the learner waited 41 % of the time; a second teacher actor would give about 1.7x",
        ),
        (
            overlapped(60, 100, 59),
            staffing(1, teacher=2),
            "teacher-bound: the learner waited 41 % of the time; a third teacher actor would give about 1.5x",
        ),
        (
            overlapped(30, 20, 100),
            staffing(2, learner=4),
            "learner-bound: rollout devices were idle 70 % of the time; one more learner rank would give about 1.2x",
        ),
        (
            step_utilization(0.0, 10.0, LOCK_STEP),
            staffing(0),
            "rollout-bound: the learner waited 60 % of the time; letting rollouts run ahead (max_staleness=1 or more) "
            "would give at most 2.0x",
        ),
        (
            step_utilization(0.0, 10.0, [span(ROLLOUT, 0, 9), span(LEARNER, 9, 10)]),
            staffing(0),
            "rollout-bound: the learner waited 90 % of the time; a second rollout actor would give about 1.8x",
        ),
        (
            overlapped(100, 100, 100),
            staffing(1),
            "balanced: rollout, the busiest, worked 100 % of the time; another would give less than 1.05x",
        ),
        (Utilization(), staffing(0), ""),
    ],
)
def test_the_verdict(usage: Utilization, counts: DeviceCounts, expected: str) -> None:
    assert verdict(usage, counts) == expected


@given(SPANS.filter(bool), st.integers(0, 2), st.integers(1, 8))
def test_promises_are_bounded(spans: list[Span], ahead: int, count: int) -> None:
    """One more of `n` actors gives at most (n+1)/n, never a loss; overlap at most what three roles can."""
    usage, subject = step_utilization(10.0, 90.0, spans), staffing(ahead, count, count, count)
    for role in STAFFED:
        assert 1 <= gain_of_another(usage, role, subject) <= (count + 1) / count + 1e-9
    assert gain_of_overlap(usage) >= 1 - 1e-9
    assert isinstance(verdict(usage, subject), str)


def test_in_lock_step_another_actor_gives_what_is_promised() -> None:
    """Measured on a schedule: the teacher's part of every step halves."""

    def steps(teacher: float) -> float:
        return scheduled(4.0, teacher, 3.0).wall_s

    usage = scheduled(4.0, 6.0, 3.0)
    assert gain_of_another(usage, TEACHER, staffing(0)) == pytest.approx(steps(6.0) / steps(3.0))


def scheduled(rollout: float, teacher: float, learner: float) -> Utilization:
    """One role after another."""
    a, b = rollout, rollout + teacher
    return step_utilization(0.0, b + learner, [span(ROLLOUT, 0, a), span(TEACHER, a, b), span(LEARNER, b, b + learner)])
