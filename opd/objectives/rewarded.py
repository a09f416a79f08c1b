"""Reverse KL on the sampled token with a signed credit beside it, as one advantage."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from opd.loss.chunked import StudentLogits
from opd.method import promises as exact
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import Batch, CreditScores, Scores, TokenLoss


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class CreditedReverseKL:
    """Policy gradient of the advantage `-(log p - log q) + weight * credit`, `p` held constant in it.

    Direction: reverse. Support: the sampled token. Estimator: loss `p/mu sg(log p - log q - weight * credit)`, `mu` the
    policy that sampled. With lookahead rewards as credit it is LGR (arXiv 2605.30833, section 4), whose advantage is
    read so: what could be read of the paper adds the credit to `1 + log p - log q`, which is a cost, and would punish
    what it means to reward. `weight=0` is `SampledReverseKL(signal=STUDENT)` bit for bit.
    """

    consumes: ClassVar[type[Scores]] = CreditScores
    on_policy: ClassVar[bool] = True

    # weight of the credit beside the log-ratio
    weight: Annotated[float, In(0, 1000, because="below 0 it punishes what is credited")] = 1.0

    @property
    def promise(self) -> exact.Promise:
        if self.weight == 0:
            return exact.ReverseKL()
        return exact.Sum((exact.ReverseKL(), exact.Weighted(weight=self.weight, of=exact.ExpectedCredit())))

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        plain = CreditedReverseKL(weight=0.0)
        return (
            exact.LimitingCase(
                name="without a credit it is the reverse KL", objective=plain, promise=exact.ReverseKL(), tolerance=1e-6
            ),
        )

    def __call__(self, student: StudentLogits, batch: Batch[CreditScores]) -> TokenLoss:
        logprobs, credit = student.at(batch.target_ids), batch.scores.credit
        log_ratio = logprobs.detach() - batch.scores.logprobs
        ratio = (logprobs - batch.behavior_logprobs).exp()
        metrics = {"reverse_kl": log_ratio, "credit": credit, "credited_share": (credit != 0).to(log_ratio.dtype)}
        return TokenLoss(loss=ratio * (log_ratio - self.weight * credit), metrics=metrics)
