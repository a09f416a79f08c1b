"""Schedules of numbers over the steps of a run, for coefficients of terms and fields of parts."""

import math
from dataclasses import dataclass
from typing import Annotated, Protocol

from opd.ports import Context
from opd.settings.ranges import Fraction, In
from opd.settings.validation import settings

Factor = Annotated[float, In(-1e6, 1e6)]
Steps = Annotated[int, In(0, 1_000_000_000, because="0 is the whole run")]


class Schedule(Protocol):
    """A number as a pure function of the step."""

    def __call__(self, context: Context) -> float:
        """Value at `context.step`."""
        ...


def value(schedule: "float | Schedule", context: Context) -> float:
    """Value of a constant or a schedule at a step."""
    return float(schedule(context)) if callable(schedule) else float(schedule)


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class LinearSchedule:
    """Linear schedule from `first` at step 0 to `last` at step `steps`, and `last` from there on."""

    # value at the first step
    first: Factor
    # value from step `steps` on
    last: Factor
    # number of steps; 0 is the whole run
    steps: Steps = 0

    def __call__(self, context: Context) -> float:
        return self.first + (self.last - self.first) * _share(self.steps, context)


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class CosineSchedule:
    """Half-cosine schedule from `first` at step 0 to `last` at step `steps`, and `last` from there on."""

    # value at the first step
    first: Factor
    # value from step `steps` on
    last: Factor
    # number of steps; 0 is the whole run
    steps: Steps = 0

    def __call__(self, context: Context) -> float:
        return self.last + (self.first - self.last) * (1 + math.cos(math.pi * _share(self.steps, context))) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class SwitchSchedule:
    """Schedule of two values: `first` until the share `at` of the run is over, and `last` from that step on."""

    # value at the first step
    first: Factor
    # value from the step on at which it switches
    last: Factor
    # share of the run's steps before it
    at: Fraction

    def __call__(self, context: Context) -> float:
        return self.first if context.step < self.at * context.steps - 1e-9 else self.last


def _share(steps: int, context: Context) -> float:
    """Share of the steps that are over, in [0, 1]."""
    return min(context.step / (steps or context.steps), 1.0)
