"""Checks of advantages in groups that no world has: with an answer that was cut, with a text without tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np

from opd.certify.awaited import awaited
from opd.certify.certificate import Finding, Row
from opd.certify.checks.weighing import first_tokens
from opd.certify.credit import Credit, scorer_credit
from opd.certify.engines import RequestLog, engines
from opd.certify.gradients import EXACT, Case
from opd.ports import Need, Role, needs_of
from opd.types import AdvantageScores, Scored, StopReason, Trajectory

CUT = "an answer that was cut is worth no more than any other"
EMPTY = "a text without tokens leaves the others a number"
BESIDE = 3  # texts beside an empty one


def check_groups(case: Case) -> Iterator[Finding]:
    """Advantages in odd groups; nothing of a scorer that gives none."""
    if not isinstance(case.enumeration.scored[0].scores, AdvantageScores):
        return
    group = _group(case)
    if Need(Role.GRADER) in needs_of(case.method.scorer):
        yield Row(name=CUT, measured=_cut(case, group), tolerance=EXACT)
    found = _credit(case, [*group[:BESIDE], first_tokens(group[0], 0)])
    yield Row(name=EMPTY, measured=float(sum(not np.isfinite(c).all() for c in found)), tolerance=0.0)


def _group(case: Case) -> list[Trajectory]:
    texts = [item.trajectory for item in case.enumeration.scored]
    return list(next(iter(groupby(texts, key=lambda t: t.prompt.id)))[1])


def _credit(case: Case, texts: Sequence[Trajectory]) -> Credit:
    """Advantages of texts as one group."""
    made: list[Scored[Any]] = []

    async def score() -> None:
        scores = await case.method.scorer(texts, engines(case.world, RequestLog()))
        made.extend(Scored(trajectory=t, scores=s) for t, s in zip(texts, scores, strict=True))

    with np.errstate(all="ignore"):  # what is no number is found here
        awaited(score())
    return scorer_credit(made) or []


def _cut(case: Case, group: Sequence[Trajectory]) -> float:
    """Worth of the best text, once it is cut, above that of the others' least."""
    worth = [float(c.mean()) for c in _credit(case, group)]
    best = int(np.argmax(worth))
    cut = [replace(t, stop=StopReason.LENGTH) if i == best else t for i, t in enumerate(group)]
    worth = [float(c.mean()) for c in _credit(case, cut)]
    return worth[best] - min(worth)
