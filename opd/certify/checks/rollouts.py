"""Checks of a method's rollout: what it asks its engines for, what it records of a text, and which texts it drops."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Int32

from opd.certify.awaited import awaited
from opd.certify.certificate import Finding, Row, Skipped
from opd.certify.checks.purity import content_of, fresh_random_state, random_state
from opd.certify.credit import reward_of
from opd.certify.engines import Generation, IdTokenizer, RequestLog, engines
from opd.certify.gradients import Case
from opd.certify.worlds import World
from opd.loss.metrics import compression
from opd.method.schedules import value
from opd.ports import Completion, Context
from opd.rollouts.blended import BlendedRollout
from opd.rollouts.mixed import AnswerRollout
from opd.rollouts.prefixes import PrefixRollout
from opd.rollouts.selected import GoodTexts, OpenPrompts
from opd.types import NO_VERSION, Prompt, Scored, Scores, StopReason, Trajectory

RECORDED = "a text is recorded with its prompt, its writer and that one's log-probabilities"
FILTERED = "texts are left out as the filter says"
ANEW = "texts are written anew, and alike in a group of any size"
COINS = "a coin falls as often as its fraction says (standard errors)"
FLIPS, ERRORS = 2000, 5.0
STEPS = (1, 2, 3, 8, 24, 50, 75, 98)  # of a hundred, beside those at which whole worlds are enumerated
SAMPLED = ("temperature", "top_p", "max_tokens")


def check_records(cases: list[Case]) -> Iterator[Finding]:
    """Prompt, log-probabilities, versions and end of every text are those that rollout and engine were given."""
    wrong = 0
    for case in [*cases, written_at(cases[0], 1)]:
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
        all(
            content_of(getattr(text.behavior, f.name)) == content_of(getattr(given.behavior, f.name, None))
            for f in fields(text.behavior)
        )
        and np.array_equal(text.versions, versions)
        and text.digests == ({} if generation.as_teacher else given.digests)
        and text.stop in ends
    )


def answer_ids(rollout: Any, prompt: Prompt) -> Int32[np.ndarray, " T"] | None:
    """The answer of a data set as a text with its end, where the rollout, or a part within it, gives that one."""
    for part in (rollout, getattr(rollout, "fixed", None)):
        if isinstance(part, AnswerRollout):
            ids = np.append(IdTokenizer().encode(prompt.answer), IdTokenizer.eos_id)
            return ids[: part.max_tokens].astype(np.int32)
    return None


def as_set(rollout: Any, generation: Generation, context: Context) -> bool:
    """Whether a request has the settings of the rollout, or of the one within it that the student writes by."""
    inside = [getattr(rollout, name, None) for name in ("student", "of")]
    own = any(hasattr(rollout, name) for name in SAMPLED)
    parts = [rollout] if own or generation.as_teacher or hasattr(rollout, "fixed") else [rollout, *inside]
    sampling = generation.request.sampling
    due = {name: getattr(part, name) for part in parts for name in SAMPLED if hasattr(part, name)}
    due |= [("topk", part.record_topk) for part in parts if hasattr(part, "record_topk")]
    blend = 0.0
    if isinstance(rollout, PrefixRollout):
        due["max_tokens"] = max(1, round(value(rollout.share, context) * rollout.student.max_tokens))
    if isinstance(rollout, BlendedRollout):
        blend = value(rollout.budget, context)
    asked = generation.request.blend.budget if generation.request.blend else 0.0
    return asked == blend and all(getattr(sampling, name) == setting for name, setting in due.items())


def written_at(case: Case, step: int) -> Case:
    """Texts of the rollout at a step, in a state of each prompt, all written at once; nothing is scored."""
    world = replace(case.world, positions=case.world.positions[-1:], step=step)
    rollout, log = getattr(case.method.rollout, "everything", case.method.rollout), RequestLog()
    context = engines(world, log)
    groups = [list(members) for _, members in groupby(world.prompts, key=lambda prompt: prompt.id)]

    async def write() -> list[list[Trajectory]]:
        return await asyncio.gather(*[rollout(group, context) for group in groups])

    scored = [Scored(trajectory=t, scores=Scores()) for texts in awaited(write()) for t in texts]
    return replace(case, enumeration=replace(case.enumeration, world=world, scored=scored, log=log, context=context))


def check_writing(case: Case) -> Iterator[Finding]:
    """Calls of a rollout: each generates, and gives the same texts again, alone, and where nothing is left out.

    A rollout is a function of prompts and context: it keeps nothing, and draws nothing from what its process shares.
    """
    rollout, log = case.method.rollout, RequestLog()
    context = engines(case.world, log)
    groups = [list(members) for _, members in groupby(case.world.prompts, key=lambda prompt: prompt.id)]
    random = fresh_random_state()
    first = awaited(_all(rollout, groups, context))
    asked = set(log.generations)
    log.generations.clear()
    again = awaited(_all(rollout, groups, context))
    problems = {
        "it does not ask its engines again": asked != set(log.generations),
        "it writes others the second time": any(
            not _same_text(a, b) or content_of(a.loss_mask) != content_of(b.loss_mask)
            for a, b in zip(first, again, strict=True)
        ),
        "it draws from, or seeds, the random state of the process": random != random_state(),
    }
    if getattr(rollout, "min_group", 1) == 1:
        alone = awaited(_all(rollout, [group[:1] for group in groups], context))
        beside = [next(t for t in first if t.prompt.id == one.prompt.id) for one in alone]
        problems["a text that is alone is another"] = any(map(_differ, alone, beside))
    if (everything := getattr(rollout, "everything", None)) is not None:
        whole = awaited(_all(everything, groups, context))
        problems["what it keeps is another text, or a part of one"] = any(map(_differ, first, whole)) or any(
            t.loss_mask.any() != t.loss_mask.all() for t in first
        )
    found = [what for what, wrong in problems.items() if wrong]
    yield Row(name=ANEW, measured=float(len(found)), tolerance=0.0, note=found[0] if found else "")


async def _all(rollout: Any, groups: Sequence[Sequence[Prompt]], context: Context) -> list[Trajectory]:
    return [text for group in groups for text in await rollout(group, context)]


def _same_text(a: Trajectory, b: Trajectory) -> bool:
    """Whether two texts have the same tokens, of the same writer."""
    return (
        all(
            content_of(getattr(a, name)) == content_of(getattr(b, name))
            for name in ("token_ids", "behavior", "versions")
        )
        and a.stop is b.stop
        and a.digests == b.digests
    )


def _differ(a: Trajectory, b: Trajectory) -> bool:
    return not _same_text(a, b)


def check_coins(rollout: Any) -> Iterator[Finding]:
    """The share of prompts, steps and samples for which the coin of a rollout falls on its side is its `fraction`."""
    flip = getattr(rollout, "student_generates", None) or getattr(rollout, "guided", None)
    if flip is None or not hasattr(rollout, "fraction"):
        yield Skipped(name=COINS, why="the rollout flips no coin")
        return
    off = [_off(replace(rollout, fraction=share), share) for share in (0.25, 0.5, 0.75)]
    yield Row(name=COINS, measured=max(off), tolerance=ERRORS)


def _off(rollout: Any, share: float) -> float:
    flip = getattr(rollout, "student_generates", None) or rollout.guided
    heads = sum(bool(flip(f"prompt/{i}", i)) for i in range(FLIPS))
    return abs(heads - FLIPS * share) / (FLIPS * share * (1 - share)) ** 0.5


def check_filters(case: Case) -> Iterator[Finding]:
    """Texts and prompts that a filter leaves out agree with the rewards of the grader, at any threshold."""
    rollout = case.method.rollout
    if not isinstance(rollout, GoodTexts | OpenPrompts):
        yield Skipped(name=FILTERED, why="the rollout is none of the known filters")
        return
    wrong = 0
    for filtering in (rollout, *_other_filters(rollout)):
        texts = awaited(_written(filtering, case.world))
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
    taught = rollout.teacher is None or awaited(_succeeds(rollout.teacher, group[0].prompt, world))
    return [sum(grade >= 1 for grade in grades) <= rollout.solved_at_most * len(group) and taught] * len(group)


async def _succeeds(teacher: Any, prompt: Prompt, world: World) -> bool:
    (text,) = await teacher([prompt], engines(world, RequestLog()))
    return reward_of(text) >= 1
