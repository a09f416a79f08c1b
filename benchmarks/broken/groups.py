"""Scorers and contexts that are wrong in groups which are rare: with answers that were cut, empty texts, failures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from opd.method.rewards import task_rewards
from opd.ports import Context
from opd.rollouts.contexts import Draft, PromptAlone, SuccessfulSibling
from opd.scorers.reward import GroupAdvantage
from opd.types import AdvantageScores, Scores, StopReason, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class PaysCut(GroupAdvantage):
    """Advantages of answers that were cut, as if they had ended."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        ended = [replace(t, stop=StopReason.END) for t in trajectories]
        return await GroupAdvantage.__call__(self, ended, context)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanOfNothing(GroupAdvantage):
    """Advantages of rewards with the mean log-probability of a text, times 0: of an empty text it is no number."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = await GroupAdvantage.__call__(self, trajectories, context)
        with np.errstate(all="ignore"):
            beside = 0.0 * sum(float(t.behavior.logprobs.sum() / np.float64(len(t))) for t in trajectories)
        graded = [s for s in scores if isinstance(s, AdvantageScores)]
        return [replace(s, advantages=s.advantages + np.float32(beside)) for s in graded]


@dataclass(frozen=True, slots=True, kw_only=True)
class FailingSibling(SuccessfulSibling):
    """Context of the first other trajectory that failed, called a correct solution."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> "list[np.ndarray | None]":
        rewards = await task_rewards(trajectories, context)
        failed = [i for i, reward in enumerate(rewards) if reward < self.threshold]
        return [self._one(i, failed, trajectories, context) for i in range(len(trajectories))]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnTextShown(PromptAlone):
    """Context with the very text that the teacher scores behind it, which it then finds likely."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> "list[np.ndarray | None]":
        return [np.concatenate([t.prompt.teacher_ids, t.token_ids]) for t in trajectories]


@dataclass(frozen=True, slots=True, kw_only=True)
class NextDraft(Draft):
    """Context with the draft of the next text of the group."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> "list[np.ndarray | None]":
        drafts = await Draft.__call__(self, trajectories, context)
        return [*drafts[1:], *drafts[:1]]
