"""Checks of teachers that are the student itself, or each other, where they read the same."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launch.config.run_config import DEFAULT, RunConfig, teacher_key
from launch.plan.checks.settings import terms_by_place
from launch.plan.checks.survey import Survey
from opd.method.needs import needed
from opd.method.terms import Term
from opd.objectives.evidence import EvidenceReverseKL
from opd.objectives.sampled import Likelihood
from opd.ports import Role, needs_of
from opd.scorers.delta import TeacherDelta
from opd.scorers.ensemble import ContextIds, Ensemble
from opd.scorers.evidence import Evidence
from opd.scorers.extrapolated import Extrapolated
from opd.scorers.judge import JudgeAdvantage
from teacher_service.config import REMOTE

SHOW = "prompts.teacher_template or prompts.teacher_prompt_column"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """A teacher that a term asks: its name and weights, and whether it reads the student's own prompt.

    `own`: it is the student's checkpoint, at the start at least.
    """

    name: str
    weights: str
    own: bool
    plain: bool


def copy_notes(config: RunConfig, training: Survey) -> list[str]:
    """Notes on terms from which nothing can be learned, because what they compare is one model in one context."""
    terms = dict(terms_by_place(config))
    plain = not training.privileged.count and not hasattr(config.method.rollout, "shown")
    readers = {place: _readers(config, term, training, plain=plain) for place, term in terms.items()}
    return [
        *_themselves(config, terms, readers),
        *_followers(config, terms, readers),
        *_twins(terms, readers),
        *_evidence(terms, plain=plain),
        *_shares(terms),
        *_shown_twice(config, training),
    ]


def _readers(config: RunConfig, term: Term, training: Survey, *, plain: bool) -> Sequence[_Reader]:
    """Teachers that compare texts with the student; a judge does not."""
    scorer = term.scorer
    if isinstance(scorer, JudgeAdvantage):
        return ()
    names = dict.fromkeys(need.name for need in sorted(needs_of(scorer), key=str) if need.role is Role.READER)
    asked = [name for own in names for name in ((own,) if own else sorted(training.teachers))]
    contexts = scorer.contexts if isinstance(scorer, Ensemble | Extrapolated) else {}
    if isinstance(scorer, TeacherDelta):
        contexts = {scorer.base: scorer.base_reads}
    return [
        _Reader(
            name=name,
            weights=_weights(config, name),
            own=_is_student(config, name),
            plain=plain or contexts.get(name) is ContextIds.STUDENT,
        )
        for name in asked
        if name in config.teachers
    ]


def _weights(config: RunConfig, name: str) -> str:
    """Identity of a teacher's weights: its folder, or its name where they are elsewhere or change."""
    teacher = config.teachers[name]
    return f"teacher {name}" if teacher.backend in REMOTE or teacher.mixup else _folder(config, name)


def _folder(config: RunConfig, name: str) -> str:
    return os.path.realpath(config.teachers[name].path)


def _is_student(config: RunConfig, name: str) -> bool:
    teacher = config.teachers[name]
    return teacher.backend not in REMOTE and _folder(config, name) == os.path.realpath(config.student.path)


def _themselves(config: RunConfig, terms: dict[str, Term], readers: dict[str, Sequence[_Reader]]) -> Iterator[str]:
    """A note where all that is learned from is the student as it is at the start."""
    if needed(config.method, Role.GRADER) or any(_learns_otherwise(term) for term in terms.values()):
        return
    every = [reader for found in readers.values() for reader in found]
    if every and all(reader.plain and reader.own for reader in every):
        yield (
            f"note: {teacher_key(every[0].name)}.path is the student's own checkpoint, and it reads what the student "
            f"reads, so there is nothing to learn from it; set {SHOW} to what it is shown beside, or choose another "
            "teacher"
        )


