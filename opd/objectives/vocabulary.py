"""Objectives over the whole vocabulary: exact divergences, no sampling noise within a state."""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from opd import divergences as exact
from opd.diagnostics import vocabulary_metrics
from opd.errors import ConfigurationError
from opd.logits import StudentLogits
from opd.types import Batch, Scores, TokenLoss, VocabularyScores


def divergence(weight_logprobs: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """`sum_v exp(weight) * (p - q)` over the last axis, in log-probabilities."""
    return (weight_logprobs.exp() * (p - q)).sum(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FullReverseKL:
    """KL(student||teacher), exact over the whole vocabulary at every state the student visited.

    Gradient: autograd through the student's distribution, states held fixed (`p_v (l_v - KL)` w.r.t. logits).
    """

    @property
    def consumes(self) -> type[Scores]:
        return VocabularyScores

    @property
    def on_policy(self) -> bool:
        return False

    @property
    def promise(self) -> exact.Promise:
        return exact.ReverseKL()

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        p, q = student.logprobs, batch.scores.vocabulary_logprobs
        return TokenLoss(loss=divergence(p, p, q), metrics=vocabulary_metrics(student, batch))


@dataclass(frozen=True, slots=True, kw_only=True)
class FullForwardKL:
    """KL(teacher||student), exact over the whole vocabulary; mode-covering (GKD, arXiv 2306.13649, beta -> 0)."""

    @property
    def consumes(self) -> type[Scores]:
        return VocabularyScores

    @property
    def on_policy(self) -> bool:
        return False

    @property
    def promise(self) -> exact.Promise:
        return exact.ForwardKL()

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        p, q = student.logprobs, batch.scores.vocabulary_logprobs
        return TokenLoss(loss=divergence(q, q, p), metrics=vocabulary_metrics(student, batch))


@dataclass(frozen=True, slots=True, kw_only=True)
class JensenShannon:
    """JSD(beta) = beta KL(q||m) + (1 - beta) KL(p||m), m = beta q + (1 - beta) p (GKD, arXiv 2306.13649).

    p is the student, q the teacher. It vanishes at both ends of beta, so 0 and 1 are refused: they are
    `FullForwardKL` and `FullReverseKL` (after dividing by beta or 1 - beta), which say what they are.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ConfigurationError(
                f"objective JensenShannon needs 0 < beta < 1, got {self.beta}; for 0 choose FullForwardKL, "
                "for 1 FullReverseKL"
            )

    @property
    def consumes(self) -> type[Scores]:
        return VocabularyScores

    @property
    def on_policy(self) -> bool:
        return False

    @property
    def promise(self) -> exact.Promise:
        return exact.JensenShannon(self.beta)

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        p, q = student.logprobs, batch.scores.vocabulary_logprobs
        m = torch.logaddexp(p + log(1 - self.beta), q + log(self.beta))
        loss = self.beta * divergence(q, q, m) + (1 - self.beta) * divergence(p, p, m)
        return TokenLoss(loss=loss, metrics={"jsd": loss.detach(), **vocabulary_metrics(student, batch)})
