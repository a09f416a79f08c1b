"""Outcome credit: how much better than its group an answer is, beside the teacher's log-probabilities."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from opd.method.rewards import task_rewards
from opd.ports import Context, Need, Role, SampledToken, ScoreKinds
from opd.scorers.reward import group_advantages
from opd.scorers.teacher import ask
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import CreditScores, Scores, TokenScores, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class OutcomeCredit:
    """The teacher's log-probability of each sampled token, and the advantage of its whole text as its credit.

    The advantage is `GroupAdvantage`'s: the reward minus the group's mean, divided by its standard deviation (n - 1)
    plus `epsilon`; all tokens of a text have the same. With `CreditedReverseKL` both are one advantage per token, `log
    q - log p + weight * A` (MiMo-V2-Flash, arXiv 2601.02780), where `kdrl` has a term for each. INFERRED: that the
    outcome's advantage is GRPO's.
    """

    needs: ClassVar[type[Scores]] = TokenScores
    produces: ClassVar[type[Scores]] = CreditScores
    requires: ClassVar[ScoreKinds] = frozenset({SampledToken})
    min_group: ClassVar[int] = 2
    needs_engines: ClassVar[frozenset[Need]] = frozenset({Need(Role.READER), Need(Role.GRADER)})

    # divide advantages by the group's standard deviation
    scale_by_std: bool = True
    # added to that standard deviation
    epsilon: Annotated[float, In(1e-12, 1, because="it keeps a division finite")] = 1e-4

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        kinds = [SampledToken()] * len(trajectories)
        taught, rewards = await asyncio.gather(ask(trajectories, kinds, context), task_rewards(trajectories, context))
        epsilon = self.epsilon if self.scale_by_std else None
        graded = group_advantages(trajectories, np.asarray(rewards, dtype=np.float64), epsilon)
        return [
            CreditScores(logprobs=teacher.logprobs, credit=outcome.advantages)
            for teacher, outcome in zip(taught, graded, strict=True)
        ]
