"""Promises of objectives that are others, read at another temperature or weighted by importance ratios."""

from dataclasses import dataclass, replace

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
