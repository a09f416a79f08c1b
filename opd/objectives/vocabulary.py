"""Objectives over the whole vocabulary: exact divergences, no sampling noise within a state."""

from dataclasses import dataclass
from math import log
from typing import ClassVar

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

    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = False
    promise: ClassVar[exact.Promise] = exact.ReverseKL()

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        p, q = student.logprobs, batch.scores.vocabulary_logprobs
        return TokenLoss(loss=divergence(p, p, q), metrics=vocabulary_metrics(student, batch))


@dataclass(frozen=True, slots=True, kw_only=True)
class FullForwardKL:
    """KL(teacher||student), exact over the whole vocabulary; mode-covering (GKD, arXiv 2306.13649, beta -> 0)."""

    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = False
    promise: ClassVar[exact.Promise] = exact.ForwardKL()

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        p, q = student.logprobs, batch.scores.vocabulary_logprobs
        return TokenLoss(loss=divergence(q, q, p), metrics=vocabulary_metrics(student, batch))


@dataclass(frozen=True, slots=True, kw_only=True)
class JensenShannon:
    """JSD(beta) = beta KL(q||m) + (1 - beta) KL(p||m), m = beta q + (1 - beta) p (GKD, arXiv 2306.13649).

    p is the student, q the teacher. It vanishes at both ends of beta, so 0 and 1 are refused: they are
    `FullForwardKL` and `FullReverseKL` (after dividing by beta or 1 - beta), which say what they are.
    """

    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = False

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ConfigurationError(
                f"objective JensenShannon needs 0 < beta < 1, got {self.beta}; for 0 choose FullForwardKL, "
                "for 1 FullReverseKL"
            )

    @property
    def promise(self) -> exact.Promise:
        return exact.JensenShannon(self.beta)

    @property
    def limits(self) -> tuple[exact.Limit, ...]:
        near, far = JensenShannon(beta=1e-6), JensenShannon(beta=1 - 1e-6)
        return (
            exact.Limit(
                name="beta -> 0 is beta times the forward KL", objective=near, promise=exact.ForwardKL(), scale=1e6
            ),
            exact.Limit(
                name="beta -> 1 is 1 - beta times the reverse KL", objective=far, promise=exact.ReverseKL(), scale=1e6
            ),
        )

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        p, q = student.logprobs, batch.scores.vocabulary_logprobs
        m = torch.logaddexp(p + log(1 - self.beta), q + log(self.beta))
        loss = self.beta * divergence(q, q, m) + (1 - self.beta) * divergence(p, p, m)
        return TokenLoss(loss=loss, metrics={"jsd": loss.detach(), **vocabulary_metrics(student, batch)})


def _skew(alpha: float, part: str) -> None:
    if not 0 < alpha < 1:
        raise ConfigurationError(
            f"objective {part} needs 0 < alpha < 1, got {alpha}; without skew choose FullReverseKL or FullForwardKL"
        )


def _mixed(a: Tensor, b: Tensor, share: float) -> Tensor:
    """`log((1 - share) a + share b)` of log-probabilities."""
    return torch.logaddexp(a + log(1 - share), b + log(share))


@dataclass(frozen=True, slots=True, kw_only=True)
class SkewedReverseKL:
    """KL(p || (1 - alpha) q + alpha p), p the student: bounded by -log alpha (skew KL, arXiv 2402.03898).

    Direction: reverse. Support: the whole vocabulary. Fully differentiated, through the mixture too. alpha -> 0 is
    `FullReverseKL`.
    """

    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = False

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _skew(self.alpha, "SkewedReverseKL")

    @property
    def promise(self) -> exact.Promise:
        return exact.SkewedReverseKL(self.alpha)

    @property
    def limits(self) -> tuple[exact.Limit, ...]:
        near = SkewedReverseKL(alpha=1e-6)
        return (exact.Limit(name="alpha -> 0 is the reverse KL", objective=near, promise=exact.ReverseKL()),)

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        p, q = student.logprobs, batch.scores.vocabulary_logprobs
        loss = divergence(p, p, _mixed(q, p, self.alpha))
        return TokenLoss(loss=loss, metrics={"skewed_kl": loss.detach(), **vocabulary_metrics(student, batch)})


@dataclass(frozen=True, slots=True, kw_only=True)
class SkewedForwardKL:
    """KL(q || (1 - alpha) p + alpha q), q the teacher: bounded by -log alpha (skew KL, arXiv 2402.03898).

    Direction: forward. Support: the whole vocabulary. alpha -> 0 is `FullForwardKL`.
    """

    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = False

    alpha: float = 0.1

    def __post_init__(self) -> None:
        _skew(self.alpha, "SkewedForwardKL")

    @property
    def promise(self) -> exact.Promise:
        return exact.SkewedForwardKL(self.alpha)

    @property
    def limits(self) -> tuple[exact.Limit, ...]:
        near = SkewedForwardKL(alpha=1e-6)
        return (exact.Limit(name="alpha -> 0 is the forward KL", objective=near, promise=exact.ForwardKL()),)

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        p, q = student.logprobs, batch.scores.vocabulary_logprobs
        loss = divergence(q, q, _mixed(p, q, self.alpha))
        return TokenLoss(loss=loss, metrics={"skewed_kl": loss.detach(), **vocabulary_metrics(student, batch)})
