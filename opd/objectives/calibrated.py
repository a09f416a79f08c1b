"""Reverse KL on the sampled token, without what a teacher's own deviation explains of the discrepancy."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from opd.loss.chunked import StudentLogits
from opd.method import promises as exact
from opd.method.reward_promises import BeyondDeviation
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import Batch, DeviationScores, Scores, TokenLoss


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class CalibratedReverseKL:
    """Policy gradient on the part of `log q - log p` beyond the teacher's self-deviation (Cal-OPD, arXiv 2609.21619).

    Direction: reverse. Support: the sampled token. Estimator: loss `-p/mu sg(A)`, with the advantage `A = [log q -
    relaxation * falls - log p]+ - [log p - log q - relaxation * rises]+`: what lies outside of the interval in which
    the teacher itself moves under probes. Inside it nothing is trained. `p` is the current student, so the expected
    gradient is exact for stale text, too. `relaxation=0` is `SampledReverseKL(signal=STUDENT)`, bit for bit. Reports
    `reverse_kl`, and the mean sizes `discrepancy` of `log q - log p` and `discrepancy_kept` of `A`; their quotient is
    the paper's retained share.
    """

    consumes: ClassVar[type[Scores]] = DeviationScores
    on_policy: ClassVar[bool] = True

    # factor of the deviation; published is 5, and 80 was worse than 1
    relaxation: Annotated[float, In(0, 1e6)] = 5.0

    @property
    def promise(self) -> exact.Promise:
        return BeyondDeviation(relaxation=self.relaxation) if self.relaxation else exact.ReverseKL()

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        plain, name = replace(self, relaxation=0.0), "without a relaxation it is the reverse KL"
        return (exact.LimitingCase(name=name, objective=plain, promise=exact.ReverseKL(), tolerance=1e-6),)

    def __call__(self, student: StudentLogits, batch: Batch[DeviationScores]) -> TokenLoss:
        logprobs, taught = student.at(batch.target_ids), batch.scores.logprobs
        own = logprobs.detach()
        above = (own - taught - self.relaxation * batch.scores.rises).relu()
        below = (taught - self.relaxation * batch.scores.falls - own).relu()
        cost, log_ratio = above - below, own - taught
        metrics = {"reverse_kl": log_ratio, "discrepancy": log_ratio.abs(), "discrepancy_kept": cost.abs()}
        return TokenLoss(loss=(logprobs - batch.behavior_logprobs).exp() * cost, metrics=metrics)
