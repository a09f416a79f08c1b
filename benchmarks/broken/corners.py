"""Objectives that are right in a small, fresh world of float64, and wrong in conditions of training.

Every one is the policy gradient of the reverse KL with one thing broken: the promise, the mean of a step, and most of
its gradient look right.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor

from broken.objectives import SoldAsReverseKL, written
from opd.loss.chunked import StudentLogits
from opd.method import promises as exact
from opd.objectives.sampled import ClippedPolicyGradient
from opd.objectives.topk import GeneralizedReverseKL
from opd.objectives.vocabulary import divergence
from opd.types import AdvantageScores, Batch, Scores, TokenLoss, TokenScores, TopKScores, VocabularyScores


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenCost(SoldAsReverseKL):
    """The right estimator, base class of the broken ones."""

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        """Cost of each sampled token, detached."""
        return (student.at(batch.target_ids) - batch.scores.logprobs).detach()

    def ratio(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        """Importance ratios, through which the gradient flows."""
        return (student.at(batch.target_ids) - batch.behavior_logprobs).exp()

    def __call__(self, student: StudentLogits, batch: Batch[TokenScores]) -> TokenLoss:
        return written(student, batch, self.ratio(student, batch) * self.cost(student, batch))


@dataclass(frozen=True, slots=True, kw_only=True)
class LateK1(WrittenCost):
    """Direct k1 from the 64th token on, which has no signal."""

    def __call__(self, student: StudentLogits, batch: Batch[TokenScores]) -> TokenLoss:
        late = student.at(batch.target_ids) - batch.scores.logprobs
        right = self.ratio(student, batch) * self.cost(student, batch)
        return written(student, batch, torch.where(batch.depth < 64, right, late))


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTokenLeftOut(WrittenCost):
    """Off by one: the first token of a completion has no cost."""

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        return WrittenCost.cost(self, student, batch) * (batch.depth > 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedLogRatio(WrittenCost):
    """The log-ratio rounded to what a float holds near 2**26: 0 in float32, itself in float64."""

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        return (WrittenCost.cost(self, student, batch) + 2**26) - 2**26


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfLogRatio(WrittenCost):
    """The log-ratio in 16 bits wherever the learner's numbers have 32."""

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        cost = WrittenCost.cost(self, student, batch)
        return cost.bfloat16().float() if cost.dtype == torch.float32 else cost


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTeacherOnly(WrittenCost):
    """Pushes tokens of every teacher but the first away from that teacher."""

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        cost = WrittenCost.cost(self, student, batch)
        return torch.where(batch.route > 0, -cost, cost) if len(batch.route) else cost


