"""Returns of tokens: the discounted sum of the log-ratios of teacher and student at later tokens (MiniLLM)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float

from opd.ports import Context, ScoreKinds, TopK
from opd.scorers.teacher import TeacherTopK
from opd.settings.ranges import Fraction, In, TopIds
from opd.settings.validation import settings
from opd.types import Scores, TokenScores, TopKReturnScores, TopKScores, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class WithReturns:
    """The teacher's top-k, plus the return of every token: discounted rewards of the tokens after it.

    Reward of a token: `log q - log mu`, times `reward_scale`. With `length_normalized` a return is divided by the
    number of the student's own tokens that remain (MiniLLM, arXiv 2306.08543); words of an environment between them
    have no reward, are not counted and discount nothing. `mu` is the behavior: of stale text a return is that of
    the policy that sampled it, held constant, and not the current student's. Published in code: discount 0.95, and
    rewards divided by 0.5 before the advantages are whitened, which undoes it; the paper's equation has `reward_scale`
    1.

    The paper's long-term part credits a token with what comes after it, because its own reward is the single-step part,
    which is exact; that is the default. The released code also has the token's own reward in the return (`own_reward`),
    so the single step counts twice: once exactly, once sampled.
    """

    needs: ClassVar[type[Scores]] = TokenScores
    produces: ClassVar[type[Scores]] = TopKReturnScores
    requires: ClassVar[ScoreKinds] = frozenset({TopK})
    min_group: ClassVar[int] = 1

    # likeliest tokens of the teacher at each position
    k: TopIds = 16
    # decay of later rewards in a return
    discount: Fraction = 1.0
    # divide a return by the tokens that remain
    length_normalized: bool = True
    # count a token's own reward in its return, as the released code does
    own_reward: bool = False
    # factor of the rewards
    reward_scale: Annotated[float, In(1e-6, 1e6)] = 1.0

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = await TeacherTopK(k=self.k)(trajectories, context)
        return [self._with(t, s) for t, s in zip(trajectories, scores, strict=True) if isinstance(s, TopKScores)]

    def _with(self, trajectory: Trajectory, scores: TopKScores) -> TopKReturnScores:
        own = trajectory.loss_mask
        rewards = np.asarray(scores.logprobs - trajectory.behavior.logprobs)[own] * self.reward_scale
        found = np.zeros(len(own), dtype=rewards.dtype)  # what others say has no reward, and takes no time
        found[own] = returns(rewards, self.discount, self.length_normalized, self.own_reward)
        return TopKReturnScores(
            logprobs=scores.logprobs,
            topk_ids=scores.topk_ids,
            topk_logprobs=scores.topk_logprobs,
            rest=scores.rest,
            returns=found,
        )


def returns(
    rewards: Float[np.ndarray, " T"], discount: float, length_normalized: bool, own_reward: bool = False
) -> Float[np.ndarray, " T"]:
    """Returns of tokens: `sum_{t' > t} discount^(t' - t - 1) r_{t'}`; 0 at the last token.

    `length_normalized` divides each by the number of its terms. With `own_reward` the sum begins at `t` itself, with
    `discount^(t' - t)`.
    """
    total = np.zeros_like(rewards)
    for t in range(len(rewards) - 2, -1, -1):
        total[t] = rewards[t + 1] + discount * total[t + 1]
    remaining = np.maximum(np.arange(len(rewards))[::-1], 1)
    if own_reward:
        total, remaining = rewards + discount * total, np.arange(len(rewards), 0, -1)
    return (total / remaining if length_normalized else total).astype(rewards.dtype)
