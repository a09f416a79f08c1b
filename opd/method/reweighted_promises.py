"""Promises of objectives that are others: at another temperature, to another target, weighted by importance ratios."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from opd.method.promises import Promise, States


@dataclass(frozen=True, slots=True, kw_only=True)
class AtTemperature:
    """`of` between both distributions at a temperature: logits divided by it."""

    of: Promise
    temperature: float

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        def softened(x: Tensor) -> Tensor:
            return (x / self.temperature).log_softmax(-1)

        return self.of(replace(states, student=softened(states.student), teacher=softened(states.teacher)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bridge:
    """`of` between the student p and `q^teacher_power p^student_power / Z`, q the teacher; that target is constant.

    Of an objective whose powers follow a schedule it has the schedules, and is called at a step, where they are
    numbers (`opd.method.schedules.with_values`).
    """

    of: Promise
    teacher_power: Any
    student_power: Any

    @property
    def rests_at(self) -> float:
        """Power of a student's distribution as the teacher of which the student is left alone."""
        return (1 - self.student_power) / self.teacher_power if self.teacher_power else 1.0

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        between = states.teacher.exp() ** self.teacher_power * states.student.detach().exp() ** self.student_power
        return self.of(replace(states, teacher=(between / between.sum(-1, keepdim=True)).log()))


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioWeighted:
    """`of` times the expected bounded importance ratio `sum_v mu min(p / mu, max_ratio)`, which is held constant.

    That factor is 1 where no ratio is above the bound, and below 1 elsewhere.
    """

    of: Promise
    max_ratio: float

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        sampled = states.behavior.exp()
        kept = states.student.detach().exp().minimum(sampled * self.max_ratio)
        return self.of(states) * kept.sum(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class WhereEvident:
    """`sum_v p sg(log p - log q)` over the ids whose evidence (`credit`) is above `threshold`.

    Without `corrected` an id counts as often as the behavior samples it: `sum_v mu sg(log p - log q) log p`.
    """

    threshold: float
    corrected: bool

    def __call__(self, states: States) -> Float[Tensor, " n"]:
        cost = (states.student - states.teacher).detach()
        kept = torch.where(states.credit > self.threshold, cost, 0.0)
        weight = states.student.exp() if self.corrected else states.behavior.exp() * states.student
        return (weight * kept).sum(-1)
