"""Policy gradient on what tuning changed in a teacher, where it agrees with plain distillation."""

from dataclasses import dataclass, replace
from enum import Enum
from typing import Annotated, ClassVar

import torch

from opd.loss.chunked import StudentLogits
from opd.method import promises as exact
from opd.method.reward_promises import AgreeingDelta
from opd.objectives.sampled import TOWARDS
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import Batch, DeltaScores, Scores, TokenLoss


class Reward(Enum):
    """Reward of a counted token."""

    DELTA = "delta"  # log q - log base, what tuning changed in the teacher
    LOG_RATIO = "log_ratio"  # log q - log p, as in plain distillation


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class DeltaReverseKL:
    """Policy gradient on `log q - log base` where it has the sign of `log q - log p` (OPD2, arXiv 2607.15161).

    Direction: reverse. Support: the sampled token. Estimator: loss `-p/mu sg(A)`; `A` is the delta less its mean under
    the student, and 0 where that and the log-ratio less its mean differ in sign, so that nothing is trained where the
    student equals its teacher. Means are `sum p (...)` over the support, which is the student's top-k, not divided by
    its mass (as in a port of the released code); `p` is the current student, so the expected gradient is exact for
    stale text, too. The ablations of the paper are `center`, `agree` and `reward` (a log-ratio agrees with itself,
    and is always counted); with `reward=LOG_RATIO center=false` it is `SampledReverseKL(signal=STUDENT)`, bit for
    bit. Reports `reverse_kl`, `delta` as it is, and the `agreed_share` of tokens.
    """

    consumes: ClassVar[type[Scores]] = DeltaScores
    on_policy: ClassVar[bool] = True

    # what a counted token earns: the DELTA, or the LOG_RATIO (the paper's ablation without a delta)
    reward: Reward = Reward.DELTA
    # take the mean under the student off both signals
    center: bool = True
    # count a token only where both signals have the same sign (of a DELTA)
    agree: bool = True
    # factor of the advantage; published is 0.1, against frequent clipping of gradients
    coefficient: Annotated[float, In(1e-6, 1e6, because=TOWARDS)] = 1.0

    @property
    def promise(self) -> exact.Promise:
        base: exact.Promise = AgreeingDelta(center=self.center, agree=self.agree)
        if self.reward is Reward.LOG_RATIO:
            base = exact.ReverseKL()  # a baseline changes no gradient, and a signal agrees with itself
        return base if self.coefficient == 1 else exact.Weighted(weight=self.coefficient, of=base)

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        plain = replace(self, reward=Reward.LOG_RATIO, center=False, coefficient=1.0)
        name = "the log-ratio as it is is the reverse KL"
        return (exact.LimitingCase(name=name, objective=plain, promise=exact.ReverseKL(), tolerance=1e-6),)

    def __call__(self, student: StudentLogits, batch: Batch[DeltaScores]) -> TokenLoss:
        scores, logprobs = batch.scores, student.at(batch.target_ids)
        gap, delta = scores.logprobs - logprobs.detach(), scores.logprobs - scores.base
        metrics = {"reverse_kl": -gap, "delta": delta}
        if self.center:
            at = student.at_support(scores.topk_ids).detach()
            gap = gap - (at.exp() * (scores.topk_logprobs - at)).sum(-1)
            delta = delta - (at.exp() * (scores.topk_logprobs - scores.topk_base)).sum(-1)
        agreed = delta.sign() * gap.sign() > 0
        reward = delta if self.reward is Reward.DELTA else gap
        kept = torch.where(agreed, reward, 0.0) if self.agree and self.reward is Reward.DELTA else reward
        loss = -(logprobs - batch.behavior_logprobs).exp() * (self.coefficient * kept)
        return TokenLoss(loss=loss, metrics={**metrics, "agreed_share": agreed.to(loss.dtype)})
