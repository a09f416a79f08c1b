"""Checks of the requests that a method's parts send to engines, and of its scorer's scores and credit."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.certify.awaited import awaited
from opd.certify.certificate import Finding, Row, Skipped, at_least
from opd.certify.checks.purity import content_of, fresh_random_state, random_state
from opd.certify.checks.rollouts import STEPS, answer_ids, as_set, written_at
from opd.certify.checks.weighing import first_tokens
from opd.certify.credit import (
    Credit,
    begins_with_own,
    credit_by_definition,
    judged,
    probed_contexts,
    reward_of,
    rewards,
    scorer_credit,
)
from opd.certify.engines import RequestLog, engines
from opd.certify.fitting import other_settings
from opd.certify.gradients import (
    EXACT,
    Case,
    enumerable,
    every_token,
    logit_gradients,
    logits,
    make_case,
    relative_difference,
)
from opd.certify.targets import (
    distances_by_definition,
    scorer_distances,
    scorer_targets,
    targets_by_definition,
)
from opd.ports import Context, Need, Role, needs_of
from opd.scorers.ensemble import ContextIds
from opd.types import (
    AdvantageScores,
    CreditScores,
    DeltaScores,
    DeviationScores,
    EvidenceScores,
    Scored,
    Scores,
    StopReason,
    TopKReturnScores,
    Trajectory,
)

ASKED = "teachers are asked about whole texts in their own context"
WRITTEN = "text is written in its own context, as the rollout says"
KEPT = "text is trained whole, as it was written"
ORDER = "scores follow their text in any order, and again"
DEFINED = "credit is what it is defined to be"
TARGETS = "targets are what they are defined to be"
DISTANCES = "distances of near futures are what they are defined to be"
BETTER = "the better of two answers has the greater advantage"
LAST = "the last return of a text is 0"
LATER = "a return falls with the teacher's doubt about later tokens, and about no others"
RAISES = "credit makes what was written likelier"


def check_requests(cases: list[Case]) -> Iterator[Finding]:
    """Requests to engines have each text in its own context, at the rollout's own settings."""
    yield Row(name=ASKED, measured=float(sum(map(_wrong_score_requests, cases))), tolerance=0.0)
    cases = [*cases, *(written_at(cases[0], step) for step in STEPS)]
    yield Row(name=WRITTEN, measured=float(sum(map(_wrong_generate_requests, cases))), tolerance=0.0)
    yield Row(name=KEPT, measured=float(sum(map(_cut_completions, cases))), tolerance=0.0)


def _wrong_score_requests(case: Case) -> int:
    scorer: Any = case.method.scorer
    texts = [item.trajectory for item in case.enumeration.scored]
    asked = {(name, r.context_ids.tobytes(), r.token_ids.tobytes()) for name, r in case.enumeration.log.score_requests}
    if hasattr(scorer, "judge"):  # is asked about other tokens, behind the whole text
        return len(
            asked ^ {(scorer.judge, ids.tobytes(), token.tobytes()) for t in texts for ids, token in judged(scorer, t)}
        )
    contexts = getattr(scorer, "contexts", {})
    due = {
        (
            name,
            ids.of(item.trajectory.prompt).tobytes(),
            item.trajectory.token_ids.tobytes(),
        )
        for item in case.enumeration.scored
        for name in (getattr(scorer, "shares", None) or [item.trajectory.prompt.teacher])
        for ids in getattr(scorer, "reads", (contexts.get(name, ContextIds.TEACHER),))
    }
    for text in texts:
        if base := getattr(scorer, "base", ""):
            due.add((base, scorer.base_reads.of(text.prompt).tobytes(), text.token_ids.tobytes()))
        probes = probed_contexts(scorer, text.prompt)
        due |= {(text.prompt.teacher, ids.tobytes(), text.token_ids.tobytes()) for ids in probes}
    extra = asked - due
    if getattr(scorer, "looks_ahead", False):  # after other tokens, too: behind what a text has before them
        begun = {(name, ids) for ids, names in _begun(case).items() for name in names}
        extra = {request for request in extra if request[:2] not in begun}
    return len(extra) + (len(due - asked) if scorer.requires else 0)


