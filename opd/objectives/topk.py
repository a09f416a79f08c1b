"""Divergences on a support of `K` tokens per state: several estimators, several different promises.

`HeadTailDivergence` and `TopKDivergence` take any direction; the others are two forms of papers. The raw sum
`sum_S p (log p - log q)` is none of them: differentiated fully it moves a student that already equals its teacher (by
the gradient of the mass on S), so it does not exist here.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opd.loss.chunked import StudentLogits
from opd.method import promises as exact
from opd.objectives.support import Outside, promised, refuse_nothing
from opd.objectives.vocabulary import Direction, Estimate, divergence, limits_of
from opd.settings.validation import settings
from opd.types import Batch, Scores, TokenLoss, TopKScores


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTailDivergence(Estimate):
    """Any direction: exact on the support, sampled outside it; unbiased for the divergence of the whole vocabulary.

    Direction: `of`. Support S: the scorer's top-k (teacher's or student's; any S fixed by the state).
    Estimator: `sum_S p sg(slope) + 1[y not in S] sg(slope_y) p_y / mu_y`, `sg` stop-gradient; the slope of the reverse
    KL is `log p - log q`, and of it the value is an estimate, too (EMA-PG, arXiv 2602.04417, with the head's log-ratio
    detached: without that the gradient is biased by that of the mass on S).
    """

    consumes: ClassVar[type[Scores]] = TopKScores
    on_policy: ClassVar[bool] = True

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> TokenLoss:
        p, q = student.at_support(batch.scores.topk_ids), batch.scores.topk_logprobs
        sampled = student.at(batch.target_ids)
        head = (p.exp() * self.of.slope(p.detach(), q)).sum(-1)
        outside = (batch.scores.topk_ids != batch.target_ids[:, None]).all(-1)
        ratio = (sampled - batch.behavior_logprobs).exp()
        tail = ratio * self.of.slope(sampled.detach(), batch.scores.logprobs)
        loss = head + torch.where(outside, tail, torch.zeros_like(tail))
        value = {"reverse_kl": loss.detach()} if isinstance(self.of.promise, exact.ReverseKL) else {}
        return TokenLoss(loss=loss, metrics=value)


@dataclass(frozen=True, slots=True, kw_only=True)
class _OnScoredSupport:
    """Divergences on the scorer's support, which read no sampled token."""

    consumes: ClassVar[type[Scores]] = TopKScores
    on_policy: ClassVar[bool] = False


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class TopKDivergence(_OnScoredSupport):
    """Any direction on the scorer's top-k S, with one of four treatments of the ids outside it.

    Direction: `of`. Support: S. BUCKET: both distributions coarsened to S and one bucket for everything else, a lower
    bound of the whole divergence; what happens inside the bucket gets no signal. RENORMALIZED: both conditioned on S;
    the mass on S gets no signal either, so a student can satisfy it and still be far from its teacher, and with one id
    it is always 0. Both fully differentiated. NOTHING, which the reverse KL alone allows, is `sum_S p sg(log p -
    log q)` with probabilities of the full softmax (Many Faces, arXiv 2605.11182 eq. 12): gradient `sum_S p l grad
    log p`, that of `GeneralizedReverseKL`; outside S no signal. PER_MASS divides that by the student's mass on S, which
    is `WeightedReverseKL`.
    """

    # direction of the divergence
    of: Direction
    # what the rest of the vocabulary is: one BUCKET, nothing (RENORMALIZED), ...
    outside: Outside = Outside.BUCKET

    def __post_init__(self) -> None:
        refuse_nothing(self, self.of)

    @property
    def promise(self) -> exact.Promise:
        return promised(self.of.promise, exact.ScoredSupport(), self.outside)

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        return limits_of(self, lambda direction: promised(direction, exact.ScoredSupport(), self.outside))

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> TokenLoss:
        loss = self._loss(student, batch)
        return TokenLoss(loss=loss, metrics={_value_name(self.of): loss.detach()})

    def _loss(self, student: StudentLogits, batch: Batch[TopKScores]) -> Tensor:
        p, q = student.at_support(batch.scores.topk_ids), batch.scores.topk_logprobs
        match self.outside:
            case Outside.RENORMALIZED:
                return self.of.between(p.log_softmax(-1), q.log_softmax(-1))
            case Outside.NOTHING:
                return (p.exp() * self.of.slope(p.detach(), q)).sum(-1)
            case Outside.PER_MASS:
                weights = (p - p.detach().logsumexp(-1, keepdim=True)).exp()
                return (weights * self.of.slope(p.detach(), q)).sum(-1)
            case Outside.BUCKET:
                head = self.of.between(p, q)
                if p.shape[-1] == student.logits.shape[-1]:  # nothing is left for a bucket
                    return head
                rest = student.outside(batch.scores.topk_ids)
                return head + self.of.between(rest[:, None], batch.scores.rest[:, None])


def _value_name(of: Direction) -> str:
    """Metric that has the value of a direction on the support."""
    match of.promise:
        case exact.ReverseKL():
            return "reverse_kl"
        case exact.ForwardKL():
            return "forward_kl"
        case _:
            return "support_divergence"


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneralizedReverseKL(_OnScoredSupport):
    """`sum_S p log(p/q) - p + q`: the reverse KL of masses that need not sum to 1 (MOPD, arXiv 2606.30406 eq. 5).

    Direction: reverse. Support: top-k, not renormalized. Every term is >= 0 and 0 only where p = q. Fully
    differentiated; the gradient is that of `TopKDivergence(of=FullReverseKL(), outside=NOTHING)`.
    """

    promise: ClassVar[exact.Promise] = exact.Truncated(of=exact.GeneralizedReverseKL(), support=exact.ScoredSupport())

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> TokenLoss:
        p, q = student.at_support(batch.scores.topk_ids), batch.scores.topk_logprobs
        loss = divergence(p, p, q) + (q.exp() - p.exp()).sum(-1)
        return TokenLoss(loss=loss, metrics={"reverse_kl": loss.detach()})


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedReverseKL(_OnScoredSupport):
    """`sum_S sg(p / P_S) r sg(l)`, r = p / sg(p): the code released with Rethinking OPD (arXiv 2604.13016).

    Direction: reverse. Support: top-k; weights renormalized on S and detached, log-ratio of the full softmax. It is a
    policy gradient over the ids of S with ratio 1 (one update per batch, so nothing is clipped). It is *not* the
    paper's eq. 5 (the renormalized reverse KL on the student's top-k) but differs by `mean l * grad log P_S`. What it
    descends is the generalized KL on S, every state weighted with 1 / P_S.
    """

    @property
    def promise(self) -> exact.Promise:
        scored = exact.ScoredSupport()
        return exact.PerMass(of=exact.Truncated(of=exact.GeneralizedReverseKL(), support=scored), support=scored)

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> TokenLoss:
        p, q = student.at_support(batch.scores.topk_ids), batch.scores.topk_logprobs
        old = p.detach()
        loss = ((p - old).exp() * old.log_softmax(-1).exp() * (old - q)).sum(-1)
        return TokenLoss(loss=loss, metrics={"reverse_kl": loss.detach()})
