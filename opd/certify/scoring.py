"""What the parts of a method ask the engines, and what its scorer makes of the answers: credit above all."""

import asyncio
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.certify.credit import Credit, begins_with_own, defined, given, rewards
from opd.certify.engines import Notes, engines
from opd.certify.fitting import other_settings
from opd.certify.gradients import EXACT, Case, case, distance, enumerable, every_token, logits, slopes
from opd.certify.page import Finding, Row, Skipped, at_least
from opd.scorers.ensemble import ContextIds
from opd.types import AdvantageScores, Scored, Scores, TopKReturnScores

ASKED = "teachers are asked about whole texts in their own context"
WRITTEN = "text is written in its own context, as the rollout says"
KEPT = "text is trained whole, as it was written"
ORDER = "scores follow their text in any order, and again"
DEFINED = "credit is what it is defined to be"
BETTER = "the better of two answers has the greater advantage"
LAST = "the last return of a text is 0"
LATER = "a return falls with the teacher's doubt about later tokens, and about no others"
RAISES = "credit makes what was written likelier"


def of_questions(cases: list[Case]) -> Iterator[Finding]:
    """Engines are asked for each text in its own context, and with the rollout's own settings."""
    yield Row(name=ASKED, measured=float(sum(map(_wrong_questions, cases))), tolerance=0.0)
    yield Row(name=WRITTEN, measured=float(sum(map(_wrong_requests, cases))), tolerance=0.0)
    yield Row(name=KEPT, measured=float(sum(map(_not_kept, cases))), tolerance=0.0)


def _wrong_questions(found: Case) -> int:
    scorer = found.method.scorer
    contexts = getattr(scorer, "contexts", {})
    due = {
        (
            name,
            contexts.get(name, ContextIds.TEACHER).of(item.trajectory.prompt).tobytes(),
            item.trajectory.token_ids.tobytes(),
        )
        for item in found.seen.scored
        for name in (getattr(scorer, "shares", None) or [item.trajectory.prompt.teacher])
    }
    asked = {(name, r.context_ids.tobytes(), r.token_ids.tobytes()) for name, r in found.seen.notes.asked}
    return len(asked - due) + (len(due - asked) if scorer.requires else 0)


def _wrong_requests(found: Case) -> int:
    wrong = 0
    for item in found.seen.scored:
        prompt = item.trajectory.prompt
        note = found.seen.notes.written.get((prompt.id, item.trajectory.sample))
        if note:
            context = prompt.teacher_ids if note.as_teacher else prompt.student_ids
            wrong += not np.array_equal(note.request.context_ids, context)
            wrong += not _as_set(found.method.rollout, note.request.sampling)
    return wrong


def _not_kept(found: Case) -> int:
    """Texts of an engine that lost tokens, or whose tokens are not trained although no weight says so."""
    texts = [item.trajectory for item in found.seen.scored]
    notes = [found.seen.notes.written.get((t.prompt.id, t.sample)) for t in texts]
    return sum(
        not (np.array_equal(text.token_ids, note.token_ids) and text.loss_mask.all())
        for text, note in zip(texts, notes, strict=True)
        if note
    )


def _as_set(rollout: Any, sampling: Any) -> bool:
    names = ("temperature", "top_p", "max_tokens")
    return all(getattr(sampling, name) == getattr(rollout, name) for name in names if hasattr(rollout, name))


def of_order(found: Case) -> Iterator[Finding]:
    """A scorer says the same of a text once more, and whichever text of a group is told first."""
    before = [item.scores for item in found.seen.scored]
    after: list[Scores] = []

    async def look() -> None:
        box = engines(found.world, Notes())
        for _, group in groupby(found.seen.scored, key=lambda item: item.trajectory.prompt.id):
            backwards = [item.trajectory for item in group][::-1]
            after.extend(list(await found.method.scorer(backwards, box))[::-1])

    asyncio.run(look())
    said, again = (_numbers(type(s[0]).concat(s).to("cpu", lambda rows: rows)) for s in (before, after))
    measured = max((distance(a, b) for a, b in zip(said, again, strict=True)), default=0.0)
    yield Row(name=ORDER, measured=measured, tolerance=EXACT)