def _begun(case: Case) -> dict[bytes, set[str]]:
    """All that a teacher reads before a token of a text, with the names of the teachers that do."""
    found: dict[bytes, set[str]] = {}
    for text in (item.trajectory for item in case.enumeration.scored):
        for t in range(len(text)):
            before = np.concatenate([text.prompt.teacher_ids, text.token_ids[:t]]).tobytes()
            found.setdefault(before, set()).add(text.prompt.teacher)
    return found


def _wrong_generate_requests(case: Case) -> int:
    begun = _begun(case)
    wrong = sum(r.context_ids.tobytes() not in begun for r in case.enumeration.log.continuations)
    for item, given in zip(case.enumeration.scored, case.world.prompts, strict=True):
        prompt = item.trajectory.prompt
        generation = case.enumeration.log.generations.get((prompt.id, item.trajectory.sample))
        if generation:
            guided = getattr(case.method.rollout, "guided", lambda *_: False)(prompt.id, item.trajectory.sample)
            context = prompt.teacher_ids if generation.as_teacher or guided else given.student_ids
            wrong += not np.array_equal(generation.request.context_ids, context)
            wrong += not as_set(case.method.rollout, generation, case.enumeration.context)
    return wrong


def _cut_completions(case: Case) -> int:
    """Number of texts that are not what their engine, or their data set, has, or of which tokens are masked."""
    texts = [item.trajectory for item in case.enumeration.scored]
    log = [case.enumeration.log.generations.get((t.prompt.id, t.sample)) for t in texts]
    whole = [
        generation.completion.token_ids if generation else answer_ids(case.method.rollout, text.prompt)
        for text, generation in zip(texts, log, strict=True)
    ]
    return sum(
        not (np.array_equal(text.token_ids, ids) and text.loss_mask.all())
        for text, ids in zip(texts, whole, strict=True)
        if ids is not None
    )


def check_score_order(case: Case) -> Iterator[Finding]:
    """The scores of a text are the same again: in any order and under any number of its group, beside other groups.

    Nothing that the scorer is given is changed by it, nor the random state that all parts of a process share.
    """
    before = [item.scores for item in case.enumeration.scored]
    groups = [
        [item.trajectory for item in group]
        for _, group in groupby(case.enumeration.scored, key=lambda item: item.trajectory.prompt.id)
    ]
    turned = [[replace(t, sample=i) for i, t in enumerate(group[::-1])] for group in groups]
    odd = [[_odd(t) for t in group] for group in groups]
    given, random = [content_of(group) for group in odd], fresh_random_state()
    context = engines(case.world, RequestLog())
    awaited(_scores(case, groups, context))  # what is kept by the number of a text is that of these
    after = [s for group in awaited(_scores(case, turned, context)) for s in group[::-1]]
    awaited(_scores(case, odd, context))
    note = "it draws from, or seeds, the random state of the process" if random != random_state() else ""
    if given != [content_of(group) for group in odd]:
        note = "it writes into the texts that it is given"
    measured = float(bool(note)) or _apart(before, after)
    if measured > EXACT and not note:
        note = _first_difference(case, groups, before)
    yield Row(name=ORDER, measured=measured, tolerance=EXACT, note=note)


