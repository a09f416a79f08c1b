"""Schedules of numbers over the steps of a run, for coefficients of terms and fields of parts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Annotated, Any, Protocol, TypeVar, get_args

from opd.errors import ConfigurationError
from opd.ports import Context
from opd.settings.ranges import Fraction, In
from opd.settings.validation import fields_of, settings

Part = TypeVar("Part")

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


def number(given: "float | Schedule") -> float:
    """Number of a field of a part as it is at a step.

    Raises:
        ConfigurationError: the field still has a schedule.
    """
    if callable(given):
        raise ConfigurationError(
            f"{given} is a schedule, and its part is used without a step; take the loss of a step: method.loss_at"
        )
    return float(given)


def with_values(part: Part, context: Context) -> Part:
    """The part as it is at a step: its schedules, and those of parts within it, are the numbers that they give.

    A field follows a schedule where its declared type allows one (`Share | Schedule`). A part without any is returned
    as it is.

    Raises:
        ConfigurationError: a schedule gives a number outside of the field's range.
    """
    changed = _with_values(part, context)
    return part if changed is None else changed


def _with_values(part: Any, context: Context) -> Any:
    """The part as it is at a step; None if nothing in it follows the step."""
    if isinstance(part, Mapping):
        found = {key: _with_values(inner, context) for key, inner in part.items()}
        changes = {key: new for key, new in found.items() if new is not None}
        return {**part, **changes} if changes else None
    if not is_dataclass(part) or isinstance(part, type):
        return None
    scheduled, found = scheduled_fields(type(part)), {}
    for name in [f.name for f in fields(part) if f.init]:
        given = getattr(part, name)
        found[name] = value(given, context) if name in scheduled else _with_values(given, context)
    changes = {name: new for name, new in found.items() if new is not None and new != getattr(part, name)}
    return replace(part, **changes) if changes else None


@cache
def scheduled_fields(cls: type) -> frozenset[str]:
    """Names of a dataclass's fields whose declared type allows a schedule."""
    return frozenset(name for name, hint in fields_of(cls).items() if Schedule in get_args(hint))


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
