"""Divergences on a support of the learner's choice, from the current student's and the teacher's whole distributions.

Union and intersection of both top-k's need both distributions at once; here they are known exactly and are those of
the current student. Cheaper on the wire, and fixed when the scorer asks, are the supports of `opd.objectives.topk`.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from opd.errors import ConfigurationError
from opd.loss.chunked import StudentLogits
from opd.method import promises as exact
from opd.objectives.vocabulary import Direction, FullForwardKL, limits_of
from opd.settings.ranges import In, TopIds
from opd.settings.validation import settings
from opd.types import Batch, Scores, TokenLoss, VocabularyScores
from opd.types.log_mass import ABSENT


class Outside(Enum):
    """Treatment of the ids outside the support."""

    RENORMALIZED = "renormalized"  # forgotten: both distributions are conditioned on the support
    BUCKET = "bucket"  # merged into one outcome
    NOTHING = "nothing"  # left as they are, without signal: the stop-gradient form (reverse KL only)
    PER_MASS = "per mass"  # as NOTHING, divided by the student's detached mass on the support (reverse KL only)


def conditioned(logprobs: Tensor, members: Bool[Tensor, "n V"]) -> Tensor:
    """Log-probabilities given membership, ABSENT outside; a state without members has ABSENT alone."""
    someone = members.any(-1, keepdim=True)
    inside = logprobs.masked_fill(~members & someone, -torch.inf)
    return torch.where(members, logprobs - inside.logsumexp(-1, keepdim=True), ABSENT)


def outside_mass(logprobs: Tensor, members: Bool[Tensor, "n V"]) -> Tensor:
    """Log-mass of all ids that are no members, `[n]`; ABSENT where every id is one."""
    full = members.all(-1, keepdim=True)
    mass = logprobs.masked_fill(members & ~full, -torch.inf).logsumexp(-1)
    return torch.where(full[:, 0], ABSENT, mass)


def on_support(of: Direction, p: Tensor, q: Tensor, members: Bool[Tensor, "n V"], outside: Outside) -> Tensor:
    """`of` on the support, `[n]`; `p` and `q` are full log-probabilities of student and teacher."""
    match outside:
        case Outside.RENORMALIZED:
            return of.between(conditioned(p, members), conditioned(q, members))
        case Outside.BUCKET:
            head = of.between(torch.where(members, p, ABSENT), torch.where(members, q, ABSENT))
            return head + of.between(outside_mass(p, members)[:, None], outside_mass(q, members)[:, None])
        case Outside.NOTHING:
            return torch.where(members, p.exp() * of.slope(p.detach(), q), torch.zeros_like(p)).sum(-1)
        case Outside.PER_MASS:
            mass = (p.detach().exp() * members).sum(-1).clamp(min=torch.finfo(p.dtype).tiny)  # no member: 0 of it
            return on_support(of, p, q, members, Outside.NOTHING) / mass


def promised(direction: exact.Promise, support: exact.Support, outside: Outside) -> exact.Promise:
    """Exact counterpart of `on_support`."""
    match outside:
        case Outside.RENORMALIZED:
            return exact.Renormalized(of=direction, support=support)
        case Outside.BUCKET:
            return exact.Coarsened(of=direction, support=support)
        case Outside.NOTHING:
            return exact.Truncated(of=exact.GeneralizedReverseKL(), support=support)
        case Outside.PER_MASS:
            return exact.PerMass(of=promised(direction, support, Outside.NOTHING), support=support)


def refuse_nothing(part: Any, of: Direction) -> None:
    """Refusal of a direction that is summed over a part of the vocabulary and is no divergence there."""
    if part.outside in (Outside.NOTHING, Outside.PER_MASS) and not isinstance(of.promise, exact.ReverseKL):
        raise ConfigurationError(
            f"objective {type(part).__name__} needs outside=RENORMALIZED or BUCKET, got {part.outside.name}: summed "
            f"over a part of the vocabulary, {type(of).__name__} is no divergence (only the reverse KL has a "
            "stop-gradient form); choose BUCKET"
        )


def chosen(support: exact.Support, student: StudentLogits, batch: Batch[VocabularyScores]) -> Bool[Tensor, "n V"]:
    """The support at every row, detached."""
    p, q = student.logprobs.detach(), batch.scores.vocabulary_logprobs  # computed once, with its graph, then detached
    with torch.no_grad():
        everything = torch.ones_like(p, dtype=torch.bool)
        return support(exact.States(student=p, teacher=q, behavior=p, support=everything, credit=p, target=p))


def _metrics(student: StudentLogits, batch: Batch[VocabularyScores], members: Bool[Tensor, "n V"]) -> dict[str, Tensor]:
    """Size and masses of the support, which is known here alone."""
    with torch.no_grad():
        p, q = student.logprobs, batch.scores.vocabulary_logprobs
        return {
            "support_size": members.sum(-1).to(p.dtype),
            "student_mass": (p.exp() * members).sum(-1),
            "teacher_mass": (q.exp() * members).sum(-1),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class SupportDivergence:
    """Any direction on a support of the learner's choice.

    Direction: `of`. Support: `support`, by default the union of both top-16. `outside` is the treatment of the rest.
    Fully differentiated; which ids are members is not. With NOTHING, which the reverse KL alone allows, the log-ratio
    is detached and the gradient flows through the student's probabilities (Many Faces, arXiv 2605.11182 eq. 12): that
    of the generalized reverse KL on the support. PER_MASS divides that by the student's mass on the support: the
    released code of Rethinking OPD (arXiv 2604.13016, `opd.objectives.topk.WeightedReverseKL`) on a support of the
    learner's choice, for texts that another distribution than the student's was sampled for (TRB, arXiv 2605.31159).
    """

    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = False

    # direction of the divergence
    of: Direction
    # ids over which is summed at each position
    support: exact.Support = field(default_factory=exact.Union)
    # what the rest of the vocabulary is: one BUCKET, nothing (RENORMALIZED), ...
    outside: Outside = Outside.BUCKET

    def __post_init__(self) -> None:
        refuse_nothing(self, self.of)

    @property
    def promise(self) -> exact.Promise:
        return promised(self.of.promise, self.support, self.outside)

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        return limits_of(self, lambda direction: promised(direction, self.support, self.outside))

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        members = chosen(self.support, student, batch)
        loss = on_support(self.of, student.logprobs, batch.scores.vocabulary_logprobs, members, self.outside)
        # `reverse_kl` is here the exact one of the whole vocabulary.
        called = "support_kl" if isinstance(self.of.promise, exact.ReverseKL) else "support_divergence"
        return TokenLoss(loss=loss, metrics={called: loss.detach(), **_metrics(student, batch, members)})


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class EntropyAwareKL:
    """Reverse KL everywhere, plus forward KL where the teacher is uncertain (EOPD, arXiv 2603.07079).

    `l` on the sampled token as a policy gradient with importance ratio, plus `1[H(q) > threshold] KL(q||p)` on the
    teacher's top-k. Direction: both. Support: the sampled token; the teacher's top `k`. Published: threshold 0.8 nats,
    k = 16. INFERRED (not found in a primary source): how the forward part treats the rest of the vocabulary
    (`outside`) and its weight (`forward_weight`). The published PPO clip never acts with one update per batch.
    """

    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = True

    # nats of the teacher's entropy above which the forward part counts
    threshold: Annotated[float, In(0, 20, because="nats; the entropy of a million ids is 14")] = 0.8
    # teacher's likeliest tokens in the forward part
    k: TopIds = 16
    # what the rest of the vocabulary is in the forward part
    outside: Outside = Outside.RENORMALIZED
    # weight of the forward part
    forward_weight: Annotated[float, In(0, 1000, because="below 0 it trains away from the teacher")] = 1.0

    def __post_init__(self) -> None:
        refuse_nothing(self, FullForwardKL())

    @property
    def promise(self) -> exact.Promise:
        forward = promised(exact.ForwardKL(), exact.TeacherTop(k=self.k), self.outside)
        gated = exact.WhereUncertain(of=forward, threshold=self.threshold)
        return exact.Sum((exact.ReverseKL(), exact.Weighted(weight=self.forward_weight, of=gated)))

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        q, sampled = batch.scores.vocabulary_logprobs, student.at(batch.target_ids)
        members = chosen(exact.TeacherTop(k=self.k), student, batch)
        entropy = -(q.exp() * q).sum(-1)
        forward = on_support(FullForwardKL(), student.logprobs, q, members, self.outside)
        gated = torch.where(entropy > self.threshold, forward, torch.zeros_like(forward))
        reverse = (sampled - batch.behavior_logprobs).exp() * (sampled.detach() - batch.scores.logprobs)
        metrics = {
            "uncertain_share": (entropy > self.threshold).to(q.dtype),
            **_metrics(student, batch, members),
        }
        return TokenLoss(loss=reverse + self.forward_weight * gated, metrics=metrics)