def _apart(first: Sequence[Scores], then: Sequence[Scores]) -> float:
    """Greatest relative difference between scores of the same texts."""
    a, b = (numbers_of(type(s[0]).concat(s).to("cpu", lambda rows: rows)) for s in (first, then))
    return max((relative_difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)


def _first_difference(case: Case, groups: Sequence[list[Trajectory]], before: Sequence[Scores]) -> str:
    """The least that must be changed of a call for other scores than `before`."""

    def apart(number: int, *, at_once: bool = False, turned: bool = False) -> bool:
        context, made = engines(case.world, RequestLog()), list[Scores]()
        for _ in range(number):
            calls = [groups] if at_once else [[group] for group in groups]
            found = [
                scores
                for call in calls
                for scores in awaited(_scores(case, [g[:: -1 if turned else 1] for g in call], context))
            ]
            made = [s for scores in found for s in (scores[::-1] if turned else scores)]
        return _apart(before, made) > EXACT

    if apart(1) or apart(2):
        return "the same call gives other scores the second time"
    if apart(1, at_once=True):
        return "scores are others where several groups are scored at once: it keeps something while it waits"
    if apart(1, turned=True):
        return "scores are others where the group comes in another order"
    return "scores are others where a text has another number (`sample`): they are kept by it"


async def _scores(case: Case, groups: Sequence[Sequence[Trajectory]], context: Context) -> list[list[Scores]]:
    """Scores of several groups, which are scored at once as in a run."""
    return [list(scores) for scores in await asyncio.gather(*[case.method.scorer(g, context) for g in groups])]


def _odd(text: Trajectory) -> Trajectory:
    """A copy of a text, as likely or unlikely as can be, and cut if its number is odd: what a scorer might correct."""
    far = np.where(np.arange(len(text)) % 2, -50.0, 0.0).astype(text.behavior.logprobs.dtype)
    return replace(
        text,
        token_ids=text.token_ids.copy(),
        behavior=replace(text.behavior, logprobs=far),
        loss_mask=text.loss_mask.copy(),
        versions=text.versions.copy(),
        stop=StopReason.LENGTH if text.sample % 2 else text.stop,
    )


def numbers_of(scores: Any) -> list[Tensor]:
    """All tensors within scores."""
    if isinstance(scores, Tensor):
        return [scores.double()] if scores.numel() else []
    if isinstance(scores, tuple):
        return [tensor for part in scores for tensor in numbers_of(part)]
    return [tensor for f in fields(scores) for tensor in numbers_of(getattr(scores, f.name))]


def check_definitions(case: Case, deep: Case) -> Iterator[Finding]:
    """Targets and distances of near futures agree with their definitions. `deep` has long texts."""
    yield from _defined(TARGETS, case, deep, scorer_targets, targets_by_definition)
    yield from _defined(DISTANCES, case, deep, scorer_distances, distances_by_definition)


def _defined(
    name: str, case: Case, deep: Case, given: Callable[..., Sequence[Any] | None], wanted: Callable[..., Any]
) -> Iterator[Finding]:
    """Agreement of what a scorer gives with its definition, also at other settings; nothing where it gives none."""
    if given(case.enumeration) is None:
        return
    others = [make_case(replace(case.method, scorer=s), case.world) for s in other_settings(case.method.scorer)]
    errors = []
    for one in (case, deep, *others):
        found, expected = given(one.enumeration), wanted(one.enumeration, one.world.teachers)
        assert found is not None
        if expected is None:
            yield Skipped(name=name, why="no definition is known for this scorer; the other rows hold without one")
            return
        errors.append(relative_difference(*(_flat(rows) for rows in (found, expected))))
    yield Row(name=name, measured=max(errors), tolerance=EXACT)


def _flat(rows: Sequence[Any]) -> Tensor:
    """All numbers of arrays per text, or of tuples of arrays."""
    every = [x for row in rows for x in (row if isinstance(row, tuple) else (row,))]
    return torch.from_numpy(np.concatenate([x.ravel() for x in every]))


def check_credit(case: Case, deep: Case) -> Iterator[Finding]:
    """Credit agrees with its definition, and raises the sampled token. `deep` has long texts."""
    if scorer_credit(case.enumeration.scored) is None:
        yield Skipped(name=DEFINED, why="the scorer gives no credit")
        return
    method, world = case.method, case.world
    others = [make_case(replace(method, scorer=other), world) for other in other_settings(method.scorer)]
    errors = [
        _error(c.enumeration.scored, credit_by_definition(c.enumeration, c.world.teachers))
        for c in (case, deep, _with_context(case), *_odd_groups(case, deep), *others)
    ]
    if None in errors:
        yield Skipped(name=DEFINED, why="no definition is known for this scorer; the rows below hold without one")
    else:
        yield Row(name=DEFINED, measured=max(e for e in errors if e is not None), tolerance=EXACT)
    match case.enumeration.scored[0].scores:
        case AdvantageScores() | CreditScores() if Need(Role.GRADER) in needs_of(case.method.scorer):
            yield from _graded(case)
        case TopKReturnScores():
            yield from _returned(case)
        case EvidenceScores() | DeviationScores() | DeltaScores():
            return  # it says which tokens count, not how much what was written is worth
    yield at_least(RAISES, _raised(case), 1e-9)


def _error(scored: list[Scored[Any]], expected: Credit | None) -> float | None:
    credit = scorer_credit(scored)
    if expected is None or credit is None:
        return None
    own = [item.trajectory.loss_mask for item in scored]
    found, due = (
        torch.from_numpy(np.concatenate([c[mask] for c, mask in zip(every, own, strict=True)]))
        for every in (credit, expected)
    )
    return relative_difference(found, due)


def _with_context(case: Case) -> Case:
    """The case with every third token of its texts as context, as words of an environment are; scored anew."""
    texts = [item.trajectory for item in case.enumeration.scored]
    return _rescored(case, [replace(t, loss_mask=np.arange(len(t)) % 3 != 1) for t in texts])


def _rescored(case: Case, texts: Sequence[Trajectory]) -> Case:
    """The case with these texts, scored anew."""
    groups = [list(group) for _, group in groupby(texts, key=lambda t: t.prompt.id)]
    scores = [s for group in awaited(_scores(case, groups, engines(case.world, RequestLog()))) for s in group]
    scored = [Scored(trajectory=t, scores=s) for t, s in zip(texts, scores, strict=True)]
    return replace(case, enumeration=replace(case.enumeration, scored=scored))


def _odd_groups(case: Case, deep: Case) -> Iterator[Case]:
    """A pair of texts, texts of equal reward, and texts of lengths between the least and the greatest."""
    items = case.enumeration.scored
    first = [item.trajectory for item in items if item.trajectory.prompt.id == items[0].trajectory.prompt.id]
    yield _rescored(case, [first[0], first[-1]])
    yield _rescored(case, [t for t in first if reward_of(t) == reward_of(first[0])][:5])
    seldom = getattr(case.method.scorer, "looks_ahead", False)  # it asks at every token, which takes its time
    for length in (1, 2) if seldom else (1, 2, 40, 200):
        world = case if length <= case.world.length else deep
        texts = [item.trajectory for item in world.enumeration.scored[:3]]
        yield _rescored(world, [first_tokens(t, min(length, len(t))) for t in texts])


def _graded(case: Case) -> Iterator[Finding]:
    rewarded, credit = rewards(case.enumeration.scored), scorer_credit(case.enumeration.scored) or []
    wrong = 0
    for _, group in groupby(range(len(rewarded)), key=lambda i: case.enumeration.scored[i].trajectory.prompt.id):
        members = list(group)
        better = np.sign(rewarded[members][:, None] - rewarded[members][None, :])
        mean = np.asarray([credit[i].mean() for i in members])
        gap = mean[:, None] - mean[None, :]
        wrong += int((np.sign(np.where(np.abs(gap) > EXACT, gap, 0)) != better).sum())
    yield Row(name=BETTER, measured=float(wrong), tolerance=0.0)


def _returned(case: Case) -> Iterator[Finding]:
    credit, own = scorer_credit(case.enumeration.scored) or [], begins_with_own(case.method.scorer)
    if own:
        yield Skipped(name=LAST, why="a return begins with the token's own reward, as the scorer declares")
    else:
        yield Row(name=LAST, measured=max(abs(float(c[-1])) for c in credit), tolerance=EXACT)
    wrong = 0
    for position in range(1, case.world.length):
        first = position + own  # of the returns without the perturbed token
        perturbed = make_case(case.method, replace(case.world, perturbed_position=position))
        credit_then = scorer_credit(perturbed.enumeration.scored) or []
        changes = [after - before for before, after in zip(credit, credit_then, strict=True) if len(before) > position]
        wrong += sum(bool((c[:first] > EXACT).any() or c[first - 1] > -EXACT) for c in changes)
        wrong += sum(bool((np.abs(c[first:]) > EXACT).any()) for c in changes)
    yield Row(name=LATER, measured=float(wrong), tolerance=0.0)


def _raised(case: Case) -> float:
    """Least increase of a sampled token's logit gradient for one more unit of its credit."""
    batch, objective = every_token(case.enumeration), enumerable(case.method.objective)
    at = logits(case.enumeration, batch)
    match batch.scores:
        case AdvantageScores(advantages=credit):
            more = replace(batch.scores, advantages=credit + 1.0)
        case TopKReturnScores(returns=credit):
            more = replace(batch.scores, returns=credit + 1.0)
        case CreditScores(credit=credit):
            more = replace(batch.scores, credit=credit + 1.0)
        case _:
            return 0.0
    rise = logit_gradients(objective, at, batch) - logit_gradients(objective, at, replace(batch, scores=more))
    return float(rise.gather(-1, batch.target_ids[:, None]).min())