def _learns_otherwise(term: Term) -> bool:
    """Whether a term learns from texts, rewards or what teachers write, and not from a comparison with them alone."""
    roles = {need.role for need in needs_of(term.scorer)}
    writes = Role.WRITER in roles or getattr(term.scorer, "looks_ahead", False)
    imitates = isinstance(term.objective, Likelihood)
    return Role.READER not in roles or isinstance(term.scorer, JudgeAdvantage) or writes or imitates


def _followers(config: RunConfig, terms: dict[str, Term], readers: dict[str, Sequence[_Reader]]) -> Iterator[str]:
    for place, found in readers.items():
        live = [r for r in found if config.teachers[r.name].mixup == 1 and r.plain]
        scorer = terms[place].scorer
        if not live or isinstance(scorer, Evidence):
            continue
        at = teacher_key(live[0].name)
        if len(live) == len(found):
            what = f"{place}.objective compares the student with itself"
        elif isinstance(scorer, Extrapolated):
            what = f"its share in {place}.scorer makes the step larger or smaller and goes beyond nothing"
        else:
            continue
        yield (
            f"note: with {at}.mixup=1 teacher {live[0].name!r} has the student's weights of every published version "
            f"and reads what the student reads, so {what}; set {at}.mixup=0 for the student of the start, or {SHOW}"
        )


def _twins(terms: dict[str, Term], readers: dict[str, Sequence[_Reader]]) -> Iterator[str]:
    """Notes on teachers of one term that are one model in one context."""
    for place, found in readers.items():
        known: dict[tuple[str, bool], str] = {}
        for reader in found:
            first = known.setdefault((reader.weights, reader.plain), reader.name)
            if first == reader.name or not isinstance(terms[place].scorer, Ensemble | Extrapolated | TeacherDelta):
                continue
            lost = (
                "the delta between them is 0 and nothing is trained"
                if isinstance(terms[place].scorer, TeacherDelta)
                else "their shares count as one"
            )
            yield (
                f"note: {teacher_key(first)}.path and {teacher_key(reader.name)}.path are the same checkpoint, and "
                f"{place}.scorer has both read the same, so {lost}; name another checkpoint"
            )


def _evidence(terms: dict[str, Term], *, plain: bool) -> Iterator[str]:
    for place, term in terms.items():
        objective = term.objective
        if plain and isinstance(term.scorer, Evidence) and isinstance(objective, EvidenceReverseKL):
            what = "no token has evidence and the term trains nothing" if objective.threshold >= 0 else "all count"
            yield (
                f"note: {place}.scorer compares a teacher in its own context with itself in the student's, but no "
                f"prompt has a context for the teacher, so {what}; set {SHOW}"
            )


def _shares(terms: dict[str, Term]) -> Iterator[str]:
    """Notes on powers of teachers that go beyond none, away from the taught one, or nowhere."""
    for place, term in terms.items():
        if not isinstance(term.scorer, Extrapolated):
            continue
        shares = term.scorer.shares
        for name in sorted(name for name, share in shares.items() if share == 0):
            yield f"note: {place}.scorer.shares.{name} is 0, so teacher {name!r} reads every text and counts nothing"
        if len(shares) > 1 and all(share >= 0 for share in shares.values()):
            yield (
                f"note: {place}.scorer.shares are all 0 or above, a product between its teachers that goes beyond "
                "none; a share below 0 moves away from a teacher ({default: 1.25, start: -0.25})"
            )
        if shares.get(DEFAULT, 0) < 0:
            yield (
                f"note: {place}.scorer.shares.{DEFAULT} is {shares[DEFAULT]:g}; below 0 the student is moved away from "
                "that teacher"
            )


def _shown_twice(config: RunConfig, training: Survey) -> Iterator[str]:
    """A note where both the prompts and the rollout say what a teacher reads."""
    if training.privileged.count and hasattr(config.method.rollout, "shown"):
        yield (
            f"note: {training.privileged.first} has a prompt of its own for the teacher, which is not read, because "
            f"method.rollout.shown writes it from the student's; put what it says into the templates of "
            "method.rollout.shown"
        )
