"""Promises about rewards that are a function of the log-ratio, and about none: what policy gradients on them descend.

Beside the divergences of `opd.method.promises`: `of`-less values that are called with `States` and return one number
per state, whose gradient is the claim.
"""

from dataclasses import dataclass
from math import log

import torch
from jaxtyping import Float
from torch import Tensor

from opd.method.promises import FromBehavior, Promise, ReverseKL, States, Sum, Weighted


def _gain(states: States, reward: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """Expected reward of a token that the student draws, the reward held constant, with the sign turned."""
    return -(states.student.exp() * reward.detach()).sum(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedLogRatio:
    """-sum_v p sg(min(max(log q - log p, -limit), limit)): of no reward is more than `limit` left."""

    limit: float

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        reward = states.teacher - states.student
        bound = torch.full_like(reward, self.limit)
        return _gain(states, torch.minimum(torch.maximum(reward, -bound), bound))


@dataclass(frozen=True, slots=True, kw_only=True)
class FlooredLogRatio:
    """-sum_v p sg(r), r = d = log q - log p where that is at least `least`; elsewhere `least` if `counted`, else 0."""

    least: float
    counted: bool

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        reward = states.teacher - states.student
        other = self.least if self.counted else 0.0
        return _gain(states, torch.where(reward < self.least, torch.full_like(reward, other), reward))


@dataclass(frozen=True, slots=True)
class SignLogRatio:
    """-sum_v p sg(sign(d) log(1 + |d|)), d = log q - log p."""

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        reward = states.teacher - states.student
        size = (1 + reward.abs()).log()
        return _gain(states, torch.where(reward < 0, -size, size))


@dataclass(frozen=True, slots=True, kw_only=True)
class BeyondDeviation:
    """-sum_v p sg(sign(d) max(|d| - relaxation * m, 0)), d = log q - log p; m is how far log q may move towards log p.

    `credit` has two numbers of every id: how far the teacher's log-probability of it falls, and how far it rises.
    """

    relaxation: float

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        gap = states.teacher - states.student.detach()
        falls, rises = states.credit.unbind(-1)
        left = (gap.abs() - self.relaxation * torch.where(gap > 0, falls, rises)).clamp(min=0)
        return _gain(states, torch.where(gap > 0, left, -left))


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreeingDelta:
    """-sum_v p sg(d), d = `credit` less its mean under the student on the support, over the ids that `agree`.

    An id agrees if the log-ratio log q - log p, less its own such mean, has the sign of d.
    """

    center: bool
    agree: bool

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        student = states.student.detach()

        def relative(signal: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
            mean = torch.where(states.support, student.exp() * signal, 0.0).sum(-1, keepdim=True)
            return signal - mean if self.center else signal

        delta, gap = relative(states.credit), relative(states.teacher - student)
        counted = ((delta > 0) & (gap > 0)) | ((delta < 0) & (gap < 0))
        return _gain(states, torch.where(counted, delta, 0.0) if self.agree else delta)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnlikelyMass:
    """Sum of p over the ids with p < `below`; which these are is held constant."""

    below: float

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        counted = states.student.detach() < log(self.below)
        return torch.where(counted, states.student.exp(), 0.0).sum(-1)


@dataclass(frozen=True, slots=True)
class Nothing:
    """0 at every state: the expected gradient must be exactly 0. For arms that claim to descend nothing.

    A certificate then asks that it is 0, in place of asking that it is not.
    """

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        return (states.student * 0.0).sum(-1)


def ignores_constants(promise: Promise | None) -> bool:
    """Whether the gradient of a promise stays as it is when a constant per state is added to the teacher's row."""
    match promise:
        case Weighted(of=of):
            return ignores_constants(of)
        case Sum(of=parts):
            return all(ignores_constants(part) for part in parts)
        case ReverseKL() | FromBehavior():
            return True
    return False
