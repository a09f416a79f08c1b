"""Objectives on the sampled token alone: the policy-gradient form of reverse KL, likelihood, and GRPO."""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, ClassVar

import torch

from opd.loss.chunked import StudentLogits
from opd.method import promises as exact
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import AdvantageScores, Batch, Scores, TokenLoss, TokenScores


class LogprobSource(Enum):
    """Source of the student's log-probability in a detached signal."""

    BEHAVIOR = "behavior"  # of the sampling policy, as recorded
    STUDENT = "student"  # the current student's: right also when the rollout is stale


TOWARDS = "0 trains nothing, and below 0 it trains away from the teacher"


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class SampledReverseKL:
    """KL(student||teacher) on the sampled token, as a policy gradient with an importance ratio.

    Direction: reverse. Support: the sampled token. Estimator: detached reward `-k1` at discount 0, whose expected
    gradient is exactly the gradient of the per-state reverse KL (Thinking Machines, "On-Policy Distillation",
    2025: `loss = -exp(log p - log mu) * A`, `A = -coefficient * (log mu - log q)`). The gradient flows through
    `log p` in the ratio only; the teacher never receives one.

    `signal` is the source of the log-probability in `A`: the behavior (as published) or the current student. The
    gradient is exact for both while the behavior is the current student. With a stale policy it stays exact for the
    student's; the behavior's gives that of KL(student||teacher) - KL(student||behavior). Both need a behavior that
    could have sampled any token (`top_p=1`).
    """

    consumes: ClassVar[type[Scores]] = TokenScores
    on_policy: ClassVar[bool] = True

    # factor of the advantage
    coefficient: Annotated[float, In(1e-6, 1e6, because=TOWARDS)] = 1.0
    # log-probability in the advantage: BEHAVIOR of the sampling policy, STUDENT of the current one
    signal: LogprobSource = LogprobSource.BEHAVIOR

    @property
    def promise(self) -> exact.Promise:
        base: exact.Promise = exact.ReverseKL()
        if self.signal is LogprobSource.BEHAVIOR:
            base = exact.Sum((base, exact.Weighted(weight=-1.0, of=exact.FromBehavior())))
        return base if self.coefficient == 1 else exact.Weighted(weight=self.coefficient, of=base)

    def __call__(self, student: StudentLogits, batch: Batch[TokenScores]) -> TokenLoss:
        logprobs = student.at(batch.target_ids)
        own = batch.behavior_logprobs if self.signal is LogprobSource.BEHAVIOR else logprobs.detach()
        log_ratio = own - batch.scores.logprobs
        ratio = (logprobs - batch.behavior_logprobs).exp()
        # With the behavior's log-probability it is another estimate than `log p - log q`, which others report.
        return TokenLoss(loss=ratio * (self.coefficient * log_ratio), metrics={"reverse_kl": log_ratio})


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihood:
    """Negative log-likelihood of the sampled token: SFT, and sequence-level distillation on teacher text."""

    consumes: ClassVar[type[Scores]] = Scores
    on_policy: ClassVar[bool] = False
    promise: ClassVar[exact.Promise] = exact.CrossEntropy()

    def __call__(self, student: StudentLogits, batch: Batch[Scores]) -> TokenLoss:
        return TokenLoss(loss=-student.at(batch.target_ids), metrics={})


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class ClippedPolicyGradient:
    """GRPO's token loss without its KL term: `-min(r A, clip(r, 1 - low, 1 + high) A)` (arXiv 2402.03300 eq. 3).

    `r = p / mu`. With one update per batch and fresh rollouts `r` is 1 and nothing is clipped.
    """

    consumes: ClassVar[type[Scores]] = AdvantageScores
    on_policy: ClassVar[bool] = True

    # importance ratios count as 1 minus this at least
    clip_low: Annotated[float, In(1e-6, 1, because="published is 0.2")] = 0.2
    # importance ratios count as 1 plus this at most
    clip_high: Annotated[float, In(1e-6, 100, because="published is 0.2")] = 0.2

    @property
    def promise(self) -> exact.Promise:
        return exact.ClippedCredit(low=self.clip_low, high=self.clip_high)

    def __call__(self, student: StudentLogits, batch: Batch[AdvantageScores]) -> TokenLoss:
        logprobs = student.at(batch.target_ids)
        ratio = (logprobs - batch.behavior_logprobs).exp()
        advantages = batch.scores.advantages
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        loss = -torch.minimum(ratio * advantages, clipped * advantages)
        was_clipped = (clipped * advantages < ratio * advantages).to(loss.dtype).detach()
        return TokenLoss(loss=loss, metrics={"pg_clipfrac": was_clipped})
