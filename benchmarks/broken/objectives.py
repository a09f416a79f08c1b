"""Parts of the broken methods. Every `promise` is the one that the method's name suggests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from torch import Tensor

from opd.loss.chunked import StudentLogits
from opd.method import promises as exact
from opd.objectives.vocabulary import divergence
from opd.ports import Context
from opd.rollouts.student import StudentRollout
from opd.scorers.teacher import SampledTokens
from opd.types import Batch, Scores, TokenLoss, TokenScores, TopKScores, Trajectory, VocabularyScores


@dataclass(frozen=True, slots=True, kw_only=True)
class SoldAsReverseKL:
    """An estimator on the sampled token whose name promises the reverse KL."""

    consumes: ClassVar[type[Scores]] = TokenScores
    on_policy: ClassVar[bool] = True
    promise: ClassVar[exact.Promise] = exact.ReverseKL()


def written(student: StudentLogits, batch: Batch[TokenScores], loss: Tensor) -> TokenLoss:
    """Loss, and the estimate that every method on sampled tokens reports."""
    logprobs = student.at(batch.target_ids)
    log_ratio = (logprobs - batch.scores.logprobs).detach()
    return TokenLoss(loss=loss, metrics={"reverse_kl": log_ratio})


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectK1(SoldAsReverseKL):
    """`log p - log q` as a loss: an unbiased value of the reverse KL whose gradient is the score, 0 in expectation."""

    def __call__(self, student: StudentLogits, batch: Batch[TokenScores]) -> TokenLoss:
        return written(student, batch, student.at(batch.target_ids) - batch.scores.logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class JointK1(SoldAsReverseKL):
    """Direct k1 under an importance weight that is not differentiated: the teacher still drops out of the gradient."""

    def __call__(self, student: StudentLogits, batch: Batch[TokenScores]) -> TokenLoss:
        logprobs = student.at(batch.target_ids)
        weight = (logprobs.detach() - batch.behavior_logprobs).exp()
        return written(student, batch, weight * (logprobs - batch.scores.logprobs))


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectK3(SoldAsReverseKL):
    """`q/p - 1 + log p - log q` as a loss: its expected gradient is that of the forward KL."""

    def __call__(self, student: StudentLogits, batch: Batch[TokenScores]) -> TokenLoss:
        back = batch.scores.logprobs - student.at(batch.target_ids)
        return written(student, batch, back.exp() - 1 - back)


def _raw(student: StudentLogits, batch: Batch[TopKScores]) -> Tensor:
    p = student.at_support(batch.scores.topk_ids)
    return divergence(p, p, batch.scores.topk_logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class RawTopK(SoldAsReverseKL):
    """`sum_S p (log p - log q)` with nothing detached and nothing renormalized. Its promise is honest: that sum.

    The sum is no divergence, so training keeps the promise and still pushes a student that equals its teacher.
    """

    consumes: ClassVar[type[Scores]] = TopKScores
    promise: ClassVar[exact.Promise] = exact.Truncated(of=exact.ReverseKL(), support=exact.ScoredSupport())

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> TokenLoss:
        return written(student, batch, _raw(student, batch))


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadTailAsPublished(SoldAsReverseKL):
    """Raw head and sampled tail: unbiased in value, biased in gradient by that of the mass on S."""

    consumes: ClassVar[type[Scores]] = TopKScores

    def __call__(self, student: StudentLogits, batch: Batch[TopKScores]) -> TokenLoss:
        own = student.at(batch.target_ids)
        outside = (batch.scores.topk_ids != batch.target_ids[:, None]).all(-1)
        ratio = (own - batch.behavior_logprobs).exp()
        tail = ratio * (own.detach() - batch.scores.logprobs) * outside
        return written(student, batch, _raw(student, batch) + tail)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchMean(SoldAsReverseKL):
    """The exact reverse KL, averaged over the tokens of each micro-batch."""

    consumes: ClassVar[type[Scores]] = VocabularyScores

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        p, q = student.logprobs, batch.scores.vocabulary_logprobs
        return written(student, batch, divergence(p, p, q) / len(batch))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftedWrittenTokens(SampledTokens):
    """The teacher's log-probabilities, one position late."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = await SampledTokens()(trajectories, context)
        return [replace(s, logprobs=np.roll(s.logprobs, 1)) for s in scores if isinstance(s, TokenScores)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SilentNucleus(StudentRollout):
    """Text cut to the nucleus without declaring it; `Method` would refuse it otherwise."""

    truncated: ClassVar[bool] = False  # pyright: ignore[reportIncompatibleMethodOverride]  # that is the lie
