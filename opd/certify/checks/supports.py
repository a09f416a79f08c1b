"""Checks of the ids that scores are about: a support has the likeliest ones, and a target moves with its teacher."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from opd.certify.certificate import Finding, Row, Skipped
from opd.certify.gradients import EXACT, Case, make_case
from opd.certify.targets import scorer_targets
from opd.ports import Role, TopK, needs_of
from opd.scorers.delta import TeacherDelta
from opd.scorers.ensemble import Ensemble
from opd.scorers.returns import WithReturns
from opd.scorers.teacher import StudentTopK, TeacherTopK
from opd.types import Scored, TopKScores

SUPPORT = "a support has the likeliest ids, as many as its `k` says"
FOLLOWS = "a target moves with its teacher at its own token"


def check_supports(cases: Sequence[Case]) -> Iterator[Finding]:
    """Supports of the teacher's likeliest ids, or of those that the student recorded, at every token."""
    scored = [item for item in cases[0].enumeration.scored if isinstance(item.scores, TopKScores)]
    if not scored:
        yield Skipped(name=SUPPORT, why="the scores are about no support")
        return
    wrong = sum(_wrong_rows(case, item) for case in cases for item in case.enumeration.scored)
    yield Row(name=SUPPORT, measured=float(wrong), tolerance=0.0)


def _wrong_rows(case: Case, item: Scored[Any]) -> int:
    """Number of tokens of a text whose support is another one than that of the scorer's kind.

    Of a scorer of your own it is only known how many ids it has, if it asks for a teacher's own top-k.
    """
    scorer: Any = case.method.scorer
    ids, text = np.asarray(item.scores.topk_ids), item.trajectory
    each = np.sort(ids, axis=-1)
    twice = (each[:, 1:] == each[:, :-1]).any(-1)
    if isinstance(scorer, TeacherTopK | WithReturns):
        teacher = case.world.teachers[text.prompt.teacher]
        chances = teacher.logprobs([(text.prompt.teacher_ids, text.token_ids)])[0].detach().double().exp().numpy()
        return int((twice | _less_than_most(chances, ids, scorer.k)).sum())
    generation = case.enumeration.log.generations.get((text.prompt.id, text.sample))
    if isinstance(scorer, StudentTopK | TeacherDelta | Ensemble) and generation:
        chances = generation.logprobs.double().exp().numpy()
        return int((twice | _less_than_most(chances, ids, generation.request.sampling.topk)).sum())
    k = getattr(scorer, "k", 0) if TopK in scorer.requires else 0
    return len(ids) if k and ids.shape[1] != min(k, case.world.vocabulary) else int(twice.sum())


def _less_than_most(chances: np.ndarray, ids: np.ndarray, k: int) -> np.ndarray:
    """Rows whose ids are not `k`, or have less probability than the likeliest `k`; of equal ones it may be any."""
    k = min(k, chances.shape[1])
    most = -np.sort(-chances, axis=-1)[:, :k]
    return (ids.shape[1] != k) | (np.take_along_axis(chances, ids.astype(np.int64), -1).sum(-1) < most.sum(-1) - EXACT)


def check_followed(case: Case) -> Iterator[Finding]:
    """Targets of a scorer that reads its teacher change where that one does, and fall where it gives a token less."""
    before, roles = scorer_targets(case.enumeration), {need.role for need in needs_of(case.method.scorer)}
    if before is None or Role.READER not in roles or Role.WRITER in roles:
        yield Skipped(name=FOLLOWS, why="the scorer makes no targets of what a teacher reads")
        return
    wrong = 0
    for position in range(case.world.length):
        other = make_case(case.method, replace(case.world, perturbed_position=position)).enumeration
        for item, (old, _), (new, _) in zip(other.scored, before, scorer_targets(other) or [], strict=True):
            if len(old) <= position:
                continue
            moved = np.asarray((np.abs(new - old) > EXACT).any(-1))
            own = position, item.trajectory.token_ids[position]
            wrong += bool(moved.any() and not moved[position]) or bool(new[own] > old[own] + EXACT)
    yield Row(name=FOLLOWS, measured=float(wrong), tolerance=0.0)
