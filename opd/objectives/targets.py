"""Learning of target distributions: soft labels on few ids per token."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from opd.loss.chunked import StudentLogits
from opd.method import promises as exact
from opd.types import Batch, Scores, TargetScores, TokenLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetForwardKL:
    """KL(target||student) with the target distribution that the scorer gives; 0 at a token that has none.

    Direction: forward. Support: the ids of the target, the student's probabilities those of the full softmax; no signal
    tells ids outside it apart. Estimator: exact. A target that is the mean of `n` distributions, weighed by `n`, has
    the gradient of the sum of the `n` divergences (their values differ by how far they are apart, which is constant).
    """

    consumes: ClassVar[type[Scores]] = TargetScores
    on_policy: ClassVar[bool] = False
    promise: ClassVar[exact.Promise] = exact.FromTarget()

    def __call__(self, student: StudentLogits, batch: Batch[TargetScores]) -> TokenLoss:
        p, y = student.at_support(batch.scores.target_ids), batch.scores.target_probs.to(student.logits.dtype)
        some = y > 0
        loss = torch.where(some, y * (torch.where(some, y, 1.0).log() - p), 0.0).sum(-1)
        return TokenLoss(loss=loss, metrics={"target_kl": loss.detach()})
