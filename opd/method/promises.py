"""Exact per-state divergences over the whole vocabulary: what an objective's `promise` is made of.

A promise is a frozen value that is called with `States` and returns one number per state. The expected gradient of
the objective that gives it, tokens drawn from the writer and states held fixed, must be the gradient of that number;
`opd.certify` compares the two by enumeration. Promises are written for reading and checking (float64, small
vocabularies), not for speed: nothing here runs in training.

On a support, members keep their log-probability and all others become 0, the log of 1: a pair of ones adds nothing to
any divergence below, so the same few formulas serve the whole vocabulary, a renormalized support and a tail bucket.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from opd.settings.ranges import TopIds
from opd.settings.validation import settings


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """`n` states: log-probabilities of everybody, and what was said of each token that could be written.

    `student` carries the gradient. `behavior` is the distribution that wrote. `support` marks the ids a scorer
    testified about (all where it testified about all). `credit` is the signed credit of writing each token (0 where
    nobody gives credit).
    """

    student: Float[Tensor, "n V"]
    teacher: Float[Tensor, "n V"]
    behavior: Float[Tensor, "n V"]
    support: Bool[Tensor, "n V"]
    credit: Float[Tensor, "n V"]


class Promise(Protocol):
    """What the expected gradient of an objective is the gradient of."""

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        """One differentiable number per state."""
        ...


class Support(Protocol):
    """Which ids of a state are looked at. A function of the state: never of the token that was written."""

    def __call__(self, states: States) -> Bool[Tensor, "n V"]:
        """True for members; no gradient."""
        ...


# Directions.


@dataclass(frozen=True, slots=True)
class ReverseKL:
    """KL(student||teacher) = sum_v p (log p - log q)."""

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        p, q = states.student, states.teacher
        return (p.exp() * (p - q)).sum(-1)


@dataclass(frozen=True, slots=True)
class ForwardKL:
    """KL(teacher||student) = sum_v q (log q - log p)."""

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        p, q = states.student, states.teacher
        return (q.exp() * (q - p)).sum(-1)


@dataclass(frozen=True, slots=True)
class JensenShannon:
    """JSD(beta) = beta KL(q||m) + (1 - beta) KL(p||m), m = beta q + (1 - beta) p (arXiv 2306.13649), 0 < beta < 1."""

    # weight of the teacher in the mixture
    beta: float

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        p, q = states.student.exp(), states.teacher.exp()
        m = (self.beta * q + (1 - self.beta) * p).log()
        to_teacher, to_student = q * (states.teacher - m), p * (states.student - m)
        return self.beta * to_teacher.sum(-1) + (1 - self.beta) * to_student.sum(-1)


@dataclass(frozen=True, slots=True)
class SkewedReverseKL:
    """KL(p || (1 - alpha) q + alpha p), 0 <= alpha < 1 (skew KL, arXiv 2402.03898)."""

    # share of the other side in the mixture
    alpha: float

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        p, q = states.student.exp(), states.teacher.exp()
        return (p * (states.student - ((1 - self.alpha) * q + self.alpha * p).log())).sum(-1)


@dataclass(frozen=True, slots=True)
class SkewedForwardKL:
    """KL(q || (1 - alpha) p + alpha q), 0 <= alpha < 1 (skew KL, arXiv 2402.03898)."""

    # share of the other side in the mixture
    alpha: float

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        p, q = states.student.exp(), states.teacher.exp()
        return (q * (states.teacher - ((1 - self.alpha) * p + self.alpha * q).log())).sum(-1)


@dataclass(frozen=True, slots=True)
class GeneralizedReverseKL:
    """sum_v p (log p - log q) - p + q: the reverse KL of masses that need not sum to 1, every term >= 0.

    On a support it is MOPD's correction (arXiv 2606.30406 eq. 5); its gradient is that of the stop-gradient form
    `sum_S p sg(log p - log q)` (arXiv 2605.11182 eq. 12), because both have the derivative `log p - log q`.
    """

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        p, q = states.student, states.teacher
        return (p.exp() * (p - q) - p.exp() + q.exp()).sum(-1)


# Supports.


@dataclass(frozen=True, slots=True)
class ScoredSupport:
    """The ids the scorer asked the teacher about."""

    def __call__(self, states: States) -> Bool[Tensor, "n V"]:
        return states.support


def top(logprobs: Float[Tensor, "n V"], k: int) -> Bool[Tensor, "n V"]:
    """The `k` likeliest ids of every row as a mask (all ids where the vocabulary is smaller)."""
    ids = logprobs.detach().topk(min(k, logprobs.shape[-1]), dim=-1).indices
    return torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, ids, True)


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class _TopK:
    # ids of each top-k
    k: TopIds = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTop(_TopK):
    """The teacher's `k` likeliest ids."""

    def __call__(self, states: States) -> Bool[Tensor, "n V"]:
        return top(states.teacher, self.k)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentTop(_TopK):
    """The current student's `k` likeliest ids."""

    def __call__(self, states: States) -> Bool[Tensor, "n V"]:
        return top(states.student, self.k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Union(_TopK):
    """Ids among the `k` likeliest of the current student or of the teacher."""

    def __call__(self, states: States) -> Bool[Tensor, "n V"]:
        return top(states.student, self.k) | top(states.teacher, self.k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Intersection(_TopK):
    """Ids among the `k` likeliest of both; it may be empty, and then nothing is said about the state."""

    def __call__(self, states: States) -> Bool[Tensor, "n V"]:
        return top(states.student, self.k) & top(states.teacher, self.k)


# What becomes of a direction on a support.


def _mass(logprobs: Float[Tensor, "n V"], members: Bool[Tensor, "n V"]) -> Float[Tensor, "n 1"]:
    """Log-mass of the members of every row; of all ids where there is no member (its value is then not used)."""
    counted = members | ~members.any(-1, keepdim=True)
    return torch.where(counted, logprobs, -torch.inf).logsumexp(-1, keepdim=True)


def _nothing(logprobs: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
    return torch.zeros_like(logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Renormalized:
    """`of` between both distributions conditioned on the support; blind to the mass on it and to all else."""

    of: Promise
    support: Support

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        members = self.support(states)

        def conditioned(x: Tensor) -> Tensor:
            return torch.where(members, x - _mass(x, members), _nothing(x))

        return self.of(replace(states, student=conditioned(states.student), teacher=conditioned(states.teacher)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Coarsened:
    """`of` between both distributions with everything outside the support merged into one bucket."""

    of: Promise
    support: Support

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        members = self.support(states)

        def merged(x: Tensor) -> Tensor:
            outside = _mass(x, ~members)
            bucket = torch.where(members.all(-1, keepdim=True), torch.zeros_like(outside), outside)
            return torch.cat([torch.where(members, x, _nothing(x)), bucket], dim=-1)

        one, everybody = torch.zeros_like(states.credit[:, :1]), torch.ones_like(members[:, :1])
        return self.of(
            States(
                student=merged(states.student),
                teacher=merged(states.teacher),
                behavior=merged(states.behavior),
                support=torch.cat([members, everybody], dim=-1),
                credit=torch.cat([states.credit, one], dim=-1),  # nobody gives credit for a bucket
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncated:
    """`of` summed over the support alone, probabilities as they are; outside it nothing is said.

    Only a divergence if `of` is one between unequal masses: `GeneralizedReverseKL` is, `ReverseKL` is not (it moves
    a student that equals its teacher by the gradient of the mass on the support).
    """

    of: Promise
    support: Support

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        members = self.support(states)

        def cut(x: Tensor) -> Tensor:
            return torch.where(members, x, _nothing(x))

        return self.of(replace(states, student=cut(states.student), teacher=cut(states.teacher)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PerMass:
    """`of` divided by the student's mass on the support, the divisor held constant."""

    of: Promise
    support: Support

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        mass = _mass(states.student, self.support(states))[:, 0]
        return self.of(states) / mass.detach().exp()


# Combinations, and promises that compare with somebody else than the teacher.


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """`weight` times `of`."""

    weight: float
    of: Promise

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        return self.weight * self.of(states)


@dataclass(frozen=True, slots=True)
class Sum:
    """The sum of several promises. Example: `Sum((ReverseKL(), Weighted(weight=-1.0, of=FromBehavior())))`."""

    of: tuple[Promise, ...]

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        return torch.stack([part(states) for part in self.of]).sum(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class WhereUncertain:
    """`of` at states where the teacher's entropy exceeds `threshold` nats, 0 elsewhere."""

    of: Promise
    threshold: float

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        entropy = -(states.teacher.exp() * states.teacher).sum(-1)
        value = self.of(states)
        return torch.where(entropy > self.threshold, value, torch.zeros_like(value))


@dataclass(frozen=True, slots=True)
class FromBehavior:
    """KL(student||behavior): 0 and flat while the writer is the current student."""

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        return ReverseKL()(replace(states, teacher=states.behavior))


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """-sum_v mu log p: the negative log-likelihood of what the writer writes."""

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        return -(states.behavior.exp() * states.student).sum(-1)


@dataclass(frozen=True, slots=True)
class ExpectedCredit:
    """-sum_v p credit: the policy gradient of a credit that is held constant."""

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        return -(states.student.exp() * states.credit).sum(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedCredit:
    """-sum_v mu min(r A, clip(r, 1 - low, 1 + high) A), r = p / mu, A = credit (arXiv 2402.03300 eq. 3)."""

    low: float
    high: float

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        written = states.behavior.exp()
        # A token that cannot be written has no ratio; its weight below is 0.
        ratio = (states.student - torch.where(written > 0, states.behavior, _nothing(written))).exp()
        gain = torch.where(states.credit > 0, ratio.clamp(max=1 + self.high), ratio.clamp(min=1 - self.low))
        return -(written * gain * states.credit).sum(-1)


def whole(promise: Promise) -> Promise:
    """What `promise` becomes when its support is the whole vocabulary."""
    match promise:
        case Renormalized(of=of) | Coarsened(of=of) | Truncated(of=of) | PerMass(of=of):
            return whole(of)
        case Weighted(weight=weight, of=of):
            return Weighted(weight=weight, of=whole(of))
        case WhereUncertain(of=of, threshold=threshold):
            return WhereUncertain(of=whole(of), threshold=threshold)
        case Sum(of=parts):
            return Sum(tuple(whole(part) for part in parts))
    return promise


def renormalized(promise: Any) -> Iterator[Support]:
    """The supports over which any part of a promise is renormalized."""
    if isinstance(promise, Renormalized):
        yield promise.support
    inner = getattr(promise, "of", ())
    for part in inner if isinstance(inner, tuple) else (inner,):
        yield from renormalized(part)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitingCase:
    """A limiting case of an objective: `objective`'s expected gradient, times `scale`, tends to that of `promise`.

    `tolerance` is relative, and as wide as the distance from the limit. Objectives list theirs as `limits`.
    """

    name: str
    objective: Any
    promise: Promise
    scale: float = 1.0
    tolerance: float = 1e-3