def _numbers(scores: Any) -> list[Tensor]:
    """All tensors within scores."""
    if isinstance(scores, Tensor):
        return [scores.double()] if scores.numel() else []
    if isinstance(scores, tuple):
        return [tensor for part in scores for tensor in _numbers(part)]
    return [tensor for f in fields(scores) for tensor in _numbers(getattr(scores, f.name))]


def of_credit(found: Case, deep: Case) -> Iterator[Finding]:
    """Credit is what the grader or the teacher makes it, by definition and by its effect. `deep` has long texts."""
    if given(found.seen.scored) is None:
        yield Skipped(name=DEFINED, why="the scorer gives no credit")
        return
    method, world = found.method, found.world
    others = [case(replace(method, scorer=other), world) for other in other_settings(method.scorer)]
    errors = [_error(c.seen.scored, defined(c.seen, c.world.teachers)) for c in (found, deep, *others)]
    if None in errors:
        yield Skipped(name=DEFINED, why="no definition is known for this scorer; the rows below hold without one")
    else:
        yield Row(name=DEFINED, measured=max(e for e in errors if e is not None), tolerance=EXACT)
    yield from _graded(found) if isinstance(found.seen.scored[0].scores, AdvantageScores) else _returned(found)
    yield at_least(RAISES, _raised(found), 1e-9)


def _error(scored: list[Scored[Any]], expected: Credit | None) -> float | None:
    said = given(scored)
    if expected is None or said is None:
        return None
    return distance(torch.from_numpy(np.concatenate(said)), torch.from_numpy(np.concatenate(expected)))


def _graded(found: Case) -> Iterator[Finding]:
    earned, credit = rewards(found.seen.scored), given(found.seen.scored) or []
    wrong = 0
    for _, group in groupby(range(len(earned)), key=lambda i: found.seen.scored[i].trajectory.prompt.id):
        members = list(group)
        better = np.sign(earned[members][:, None] - earned[members][None, :])
        mean = np.asarray([credit[i].mean() for i in members])
        gap = mean[:, None] - mean[None, :]
        wrong += int((np.sign(np.where(np.abs(gap) > EXACT, gap, 0)) != better).sum())
    yield Row(name=BETTER, measured=float(wrong), tolerance=0.0)


def _returned(found: Case) -> Iterator[Finding]:
    credit, own = given(found.seen.scored) or [], begins_with_own(found.method.scorer)
    if own:
        yield Skipped(name=LAST, why="a return begins with the token's own reward, as the scorer says")
    else:
        yield Row(name=LAST, measured=max(abs(float(c[-1])) for c in credit), tolerance=EXACT)
    wrong = 0
    for place in range(1, found.world.length):
        first = place + own  # of those that do not see the doubt
        doubted = given(case(found.method, replace(found.world, doubt=place)).seen.scored) or []
        changes = [after - before for before, after in zip(credit, doubted, strict=True) if len(before) > place]
        wrong += sum(bool((c[:first] > EXACT).any() or c[first - 1] > -EXACT) for c in changes)
        wrong += sum(bool((np.abs(c[first:]) > EXACT).any()) for c in changes)
    yield Row(name=LATER, measured=float(wrong), tolerance=0.0)


def _raised(found: Case) -> float:
    """How much more a token's own logit rises at least, for one more unit of its credit."""
    batch, objective = every_token(found.seen), enumerable(found.method.objective)
    at = logits(found.seen, batch)
    match batch.scores:
        case AdvantageScores(advantages=credit):
            more = replace(batch.scores, advantages=credit + 1.0)
        case TopKReturnScores(returns=credit):
            more = replace(batch.scores, returns=credit + 1.0)
        case _:
            return 0.0
    rise = slopes(objective, at, batch) - slopes(objective, at, replace(batch, scores=more))
    return float(rise.gather(-1, batch.target_ids[:, None]).min())
