"""Shapes of rewards: functions that clip, compress or bound a sampled token's log-ratio `d = log q - log p`.

The log-ratio itself has no lower bound: one token that the teacher rules out can decide a step, and these forms are
published against that.
"""

from dataclasses import dataclass
from enum import Enum
from math import inf, log
from typing import Annotated, Protocol

import torch
from torch import Tensor

from opd.method import promises as exact
from opd.method import reward_promises as rewards
from opd.settings.ranges import In
from opd.settings.validation import settings


class Shape(Protocol):
    """Function that turns the log-ratio of teacher and student into the reward of a token."""

    @property
    def promise(self) -> exact.Promise:
        """Divergence, or gain with the sign turned, that a policy gradient on the reward descends."""
        ...

    def reward(self, log_ratio: Tensor) -> Tensor:
        """Reward of every token; 0 where the log-ratio is 0."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Clip:
    """`clip(d, -limit, limit)`: the hard clip of arXiv 2607.13399; Revisiting OPD's code (arXiv 2603.25562) has 5."""

    # largest reward, of either sign, in nats
    limit: Annotated[float, In(1e-3, 1e6, because="0 trains nothing")] = 5.0

    @property
    def promise(self) -> exact.Promise:
        return rewards.ClippedLogRatio(limit=self.limit)

    def reward(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.clamp(-self.limit, self.limit)


class Below(Enum):
    """Reward of a token whose log-ratio is below the floor."""

    FLOOR = "floor"  # the floor itself
    NOTHING = "nothing"  # 0: the token is not trained


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class Floor:
    """`max(d, floor)`, or d where it is at least the floor and else 0 (REOPOLD, arXiv 2603.11137 eq. 7).

    The floor is `log(mixture / (1 - mixture))`: -1.39 nats of 0.2. A `mixture` of 0 has none.
    """

    # share that the floor is made of; 0 is no floor, and 0.5 leaves no reward below 0
    mixture: Annotated[float, In(0, 0.5, because="above it, a token on which both agree would be rewarded")] = 0.2
    # reward of what is below the floor: the FLOOR, or NOTHING
    below: Below = Below.FLOOR

    @property
    def least(self) -> float:
        """Floor of the rewards in nats."""
        return log(self.mixture / (1 - self.mixture)) if self.mixture else -inf

    @property
    def promise(self) -> exact.Promise:
        if not self.mixture:
            return exact.ReverseKL()
        return rewards.FlooredLogRatio(least=self.least, counted=self.below is Below.FLOOR)

    def reward(self, log_ratio: Tensor) -> Tensor:
        if self.below is Below.FLOOR:
            return log_ratio.clamp(min=self.least)
        return torch.where(log_ratio >= self.least, log_ratio, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SignLog:
    """`sign(d) log(1 + |d|)`: small log-ratios as they are, large ones compressed (arXiv 2607.13399)."""

    @property
    def promise(self) -> exact.Promise:
        return rewards.SignLogRatio()

    def reward(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.sign() * log_ratio.abs().log1p()


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class ProximalTeacher:
    """`log(alpha q/p + 1 - alpha)`: the log-ratio to the mixture of teacher and student (TOP-D, arXiv 2607.04751).

    Never below `log(1 - alpha)`. It is the slope of JSD(alpha) divided by `alpha - 1`, so that what it descends is
    a divergence; `alpha` 1 is the teacher itself and plain distillation.
    """

    # share of the teacher in the mixture; 1 is the teacher itself
    alpha: Annotated[float, In(1e-3, 1)] = 0.2

    @property
    def promise(self) -> exact.Promise:
        if self.alpha == 1:
            return exact.ReverseKL()
        return exact.Weighted(weight=1 / (1 - self.alpha), of=exact.JensenShannon(self.alpha))

    def reward(self, log_ratio: Tensor) -> Tensor:
        if self.alpha == 1:
            return log_ratio
        taught = log_ratio + log(self.alpha)
        return torch.logaddexp(taught, torch.full_like(taught, log(1 - self.alpha)))
