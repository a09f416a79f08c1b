"""Group-relative advantages from the rewards of graded answers (GRPO, arXiv 2402.03300 eq. 3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from opd.ports import Context, Need, Role, ScoreKinds
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import AdvantageScores, Scores, StopReason, TokenScores, Trajectory


async def task_rewards(trajectories: Sequence[Trajectory], context: Context) -> list[float]:
    """Rewards: an environment's where it gave one, else the grader's of the prompt's task.

    A completion that the token limit cut is wrong by definition (0), unless its grader judges such ones too; so is one
    that was cut before its environment, whose task has no grader, could answer.
    """
    graded = [0.0 if t.reward is None else t.reward for t in trajectories]
    left = [i for i, t in enumerate(trajectories) if t.reward is None]
    for task in {trajectories[i].prompt.task for i in left}:
        if task not in context.graders and task in context.environments:
            continue
        grader, mine = context.graders[task], [i for i in left if trajectories[i].prompt.task == task]
        texts = [context.tokenizer.decode(trajectories[i].token_ids) for i in mine]
        answers = [trajectories[i].prompt.answer for i in mine]
        judges_cut = getattr(grader, "judges_cut", False)
        for i, reward in zip(mine, await grader.grade(texts, answers), strict=True):
            graded[i] = reward if judges_cut or trajectories[i].stop is StopReason.END else 0.0
    return graded


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
        advantages = rewards - rewards.mean()
        if self.scale_by_std:
            advantages = advantages / (rewards.std(ddof=1) + self.epsilon)
        return [
            AdvantageScores(
                advantages=np.full(len(t), advantage, dtype=np.float32),
                rewards=np.full(len(t), reward, dtype=np.float32),
            )
            for t, advantage, reward in zip(trajectories, advantages, rewards, strict=True)
        ]
