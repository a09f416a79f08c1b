"""Token weights by definition: computed from scores and readings, never by the weight under test."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil, floor
from typing import Any

import numpy as np
from jaxtyping import Float

from opd.loss.readings import (
    Compatibility,
    StudentEntropy,
    StudentTopEntropy,
    TeacherEntropy,
    UnionForwardKL,
    VocabularyReverseKL,
)
from opd.ports import Reading
from opd.token_weights.confidence import PlausibleTrajectories, Scope, SureTeacherUnsureStudent
from opd.token_weights.far_futures import CapAtMedian, Part
from opd.token_weights.length import SkipBeginning, SkipTruncated
from opd.token_weights.selection import ByReading, Signal, Teachability, TopFraction
from opd.token_weights.sources import Source, WrittenBy
from opd.token_weights.special_tokens import SkipFirst
from opd.token_weights.targets import PerTarget
from opd.token_weights.teachers import PromptWeight, TeacherBalance
from opd.types import NO_VERSION, Scored, StopReason, Trajectory

Weights = list[Float[np.ndarray, " _T"]]
_EPSILON = 1e-8  # beside the range between two quantiles


def first_tokens(text: Trajectory, count: int) -> Trajectory:
    """A text cut after its first `count` tokens."""
    return replace(
        text,
        token_ids=text.token_ids[:count],
        behavior=text.behavior.take(np.arange(count)),
        loss_mask=text.loss_mask[:count],
        versions=text.versions[:count],
    )


def one_token(item: Scored[Any]) -> Scored[Any]:
    """A text with its scores, cut after its first token."""
    return replace(item, trajectory=first_tokens(item.trajectory, 1), scores=item.scores.take(np.arange(1)))


def weights_by_definition(part: Any, items: Sequence[Scored[Any]]) -> Weights | None:
    """Weights of texts of which everything was sampled; None where no definition is known."""
    match part:
        case PlausibleTrajectories():
            return _plausible(part, items)
        case SureTeacherUnsureStudent():
            return _sure(part, items)
        case TopFraction() if not part.filters:
            return _top(part, items)
        case CapAtMedian(part=Part.LOW):
            return _capped(part, items)
        case PerTarget():
            return [np.asarray(item.scores.targets, dtype=np.float64) for item in items]
        case WrittenBy():
            by_student = part.source is Source.STUDENT
            return [np.where(i.trajectory.versions == NO_VERSION, not by_student, by_student) * 1.0 for i in items]
        case SkipTruncated():
            return [np.full(len(i.trajectory), float(i.trajectory.stop is not StopReason.LENGTH)) for i in items]
        case SkipBeginning():
            return [np.repeat([0.0, 1.0], [min(part.count, n), max(n - part.count, 0)]) for n in _lengths(items)]
        case PromptWeight():
            return [np.full(len(i.trajectory), float(i.trajectory.prompt.weight)) for i in items]
        case TeacherBalance() if not part.filters:
            return _balanced(part, items)
        case SkipFirst():
            return [_without_first(part.token_ids, i.trajectory.token_ids.tolist()) for i in items]
    return None


def _lengths(items: Sequence[Scored[Any]]) -> list[int]:
    return [len(item.trajectory) for item in items]


def _plausible(part: PlausibleTrajectories, items: Sequence[Scored[Any]]) -> Weights:
    """0 for a text with at most `floor(drop n)` texts below that many places, by the teacher's mean log-probability."""
    mean = [sum(np.asarray(i.scores.logprobs, dtype=np.float64).tolist()) / len(i.trajectory) for i in items]
    teacher = [i.trajectory.prompt.teacher if part.per_teacher else "" for i in items]
    made = []
    for i, item in enumerate(items):
        level = sorted(m for m, name in zip(mean, teacher, strict=True) if name == teacher[i])
        least = level[min(floor(part.drop * len(level) + 1e-9), len(level) - 1)]
        made.append(np.full(len(item.trajectory), float(mean[i] >= least)))
    return made


def _balanced(part: TeacherBalance, items: Sequence[Scored[Any]]) -> Weights:
    """`share N / n` of a teacher's tokens: its share among those that have any, of all `N` tokens, over its own `n`."""
    names, lengths = [item.trajectory.prompt.teacher for item in items], _lengths(items)
    tokens = {name: sum(n for n, other in zip(lengths, names, strict=True) if other == name) for name in names}
    share = {name: float(part.shares.get(name, 1.0)) for name in tokens}
    factor = {name: share[name] / sum(share.values()) * sum(lengths) / tokens[name] for name in tokens}
    return [np.full(n, factor[name]) for n, name in zip(lengths, names, strict=True)]


def _without_first(skipped: Sequence[int], ids: list[int]) -> Float[np.ndarray, " T"]:
    """1 at every token but the first one of each id that is skipped."""
    return np.asarray([float(not (token in skipped and token not in ids[:t])) for t, token in enumerate(ids)])


def _sure(part: SureTeacherUnsureStudent, items: Sequence[Scored[Any]]) -> Weights:
    """`(1 + a (1 - H_T / max H_T)) (1 + b H_S / max H_S)`, over its mean in the text."""
    taught, own = ([_reading(item, kind()) for item in items] for kind in (TeacherEntropy, StudentEntropy))
    made = []
    for i in range(len(items)):
        scope = range(len(items)) if part.scope is Scope.BATCH else [i]
        most_taught, most_own = (max(float(x[j].max()) for j in scope) for x in (taught, own))
        sure, unsure = 1 - taught[i] / most_taught, own[i] / most_own
        weight = (1 + part.teacher * sure) * (1 + part.student * unsure)
        made.append(weight / (weight.sum() / len(weight)))
    return made


