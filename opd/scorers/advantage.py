"""Advantages from a teacher: shaped rewards of tokens, with those of later tokens, relative to their group."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
import torch
from jaxtyping import Float

from opd.method.shapes import ProximalTeacher, Shape
from opd.ports import Context, Need, Role, SampledToken, ScoreKinds
from opd.scorers.teacher import SampledTokens
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import AdvantageScores, Scores, TokenScores, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class TeacherAdvantage:
    """Advantage of each token from its teacher's reward `r = shape(log q - log mu)` (TOP-D, arXiv 2607.04751).

    With `later` a token's return is its own reward and the mean of those of the tokens after it (eq. 8; the last one
    has its own alone); with `normalized` it is taken relative to all tokens of the group, `(R - mean) / (std +
    epsilon)` (eq. 9). `mu` is the policy that sampled, as published, held constant. Only sampled tokens count. The
    standard deviation is that of a sample (n - 1), 0 of a single token: INFERRED, as an implementation for prime-rl has
    it. A group that has one value everywhere has advantage 0. `shape` with `alpha` 1 and neither of both is the reward
    of plain distillation.
    """

    needs: ClassVar[type[Scores]] = TokenScores
    produces: ClassVar[type[Scores]] = AdvantageScores
    requires: ClassVar[ScoreKinds] = frozenset({SampledToken})
    needs_engines: ClassVar[frozenset[Need]] = frozenset({Need(Role.READER)})
    min_group: ClassVar[int] = 1

    # reward as a function of the log-ratio
    shape: Shape = field(default_factory=ProximalTeacher)
    # add the mean reward of later tokens
    later: bool = True
    # take a return relative to those of all tokens of the group
    normalized: bool = True
    # added to the group's standard deviation
    epsilon: Annotated[float, In(1e-12, 1, because="it keeps a division finite")] = 1e-6

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = await SampledTokens()(trajectories, context)
        taught = [np.asarray(s.logprobs) for s in scores if isinstance(s, TokenScores)]
        rewards = [self._rewards(t, q) for t, q in zip(trajectories, taught, strict=True)]
        masks = [t.loss_mask for t in trajectories]
        gains = [with_later(r, m) if self.later else r for r, m in zip(rewards, masks, strict=True)]
        if self.normalized:
            gains = relative(gains, masks, self.epsilon)
        return [
            AdvantageScores(advantages=np.where(m, g, 0).astype(np.float32), rewards=r.astype(np.float32))
            for g, r, m in zip(gains, rewards, masks, strict=True)
        ]

    def _rewards(self, trajectory: Trajectory, taught: Float[np.ndarray, " T"]) -> Float[np.ndarray, " T"]:
        """Reward of every token in float64; 0 at context."""
        log_ratio = torch.from_numpy((taught - trajectory.behavior.logprobs).astype(np.float64))
        return np.where(trajectory.loss_mask, self.shape.reward(log_ratio).numpy(), 0.0)


def with_later(rewards: Float[np.ndarray, " T"], counted: np.ndarray) -> Float[np.ndarray, " T"]:
    """Each reward and the mean of the counted rewards after it; `rewards` are 0 where `counted` is False."""
    after = rewards[::-1].cumsum()[::-1] - rewards
    number = counted[::-1].cumsum()[::-1] - counted
    return rewards + after / np.maximum(number, 1)


def relative(
    gains: Sequence[Float[np.ndarray, " _T"]], masks: Sequence[np.ndarray], epsilon: float
) -> list[Float[np.ndarray, " _T"]]:
    """Distances from the mean of all counted tokens, in their standard deviations."""
    counted = np.concatenate([g[m] for g, m in zip(gains, masks, strict=True)])
    if not len(counted):
        return list(gains)
    spread = counted.std(ddof=1) if len(counted) > 1 else 0.0
    return [(g - counted.mean()) / (spread + epsilon) for g in gains]
