"""What a doctor works with: the subject, the evidence, findings, and how readings of a text are compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import cast

import numpy as np

from opd.ports import Engines, Learner, LogprobTeacher, ScoreKind, ScoreKinds, ScoreRequest
from opd.ports.score_kinds import A
from opd.scorers.validation import verify
from opd.types import TokenScores, Trajectory


class Verdict(Enum):
    """What a finding means for the run."""

    FINE = "fine"
    WARNING = "warning"  # training is right, but may not be what is wanted
    REFUSED = "refused"  # training would be wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """`measured` is for people; `sentence` is empty when all is well."""

    check: str
    verdict: Verdict
    measured: str
    sentence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckThresholds:
    """Where a finding stops being fine. Chosen by us; no paper gives them, except where named.

    `tolerance`: nats by which two readings of the same token may differ, `mean_tolerance` by which they may on average
    (float32; what bfloat16 needs is in `launch.run.doctor`): two programs are compared, so there is no smaller floor to
    measure. `overlap`: share of the student's top-k that the teacher's holds below which a cold start is advised
    (successful runs of arXiv 2604.13016 start at about 0.72; two strangers share k / V by chance). `surprise`: nats by
    which the teacher must find special places (first token, end of text) less likely than the rest of the same texts
    before it is said not to expect them. `flat`: a token that is exchanged for another changes a trained teacher's
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
    engines: Engines
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
        """The teacher as the run asks it."""
        return self.engines.teachers[self.name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Short completions of the student (with its top-k), and what the teacher says of their tokens."""

    written: Sequence[Trajectory]
    said: Sequence[TokenScores]


async def ask(teacher: LogprobTeacher, written: Sequence[Trajectory], kind: ScoreKind[A]) -> list[A]:
    """Scores of one kind about the written texts, verified."""
    requests = [ScoreRequest(context_ids=t.prompt.teacher_ids, token_ids=t.token_ids, kinds=(kind,)) for t in written]
    answers = await teacher.score(requests)
    verify(requests, answers)
    return [cast(A, scores) for (scores,) in answers]


def distance(a: TokenScores, b: TokenScores, start: int = 0, stop: int | None = None) -> float:
    """The largest difference of two readings of the same tokens, in nats."""
    difference = np.abs(np.asarray(a.logprobs)[start:stop] - np.asarray(b.logprobs)[start:stop])
    return float(difference.max()) if len(difference) else 0.0


def fine(check: str, measured: str) -> Finding:
    """All is well."""
    return Finding(check=check, verdict=Verdict.FINE, measured=measured)


def warned(check: str, measured: str, sentence: str) -> Finding:
    """Training is right, but may not be what is wanted."""
    return Finding(check=check, verdict=Verdict.WARNING, measured=measured, sentence=sentence)


def refused(check: str, measured: str, sentence: str) -> Finding:
    """Training would be wrong."""
    return Finding(check=check, verdict=Verdict.REFUSED, measured=measured, sentence=sentence)