@dataclass(frozen=True, slots=True, kw_only=True)
class ClampedLogRatio(WrittenCost):
    """The log-ratio clamped to 4 nats, which hides teachers that are farther away."""

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        return WrittenCost.cost(self, student, batch).clamp(-4, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoCostWithin(WrittenCost):
    """No cost where student and teacher differ by less than 0.001: it never gets nearer."""

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        cost = WrittenCost.cost(self, student, batch)
        return torch.where(cost.abs() < 1e-3, 0.0, cost)


@dataclass(frozen=True, slots=True, kw_only=True)
class NoCostBeyond(WrittenCost):
    """No cost where student and teacher differ by more than 12, as if it were an error of the engine."""

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        cost = WrittenCost.cost(self, student, batch)
        return torch.where(cost.abs() > 12, 0.0, cost)


@dataclass(frozen=True, slots=True, kw_only=True)
class CertainLeftOut(WrittenCost):
    """No cost at states where the student is certain of a token."""

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        certain = student.logprobs.detach().amax(-1).exp() > 0.9999
        return torch.where(certain, 0.0, WrittenCost.cost(self, student, batch))


@dataclass(frozen=True, slots=True, kw_only=True)
class ClampedRatio(WrittenCost):
    """Importance ratios clamped to 20, unannounced: they are larger where the behavior is far away."""

    def ratio(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        return WrittenCost.ratio(self, student, batch).clamp(max=20)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndLeftOut(WrittenCost):
    """No cost on the end-of-text token, so the student never learns to stop."""

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        return WrittenCost.cost(self, student, batch) * (batch.target_ids != 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBaseline(WrittenCost):
    """The cost less the mean cost of its chunk, the token's own included."""

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        cost = WrittenCost.cost(self, student, batch)
        return cost - cost.mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTwice(WrittenCost):
    """Token weights applied twice: here, and in the learner's sum."""

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        return WrittenCost.cost(self, student, batch) * batch.weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Noisy(WrittenCost):
    """Costs with noise from the process's own generator: right on average, and no run can be repeated."""

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        cost = WrittenCost.cost(self, student, batch)
        return cost + 1e-9 * torch.randn_like(cost)


@dataclass(frozen=True, slots=True, kw_only=True)
class LargeVocabulary(WrittenCost):
    """The negated objective, in every vocabulary of a language model's size."""

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        cost = WrittenCost.cost(self, student, batch)
        return -cost if student.logits.shape[-1] > 1000 else cost


@dataclass(frozen=True, slots=True, kw_only=True)
class WhileReported(WrittenCost):
    """No signal while the learner also measures overlaps, as it does by default."""

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        return WrittenCost.cost(self, student, batch) * (student.overlap_k == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FadingAway(WrittenCost):
    """No signal after a number of evaluations, which the class counts."""

    calls: ClassVar[Iterator[int]] = count()

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        return WrittenCost.cost(self, student, batch) * (next(self.calls) % 128 < 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedByShape(WrittenCost):
    """Scores of a batch, cached and used again for the next one of as many tokens."""

    kept: ClassVar[dict[int, Tensor]] = {}

    def cost(self, student: StudentLogits, batch: Batch[TokenScores]) -> Tensor:
        kept = self.kept.setdefault(len(batch), batch.scores.logprobs)
        return (student.at(batch.target_ids) - kept.to(batch.scores.logprobs.dtype)).detach()


@dataclass(frozen=True, slots=True, kw_only=True)
class Away(SoldAsReverseKL):
    """The negated objective, with a promise that admits it."""

    consumes: ClassVar[type[Scores]] = VocabularyScores
    promise: ClassVar[exact.Promise] = exact.Weighted(weight=-1.0, of=exact.ReverseKL())

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        p, q = student.logprobs, batch.scores.vocabulary_logprobs
        return written(student, batch, -divergence(p, p, q))


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing(SoldAsReverseKL):
    """An objective of gradient 0, as its promise admits: gradients of 0 are equal."""

    promise: ClassVar[exact.Promise] = exact.Weighted(weight=0.0, of=exact.ReverseKL())

    def __call__(self, student: StudentLogits, batch: Batch[TokenScores]) -> TokenLoss:
        return written(student, batch, 0 * student.at(batch.target_ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class EightIds(GeneralizedReverseKL):
    """Only the first 8 ids of a support, whatever k is."""

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> TokenLoss:
        p, q = student.at_support(batch.scores.topk_ids[:, :8]), batch.scores.topk_logprobs[:, :8]
        return TokenLoss(loss=divergence(p, p, q) + (q.exp() - p.exp()).sum(-1), metrics={})


def _left(logprobs: Tensor) -> Tensor:
    return torch.log1p(-logprobs.exp().sum(-1).clamp(max=1 - torch.finfo(logprobs.dtype).eps))


@dataclass(frozen=True, slots=True, kw_only=True)
class LostTail:
    """The bucket of all other ids as one minus the sum of the support, which float32 loses where a model is sure."""

    consumes: ClassVar[type[Scores]] = TopKScores
    on_policy: ClassVar[bool] = False
    promise: ClassVar[exact.Promise] = exact.Coarsened(of=exact.ReverseKL(), support=exact.ScoredSupport())

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> TokenLoss:
        p, q = student.at_support(batch.scores.topk_ids), batch.scores.topk_logprobs
        tail = _left(p).exp() * (_left(p) - _left(q))
        return TokenLoss(loss=divergence(p, p, q) + tail, metrics={})


@dataclass(frozen=True, slots=True, kw_only=True)
class SwappedClip(ClippedPolicyGradient):
    """Swapped bounds of the ratio, which does not show while they are equal."""

    def __call__(self, student: StudentLogits, batch: Batch[AdvantageScores]) -> TokenLoss:
        swapped = ClippedPolicyGradient(clip_low=min(self.clip_high, 1.0), clip_high=self.clip_low)
        return swapped(student, batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgainstCredit(ClippedPolicyGradient):
    """Rewarded text made less likely, with a promise that admits it."""

    @property
    def promise(self) -> exact.Promise:
        return exact.Weighted(weight=-1.0, of=exact.ClippedCredit(low=self.clip_low, high=self.clip_high))

    def __call__(self, student: StudentLogits, batch: Batch[AdvantageScores]) -> TokenLoss:
        return TokenLoss(loss=-ClippedPolicyGradient.__call__(self, student, batch).loss, metrics={})
