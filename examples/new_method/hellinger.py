"""A method of your own: the squared Hellinger distance, estimated from the sampled token."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from opd.loss.chunked import StudentLogits
from opd.method.promises import Promise, States
from opd.types import Batch, Scores, TokenLoss, TokenScores


@dataclass(frozen=True, slots=True)
class SquaredHellinger:
    """1 - sum_v sqrt(p_v q_v): symmetric in student p and teacher q, between 0 and 1."""

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        """The distance at every state; the certificate compares gradients with that of this."""
        return 1 - (0.5 * (states.student + states.teacher)).exp().sum(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledHellinger:
    """Policy gradient of it at the sampled token: loss p/mu sg((1 - sqrt(q/p)) / 2), mu the policy that sampled."""

    consumes: ClassVar[type[Scores]] = TokenScores
    on_policy: ClassVar[bool] = True  # an estimate over draws of the student: refused on text of another model
    promise: ClassVar[Promise] = SquaredHellinger()

    def __call__(self, student: StudentLogits, batch: Batch[TokenScores]) -> TokenLoss:
        """Loss of every trained token."""
        logprobs = student.at(batch.target_ids)
        distance = 1 - (0.5 * (batch.scores.logprobs - logprobs)).exp()  # its mean over draws is the distance
        ratio = (logprobs - batch.behavior_logprobs).exp()
        return TokenLoss(loss=ratio * 0.5 * distance.detach(), metrics={"hellinger": distance.detach()})
