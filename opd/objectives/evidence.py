"""Distillation of the tokens alone that what the teacher is shown makes likelier."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from opd.loss.chunked import StudentLogits
from opd.method import promises as exact
from opd.method.reweighted_promises import WhereEvident
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import Batch, EvidenceScores, Scores, TokenLoss


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class EvidenceReverseKL:
    """Sampled reverse KL of the tokens whose evidence is above `threshold` (EDGE-OPD, arXiv 2605.23493 eq. 5).

    Evidence of a token: `log q(y | x, r) - log q(y | x)`, `r` what the teacher is shown. Loss: `-m sg(log q - log p)
    log p` as a policy gradient, with the mask `m` of the evidence held constant. As published nothing corrects for the
    policy that wrote, which in guided text is another than the student; with `corrected` a token counts `p / mu`, and
    the expected gradient is that of the reverse KL summed over the evident tokens, whatever wrote the text.
    """

    consumes: ClassVar[type[Scores]] = EvidenceScores
    on_policy: ClassVar[bool] = False  # without a correction it is about given tokens, of any policy

    # evidence that a token must exceed, in nats
    threshold: Annotated[float, In(-1e6, 100, because="hardly a token's evidence is 100 nats")] = 0.0
    # multiply with the importance ratio of the student and the policy that wrote
    corrected: bool = False

    @property
    def promise(self) -> exact.Promise:
        return WhereEvident(threshold=self.threshold, corrected=self.corrected)

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        every = replace(self, threshold=-1e6, corrected=True)
        name = "every token evident and corrected is the reverse KL"
        return (exact.LimitingCase(name=name, objective=every, promise=exact.ReverseKL(), tolerance=1e-6),)

    def __call__(self, student: StudentLogits, batch: Batch[EvidenceScores]) -> TokenLoss:
        logprobs = student.at(batch.target_ids)
        log_ratio = logprobs.detach() - batch.scores.logprobs
        evident = (batch.scores.logprobs - batch.scores.plain > self.threshold).to(logprobs.dtype)
        ratio = (logprobs - (batch.behavior_logprobs if self.corrected else logprobs.detach())).exp()
        metrics = {"reverse_kl": log_ratio, "evident_share": evident}
        return TokenLoss(loss=ratio * (evident * log_ratio), metrics=metrics)
