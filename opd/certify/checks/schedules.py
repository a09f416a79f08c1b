"""Checks of a method's schedules: where they begin, where they end, their way between the two."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from opd.certify.certificate import Finding, Row, Skipped
from opd.certify.engines import RequestLog, engines
from opd.certify.fitting import other_settings
from opd.certify.gradients import SAME
from opd.certify.worlds import World
from opd.errors import ConfigurationError
from opd.method.schedules import CosineSchedule, LinearSchedule, SwitchSchedule
from opd.ports import Context

SCHEDULED = "schedules begin at their first value and end at their last"
DEFINED = "schedules have the value at every step that they are defined to"
Known = LinearSchedule | CosineSchedule | SwitchSchedule
RUN = 40  # steps of a run; as many are looked at of a schedule that has a length of its own


def check_schedules(part: Any, world: World) -> Iterator[Finding]:
    """Every schedule in `part` that has a `first` and a `last` value goes from the one to the other."""
    found = list(schedules(part))
    if not found:
        yield from (Skipped(name=name, why="no number of the method follows the step") for name in (SCHEDULED, DEFINED))
        return
    context = engines(world, RequestLog())
    yield Row(name=SCHEDULED, measured=max(_off(one, context) for one in found), tolerance=SAME)
    known = [one for one in found if isinstance(one, Known)]
    if not known:
        yield Skipped(name=DEFINED, why="no definition is known for this schedule; the other row holds without one")
        return
    every = [one for schedule in known for one in (schedule, *other_settings(schedule))]
    yield Row(name=DEFINED, measured=max(_astray(one, context) for one in every), tolerance=SAME)


def schedules(part: Any) -> Iterator[Any]:
    """All parts within `part` that are called with a context and have a `first` and a `last` value."""
    if isinstance(part, Mapping):
        for value in part.values():
            yield from schedules(value)
        return
    if not is_dataclass(part) or isinstance(part, type):
        return
    if callable(part) and hasattr(part, "first") and hasattr(part, "last"):
        yield part
        return
    for f in fields(part):
        yield from schedules(getattr(part, f.name))


def _off(schedule: Any, context: Context) -> float:
    """Distance of the ends from what they should be, or of any step's value from between them, over their range."""
    length = getattr(schedule, "steps", 0) or RUN
    context = Context.of(context, step=0, steps=max(length, RUN), seed=0)
    values = [_value(schedule, context.at(round(share * length / RUN))) for share in range(RUN + 1)]
    first, last = float(schedule.first), float(schedule.last)
    begins = last if getattr(schedule, "at", 1.0) == 0 else first  # a switch that is over before it begins
    low, high = min(first, last), max(first, last)
    beyond = max(max(low - value, value - high) for value in values)
    later = _value(schedule, context.at(length + 1)) if length < context.steps else last
    return max(abs(values[0] - begins), abs(values[-1] - last), abs(later - last), beyond) / max(high - low, 1e-9)


def _astray(schedule: Known, context: Context) -> float:
    """Greatest distance from the definition at any step of runs that are as long as the schedule, and longer."""
    own = getattr(schedule, "steps", 0)
    runs = [own, 2 * own] if own else [RUN, RUN // 2 + 1]
    contexts = [Context.of(context, step=step, steps=n, seed=0) for n in runs for step in _steps(n)]
    off = [abs(_value(schedule, at) - defined(schedule, at.step, at.steps)) for at in contexts]
    return max(off) / max(abs(schedule.last - schedule.first), 1e-9)


def _value(schedule: Any, context: Context) -> float:
    try:
        return float(schedule(context))
    except (ArithmeticError, ValueError) as error:
        raise ConfigurationError(
            f"schedule {schedule} has no value at step {context.step} of {context.steps} ({type(error).__name__}: "
            f"{error}); give every step of a run of any length a number"
        ) from error


def _steps(run: int) -> list[int]:
    """Steps of a run, the evaluation after it included: all of a short one."""
    return sorted({round(share * run / RUN) for share in range(RUN + 1)} | {1, max(run - 1, 0)})


def defined(schedule: Known, step: int, steps: int) -> float:
    """Value of a schedule at a step of a run by definition."""
    first, last = float(schedule.first), float(schedule.last)
    if isinstance(schedule, SwitchSchedule):
        return first if step < schedule.at * steps - SAME else last
    share = min(step / (schedule.steps or steps), 1.0)
    if isinstance(schedule, CosineSchedule):
        share = (1 - math.cos(math.pi * share)) / 2
    return first + (last - first) * share
