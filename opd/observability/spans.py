"""Spans of work by role: the record from which utilization, bubbles and traces are computed."""

from dataclasses import dataclass
from enum import Enum


class Stage(Enum):
    """Role that can be busy. Publishing occupies learner and engines at once and is therefore a role of its own."""

    ROLLOUT = "rollout"
    TEACHER = "teacher"
    LEARNER = "learner"
    PUBLISH = "publish"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Interval in which `role` worked for `step` (counted from 1), `start` to `end` in seconds of the event loop's
    clock.

    Requested and unfinished work counts, whatever it waits for inside the role. Spans of one role may overlap.
    """

    role: Stage
    step: int
    start: float
    end: float
