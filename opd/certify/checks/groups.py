"""Checks of credit in groups that no world has: of equal texts, with a text that was cut, an empty one, and context."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import groupby
from typing import Any

import numpy as np

from opd.certify.certificate import Finding, Row
from opd.certify.credit import Credit, scorer_credit
from opd.certify.engines import RequestLog, engines
from opd.certify.gradients import EXACT, Case
from opd.ports import Need, Role, needs_of
from opd.types import AdvantageScores, Scored, StopReason, Trajectory

EQUAL = "equal texts of a group earn the same, and a number"
CUT = "an answer that was cut is worth no more than any other"
EMPTY = "a text without tokens leaves the others a number"
CONTEXT = "tokens of context earn nothing for others"
COPIES = 3
LESS = 3.0  # nats that a log-probability of context is changed by


def check_groups(case: Case) -> Iterator[Finding]:
    """Credit in odd groups; nothing of a scorer that gives none."""
    if scorer_credit(case.enumeration.scored) is None:
        return
    group = _group(case)
    sizes = {max(1, case.method.scorer.min_group), COPIES}
    yield Row(name=EQUAL, measured=max(_spread(_credit(case, group[:1] * size)) for size in sizes), tolerance=EXACT)
    if isinstance(case.enumeration.scored[0].scores, AdvantageScores):  # which are relative to others of the group
        if Need(Role.GRADER) in needs_of(case.method.scorer):
            yield Row(name=CUT, measured=_cut(case, group), tolerance=EXACT)
        found = _credit(case, [*group[:COPIES], _empty(group[0])])
        yield Row(name=EMPTY, measured=float(sum(not np.isfinite(c).all() for c in found)), tolerance=0.0)
    yield Row(name=CONTEXT, measured=_context(case, group[:COPIES]), tolerance=EXACT)


def _group(case: Case) -> list[Trajectory]:
    texts = [item.trajectory for item in case.enumeration.scored]
    return list(next(iter(groupby(texts, key=lambda t: t.prompt.id)))[1])


def _credit(case: Case, texts: Sequence[Trajectory], perturbed: int = -1) -> Credit:
    """Credit of texts as one group, of whose token at `perturbed` the teachers think otherwise."""
    world = replace(case.world, perturbed_position=perturbed)
    made: list[Scored[Any]] = []

    async def score() -> None:
        scores = await case.method.scorer(texts, engines(world, RequestLog()))
        made.extend(Scored(trajectory=t, scores=s) for t, s in zip(texts, scores, strict=True))

    with np.errstate(all="ignore"):  # what is no number is found here
        asyncio.run(score())
    return scorer_credit(made) or []


def _spread(found: Credit) -> float:
    """Largest difference between texts; 1 where one is no number."""
    if not all(np.isfinite(c).all() for c in found):
        return 1.0
    return max((float(np.abs(c - found[0]).max(initial=0.0)) for c in found), default=0.0)


def _cut(case: Case, group: Sequence[Trajectory]) -> float:
    """Worth of the best text, once it is cut, above that of the others' least."""
    worth = [float(c.mean()) for c in _credit(case, group)]
    best = int(np.argmax(worth))
    cut = [replace(t, stop=StopReason.LENGTH) if i == best else t for i, t in enumerate(group)]
    worth = [float(c.mean()) for c in _credit(case, cut)]
    return worth[best] - min(worth)


def _context(case: Case, group: Sequence[Trajectory]) -> float:
    """Change of what sampled tokens earn with what teacher and writer think of a token of context."""
    masked = [replace(t, loss_mask=np.arange(len(t)) > 0) for t in group]
    behavior = [replace(t.behavior, logprobs=_less(np.asarray(t.behavior.logprobs))) for t in masked]
    other = [replace(t, behavior=b) for t, b in zip(masked, behavior, strict=True)]
    before, changed = _credit(case, masked), [_credit(case, other)]
    if _asks_of_texts(case, masked):  # else a teacher thinks otherwise of something else that it is asked about
        changed.append(_credit(case, masked, perturbed=0))
    return max(
        float(np.abs(a[1:] - b[1:]).max(initial=0.0)) for now in changed for a, b in zip(now, before, strict=True)
    )


def _asks_of_texts(case: Case, group: Sequence[Trajectory]) -> bool:
    """Whether all requests to teachers are about the texts alone."""
    log, texts = RequestLog(), {t.token_ids.tobytes() for t in group}

    async def score() -> None:
        await case.method.scorer(group, engines(case.world, log))

    asyncio.run(score())
    return all(request.token_ids.tobytes() in texts for _, request in log.score_requests)


def _less(logprobs: np.ndarray) -> np.ndarray:
    return np.where(np.arange(len(logprobs)) > 0, logprobs, logprobs - LESS).astype(logprobs.dtype)


def _empty(text: Trajectory) -> Trajectory:
    rows = {f.name: getattr(text.behavior, f.name)[:0] for f in fields(text.behavior)}
    return replace(
        text,
        token_ids=text.token_ids[:0],
        loss_mask=text.loss_mask[:0],
        versions=text.versions[:0],
        behavior=replace(text.behavior, **rows),
    )
