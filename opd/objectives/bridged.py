"""Divergences to a target between teacher and student: the normalized product of powers of both."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from torch import Tensor

from opd.loss.chunked import StudentLogits
from opd.method import promises as exact
from opd.method.reweighted_promises import Bridge
from opd.method.schedules import Schedule, number
from opd.objectives.vocabulary import Direction
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import Batch, Scores, TokenLoss, VocabularyScores

Power = Annotated[float, In(0, 1, because="0 leaves the model out of the target")]


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class BridgeDivergence:
    """`of` between the student p and the target `Q = q^s p^b / Z`, which is held constant.

    Direction: `of`. Support: the whole vocabulary. The target has much mass where both models have (a product of
    experts), so an id that the student hardly knows pulls less: where p -> 0, `Q / p` is `q p^(b - 1)` and no
    longer `q / p`. That Q is held constant is INFERRED from the published gradients (with the reverse KL the cost of a
    sampled id is `(1 - b) log p - log q`), and is so in TAID's released code.

    Veto (arXiv 2601.07155): s = 1, and b from 0.8 to 0; the student tends to `q^(1 / (1 - b))`, sharper than its
    teacher, as long as b is above 0. TAID (arXiv 2501.16937): s from 0.4 to 1, and b = 1 - s. With s = 1 and b = 0 it
    is `of`, bit for bit. Reports `bridge_divergence`, which is the loss.
    """

    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = False

    # direction of the divergence
    of: Direction
    # power of the teacher's distribution in the target (s): a number, or a schedule over steps
    teacher_power: Power | Schedule = 1.0
    # power of the student's distribution in the target (b): a number, or a schedule over steps
    student_power: Power | Schedule = 0.0

    @property
    def promise(self) -> exact.Promise:
        return Bridge(of=self.of.promise, teacher_power=self.teacher_power, student_power=self.student_power)

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        plain, name = replace(self, teacher_power=1.0, student_power=0.0), "without the student in it the target is q"
        return (exact.LimitingCase(name=name, objective=plain, promise=self.of.promise, tolerance=1e-6),)

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        loss = self.of.between(student.logprobs, self.target(student.logprobs, batch.scores.vocabulary_logprobs))
        return TokenLoss(loss=loss, metrics={"bridge_divergence": loss.detach()})

    def target(self, p: Tensor, q: Tensor) -> Tensor:
        """Log-probabilities of the target, without a gradient."""
        of_teacher, of_student = number(self.teacher_power), number(self.student_power)
        if (of_teacher, of_student) == (1, 0):
            return q
        return (of_teacher * q + of_student * p.detach()).log_softmax(-1)
