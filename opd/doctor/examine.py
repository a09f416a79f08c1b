"""Examination of a teacher for a student: probes of the running parts, through the ports alone.

Every probe asks one question and answers with a `Finding`: what was measured, and, where training would be wrong, a
sentence that says why and what to do. They cost a few short completions and a dozen teacher calls.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from opd.doctor import learner_checks, teacher_checks
from opd.doctor.findings import Evidence, Finding, Subject, ask, fine, refused, warned
from opd.errors import DataError
from opd.ports import Context, LastHidden, SampledToken, Sampling, TextEngine, TopK
from opd.rollouts.student import generate
from opd.scorers.reward import task_rewards
from opd.types import Prompt, TokenScores, Trajectory

Check = Callable[[Subject, Evidence], Awaitable[Finding]]


async def examine(subject: Subject, prompts: Sequence[Prompt], max_tokens: int) -> list[Finding]:
    """All findings about `subject`; only one if the teacher's answers cannot be read at all."""
    sampling = Sampling(max_tokens=max_tokens, topk=min(subject.support, subject.vocabulary))
    written = await generate(prompts, subject.context.student, sampling)
    try:
        scores = await ask(subject.teacher, written, SampledToken())
    except DataError as error:
        return [_unreadable("answers", subject, error)]
    evidence = Evidence(written=written, scores=scores)
    findings = [fine("answers", f"{sum(map(len, written))} tokens scored")]
    for name, check in _checks(subject).items():
        try:
            findings.append(await check(subject, evidence))
        except DataError as error:
            findings.append(_unreadable(name, subject, error))
    return findings


def _unreadable(check: str, subject: Subject, error: DataError) -> Finding:
    return refused(check, "unreadable", f"teacher {subject.name!r} cannot be used: {error}")


def _checks(subject: Subject) -> Mapping[str, Check]:
    checks: dict[str, Check] = {
        "alignment": teacher_checks.causality,
        "steadiness": teacher_checks.steadiness,
        "replicas": teacher_checks.replicas_agree,
    }
    if subject.reference is not None:
        checks |= {"backends": teacher_checks.backends_agree}
    if TopK in subject.supports:
        checks |= {
            "full softmax": teacher_checks.full_softmax,
            "padding": teacher_checks.padding,
            "overlap": teacher_checks.overlap,
        }
    if LastHidden in subject.supports and subject.exact:
        checks |= {"hidden states": learner_checks.hidden_states}
    if subject.twin is not None:
        checks |= {"own teacher": teacher_checks.own_teacher}
    return checks | {
        "engine and learner": learner_checks.engine_equals_learner,
        "first token": teacher_checks.first_token,
        "end of text": teacher_checks.end_of_text,
    }


async def teacher_gain(context: Context, writer: TextEngine, prompts: Sequence[Prompt], max_tokens: int) -> Finding:
    """Whether the teacher ends the student's half-written texts better than the student (arXiv 2604.13016, 6.1).

    Both write on from the middle of the student's own completions, each in its own context (a privileged teacher knows
    more); the task's grader judges the whole texts.
    """
    prompts = [prompt for prompt in prompts if prompt.answer and prompt.task in context.graders]
    if not prompts:
        return fine("teacher gain", "not measured: the prompts have no reference answers")
    sampling = Sampling(max_tokens=max_tokens)
    written = await generate(prompts, context.student, sampling)
    halves = [t.token_ids[: len(t) // 2] for t in written]
    begun = [
        replace(
            p,
            id=f"{p.id}/gain",
            student_ids=np.concatenate([p.student_ids, half]),
            teacher_ids=np.concatenate([p.teacher_ids, half]),
        )
        for p, half in zip(prompts, halves, strict=True)
    ]
    rewards = []
    for engine, as_teacher in ((context.student, False), (writer, True)):
        rests = [Sampling(max_tokens=max(1, max_tokens - len(half))) for half in halves]
        endings = [generate([p], engine, rest, as_teacher=as_teacher) for p, rest in zip(begun, rests, strict=True)]
        ended = await asyncio.gather(*endings)
        whole = [_after(half, t) for half, (t,) in zip(halves, ended, strict=True)]
        rewards.append(np.asarray(await task_rewards(whole, context)))
    student, teacher = (float(np.mean(r)) for r in rewards)
    error = float(np.std(rewards[1] - rewards[0])) / len(prompts) ** 0.5  # of the difference, measured on pairs
    measured = f"from {len(prompts)} half-written texts: student {student:.1%}, teacher {teacher:.1%} (+- {error:.1%})"
    if teacher - student <= error:
        return warned(
            "teacher gain",
            measured,
            "the teacher does not end the student's texts measurably better than the student; there is little to "
            "learn on-policy",
        )
    return fine("teacher gain", measured)


def _after(half: np.ndarray, rest: Trajectory) -> Trajectory:
    """A text in two parts as one trajectory for a grader, without scores of its tokens."""
    ids = np.concatenate([half, rest.token_ids]).astype(np.int32)
    nothing = TokenScores(logprobs=np.zeros(len(ids), dtype=np.float32))
    versions, mask = np.zeros(len(ids), dtype=np.int32), np.ones(len(ids), dtype=bool)
    return replace(rest, token_ids=ids, behavior=nothing, versions=versions, loss_mask=mask)
