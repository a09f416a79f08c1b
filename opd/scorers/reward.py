"""Group-relative advantages from the rewards of graded answers (GRPO, arXiv 2402.03300 eq. 3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float

from opd.method.rewards import task_rewards
from opd.ports import Context, Need, Role, ScoreKinds
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import AdvantageScores, Scores, TokenScores, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class GroupAdvantage:
    """Reward minus the group's mean, divided by its standard deviation (n - 1) plus `epsilon`.

    `scale_by_std=False` is the Dr. GRPO variant (arXiv 2503.20783). A group of equal rewards has advantage 0.
    """

    needs: ClassVar[type[Scores]] = TokenScores
    produces: ClassVar[type[Scores]] = AdvantageScores
    requires: ClassVar[ScoreKinds] = frozenset()
    min_group: ClassVar[int] = 2
    needs_engines: ClassVar[frozenset[Need]] = frozenset({Need(Role.GRADER)})

    # divide advantages by the group's standard deviation
    scale_by_std: bool = True
    # added to that standard deviation
    epsilon: Annotated[float, In(1e-12, 1, because="it keeps a division finite")] = 1e-4

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        rewards = np.asarray(await task_rewards(trajectories, context), dtype=np.float64)
        return group_advantages(trajectories, rewards, self.epsilon if self.scale_by_std else None)


def group_advantages(
    trajectories: Sequence[Trajectory], rewards: Float[np.ndarray, " n"], epsilon: float | None
) -> list[AdvantageScores]:
    """Rewards of a group less their mean, over their standard deviation plus `epsilon` unless that is None."""
    advantages = rewards - rewards.mean()
    if epsilon is not None:
        advantages = advantages / (rewards.std(ddof=1) + epsilon)
    return [
        AdvantageScores(
            advantages=np.full(len(t), advantage, dtype=np.float32),
            rewards=np.full(len(t), reward, dtype=np.float32),
        )
        for t, advantage, reward in zip(trajectories, advantages, rewards, strict=True)
    ]
