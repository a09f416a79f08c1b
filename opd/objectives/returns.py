"""Reverse KL of whole sequences: the state's own term, and credit for the tokens after (MiniLLM)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from opd.errors import ConfigurationError
from opd.loss.chunked import StudentLogits
from opd.method import promises as exact
from opd.objectives.topk import HeadTailDivergence
from opd.objectives.vocabulary import FullReverseKL
from opd.settings.ranges import Fraction, In
from opd.settings.validation import settings
from opd.types import Batch, Scores, TokenLoss, TopKReturnScores


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class MiniLLM:
    """`grad KL_t - p/mu R_{t+1} grad log p`: MiniLLM's "single" and "long" parts (arXiv 2306.08543), without mixing.

    Direction: reverse. The single part is KL(student||teacher) at the state, exact on the scorer's support and sampled
    outside it (unbiased for the full KL; the paper sums over the whole vocabulary). The long part is a policy gradient
    on the return `R` that the scorer `WithReturns` computed. `long_weight=0` is exact on-policy distillation.

    `alpha` is the paper's share of teacher-sampled tokens (0.2 there). Mixing two models token by token needs the
    teacher in the rollout engine's decoding loop, which no engine here has: only 0 is accepted. The paper's language
    model loss on pre-training text is not part of this objective.
    """

    consumes: ClassVar[type[Scores]] = TopKReturnScores
    on_policy: ClassVar[bool] = True

    # the paper's share of teacher-sampled tokens (0.2 there)
    alpha: Fraction = 0.0
    # weight of the long-term part beside the single-step one
    long_weight: Annotated[float, In(0, 1000, because="below 0 it trains away from the teacher")] = 1.0

    def __post_init__(self) -> None:
        if self.alpha != 0:
            raise ConfigurationError(
                f"objective MiniLLM was asked for teacher-mixed sampling (alpha={self.alpha}), which needs the teacher "
                "in the rollout engine's decoding loop, and no engine has it; set alpha=0"
            )

    @property
    def promise(self) -> exact.Promise:
        if self.long_weight == 0:
            return exact.ReverseKL()
        return exact.Sum((exact.ReverseKL(), exact.Weighted(weight=self.long_weight, of=exact.ExpectedCredit())))

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        single, name = MiniLLM(long_weight=0.0), "without the long part it is the per-state reverse KL"
        return (exact.LimitingCase(name=name, objective=single, promise=exact.ReverseKL(), tolerance=1e-6),)

    def __call__(self, student: StudentLogits, batch: Batch[TopKReturnScores]) -> TokenLoss:
        single = HeadTailDivergence(of=FullReverseKL())(student, batch)
        ratio = (student.at(batch.target_ids) - batch.behavior_logprobs).exp()
        loss = single.loss - self.long_weight * ratio * batch.scores.returns
        return TokenLoss(loss=loss, metrics={**single.metrics, "return": batch.scores.returns})