def _capped(part: CapAtMedian, items: Sequence[Scored[Any]]) -> Weights:
    """`median / loss` where that is below 1, of the `floor(share n)` candidates of the step with the least distance."""
    ahead = [np.asarray(item.scores.ahead, dtype=np.float64).tolist() for item in items]
    near = sorted(far for row in ahead for far in row if far >= 0)
    number = floor(part.share * len(near) + 1e-9)
    made = []
    for item, row in zip(items, ahead, strict=True):
        losses = _reading(item, VocabularyReverseKL()).tolist()
        ordered, n = sorted(losses), len(losses)
        middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
        is_near = [number > 0 and 0 <= far <= near[number - 1] for far in row]
        caps = zip(is_near, losses, strict=True)
        made.append(np.asarray([min(1.0, middle / loss) if capped else 1.0 for capped, loss in caps]))
    return made


def _top(part: TopFraction, items: Sequence[Scored[Any]]) -> Weights | None:
    """1 for the `ceil(fraction n)` tokens of the greatest score, after the best of each text."""
    scores = _scores(part.by, items)
    if scores is None:
        return None
    places = [(i, t) for i, item in enumerate(items) for t in range(len(item.trajectory))]
    ranked = sorted(range(len(places)), key=lambda n: (-scores[n], n))
    chosen: list[int] = []
    for i in range(len(items)):
        chosen += [n for n in ranked if places[n][0] == i][: part.per_trajectory]
    number = max(ceil(part.fraction * len(places) - 1e-9), len(chosen))
    chosen += [n for n in ranked if n not in set(chosen)][: number - len(chosen)]
    made = [np.zeros(len(item.trajectory)) for item in items]
    for n in chosen:
        made[places[n][0]][places[n][1]] = 1.0
    return made


def _scores(by: Any, items: Sequence[Scored[Any]]) -> Float[np.ndarray, " N"] | None:
    """Score of every token of a step; None where no definition is known."""

    def step(reading: Reading) -> Float[np.ndarray, " N"]:
        return np.concatenate([_reading(item, reading) for item in items])

    match by:
        case ByReading():
            return (-1 if by.lowest else 1) * step(by.reading)
        case Teachability():
            return _teachability(by, {r: step(r) for r in by.readings})
    return None


def _teachability(by: Teachability, readings: Mapping[Reading, Float[np.ndarray, " N"]]) -> Float[np.ndarray, " N"]:
    def normal(values: Float[np.ndarray, " N"] | None) -> Float[np.ndarray, " N"]:
        if values is None:
            return np.zeros(0)
        low, high = np.quantile(values, by.low), np.quantile(values, by.high)
        return np.minimum(np.maximum((values - low) / (max(high - low, 0) + _EPSILON), 0), 1)

    d, c = (normal(readings.get(kind(k=by.k))) for kind in (UnionForwardKL, Compatibility))
    h = readings.get(StudentTopEntropy(k=by.k), np.zeros(0))
    match by.signal:
        case Signal.LEARNABLE:
            return d * c
        case Signal.INCOMPATIBLE:
            return d - d * c
        case Signal.DISAGREEMENT:
            return d
        case Signal.COMPATIBILITY:
            return c
        case Signal.DISAGREEMENT_OR_ENTROPY:
            return h + d - h * d
        case Signal.LEARNABLE_OR_ENTROPY:
            return h + d * c - h * d * c


def _reading(item: Scored[Any], reading: Reading) -> Float[np.ndarray, " _T"]:
    return np.asarray(item.readings[reading], dtype=np.float64)


def reading_by_definition(
    reading: Any, p: Float[np.ndarray, "n V"], q: Float[np.ndarray, "n V"] | None
) -> Float[np.ndarray, " n"] | None:
    """A reading from log-probabilities of student and teacher; None where no definition is known, or no teacher."""
    own = np.exp(p)
    k = min(getattr(reading, "k", 1), p.shape[1])
    likeliest = np.argsort(-p, axis=-1, kind="stable")[:, :k]
    match reading:
        case StudentEntropy():
            return -(own * p).sum(-1)
        case StudentTopEntropy():
            top = np.take_along_axis(own, likeliest, -1)
            top = top / top.sum(-1, keepdims=True)
            return -(top * np.log(top)).sum(-1) / np.log(max(k, 2))
    if q is None:
        return None
    taught = np.exp(q)
    match reading:
        case TeacherEntropy():
            return -(taught * q).sum(-1)
        case VocabularyReverseKL():
            return (own * (p - q)).sum(-1)
        case Compatibility():
            return np.take_along_axis(taught, likeliest, -1).sum(-1)
        case UnionForwardKL():
            members = np.zeros(p.shape, dtype=bool)
            for ids in (likeliest, np.argsort(-q, axis=-1, kind="stable")[:, :k]):
                np.put_along_axis(members, ids, True, -1)
            a, b = (x * members / (x * members).sum(-1, keepdims=True) for x in (own, taught))
            return (b * np.log(np.where(members, b, 1.0) / np.where(members, a, 1.0))).sum(-1)
    return None
