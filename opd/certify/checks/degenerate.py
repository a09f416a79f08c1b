"""Checks of a method's scorer in groups where something that it divides by, or looks at, may not be there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from opd.certify.awaited import awaited
from opd.certify.certificate import Finding, Row, Skipped
from opd.certify.checks.scorers import numbers_of
from opd.certify.checks.weighing import first_tokens
from opd.certify.engines import RequestLog, engines
from opd.certify.gradients import EXACT, Case, relative_difference
from opd.errors import ConfigurationError
from opd.types import Scores, Trajectory

SCORED = "scores are numbers in degenerate groups"
GROUPED = "scores of a text do not depend on its group"
UNREAD = "scores do not depend on log-probabilities of what was not sampled"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Group of texts of one prompt."""

    name: str
    texts: list[Trajectory]


def check_degenerate(case: Case) -> Iterator[Finding]:
    """Scores have a number for every token of a lone text, of equal texts, of one token, and of partly masked ones."""
    measured = sum(awaited(_not_numbers(case, group)) for group in _groups(case))
    yield Row(name=SCORED, measured=float(measured), tolerance=0.0)
    yield Row(name=UNREAD, measured=float(awaited(_read_context(case))), tolerance=0.0)
    scorer: Any = case.method.scorer
    if getattr(scorer, "min_group", 1) > 1 or getattr(scorer, "normalized", False):
        yield Skipped(name=GROUPED, why="the scorer compares the texts of a group, as it declares")
        return
    yield Row(name=GROUPED, measured=awaited(_alone(case)), tolerance=EXACT)


async def _alone(case: Case) -> float:
    """Difference between the scores of three texts, of which one is shorter, and those of each by itself."""
    texts = [item.trajectory for item in case.enumeration.scored[:: case.world.vocabulary + 1][:3]]
    texts = [replace(t, prompt=texts[0].prompt) for t in texts]
    texts[1] = first_tokens(texts[1], 1)
    context = engines(case.world, RequestLog())
    together = list(await case.method.scorer(texts, context))
    alone = [one for t in texts for one in await case.method.scorer([t], context)]
    first, then = (numbers_of(type(x[0]).concat(x).to("cpu", lambda rows: rows)) for x in (together, alone))
    return max((relative_difference(a, b) for a, b in zip(first, then, strict=True)), default=0.0)


async def _read_context(case: Case) -> int:
    """Number of texts whose scores change with the log-probabilities that stand at tokens of context.

    Words of an environment or a tool have none: what stands there says nothing.
    """
    texts = [item.trajectory for item in case.enumeration.scored[: case.world.vocabulary]]
    masks = [np.arange(len(t)) % 3 != 1 for t in texts]
    within = [replace(t, loss_mask=mask) for t, mask in zip(texts, masks, strict=True)]
    other = [_with_noise(t) for t in within]
    context = engines(case.world, RequestLog())
    first, then = [list(await case.method.scorer(group, context)) for group in (within, other)]
    kept = [np.flatnonzero(mask) for mask in masks]
    whole = [item.scores for item in case.enumeration.scored[: len(texts)]]
    moved = sum(not _same_teacher(a, b, rows) for a, b, rows in zip(first, whole, kept, strict=True))
    return moved + sum(not _equal(a.take(rows), b.take(rows)) for a, b, rows in zip(first, then, kept, strict=True))


def _same_teacher(scores: Any, whole: Any, rows: np.ndarray) -> bool:
    """Whether a teacher's log-probabilities of the tokens `rows` are the same where others are context."""
    names = [f.name for f in fields(scores) if f.name in ("logprobs", "topk_logprobs")]
    return all(np.array_equal(getattr(scores, n)[rows], getattr(whole, n)[rows]) for n in names)


def _with_noise(text: Trajectory) -> Trajectory:
    behavior = text.behavior
    logprobs = np.where(text.loss_mask, behavior.logprobs, behavior.logprobs - 1)
    return replace(text, behavior=replace(behavior, logprobs=logprobs))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Scores):
        return all(_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, tuple):
        return all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return not isinstance(a, np.ndarray) or np.array_equal(a, b)  # rows that lie elsewhere are of the teacher alone


def _groups(case: Case) -> Iterator[_Group]:
    least = getattr(case.method.scorer, "min_group", 1)
    items = case.enumeration.scored
    text, other = items[0].trajectory, items[-case.world.vocabulary].trajectory
    short = first_tokens(text, 1)
    yield _Group(name=f"{least} equal texts", texts=[replace(text, sample=i) for i in range(least)])
    yield _Group(name="texts of one token", texts=[replace(short, sample=i) for i in range(max(least, 2))])
    same = replace(other, prompt=text.prompt)
    masked = np.zeros(len(same), dtype=bool)
    nothing = replace(same, loss_mask=masked, sample=1)
    context = replace(text, loss_mask=np.arange(len(text)) != 1)
    yield _Group(name="a text with context in it beside one of which nothing was sampled", texts=[context, nothing])


async def _not_numbers(case: Case, group: _Group) -> int:
    """Number of texts whose scores are not as many numbers as it has tokens."""
    scorer, context = case.method.scorer, engines(case.world, RequestLog())
    try:
        with np.errstate(all="ignore"):
            scores = list(await scorer(group.texts, context))
    except (ArithmeticError, ValueError, IndexError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"scorer {type(scorer).__name__} cannot score a group of {group.name} ({type(error).__name__}: {error}), "
            "which may come up in a run; give every token a number there"
        ) from error
    found = [_numbers(one, len(text)) for one, text in zip(scores, group.texts, strict=False)]
    return len(group.texts) - sum(found)


def _numbers(scores: Scores, tokens: int) -> bool:
    """Whether all arrays within scores have a row per token and no NaN, and no infinity that is a probability of 0."""
    return all(_array(getattr(scores, f.name), tokens) for f in fields(scores))


def _array(value: Any, tokens: int) -> bool:
    if isinstance(value, Scores):
        return _numbers(value, tokens)
    if isinstance(value, tuple):
        parts: Sequence[Any] = value
        return all(_array(part, tokens) for part in parts)
    if not isinstance(value, np.ndarray):
        return len(value) == tokens  # rows that lie elsewhere
    return len(value) == tokens and not bool((np.isnan(value) | (value == np.inf)).any())
