"""The expected gradient is that of the promise: in small worlds, and in corners where training happens."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from opd.certify.fitting import (
    fitted,
    other_settings,
    teacher_names,
    with_more_teachers,
    with_supports,
    with_temperature,
)
from opd.certify.gradients import EXACT, NOTICED, SAME, Case, case, distance
from opd.certify.page import Finding, Row, Skipped, at_least
from opd.certify.states import read
from opd.certify.worlds import MORE, VOCABULARY, WIDE, World, long, make_world, one_state, stale
from opd.errors import OpdError
from opd.method.method import Method
from opd.method.promises import whole

GRADIENT = "gradient of the promise"
NOT_THE_WRITER = "the student is not the writer"
FLOAT32, BFLOAT16 = 3e-5, 0.15  # of gradients of a few states; a wrong formula is off by more
FAR = 1e-4  # ratios of e^10, whose logarithm travels in float32


def of_the_promise(found: Case, old: Case | None) -> Iterator[Finding]:
    """The expected gradient is that of the promise, whoever wrote, and there is one."""
    exact = found.exact()
    yield at_least("the promise has a gradient", float(exact.abs().max()), NOTICED)
    yield Row(name=GRADIENT, measured=distance(found.training(), exact), tolerance=EXACT)
    name = f"{GRADIENT}, stale writer"
    yield _row(name, old, EXACT) if old else Skipped(name=name, why=NOT_THE_WRITER)
    broken = float(not found.seen.support_is_fixed())
    yield Row(name="the support does not depend on the written token", measured=broken, tolerance=0.0)


def _row(name: str, found: Case, tolerance: float) -> Row:
    return Row(name=name, measured=distance(found.training(), found.exact()), tolerance=tolerance)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corner:
    """A method where one thing is extreme; without a case there is a reason why it does not apply."""

    name: str
    found: Case | None
    tolerance: float = EXACT
    why: str = ""


def corners(method: Method) -> list[Corner]:
    """Long texts first. `method` is as shipped; it is fitted into each world."""
    names, drawn = teacher_names(method), getattr(method.rollout, "on_policy", False)
    small, world = fitted(method, VOCABULARY), one_state(make_world(2, names=names))

    def written(world: World, distance: float = 0.2) -> World:
        return stale(world, 6, distance) if drawn else world

    far = one_state(make_world(3, names=names, distance=2.0))
    wide, shipped = one_state(make_world(5, WIDE, names)), fitted(method, WIDE, WIDE)
    closed = replace(world, length=5, places=(2,))  # an even id stands before it
    sure = {
        "float32": world,
        "float32, sure teacher": closed.surer(1.0, 5.0),
        "float32, sure student": closed.surer(8.0, 1.0),
    }
    cold = replace(small, rollout=with_temperature(small.rollout, 0.7))
    return [
        Corner(name="long prompts and completions", found=case(small, long(written(world)))),
        Corner(name=f"{WIDE} ids", found=case(shipped, written(wide))),
        Corner(name="teacher far away", found=case(small, written(far))),
        Corner(
            name="writer far away",
            found=case(small, written(world, 1.0)) if drawn else None,
            tolerance=FAR,
            why=NOT_THE_WRITER,
        ),
        Corner(
            name="temperature 0.7",
            found=case(cold, written(world)) if cold != small else None,
            why="nothing is drawn at a temperature",
        ),
        *(
            Corner(name=name, found=case(small, written(near).to(torch.float32)), tolerance=FLOAT32)
            for name, near in sure.items()
        ),
        Corner(name="bfloat16", found=case(small, written(world).to(torch.bfloat16)), tolerance=BFLOAT16),
    ]


def in_corners(found: list[Corner]) -> Iterator[Finding]:
    """The promise is kept there."""
    for corner in found:
        name = f"{GRADIENT}, {corner.name}"
        yield _row(name, corner.found, corner.tolerance) if corner.found else Skipped(name=name, why=corner.why)


def of_several_teachers(method: Method) -> Iterator[Finding]:
    """Prompts ask different teachers, one of another width; which of them comes first does not matter."""
    method = with_more_teachers(fitted(method, VOCABULARY))
    names = tuple(dict.fromkeys([*teacher_names(method), *MORE]))
    world = make_world(7, names=names)
    world = replace(world, contexts=world.contexts * -(-len(names) // 2), places=(1,))
    found = case(method, world)
    yield _row(f"{GRADIENT}, several teachers", found, EXACT)
    turned = case(method, replace(world, teachers={name: world.teachers[name] for name in reversed(names)}))
    measured = distance(found.training(), turned.training())
    yield Row(name="invariance: order of the teachers", measured=measured, tolerance=SAME)


def at_other_settings(found: Case) -> Iterator[Finding]:
    """The promise is kept by every other setting of the objective, too."""
    measured = [distance(found.training(other), found.exact(other.promise)) for other in _others(found.method)]
    name = f"{GRADIENT}, other settings"
    if measured:
        yield Row(name=name, measured=max(measured), tolerance=EXACT)
    else:
        yield Skipped(name=name, why="the objective has no settings")


def _others(method: Method) -> Iterator[Any]:
    """The objective at other settings that go with the method's scorer (a baseline may read other scores)."""
    for other in other_settings(method.objective):
        try:
            replace(method, objective=other)
        except OpdError:
            continue
        yield other


def at_limits(found: Case) -> Iterator[Finding]:
    """Limiting cases: a support of everything, and those that objective and rollout list themselves."""
    method = found.method
    grown = with_supports(method, lambda _: found.world.vocabulary)
    if grown != method:
        full = case(grown, found.world)
        error = distance(full.training(), full.exact(whole(grown.objective.promise)))
        yield Row(name="limit: k = V is the whole vocabulary", measured=error, tolerance=EXACT)
    for limit in getattr(method.objective, "limits", ()):
        error = distance(limit.scale * found.training(limit.objective), found.exact(limit.promise))
        yield Row(name=f"limit: {limit.name}", measured=error, tolerance=limit.tolerance)
    for limit in getattr(method.rollout, "limits", ()):
        ends = [read(rollout, method.scorer, found.world) for rollout in (limit.rollout, limit.equals)]
        same = [
            np.array_equal(a.trajectory.behavior.logprobs, b.trajectory.behavior.logprobs)
            for a, b in zip(ends[0].scored, ends[1].scored, strict=True)
        ]
        yield Row(name=f"limit: {limit.name}", measured=float(len(same) - sum(same)), tolerance=0.0)
