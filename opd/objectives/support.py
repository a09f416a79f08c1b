"""KL on a support that the learner chooses itself, from the current student's and the teacher's whole distributions.

Union and intersection of both top-k's need both distributions at once; here they are known exactly and are those of
the current student. Cheaper on the wire, and fixed when the scorer asks, are the supports of `opd.objectives.topk`.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from opd import divergences as exact
from opd.diagnostics import vocabulary_metrics
from opd.errors import ConfigurationError
from opd.logits import StudentLogits
from opd.types import Batch, Scores, TokenLoss, VocabularyScores


class Outside(Enum):
    """What becomes of the ids outside the support."""

    RENORMALIZED = "renormalized"  # forgotten: both distributions are conditioned on the support
    BUCKET = "bucket"  # merged into one outcome
    NOTHING = "nothing"  # left as they are, without signal: the stop-gradient form (reverse KL only)


def conditioned(logprobs: Tensor, members: Bool[Tensor, "n V"]) -> Tensor:
    """Log-probabilities given membership, 0 outside; a state without members gets 0 everywhere."""
    someone = members.any(-1, keepdim=True)
    inside = logprobs.masked_fill(~members & someone, -torch.inf)
    return torch.where(members, logprobs - inside.logsumexp(-1, keepdim=True), torch.zeros_like(logprobs))


def outside_mass(logprobs: Tensor, members: Bool[Tensor, "n V"]) -> Tensor:
    """Log-mass of all ids that are no members, `[n]`; 0 where every id is one (it then stands for nothing)."""
    full = members.all(-1, keepdim=True)
    mass = logprobs.masked_fill(members & ~full, -torch.inf).logsumexp(-1)
    return torch.where(full[:, 0], torch.zeros_like(mass), mass)


def kl(weight: Tensor, other: Tensor, members: Bool[Tensor, "n V"], outside: Outside) -> Tensor:
    """KL(weight||other) on the support, `[n]`; arguments are full log-probabilities."""
    if outside is Outside.RENORMALIZED:
        a, b = conditioned(weight, members), conditioned(other, members)
        return torch.where(members, a.exp() * (a - b), torch.zeros_like(a)).sum(-1)
    ratio = weight.detach() - other if outside is Outside.NOTHING else weight - other
    head = torch.where(members, weight.exp() * ratio, torch.zeros_like(weight)).sum(-1)
    if outside is Outside.NOTHING:
        return head
    a, b = outside_mass(weight, members), outside_mass(other, members)
    return head + a.exp() * (a - b)


def promised(direction: exact.Promise, support: exact.Support, outside: Outside) -> exact.Promise:
    """The exact counterpart of `kl`."""
    match outside:
        case Outside.RENORMALIZED:
            return exact.Renormalized(of=direction, support=support)
        case Outside.BUCKET:
            return exact.Coarsened(of=direction, support=support)
        case Outside.NOTHING:
            return exact.Truncated(of=exact.GeneralizedReverseKL(), support=support)


def chosen(support: exact.Support, student: StudentLogits, batch: Batch[VocabularyScores]) -> Bool[Tensor, "n V"]:
    """The support at every row, detached."""
    p, q = student.logprobs.detach(), batch.scores.vocabulary_logprobs  # computed once, with its graph, then detached
    with torch.no_grad():
        everything = torch.ones_like(p, dtype=torch.bool)
        return support(exact.States(student=p, teacher=q, behavior=p, support=everything, credit=p))


def _metrics(student: StudentLogits, batch: Batch[VocabularyScores], members: Bool[Tensor, "n V"]) -> dict[str, Tensor]:
    with torch.no_grad():
        p, q = student.logprobs, batch.scores.vocabulary_logprobs
        return {
            "support_size": members.sum(-1).to(p.dtype),
            "student_mass": (p.exp() * members).sum(-1),
            "teacher_mass": (q.exp() * members).sum(-1),
            **vocabulary_metrics(student, batch),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportReverseKL:
    """KL(student||teacher) on a support of the learner's choice.

    Direction: reverse. Support: `support`, by default the union of both top-16. `outside` says what becomes of the
    rest. Gradient: through the student's log-probabilities (with NOTHING through its probabilities alone, the
    log-ratio is detached); which ids are members is not differentiated.
    """

    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = False

    support: exact.Support = field(default_factory=exact.Union)
    outside: Outside = Outside.RENORMALIZED

    @property
    def promise(self) -> exact.Promise:
        return promised(exact.ReverseKL(), self.support, self.outside)

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        members = chosen(self.support, student, batch)
        loss = kl(student.logprobs, batch.scores.vocabulary_logprobs, members, self.outside)
        return TokenLoss(loss=loss, metrics={"support_kl": loss.detach(), **_metrics(student, batch, members)})


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportForwardKL:
    """KL(teacher||student) on a support of the learner's choice; `outside` must be RENORMALIZED or BUCKET.

    Direction: forward. Support: `support`, by default the union of both top-16. The plain sum over a support is no
    divergence (it can be negative, and falls without bound in the mass of S), so NOTHING is refused.
    """

    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = False

    support: exact.Support = field(default_factory=exact.Union)
    outside: Outside = Outside.BUCKET

    def __post_init__(self) -> None:
        if self.outside is Outside.NOTHING:
            raise ConfigurationError(
                "objective SupportForwardKL needs outside=RENORMALIZED or BUCKET, got NOTHING: the forward KL summed "
                "over a part of the vocabulary is no divergence; choose BUCKET"
            )

    @property
    def promise(self) -> exact.Promise:
        return promised(exact.ForwardKL(), self.support, self.outside)

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        members = chosen(self.support, student, batch)
        loss = kl(batch.scores.vocabulary_logprobs, student.logprobs, members, self.outside)
        return TokenLoss(loss=loss, metrics={"support_kl": loss.detach(), **_metrics(student, batch, members)})


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyAwareKL:
    """Reverse KL everywhere, plus forward KL where the teacher is uncertain (EOPD, arXiv 2603.07079).

    `l` on the written token as a policy gradient with importance ratio, plus `1[H(q) > threshold] KL(q||p)` on the
    teacher's top-k. Direction: both. Support: the written token; the teacher's top `k`. Published: threshold 0.8 nats,
    k = 16. INFERRED (not found in a primary source): how the forward part treats the rest of the vocabulary
    (`outside`) and its weight (`forward_weight`). The published PPO clip never acts with one update per batch.
    """

    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = True

    threshold: float = 0.8
    k: int = 16
    outside: Outside = Outside.RENORMALIZED
    forward_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.k < 1 or self.outside is Outside.NOTHING:
            raise ConfigurationError(
                f"objective EntropyAwareKL needs k >= 1 and outside=RENORMALIZED or BUCKET, got {self}; "
                "published is k=16"
            )

    @property
    def promise(self) -> exact.Promise:
        forward = promised(exact.ForwardKL(), exact.TeacherTop(k=self.k), self.outside)
        gated = exact.WhereUncertain(of=forward, threshold=self.threshold)
        return exact.Sum((exact.ReverseKL(), exact.Weighted(weight=self.forward_weight, of=gated)))

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        q, written = batch.scores.vocabulary_logprobs, student.at(batch.target_ids)
        members = chosen(exact.TeacherTop(k=self.k), student, batch)
        entropy = -(q.exp() * q).sum(-1)
        forward = kl(q, student.logprobs, members, self.outside)
        gated = torch.where(entropy > self.threshold, forward, torch.zeros_like(forward))
        reverse = (written - batch.behavior_logprobs).exp() * (written.detach() - batch.scores.logprobs)
        metrics = {
            "uncertain_share": (entropy > self.threshold).to(q.dtype),
            **_metrics(student, batch, members),
        }
        return TokenLoss(loss=reverse + self.forward_weight * gated, metrics=metrics)
