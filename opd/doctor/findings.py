"""Data of the doctor: the subject, the evidence, findings, and the comparison of two scorings of a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import cast

import numpy as np

from opd.ports import Context, Learner, LogprobTeacher, ScoreKind, ScoreKinds, ScoreRequest
from opd.ports.score_kinds import A
from opd.scorers.validation import validate_scores
from opd.types import TokenScores, Trajectory


class Verdict(Enum):
    """Severity of a finding."""

    FINE = "fine"
    WARNING = "warning"  # training is right, but may not be what is wanted
    REFUSED = "refused"  # training would be wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Result of one check; `measured` is for people; `sentence` is empty when the check passed."""

    check: str
    verdict: Verdict
    measured: str
    sentence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckThresholds:
    """Thresholds of the findings. Chosen by us; no paper gives them, except where named.

    `tolerance`: nats by which two readings of the same token may differ, `mean_tolerance` by which they may on average
    (float32; what bfloat16 needs is in `launch.run.doctor`): two programs are compared, so there is no smaller floor to
    measure. `overlap`: share of the student's top-k that the teacher's holds below which a cold start is advised
    (successful runs of arXiv 2604.13016 start at about 0.72; unrelated models share k / V). `surprise`: nats by
    which the teacher must find special places (first token, end of text) less likely than the rest of the same texts
    before a warning. `flat`: a token that is exchanged for another changes a trained teacher's
    logprob by several nats; a teacher for which it is less than this has nothing to teach.
    """

    tolerance: float = 1e-3
    mean_tolerance: float = 1e-3
    flat: float = 0.5
    overlap: float = 0.4
    surprise: float = 12.0
    padding_mass: float = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A student, its learner and one teacher, as the run will use them.

    `replicas` are the teacher's members one by one; `reference` is its checkpoint on another backend; `supports` are
    the kinds of scores it answers; `vocabulary` counts the tokenizer's tokens (columns beyond are padding); `twin` is a
    teacher of the same backend made from the student's checkpoint; `support` is the k of top-k probes; `exact` says
    that the learner can read hidden states with the teacher's output matrix.
    """

    name: str
    context: Context
    learner: Learner
    replicas: Sequence[LogprobTeacher]
    supports: ScoreKinds
    vocabulary: int
    reference: LogprobTeacher | None = None
    twin: LogprobTeacher | None = None
    support: int = 16
    exact: bool = True
    thresholds: CheckThresholds = CheckThresholds()

    @property
    def teacher(self) -> LogprobTeacher:
        """The teacher as the run uses it."""
        return self.context.teachers[self.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Short completions of the student (with its top-k), and the teacher's scores of their tokens."""

    written: Sequence[Trajectory]
    scores: Sequence[TokenScores]


async def ask(teacher: LogprobTeacher, written: Sequence[Trajectory], kind: ScoreKind[A]) -> list[A]:
    """Scores of one kind about the written texts, verified."""
    requests = [ScoreRequest(context_ids=t.prompt.teacher_ids, token_ids=t.token_ids, kinds=(kind,)) for t in written]
    answers = await teacher.score(requests)
    validate_scores(requests, answers)
    return [cast(A, scores) for (scores,) in answers]


def distance(a: TokenScores, b: TokenScores, start: int = 0, stop: int | None = None) -> float:
    """Largest difference of two scorings of the same tokens, in nats."""
    difference = np.abs(np.asarray(a.logprobs)[start:stop] - np.asarray(b.logprobs)[start:stop])
    return float(difference.max()) if len(difference) else 0.0


def fine(check: str, measured: str) -> Finding:
    """Finding of a check that passed."""
    return Finding(check=check, verdict=Verdict.FINE, measured=measured)


def warned(check: str, measured: str, sentence: str) -> Finding:
    """Finding of a check that failed, although training is correct: it may not be as intended."""
    return Finding(check=check, verdict=Verdict.WARNING, measured=measured, sentence=sentence)


def refused(check: str, measured: str, sentence: str) -> Finding:
    """Finding of a check that failed and makes training wrong."""
    return Finding(check=check, verdict=Verdict.REFUSED, measured=measured, sentence=sentence)
