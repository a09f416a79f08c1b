"""Objectives over the whole vocabulary: exact divergences, no sampling noise within a state.

Each is also a `Direction`, a sum and its slope, of which the other modules make every estimator on every support.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import log
from typing import Annotated, Any, ClassVar, Protocol

import torch
from torch import Tensor

from opd.loss.chunked import StudentLogits
from opd.method import promises as exact
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import Batch, Scores, TokenLoss, VocabularyScores


def divergence(weight_logprobs: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """`sum_v exp(weight) * (p - q)` over the last axis, in log-probabilities."""
    return (weight_logprobs.exp() * (p - q)).sum(-1)


Skew = Annotated[float, In(1e-6, 1 - 1e-6, because="without skew choose FullReverseKL or FullForwardKL")]


def _mixed(a: Tensor, b: Tensor, share: float) -> Tensor:
    """`log((1 - share) a + share b)` of log-probabilities."""
    return torch.logaddexp(a + log(1 - share), b + log(share))


class Direction(Protocol):
    """A divergence between student and teacher, apart from where and how it is estimated.

    Both functions take log-probabilities `p` of the student and `q` of the teacher.
    """

    @property
    def promise(self) -> exact.Promise:
        """The divergence of whole distributions."""
        ...

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        """Limiting cases at the ends of its fields."""
        ...

    def between(self, p: Tensor, q: Tensor) -> Tensor:
        """The divergence over the last axis: a sum of one term per outcome, so parts of it can be added."""
        ...

    def slope(self, p: Tensor, q: Tensor) -> Tensor:
        """Each term differentiated by the student's probability, less the constant that makes it 0 where p = q.

        A constant changes no gradient of probabilities that sum to 1. So `sum p sg(slope)` has the divergence's
        gradient, and so has its estimate from tokens that the student drew.
        """
        ...


def limits_of(
    part: Any, made: Callable[[exact.Promise], exact.Promise] = lambda p: p
) -> tuple[exact.LimitingCase, ...]:
    """The limits of `part.of` for an estimator `part` of it; `made` is the promise it makes of a direction's."""
    return tuple(
        replace(limit, objective=replace(part, of=limit.objective), promise=made(limit.promise))
        for limit in part.of.limits
    )


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Estimate:
    """Common part of all estimates of the whole `of`: its promise and its limits."""

    # direction of the divergence
    of: Direction

    @property
    def promise(self) -> exact.Promise:
        return self.of.promise

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        return limits_of(self)


LARGEST = 80.0  # exp of it is finite in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class FullReverseKL:
    """KL(student||teacher), exact over the whole vocabulary at every state the student visited.

    Gradient: autograd through the student's distribution, states held fixed (`p_v (l_v - KL)` w.r.t. logits).
    """

    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = False

    @property
    def promise(self) -> exact.Promise:
        return exact.ReverseKL()

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        return ()

    def between(self, p: Tensor, q: Tensor) -> Tensor:
        return divergence(p, p, q)

    def slope(self, p: Tensor, q: Tensor) -> Tensor:
        return p - q

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        loss = self.between(student.logprobs, batch.scores.vocabulary_logprobs)
        return TokenLoss(loss=loss, metrics={})


