"""Targets by definition: soft labels that follow from the models alone, never from the scorer under test."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from jaxtyping import Float

from opd.certify.engines import continuation
from opd.certify.enumeration import Enumeration
from opd.certify.models import TinyModel
from opd.ports import Role, Sampling, needs_of
from opd.scorers.near_future import RecordedReverseKL
from opd.scorers.transport import EmbeddingCosine
from opd.types import FutureScores, TargetScores, TopKScores, Trajectory

Dense = list[tuple[Float[np.ndarray, "_T V"], Float[np.ndarray, " _T"]]]
"""Per trajectory the target of every token over the vocabulary, and the number of labels of which it is the mean."""


def writes(scorer: Any) -> bool:
    """Whether a scorer lets a teacher go on from the middle of a text."""
    return any(need.role is Role.WRITER for need in needs_of(scorer))


def scorer_targets(enumeration: Enumeration) -> Dense | None:
    """Targets as the scorer gave them; None where a scorer gives none."""
    if not isinstance(enumeration.scored[0].scores, TargetScores):
        return None
    return [_dense(item.scores, enumeration.world.vocabulary) for item in enumeration.scored]


def _dense(scores: TargetScores, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.zeros((len(scores.targets), vocabulary))
    places = np.broadcast_to(np.arange(len(rows))[:, None], np.shape(scores.target_ids))
    np.add.at(rows, (places, np.asarray(scores.target_ids)), np.asarray(scores.target_probs, dtype=np.float64))
    return rows, np.asarray(scores.targets, dtype=np.float64)


def targets_by_definition(enumeration: Enumeration, teachers: Mapping[str, TinyModel]) -> Dense | None:
    """Targets of every token by definition; None where no definition is known for the scorer's fields."""
    if not hasattr(enumeration.scorer, "window") or scorer_targets(enumeration) is None:
        return None
    return [_near_futures(enumeration, length, windows) for length, windows in _every_window(enumeration, teachers)]


def scorer_distances(enumeration: Enumeration) -> list[Float[np.ndarray, " _T"]] | None:
    """Distances of near futures as the scorer gave them; None where a scorer gives none."""
    scores = [item.scores for item in enumeration.scored]
    return [np.asarray(s.ahead, dtype=np.float64) for s in scores if isinstance(s, FutureScores)] or None


def distances_by_definition(
    enumeration: Enumeration, teachers: Mapping[str, TinyModel]
) -> list[Float[np.ndarray, " _T"]] | None:
    """Distance of the near futures of every candidate, -1 at other tokens; None as with targets."""
    if not hasattr(enumeration.scorer, "window"):
        return None
    made = []
    for length, windows in _every_window(enumeration, teachers):
        row = np.full(length, -1.0)
        for window in windows:
            row[window.start] = window.apart
        made.append(row)
    return made


def _every_window(enumeration: Enumeration, teachers: Mapping[str, TinyModel]) -> list[tuple[int, list["_Matched"]]]:
    """Length of every text, and its windows with their transport plans (transport is the scorer's own part)."""
    known: dict[tuple[bytes, int, str], np.ndarray] = {}
    texts = [item.trajectory for item in enumeration.scored]
    windows = [_windows(enumeration, text, teachers, known) for text in texts]
    scorer, student = enumeration.scorer, enumeration.world.student
    pairs = {one.pair: one for found in windows for one in found}
    costs = [np.asarray([[_cost(scorer.cost, student, a, b) for b in w.future] for a in w.own]) for w in pairs.values()]
    plans = dict(zip(pairs, zip(scorer.transport.plans(costs), costs, strict=True), strict=True)) if pairs else {}
    return [
        (len(text), [_Matched(window.start, window.future, *plans[window.pair]) for window in found])
        for text, found in zip(texts, windows, strict=True)
    ]


