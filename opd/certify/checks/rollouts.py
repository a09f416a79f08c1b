"""Checks of a method's rollout: what it asks its engines for, what it records of a text, and which texts it drops."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import groupby
from typing import Any

import numpy as np

from opd.certify.certificate import Finding, Row, Skipped
from opd.certify.credit import reward_of
from opd.certify.engines import Generation, RequestLog, engines
from opd.certify.gradients import Case
from opd.certify.worlds import World
from opd.loss.metrics import compression
from opd.method.schedules import value
from opd.ports import Completion, Context
from opd.rollouts.blended import BlendedRollout
from opd.rollouts.prefixes import PrefixRollout
from opd.rollouts.selected import GoodTexts, OpenPrompts
from opd.types import NO_VERSION, Prompt, StopReason, Trajectory

RECORDED = "a text is recorded with its prompt, its writer and that one's log-probabilities"
FILTERED = "texts are left out as the filter says"
SAMPLED = ("temperature", "top_p", "max_tokens")


def check_records(cases: list[Case]) -> Iterator[Finding]:
    """Prompt, log-probabilities, versions and end of every text are those that rollout and engine were given."""
    wrong = 0
    for case in cases:
        shows = hasattr(case.method.rollout, "shown")
        for item, prompt in zip(case.enumeration.scored, case.world.prompts, strict=True):
            text = item.trajectory
            generation = case.enumeration.log.generations.get((prompt.id, text.sample))
            wrong += not _same_prompt(text.prompt, prompt, shows=shows) or not _as_written(text, generation)
    yield Row(name=RECORDED, measured=float(wrong), tolerance=0.0)


def _same_prompt(got: Prompt, given: Prompt, *, shows: bool) -> bool:
    """Whether a prompt is the one that was given; a rollout that shows the teacher more changes what that one reads."""
    names = [f.name for f in fields(Prompt) if f.name != "source" and not (shows and f.name == "teacher_ids")]
    return all(np.array_equal(getattr(got, name), getattr(given, name)) for name in names)


def _as_written(text: Trajectory, generation: Generation | None) -> bool:
    if generation is None:  # of a data set: no policy of the run wrote it
        return bool((text.versions == NO_VERSION).all()) and not text.digests
    given: Completion = generation.completion
    versions = np.full(len(text), NO_VERSION) if generation.as_teacher else given.versions
    ends = {given.stop, StopReason.PREFIX} if given.stop is StopReason.LENGTH else {given.stop}
    return (
        np.array_equal(text.behavior.logprobs, given.behavior.logprobs)
        and np.array_equal(text.versions, versions)
        and text.digests == ({} if generation.as_teacher else given.digests)
        and text.stop in ends
    )


def as_set(rollout: Any, generation: Generation, context: Context) -> bool:
    """Whether a request has the settings of the rollout, or of the one within it that the student writes by."""
    inside = [getattr(rollout, name, None) for name in ("student", "of")]
    own = any(hasattr(rollout, name) for name in SAMPLED)
    parts = [rollout] if own or generation.as_teacher or hasattr(rollout, "fixed") else [rollout, *inside]
    sampling = generation.request.sampling
    due = {name: getattr(part, name) for part in parts for name in SAMPLED if hasattr(part, name)}
    blend = 0.0
    if isinstance(rollout, PrefixRollout):
        due["max_tokens"] = max(1, round(value(rollout.share, context) * rollout.student.max_tokens))
    if isinstance(rollout, BlendedRollout):
        blend = value(rollout.budget, context)
    asked = generation.request.blend.budget if generation.request.blend else 0.0
    return asked == blend and all(getattr(sampling, name) == setting for name, setting in due.items())


def check_filters(case: Case) -> Iterator[Finding]:
    """Texts and prompts that a filter leaves out agree with the rewards of the grader, at any threshold."""
    rollout = case.method.rollout
    if not isinstance(rollout, GoodTexts | OpenPrompts):
        yield Skipped(name=FILTERED, why="the rollout is none of the known filters")
        return
    wrong = 0
    for filtering in (rollout, *_other_filters(rollout)):
        texts = asyncio.run(_written(filtering, case.world))
        for _, members in groupby(texts, key=lambda t: t.prompt.id):
            group = list(members)
            kept = _kept(filtering, group, case.world)
            wrong += sum(bool((t.loss_mask != keep).any()) for t, keep in zip(group, kept, strict=True))
    yield Row(name=FILTERED, measured=float(wrong), tolerance=0.0)


def _other_filters(rollout: GoodTexts | OpenPrompts) -> list[GoodTexts | OpenPrompts]:
    if isinstance(rollout, GoodTexts):
        return [replace(rollout, at_least=least) for least in (0.0, 0.5, 1.0)]
    return [replace(rollout, solved_at_most=most, teacher=None) for most in (0.0, 0.1, 0.5)]


async def _written(rollout: Any, world: World) -> list[Trajectory]:
    context = engines(world, RequestLog())
    groups = [list(members) for _, members in groupby(world.prompts, key=lambda prompt: prompt.id)]
    return [text for group in groups for text in await rollout(group, context)]


def _kept(rollout: GoodTexts | OpenPrompts, group: Sequence[Trajectory], world: World) -> list[bool]:
    grades = [reward_of(text) for text in group]
    if isinstance(rollout, GoodTexts):
        fresh = [not rollout.repetition or compression(t.token_ids) <= rollout.repetition for t in group]
        return [
            new and (not rollout.at_least or grade >= rollout.at_least)
            for new, grade in zip(fresh, grades, strict=True)
        ]
    taught = rollout.teacher is None or asyncio.run(_succeeds(rollout.teacher, group[0].prompt, world))
    return [sum(grade >= 1 for grade in grades) <= rollout.solved_at_most * len(group) and taught] * len(group)


async def _succeeds(teacher: Any, prompt: Prompt, world: World) -> bool:
    (text,) = await teacher([prompt], engines(world, RequestLog()))
    return reward_of(text) >= 1
