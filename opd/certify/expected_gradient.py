"""Checks of the expected gradient against that of the promise, in small worlds and in corner cases."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from opd.certify.certificate import Finding, Row, Skipped, at_least
from opd.certify.enumeration import enumerated
from opd.certify.fitting import (
    fitted,
    other_settings,
    teacher_names,
    with_more_teachers,
    with_supports,
    with_temperature,
)
from opd.certify.gradients import (
    EXACT,
    NOTICED,
    SAME,
    Case,
    departure,
    how_it_departs,
    make_case,
    promises_nothing,
    relative_difference,
)
from opd.certify.targets import writes
from opd.certify.worlds import MORE, VOCABULARY, WIDE, World, long, make_world, one_state, stale
from opd.errors import OpdError
from opd.method.method import Method, loss_masks, weigh
from opd.method.needs import named
from opd.method.promises import on_whole_vocabulary
from opd.ports import Role

GRADIENT = "gradient of the promise"
SOME = "the promise has a gradient"
NOT_THE_WRITER = "the student is not the writer"
FLOAT32, BFLOAT16 = 3e-5, 0.15  # of gradients of a few states; a wrong formula is off by more
FAR = 1e-4  # ratios of e^10, whose logarithm travels in float32
NEAR = 1e-4  # of gradients below 1e-5, where a number that is left out is a multiple of it


def check_promise(case: Case, stale_case: Case | None) -> Iterator[Finding]:
    """The expected gradient is that of the promise, for a fresh and a stale behavior policy, and is not 0."""
    if promises_nothing(case.method.objective):
        yield Skipped(name=SOME, why="the objective promises to descend nothing")
    else:
        yield at_least(SOME, float(case.exact().abs().max()), NOTICED)
    yield _row(GRADIENT, case, EXACT)
    name = f"{GRADIENT}, stale writer"
    yield _row(name, stale_case, EXACT) if stale_case else Skipped(name=name, why=NOT_THE_WRITER)
    broken = float(not case.enumeration.support_is_fixed())
    yield Row(name="the support does not depend on the sampled token", measured=broken, tolerance=0.0)


def _row(name: str, case: Case, tolerance: float) -> Row:
    row = Row(name=name, measured=departure(case), tolerance=tolerance)
    return row if row.passed else replace(row, note=how_it_departs(case))


@dataclass(frozen=True, slots=True, kw_only=True)
class Corner:
    """Corner case of a method, where one thing is extreme; or the reason `why` it does not apply."""

    name: str
    case: Case | None
    tolerance: float = EXACT
    why: str = ""


def corner_cases(method: Method) -> list[Corner]:
    """Corner cases of a method, long texts first. `method` is as shipped; it is fitted into each world."""
    names, on_policy = teacher_names(method), getattr(method.rollout, "on_policy", False)
    beside = named(method, Role.READER)
    small, world = fitted(method, VOCABULARY), one_state(make_world(2, names=names, named=beside))

    def behind(world: World, distance: float = 0.2) -> World:
        return stale(world, 6, distance) if on_policy else world

    far = one_state(make_world(3, names=names, distance=2.0, named=beside))
    near = _in_one_context(one_state(make_world(4, names=names, distance=5e-5, named=beside)))  # log-ratios of 5e-4
    beyond = one_state(make_world(4, names=names, distance=8.0, named=beside))  # up to 80
    certain = one_state(make_world(4, names=names, named=beside)).sharpened(16.0, 16.0)  # of 0.9999 and more
    wide, shipped = one_state(make_world(5, WIDE, names, named=beside)), fitted(method, WIDE, WIDE)
    closed = replace(world, length=5, positions=(2,))  # an even id stands before it
    sure = {
        "float32": world,
        "float32, sure teacher": closed.sharpened(1.0, 5.0),
        "float32, sure student": closed.sharpened(8.0, 1.0),
    }
    cold = replace(small, rollout=with_temperature(small.rollout, 0.7))
    return [
        Corner(name="long prompts and completions", case=make_case(small, _long(small, behind(world)))),
        Corner(name=f"{WIDE} ids", case=make_case(shipped, behind(wide))),
        Corner(name="teacher nearly reached", case=make_case(small, behind(near)), tolerance=NEAR),
        Corner(name="teacher far away", case=make_case(small, behind(far))),
        Corner(name="teacher farther away", case=make_case(small, behind(beyond))),
        Corner(name="both nearly certain", case=make_case(small, behind(certain)), tolerance=NEAR),
        Corner(
            name="writer far away",
            case=make_case(small, behind(world, 1.0)) if on_policy else None,
            tolerance=FAR,
            why=NOT_THE_WRITER,
        ),
        Corner(
            name="temperature 0.7",
            case=make_case(cold, behind(world)) if cold != small else None,
            why="nothing is drawn at a temperature",
        ),
        *(
            Corner(name=name, case=make_case(small, behind(replace(world, step=step))))
            for name, step in (("middle of a run", world.steps // 3), ("end of a run", world.steps - 1))
        ),
        Corner(name="student a step later", case=make_case(small, _a_step_later(behind(world)))),
        Corner(name="texts that the token limit cut", case=make_case(small, behind(replace(world, cut=True)))),
        *(
            Corner(name=name, case=make_case(small, behind(near).to(torch.float32)), tolerance=FLOAT32)
            for name, near in sure.items()
        ),
        Corner(name="bfloat16", case=make_case(small, behind(world).to(torch.bfloat16)), tolerance=BFLOAT16),
    ]


def _in_one_context(world: World) -> World:
    """World whose teachers read what the student reads."""
    return replace(world, contexts=tuple((own, own) for own, _ in world.contexts))


def _a_step_later(world: World) -> World:
    """The world with the same texts and teachers, and a student that has learned in the meantime."""
    return replace(world, student=world.student.perturbed(torch.Generator().manual_seed(8), 0.1))


def _long(method: Method, world: World) -> World:
    """World of long texts; shorter ones where the scorer asks about several tokens at every place of them."""
    return long(world, 30, 30) if getattr(method.scorer, "looks_ahead", False) or writes(method.scorer) else long(world)


def check_corners(corners: list[Corner]) -> Iterator[Finding]:
    """The expected gradient is that of the promise in corner cases."""
    for corner in corners:
        name = f"{GRADIENT}, {corner.name}"
        yield _row(name, corner.case, corner.tolerance) if corner.case else Skipped(name=name, why=corner.why)


def check_several_teachers(method: Method) -> Iterator[Finding]:
    """Prompts have different teachers, one of another width; their order does not matter."""
    method = with_more_teachers(fitted(method, VOCABULARY))
    names = tuple(dict.fromkeys([*teacher_names(method), *MORE]))
    world = make_world(7, names=names, named=named(method, Role.READER))
    world = replace(world, contexts=world.contexts * -(-len(names) // 2), positions=(1,))
    case = make_case(method, world)
    yield _row(f"{GRADIENT}, several teachers", case, EXACT)
    if not case.trains():
        return
    reordered = make_case(method, replace(world, teachers={name: world.teachers[name] for name in reversed(names)}))
    measured = relative_difference(case.training(), reordered.training())
    yield Row(name="invariance: order of the teachers", measured=measured, tolerance=SAME)


def check_other_settings(case: Case) -> Iterator[Finding]:
    """The expected gradient is that of the promise at every other legal setting of the objective."""
    measured = [
        departure(replace(case, method=replace(case.method, objective=other)))
        for other in _other_objectives(case.method)
    ]
    name = f"{GRADIENT}, other settings"
    if measured:
        yield Row(name=name, measured=max(measured), tolerance=EXACT)
    else:
        yield Skipped(name=name, why="the objective has no settings")


def _other_objectives(method: Method) -> Iterator[Any]:
    """The objective at other settings that go with the method's scorer (a baseline may read other scores)."""
    for other in other_settings(method.objective):
        try:
            replace(method, objective=other)
        except OpdError:
            continue
        yield other


