"""Exact divergences per state over the whole vocabulary, of which an objective's `promise` is composed.

A promise is a frozen value that is called with `States` and returns one number per state. The expected gradient of
the objective that states it, tokens drawn from the behavior policy and states held fixed, must be the gradient of that
number; `opd.certify` compares the two by enumeration. Promises are written for reading and checking (float64, small
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
    """Log-probabilities of student, teacher and behavior policy at `n` states, with support and credit of every id.

    `student` carries the gradient. `behavior` is the distribution that was sampled from. `support` marks the ids that
    the scores are about. `credit` is the signed credit of sampling each id, or several numbers of each in a last axis;
    `target` each id's probability in a target distribution, on average over what may be sampled (0: there is none).
    """

    student: Float[Tensor, "n V"]
    teacher: Float[Tensor, "n V"]
    behavior: Float[Tensor, "n V"]
    support: Bool[Tensor, "n V"]
    credit: Float[Tensor, "n V *numbers"]
    target: Float[Tensor, "n V"]


class Promise(Protocol):
    """Exact divergence per state whose gradient is the expected gradient of an objective."""

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        """One differentiable number per state."""
        ...


class Support(Protocol):
    """Set of ids that a divergence is computed on; a function of the state, never of the token that was sampled."""

    def __call__(self, states: States) -> Bool[Tensor, "n V"]:
        """Mask of the ids in the set; no gradient."""
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
    """Support of the ids that the scores are about."""

    def __call__(self, states: States) -> Bool[Tensor, "n V"]:
        return states.support


def top(logprobs: Float[Tensor, "n V"], k: int) -> Bool[Tensor, "n V"]:
    """Mask of the `k` likeliest ids of every row (all ids where the vocabulary is smaller)."""
    ids = logprobs.detach().topk(min(k, logprobs.shape[-1]), dim=-1).indices
    return torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, ids, True)


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class _TopK:
    # ids of each top-k
    k: TopIds = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherTop(_TopK):
    """Support of the teacher's `k` likeliest ids."""

    def __call__(self, states: States) -> Bool[Tensor, "n V"]:
        return top(states.teacher, self.k)


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentTop(_TopK):
    """Support of the current student's `k` likeliest ids."""

    def __call__(self, states: States) -> Bool[Tensor, "n V"]:
        return top(states.student, self.k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Union(_TopK):
    """Support of the ids among the `k` likeliest of the current student or of the teacher."""

    def __call__(self, states: States) -> Bool[Tensor, "n V"]:
        return top(states.student, self.k) | top(states.teacher, self.k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Intersection(_TopK):
    """Support of the ids among the `k` likeliest of both; at a state where it is empty the divergence is 0."""

    def __call__(self, states: States) -> Bool[Tensor, "n V"]:
        return top(states.student, self.k) & top(states.teacher, self.k)


# A direction on a support.


def _mass(logprobs: Float[Tensor, "n V"], members: Bool[Tensor, "n V"]) -> Float[Tensor, "n 1"]:
    """Log of the probability mass of the members of every row; of all ids where there is no member (then not used)."""
    counted = members | ~members.any(-1, keepdim=True)
    return torch.where(counted, logprobs, -torch.inf).logsumexp(-1, keepdim=True)


def _zeros(logprobs: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
    return torch.zeros_like(logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Renormalized:
    """`of` between both distributions renormalized over the support; the mass on the support does not matter."""

    of: Promise
    support: Support

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        members = self.support(states)

        def conditioned(x: Tensor) -> Tensor:
            return torch.where(members, x - _mass(x, members), _zeros(x))

        return self.of(replace(states, student=conditioned(states.student), teacher=conditioned(states.teacher)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Coarsened:
    """`of` between both distributions with all ids outside the support merged into one bucket."""

    of: Promise
    support: Support

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        members = self.support(states)

        def merged(x: Tensor) -> Tensor:
            outside = _mass(x, ~members)
            bucket = torch.where(members.all(-1, keepdim=True), torch.zeros_like(outside), outside)
            return torch.cat([torch.where(members, x, _zeros(x)), bucket], dim=-1)

        no_credit, member = torch.zeros_like(states.credit[:, :1]), torch.ones_like(members[:, :1])
        return self.of(
            States(
                student=merged(states.student),
                teacher=merged(states.teacher),
                behavior=merged(states.behavior),
                support=torch.cat([members, member], dim=-1),
                credit=torch.cat([states.credit, no_credit], dim=1),  # a bucket has none
                target=torch.cat([states.target, torch.zeros_like(states.target[:, :1])], dim=-1),
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncated:
    """`of` summed over the support alone, with probabilities as they are.

    Only a divergence if `of` is one between unequal masses: `GeneralizedReverseKL` is, `ReverseKL` is not (it moves
    a student that equals its teacher by the gradient of the mass on the support).
    """

    of: Promise
    support: Support

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        members = self.support(states)

        def cut(x: Tensor) -> Tensor:
            return torch.where(members, x, _zeros(x))

        return self.of(replace(states, student=cut(states.student), teacher=cut(states.teacher)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PerMass:
    """`of` divided by the student's probability mass on the support, the divisor held constant."""

    of: Promise
    support: Support

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        mass = _mass(states.student, self.support(states))[:, 0]
        return self.of(states) / mass.detach().exp()


# Combinations, and promises without the teacher.


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
    """-sum_v mu log p: the expected negative log-likelihood of sampled tokens."""

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        return -(states.behavior.exp() * states.student).sum(-1)


@dataclass(frozen=True, slots=True)
class FromTarget:
    """KL(target||student), the cross-entropy with a target distribution less its entropy; 0 where there is none."""

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        y = states.target
        return torch.where(y > 0, y * (torch.where(y > 0, y, 1.0).log() - states.student), 0.0).sum(-1)


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
        sampled = states.behavior.exp()
        # A token that cannot be sampled has no ratio; its weight below is 0.
        ratio = (states.student - torch.where(sampled > 0, states.behavior, _zeros(sampled))).exp()
        gain = torch.where(states.credit > 0, ratio.clamp(max=1 + self.high), ratio.clamp(min=1 - self.low))
        return -(sampled * gain * states.credit).sum(-1)


def on_whole_vocabulary(promise: Promise) -> Promise:
    """The promise with the whole vocabulary as its support."""
    match promise:
        case Renormalized(of=of) | Coarsened(of=of) | Truncated(of=of) | PerMass(of=of):
            return on_whole_vocabulary(of)
        case Sum(of=parts):
            return Sum(tuple(on_whole_vocabulary(part) for part in parts))
    inner = getattr(promise, "of", None)  # of whatever else is made of another promise
    changed: Any = promise
    return promise if inner is None else replace(changed, of=on_whole_vocabulary(inner))


def renormalized_supports(promise: Any) -> Iterator[Support]:
    """Supports over which any part of a promise is renormalized."""
    if isinstance(promise, Renormalized):
        yield promise.support
    inner = getattr(promise, "of", ())
    for part in inner if isinstance(inner, tuple) else (inner,):
        yield from renormalized_supports(part)


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitingCase:
    """Limiting case of an objective: the expected gradient of `objective`, times `scale`, tends to that of `promise`.

    `tolerance` is relative, and as wide as the distance from the limit. Objectives list theirs as `limits`.
    """

    name: str
    objective: Any
    promise: Promise
    scale: float = 1.0
    tolerance: float = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutLimit:
    """Limiting case of a rollout: `rollout`, at an end of its range, gives the text of `equals`."""

    name: str
    rollout: Any
    equals: Any