def mean_targets(
    enumeration: Enumeration, teachers: Mapping[str, TinyModel], counted: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "s V"]:
    """Mean target at every state, by definition or else as the scorer gave it, over tokens as they are `counted`."""
    v = enumeration.world.vocabulary
    found = targets_by_definition(enumeration, teachers) or scorer_targets(enumeration)
    if found is None:
        return np.zeros((len(counted) // v, v))
    rows = np.stack([target[p] for (target, _), p in zip(found, enumeration.position, strict=True)])
    share = counted.reshape(-1, v) / np.maximum(counted.reshape(-1, v).sum(-1, keepdims=True), 1e-300)
    return (rows.reshape(-1, v, v) * share[:, :, None]).sum(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Window:
    """Tokens from `start` on that the student wrote, and those that the teacher writes there."""

    start: int
    own: np.ndarray
    future: np.ndarray

    @property
    def pair(self) -> tuple[bytes, bytes]:
        return self.own.tobytes(), self.future.tobytes()


@dataclass(frozen=True, slots=True)
class _Matched:
    """Window from `start` on, the teacher's tokens of it, and their transport."""

    start: int
    future: np.ndarray
    plan: np.ndarray
    cost: np.ndarray

    @property
    def apart(self) -> float:
        return float((self.plan * self.cost).sum())


def _windows(
    enumeration: Enumeration,
    text: Trajectory,
    teachers: Mapping[str, TinyModel],
    known: dict[tuple[bytes, int, str], np.ndarray],
) -> list[_Window]:
    """Windows of the candidates of a text; `known` keeps what teachers went on with."""
    scorer, teacher = enumeration.scorer, teachers[text.prompt.teacher]
    losses = _losses(enumeration, text, teacher)
    most = sorted(range(len(text)), key=lambda t: (-losses[t], t))[: ceil(scorer.fraction * len(text) - 1e-9)]
    found = []
    for t in most:
        own = text.token_ids[t : t + scorer.window]
        before = np.concatenate([text.prompt.teacher_ids, text.token_ids[:t]]).astype(np.int32)
        key = before.tobytes(), len(own), text.prompt.teacher
        if key not in known:
            known[key] = continuation(teacher, before, Sampling(max_tokens=len(own), temperature=scorer.temperature))
        found.append(_Window(start=t, own=own, future=np.asarray(known[key])))
    return found


def _near_futures(enumeration: Enumeration, length: int, windows: Sequence[_Matched]) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the windows in which student and teacher part, token by token."""
    scorer = enumeration.scorer
    least = np.quantile([window.apart for window in windows], scorer.quantile)
    total, count = np.zeros((length, enumeration.world.vocabulary)), np.zeros(length)
    for window in windows:
        if window.apart <= 0 or window.apart < least:
            continue
        for i, row in enumerate(window.plan):
            label = np.zeros(enumeration.world.vocabulary)
            for token, share in zip(window.future, row, strict=True):
                label[token] += share if share / max(row.sum(), 1e-300) >= scorer.least else 0.0
            if label.any():
                total[window.start + i] += label / label.sum()
                count[window.start + i] += 1
    return total / np.maximum(count, 1)[:, None], count


def _losses(enumeration: Enumeration, text: Trajectory, teacher: TinyModel) -> Float[np.ndarray, " _T"]:
    drawn = enumeration.log.generations[text.prompt.id, text.sample].logprobs.double().numpy()
    taught = teacher.logprobs([(text.prompt.teacher_ids, text.token_ids)])[0].detach().double().numpy()
    if not isinstance(enumeration.scorer.loss, RecordedReverseKL):
        rows = np.arange(len(text))
        return (drawn - taught)[rows, text.token_ids]
    assert isinstance(text.behavior, TopKScores)
    made = np.zeros(len(text))
    for t, (p, q) in enumerate(zip(np.exp(drawn), np.exp(taught), strict=True)):
        best = np.argsort(-p, kind="stable")[: np.shape(text.behavior.topk_ids)[1]]
        others = np.setdiff1d(np.arange(len(p)), best)
        for one, other in [*zip(p[best], q[best], strict=True), (p[others].sum(), q[others].sum())]:
            made[t] += one * np.log(one / other) if one > 0 else 0.0
    return made


def _cost(cost: Any, student: TinyModel, a: int, b: int) -> float:
    if a == b:
        return 0.0
    if not isinstance(cost, EmbeddingCosine):
        return 1.0
    own, other = (student.embedding[int(i)].float().double().numpy() for i in (a, b))
    return float(min(max(1 - own @ other / (np.linalg.norm(own) * np.linalg.norm(other)), 0.0), 2.0))
