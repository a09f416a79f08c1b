"""Divergences on a support of `K` tokens per state: several estimators, several different promises.

`HeadTailDivergence` and `TopKDivergence` take any direction; the others are those of papers. The raw sum
`sum_S p (log p - log q)` is none of them: differentiated fully it moves a student that already equals its teacher (by
the gradient of the mass on S), so it does not exist here.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from opd.loss.chunked import StudentLogits
from opd.loss.metrics import topk_metrics
from opd.method import promises as exact
from opd.objectives.support import Outside, promised, refuse_nothing
from opd.objectives.vocabulary import (
    Direction,
    Estimate,
    FullForwardKL,
    FullReverseKL,
    divergence,
    limits_of,
)
from opd.settings.validation import settings
from opd.types import Batch, Scores, TokenLoss, TopKScores


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTailDivergence(Estimate):
    """Any direction: exact on the support, sampled outside it; unbiased for the divergence of the whole vocabulary.

    Direction: `of`. Support S: the scorer's top-k (teacher's or student's; any S fixed by the state).
    Estimator: `sum_S p sg(slope) + 1[y not in S] sg(slope_y) p_y / mu_y`, `sg` stop-gradient; the slope of the reverse
    KL is `log p - log q`.
    """

    consumes: ClassVar[type[Scores]] = TopKScores
    on_policy: ClassVar[bool] = True

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> TokenLoss:
        p, q = student.at_support(batch.scores.topk_ids), batch.scores.topk_logprobs
        written = student.at(batch.target_ids)
        head = (p.exp() * self.of.slope(p.detach(), q)).sum(-1)
        outside = (batch.scores.topk_ids != batch.target_ids[:, None]).all(-1)
        ratio = (written - batch.behavior_logprobs).exp()
        sampled = ratio * self.of.slope(written.detach(), batch.scores.logprobs)
        loss = head + torch.where(outside, sampled, torch.zeros_like(sampled))
        return TokenLoss(loss=loss, metrics=topk_metrics(student, batch))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTailReverseKL:
    """KL(student||teacher): exact on the support, sampled outside it; unbiased for the full reverse KL.

    Direction: reverse. Support and estimator: those of `HeadTailDivergence`, with the slope `l = log p - log q`; the
    value is an estimate of the KL, too. The expected gradient is that of the full-vocabulary reverse KL (EMA-PG, arXiv
    2602.04417, with the head's log-ratio detached: without that it is biased by the gradient of the mass on S).
    """

    consumes: ClassVar[type[Scores]] = TopKScores
    on_policy: ClassVar[bool] = True
    promise: ClassVar[exact.Promise] = exact.ReverseKL()

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> TokenLoss:
        result = HeadTailDivergence(of=FullReverseKL())(student, batch)
        return replace(result, metrics={"reverse_kl": result.loss.detach(), **result.metrics})


@dataclass(frozen=True, slots=True, kw_only=True)
class _OnScoredSupport:
    """What the divergences on the scorer's support share: they read no written token."""

    consumes: ClassVar[type[Scores]] = TopKScores
    on_policy: ClassVar[bool] = False


def _between(
    of: Direction, outside: Outside, called: str, student: StudentLogits, batch: Batch[TopKScores]
) -> TokenLoss:
    """`of` between both distributions on the scorer's support, and reported under the name `called`."""
    p, q = student.at_support(batch.scores.topk_ids), batch.scores.topk_logprobs
    if outside is Outside.RENORMALIZED:
        loss = of.between(p.log_softmax(-1), q.log_softmax(-1))
    else:
        loss = of.between(p, q)
        if p.shape[-1] < student.logits.shape[-1]:  # else nothing is left for a bucket
            outside_student = student.outside(batch.scores.topk_ids)
            loss = loss + of.between(outside_student[:, None], batch.scores.rest[:, None])
    return TokenLoss(loss=loss, metrics={called: loss.detach(), **topk_metrics(student, batch)})


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class TopKDivergence(_OnScoredSupport):
    """Any direction on the scorer's top-k; `outside` must be RENORMALIZED or BUCKET.

    Direction: `of`. Support: top-k, with one bucket for everything else (a lower bound of the whole divergence) or
    renormalized (blind to the mass on it). Fully differentiated. The two KLs have classes of their own, below.
    """

    # direction of the divergence
    of: Direction
    # what the rest of the vocabulary is: one BUCKET, nothing (RENORMALIZED), ...
    outside: Outside = Outside.BUCKET

    def __post_init__(self) -> None:
        refuse_nothing(self)

    @property
    def promise(self) -> exact.Promise:
        return promised(self.of.promise, exact.ScoredSupport(), self.outside)

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        return limits_of(self, lambda direction: promised(direction, exact.ScoredSupport(), self.outside))

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> TokenLoss:
        return _between(self.of, self.outside, "support_divergence", student, batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class TailBucketReverseKL(_OnScoredSupport):
    """KL(student||teacher) of the distributions coarsened to S plus one bucket for everything else.

    Direction: reverse. Support: top-k and a tail bucket. A lower bound of the full KL, exact for the coarsened
    distribution; what happens inside the tail gets no signal. Fully differentiated.
    """

    promise: ClassVar[exact.Promise] = exact.Coarsened(of=exact.ReverseKL(), support=exact.ScoredSupport())

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> TokenLoss:
        return _between(FullReverseKL(), Outside.BUCKET, "reverse_kl", student, batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class RenormalizedReverseKL(_OnScoredSupport):
    """KL(student||teacher) of both distributions renormalized on S (local support matching).

    Direction: reverse. Support: top-k, renormalized; the mass on S and everything outside it get no signal, so a
    student can satisfy it and still be far from its teacher. `k = 1` is always 0. Fully differentiated.
    """

    promise: ClassVar[exact.Promise] = exact.Renormalized(of=exact.ReverseKL(), support=exact.ScoredSupport())

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> TokenLoss:
        return _between(FullReverseKL(), Outside.RENORMALIZED, "reverse_kl", student, batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class StopGradientReverseKL(_OnScoredSupport):
    """KL(student||teacher) on S as `sum_S p sg(log p - log q)` (Many Faces, arXiv 2605.11182 eq. 12).

    Direction: reverse. Support: top-k, not renormalized; probabilities of the full softmax. The log-ratio is detached,
    the weight is not: gradient `sum_S p l grad log p`, which is that of `GeneralizedReverseKL`; outside S no signal.
    """

    promise: ClassVar[exact.Promise] = exact.Truncated(of=exact.GeneralizedReverseKL(), support=exact.ScoredSupport())

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> TokenLoss:
        p, q = student.at_support(batch.scores.topk_ids), batch.scores.topk_logprobs
        loss = divergence(p, p.detach(), q)
        return TokenLoss(loss=loss, metrics={"reverse_kl": loss.detach(), **topk_metrics(student, batch)})


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneralizedReverseKL(_OnScoredSupport):
    """`sum_S p log(p/q) - p + q`: the reverse KL of masses that need not sum to 1 (MOPD, arXiv 2606.30406 eq. 5).

    Direction: reverse. Support: top-k, not renormalized. Every term is >= 0 and 0 only where p = q. Fully
    differentiated; the gradient is that of `StopGradientReverseKL`.
    """

    promise: ClassVar[exact.Promise] = exact.Truncated(of=exact.GeneralizedReverseKL(), support=exact.ScoredSupport())

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> TokenLoss:
        p, q = student.at_support(batch.scores.topk_ids), batch.scores.topk_logprobs
        loss = divergence(p, p, q) + (q.exp() - p.exp()).sum(-1)
        return TokenLoss(loss=loss, metrics={"reverse_kl": loss.detach(), **topk_metrics(student, batch)})


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedReverseKL(_OnScoredSupport):
    """`sum_S sg(p / P_S) r sg(l)`, r = p / sg(p): the code released with Rethinking OPD (arXiv 2604.13016).

    Direction: reverse. Support: top-k; weights renormalized on S and detached, log-ratio of the full softmax. It is a
    policy gradient over the ids of S with ratio 1 (one update per batch, so nothing is clipped). It is *not* the
    paper's eq. 5 (that is `RenormalizedReverseKL` on the student's top-k) but differs by `mean l * grad log P_S`. What
    it descends is the generalized KL on S, every state weighted with 1 / P_S.
    """

    @property
    def promise(self) -> exact.Promise:
        said = exact.ScoredSupport()
        return exact.PerMass(of=exact.Truncated(of=exact.GeneralizedReverseKL(), support=said), support=said)

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> TokenLoss:
        p, q = student.at_support(batch.scores.topk_ids), batch.scores.topk_logprobs
        old = p.detach()
        loss = ((p - old).exp() * old.log_softmax(-1).exp() * (old - q)).sum(-1)
        return TokenLoss(loss=loss, metrics={"reverse_kl": loss.detach(), **topk_metrics(student, batch)})


@dataclass(frozen=True, slots=True, kw_only=True)
class TailBucketForwardKL(_OnScoredSupport):
    """KL(teacher||student) of the distributions coarsened to S plus one bucket for everything else.

    Direction: forward. Support: top-k and a tail bucket; on the teacher's top-k nearly all its mass. Fully
    differentiated; a lower bound of the full forward KL.
    """

    promise: ClassVar[exact.Promise] = exact.Coarsened(of=exact.ForwardKL(), support=exact.ScoredSupport())

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> TokenLoss:
        return _between(FullForwardKL(), Outside.BUCKET, "forward_kl", student, batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class RenormalizedForwardKL(_OnScoredSupport):
    """KL(teacher||student) of both distributions renormalized on S; the mass on S gets no signal.

    Direction: forward. Support: top-k, renormalized. Fully differentiated.
    """

    promise: ClassVar[exact.Promise] = exact.Renormalized(of=exact.ForwardKL(), support=exact.ScoredSupport())

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> TokenLoss:
        return _between(FullForwardKL(), Outside.RENORMALIZED, "forward_kl", student, batch)
