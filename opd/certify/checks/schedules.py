"""Checks of a method's schedules: where they begin, where they end, and that they stay between the two."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from opd.certify.certificate import Finding, Row, Skipped
from opd.certify.engines import RequestLog, engines
from opd.certify.gradients import SAME
from opd.certify.worlds import World
from opd.ports import Context

SCHEDULED = "schedules begin at their first value and end at their last"
RUN = 40  # steps of a run; as many are looked at of a schedule that has a length of its own


def check_schedules(part: Any, world: World) -> Iterator[Finding]:
    """Every schedule in `part` that has a `first` and a `last` value goes from the one to the other."""
    found = list(schedules(part))
    if not found:
        yield Skipped(name=SCHEDULED, why="no number of the method follows the step")
        return
    context = engines(world, RequestLog())
    yield Row(name=SCHEDULED, measured=max(_off(one, context) for one in found), tolerance=SAME)


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
    values = [float(schedule(context.at(round(share * length / RUN)))) for share in range(RUN + 1)]
    first, last = float(schedule.first), float(schedule.last)
    begins = last if getattr(schedule, "at", 1.0) == 0 else first  # a switch that is over before it begins
    low, high = min(first, last), max(first, last)
    beyond = max(max(low - value, value - high) for value in values)
    later = float(schedule(context.at(length + 1))) if length < context.steps else last
    return max(abs(values[0] - begins), abs(values[-1] - last), abs(later - last), beyond) / max(high - low, 1e-9)