@dataclass(frozen=True, slots=True, kw_only=True)
class FullForwardKL:
    """KL(teacher||student), exact over the whole vocabulary; mode-covering (GKD, arXiv 2306.13649, beta -> 0)."""

    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = False

    @property
    def promise(self) -> exact.Promise:
        return exact.ForwardKL()

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        return ()

    def between(self, p: Tensor, q: Tensor) -> Tensor:
        return divergence(q, q, p)

    def slope(self, p: Tensor, q: Tensor) -> Tensor:
        return 1 - (q - p).clamp(max=LARGEST).exp()

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        loss = self.between(student.logprobs, batch.scores.vocabulary_logprobs)
        return TokenLoss(loss=loss, metrics={})


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class JensenShannon:
    """JSD(beta) = beta KL(q||m) + (1 - beta) KL(p||m), m = beta q + (1 - beta) p (GKD, arXiv 2306.13649).

    p is the student, q the teacher. It vanishes at both ends of beta, so 0 and 1 are refused: they are
    `FullForwardKL` and `FullReverseKL` (after dividing by beta or 1 - beta), under their own names.
    """

    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = False

    # weight of the teacher in the mixture: near 0 forward KL, near 1 reverse KL
    beta: Annotated[float, In(1e-6, 1 - 1e-6, because="0 is FullForwardKL, 1 FullReverseKL")] = 0.5

    @property
    def promise(self) -> exact.Promise:
        return exact.JensenShannon(self.beta)

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        near, far = JensenShannon(beta=1e-6), JensenShannon(beta=1 - 1e-6)
        return (
            exact.LimitingCase(
                name="beta -> 0 is beta times the forward KL", objective=near, promise=exact.ForwardKL(), scale=1e6
            ),
            exact.LimitingCase(
                name="beta -> 1 is 1 - beta times the reverse KL", objective=far, promise=exact.ReverseKL(), scale=1e6
            ),
        )

    def between(self, p: Tensor, q: Tensor) -> Tensor:
        m = _mixed(p, q, self.beta)
        return self.beta * divergence(q, q, m) + (1 - self.beta) * divergence(p, p, m)

    def slope(self, p: Tensor, q: Tensor) -> Tensor:
        return (1 - self.beta) * (p - _mixed(p, q, self.beta))

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        loss = self.between(student.logprobs, batch.scores.vocabulary_logprobs)
        return TokenLoss(loss=loss, metrics={"jsd": loss.detach()})


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class SkewedReverseKL:
    """KL(p || (1 - alpha) q + alpha p), p the student: bounded by -log alpha (skew KL, arXiv 2402.03898).

    Direction: reverse. Support: the whole vocabulary. Fully differentiated, through the mixture too. alpha -> 0 is
    `FullReverseKL`.
    """

    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = False

    # share of the other side in the mixture
    alpha: Skew = 0.1

    @property
    def promise(self) -> exact.Promise:
        return exact.SkewedReverseKL(self.alpha)

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        near = SkewedReverseKL(alpha=1e-6)
        return (exact.LimitingCase(name="alpha -> 0 is the reverse KL", objective=near, promise=exact.ReverseKL()),)

    def between(self, p: Tensor, q: Tensor) -> Tensor:
        return divergence(p, p, _mixed(q, p, self.alpha))

    def slope(self, p: Tensor, q: Tensor) -> Tensor:
        back = p - _mixed(q, p, self.alpha)
        return back + self.alpha * (1 - back.exp())

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        loss = self.between(student.logprobs, batch.scores.vocabulary_logprobs)
        return TokenLoss(loss=loss, metrics={"skewed_kl": loss.detach()})


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class SkewedForwardKL:
    """KL(q || (1 - alpha) p + alpha q), q the teacher: bounded by -log alpha (skew KL, arXiv 2402.03898).

    Direction: forward. Support: the whole vocabulary. alpha -> 0 is `FullForwardKL`.
    """

    consumes: ClassVar[type[Scores]] = VocabularyScores
    on_policy: ClassVar[bool] = False

    # share of the other side in the mixture
    alpha: Skew = 0.1

    @property
    def promise(self) -> exact.Promise:
        return exact.SkewedForwardKL(self.alpha)

    @property
    def limits(self) -> tuple[exact.LimitingCase, ...]:
        near = SkewedForwardKL(alpha=1e-6)
        return (exact.LimitingCase(name="alpha -> 0 is the forward KL", objective=near, promise=exact.ForwardKL()),)

    def between(self, p: Tensor, q: Tensor) -> Tensor:
        return divergence(q, q, _mixed(p, q, self.alpha))

    def slope(self, p: Tensor, q: Tensor) -> Tensor:
        return (1 - self.alpha) * (1 - (q - _mixed(p, q, self.alpha)).exp())

    def __call__(self, student: StudentLogits, batch: Batch[VocabularyScores]) -> TokenLoss:
        loss = self.between(student.logprobs, batch.scores.vocabulary_logprobs)
        return TokenLoss(loss=loss, metrics={"skewed_kl": loss.detach()})