def check_limits(case: Case) -> Iterator[Finding]:
    """Limiting cases: k = V, and those that objective, rollout and token weights list themselves."""
    method = case.method
    grown = with_supports(method, lambda _: case.world.vocabulary)
    if grown != method:
        full = make_case(grown, case.world)
        error = relative_difference(full.training(), full.exact(on_whole_vocabulary(grown.objective.promise)))
        yield Row(name="limit: k = V is the whole vocabulary", measured=error, tolerance=EXACT)
    for limit in getattr(method.objective, "limits", ()):
        error = relative_difference(limit.scale * case.training(limit.objective), case.exact(limit.promise))
        yield Row(name=f"limit: {limit.name}", measured=error, tolerance=limit.tolerance)
    for limit in getattr(method.rollout, "limits", ()):
        ends = [enumerated(rollout, method.scorer, case.world) for rollout in (limit.rollout, limit.equals)]
        same = [
            np.array_equal(a.trajectory.behavior.logprobs, b.trajectory.behavior.logprobs)
            for a, b in zip(ends[0].scored, ends[1].scored, strict=True)
        ]
        yield Row(name=f"limit: {limit.name}", measured=float(len(same) - sum(same)), tolerance=0.0)
    items = case.read(case.enumeration.scored)
    masks = loss_masks(items)
    for limit in [limit for part in method.weights.values() for limit in getattr(part, "limits", ())]:
        weights = weigh({limit.name: limit.weight}, items, case.enumeration.context)
        wrong = sum(int((a != b).sum()) for a, b in zip(weights, masks, strict=True))
        yield Row(name=f"limit: {limit.name}", measured=float(wrong), tolerance=0.0)
