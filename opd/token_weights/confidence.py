"""Weights by what teacher and student are sure of: whole trajectories left out, tokens of the others weighed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import floor
from typing import Annotated, Any, ClassVar

import numpy as np
from jaxtyping import Float

from opd.loss.readings import StudentEntropy, TeacherEntropy
from opd.method.slots import WeightLimit
from opd.ports import Context, Reading
from opd.settings.ranges import Fraction, In
from opd.settings.validation import settings
from opd.token_weights.selection import flat, spread
from opd.types import Scored, Scores, TokenScores

_ROUNDING = 1e-9  # of a product of a fraction and a count, which may be meant to be whole
Strength = Annotated[float, In(0, 1000, because="below 0 a weight might be negative")]


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class PlausibleTrajectories:
    """Weight 0 of the trajectories that the teacher finds least plausible (the filter of FiRe-OPD, arXiv 2606.02684).

    The score of a trajectory is the mean log-probability that the teacher gives to its tokens. Of a step's `n`
    trajectories the `floor(drop * n)` with the lowest are left out; those as high as the lowest that stays, stay. With
    `per_teacher` each teacher's trajectories are compared among themselves, since the levels of teachers differ (not in
    the paper, which compares all). It looks at what was sampled, so it is not for estimates from sampled tokens.
    """

    consumes: ClassVar[type[Scores]] = TokenScores
    reads_sampled_tokens: ClassVar[bool] = True

    # share of the trajectories that is left out
    drop: Fraction = 0.2
    # whether each teacher's trajectories are compared among themselves
    per_teacher: bool = False

    @property
    def limits(self) -> tuple[WeightLimit, ...]:
        """`drop = 0` leaves none out."""
        return (WeightLimit(name="drop = 0 is every trajectory", weight=replace(self, drop=0.0)),)

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[Float[np.ndarray, " T"]]:
        groups: dict[str, list[int]] = {}
        for i, s in enumerate(scored):
            if s.trajectory.loss_mask.any():  # what has no token of the student is in no ranking
                groups.setdefault(s.trajectory.prompt.teacher if self.per_teacher else "", []).append(i)
        kept = np.ones(len(scored))
        for members in groups.values():
            means = np.array([self._mean(scored[i]) for i in members])
            dropped = min(floor(self.drop * len(members) + _ROUNDING), len(members) - 1)
            kept[members] = means >= np.sort(means)[dropped]
        return [np.full(len(s.trajectory), kept[i]) for i, s in enumerate(scored)]

    @staticmethod
    def _mean(scored: Scored[TokenScores]) -> float:
        return float(np.asarray(scored.scores.logprobs, dtype=np.float64)[scored.trajectory.loss_mask].mean())


class Scope(Enum):
    """Tokens over which the greatest entropies are taken."""

    BATCH = "batch"  # all of the step, as in the paper
    TRAJECTORY = "trajectory"  # those of the same completion, as the released scripts have it (micro-batches of one)


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class SureTeacherUnsureStudent:
    """Weight `(1 + a c)(1 + b u)`, on average 1 in every trajectory (FiRe-OPD, arXiv 2606.02684 eq. 8).

    `c = 1 - H(teacher) / max H(teacher)` is the teacher's confidence, `u = H(student) / max H(student)` the student's
    uncertainty, with entropies over the whole vocabulary. The mean over a trajectory depends on later tokens, so it is
    not for estimates from sampled tokens.
    """

    consumes: ClassVar[type[Scores]] = Scores
    reads_sampled_tokens: ClassVar[bool] = True
    readings: ClassVar[Sequence[Reading]] = (TeacherEntropy(), StudentEntropy())

    # how much the teacher's confidence counts (the paper's alpha)
    teacher: Strength = 1.0
    # how much the student's uncertainty counts (the paper's beta)
    student: Strength = 1.0
    # tokens over which the greatest entropies are taken
    scope: Scope = Scope.BATCH

    @property
    def limits(self) -> tuple[WeightLimit, ...]:
        """Strengths of 0 weigh every token alike."""
        alike = replace(self, teacher=0.0, student=0.0)
        return (WeightLimit(name="teacher = student = 0 is every token alike", weight=alike),)

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[Float[np.ndarray, " T"]]:
        parts = [[s] for s in scored] if self.scope is Scope.TRAJECTORY else [list(scored)]
        return [weight for part in parts for weight in self._weights(part)]

    def _weights(self, scored: Sequence[Scored[Any]]) -> list[Float[np.ndarray, " T"]]:
        taught, own = (_shares_of_greatest(flat(scored, reading)) for reading in self.readings)
        raw = spread(scored, (1 + self.teacher * (1 - taught)) * (1 + self.student * own))
        return [w / w[s.trajectory.loss_mask].mean() if w.any() else w for w, s in zip(raw, scored, strict=True)]


def _shares_of_greatest(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """Values over the greatest of them; 0 where none is above 0."""
    greatest = values.max(initial=0.0)
    return values / greatest if greatest > 0 else np.zeros_like(values)
