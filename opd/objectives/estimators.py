"""Estimators on the sampled token: of any direction by its slope, with or without a baseline; of the reverse KL also
squared and ratio-weighted.

Those of the reverse KL have the expected gradient of the exact per-state one; they differ in variance and in what they
must know. `k1`, `k2`, `k3` of log-ratio l = log p - log q are l, l^2 / 2 and q/p - 1 + l (arXiv 2506.09477). Direct k1
(no gradient in expectation) and direct k3 (the forward KL's) do not exist here.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from torch import Tensor

from opd.loss.chunked import StudentLogits
from opd.method import promises as exact
from opd.objectives.vocabulary import LARGEST, Estimate
from opd.settings.validation import settings
from opd.types import Batch, Scores, TokenLoss, TokenScores, TopKScores, VocabularyScores


@dataclass(frozen=True, slots=True, kw_only=True)
class _OnSampledTokens:
    """Common declarations of estimators over the student's own tokens."""

    on_policy: ClassVar[bool] = True
    promise: ClassVar[exact.Promise] = exact.ReverseKL()


def _result(student: StudentLogits, batch: Batch[TokenScores], loss: Tensor) -> TokenLoss:
    log_ratio = (student.at(batch.target_ids) - batch.scores.logprobs).detach()
    # Its own estimate: with a top-k at hand, other objectives have another one under this name, or none.
    return TokenLoss(loss=loss, metrics={"reverse_kl": log_ratio})


@dataclass(frozen=True, slots=True, kw_only=True)
class SquaredReverseKL(_OnSampledTokens):
    """KL(student||teacher) on the sampled token as `sg(p / mu) l^2 / 2` (k2 as a loss; KDRL, arXiv 2506.02208).

    Direction: reverse. Support: the sampled token. The importance ratio is detached; gradient `p/mu l grad log p`.
    Its value is no estimate of the KL, its gradient is.
    """

    consumes: ClassVar[type[Scores]] = TokenScores

    def __call__(self, student: StudentLogits, batch: Batch[TokenScores]) -> TokenLoss:
        logprobs = student.at(batch.target_ids)
        ratio = (logprobs.detach() - batch.behavior_logprobs).exp()
        return _result(student, batch, ratio * 0.5 * (logprobs - batch.scores.logprobs).square())


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioReverseKL(_OnSampledTokens):
    """KL(student||teacher) on the sampled token as `p / mu (q/p - 1 + l)`, ratio and k3 both differentiated.

    Direction: reverse. Support: the sampled token. Value and gradient are unbiased, also with a stale policy; per
    sample the gradient is that of `SquaredReverseKL` (DeepSeek-V3.2's use of k3, as reported).
    """

    consumes: ClassVar[type[Scores]] = TokenScores

    def __call__(self, student: StudentLogits, batch: Batch[TokenScores]) -> TokenLoss:
        logprobs = student.at(batch.target_ids)
        back = batch.scores.logprobs - logprobs
        ratio = (logprobs - batch.behavior_logprobs).exp()
        # p/mu * q/p is q/mu, a constant: it is part of the value alone, and bounded so that float32 holds it.
        taught = (batch.scores.logprobs - batch.behavior_logprobs).clamp(max=LARGEST).exp()
        return _result(student, batch, taught - ratio * (1 + back))


class Baseline(Enum):
    """Function of the state that is taken off every cost there: it removes variance and no signal."""

    NONE = "none"
    VOCABULARY = "vocabulary"  # the mean cost under the current student, exact
    TOPK = "topk"  # the same summed over the scorer's top-k alone: less variance removed


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class SampledDivergence(Estimate):
    """Any direction on the sampled token as a policy gradient: `p / mu sg(slope - baseline)`.

    Direction: `of`. Support: the sampled token. Estimator: the divergence's slope at the token is the cost of sampling
    it, detached; the gradient flows through the importance ratio, and its expectation is exact, also with a stale
    policy. With `of=FullReverseKL()` it is `SampledReverseKL(signal=STUDENT)`, and its baseline over the vocabulary is
    the exact KL of the state (vOPD, arXiv 2605.07865). A forward KL has costs of the size of `q / p`, so its variance
    is large where the student rarely samples what the teacher would.
    """

    on_policy: ClassVar[bool] = True

    # mean cost of the state that is taken off a token's cost: of the whole VOCABULARY, of the scorer's TOPK, or NONE
    baseline: Baseline = Baseline.NONE

    @property
    def consumes(self) -> type[Scores]:
        match self.baseline:
            case Baseline.NONE:
                return TokenScores
            case Baseline.VOCABULARY:
                return VocabularyScores
            case Baseline.TOPK:
                return TopKScores

    def __call__(self, student: StudentLogits, batch: Batch[Any]) -> TokenLoss:
        logprobs = student.at(batch.target_ids)
        cost = self.of.slope(logprobs.detach(), batch.scores.logprobs)
        if self.baseline is not Baseline.NONE:
            cost = cost - self._mean_cost(student, batch)
        return _result(student, batch, (logprobs - batch.behavior_logprobs).exp() * cost)

    def _mean_cost(self, student: StudentLogits, batch: Batch[Any]) -> Tensor:
        if self.baseline is Baseline.TOPK:
            p, q = student.at_support(batch.scores.topk_ids).detach(), batch.scores.topk_logprobs
        else:
            p, q = student.logprobs.detach(), batch.scores.vocabulary_logprobs
        return (p.exp() * self.of.slope(p, q)).sum(-1)
