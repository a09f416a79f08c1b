"""Scorers, weights and normalizers that give the wrong credit or target, beside objectives that are right."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from opd.loss.packing import SequenceMean, TokenWeights
from opd.ports import Context, ScoreKinds
from opd.scorers.near_future import FutureDistances, NearFuture
from opd.scorers.returns import WithReturns, returns
from opd.scorers.reward import GroupAdvantage
from opd.scorers.teacher import SampledTokens
from opd.types import (
    AdvantageScores,
    CreditScores,
    FutureScores,
    Scored,
    Scores,
    StopReason,
    TokenScores,
    TopKReturnScores,
    Trajectory,
)


def _returns(trajectories: Sequence[Trajectory], scores: Sequence[Scores], of: Any) -> list[Scores]:
    """The scores with other returns, made by `of` from the rewards `log q - log mu`."""
    return [
        replace(s, returns=np.asarray(of(np.where(t.loss_mask, s.logprobs - t.behavior.logprobs, 0)), dtype=np.float64))
        for t, s in zip(trajectories, scores, strict=True)
        if isinstance(s, TopKReturnScores)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class PastReturns(WithReturns):
    """Returns of the tokens *before*, with the wrong sign."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = await WithReturns.__call__(self, trajectories, context)
        return _returns(trajectories, scores, lambda rewards: rewards - np.cumsum(rewards))


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortReturns(WithReturns):
    """Returns over the next 32 tokens alone."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = await WithReturns.__call__(self, trajectories, context)

        def of(rewards: np.ndarray) -> list[float]:
            seen = [rewards[i : i + 33] for i in range(len(rewards))]
            return [returns(part, self.discount, self.length_normalized)[0] for part in seen]

        return _returns(trajectories, scores, of)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnReward(WithReturns):
    """Returns that begin with the token's own reward, which the objective counts a second time."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = await WithReturns.__call__(self, trajectories, context)
        return _returns(trajectories, scores, lambda rewards: np.cumsum(rewards[::-1])[::-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleIgnored(WithReturns):
    """Rewards that ignore `reward_scale`, which does not show while that is 1."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        return await WithReturns.__call__(replace(self, reward_scale=1.0), trajectories, context)


@dataclass(frozen=True, slots=True, kw_only=True)
class NegatedAdvantage(GroupAdvantage):
    """Greater advantages for worse answers."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = await GroupAdvantage.__call__(self, trajectories, context)
        return [replace(s, advantages=-s.advantages) for s in scores if isinstance(s, AdvantageScores)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthAdvantage(GroupAdvantage):
    """Advantages divided by the length of their text: of two wrong answers the longer one is less wrong."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = await GroupAdvantage.__call__(self, trajectories, context)
        made = [s for s in scores if isinstance(s, AdvantageScores)]
        return [replace(s, advantages=s.advantages / len(s.advantages)) for s in made]


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenTeacher(GroupAdvantage):
    """Group advantages plus a teacher's bonus, which neither name nor promise mentions."""

    requires: ClassVar[ScoreKinds] = SampledTokens.requires

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = await GroupAdvantage.__call__(self, trajectories, context)
        teacher = await SampledTokens()(trajectories, context)
        return [
            replace(s, advantages=s.advantages + t.logprobs)
            for s, t in zip(scores, teacher, strict=True)
            if isinstance(s, AdvantageScores) and isinstance(t, TokenScores)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alphabetical(SampledTokens):
    """Scores of the texts, in alphabetical order of the texts."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = await SampledTokens.__call__(self, trajectories, context)
        by_length: dict[int, list[int]] = {}
        for i, t in enumerate(trajectories):
            by_length.setdefault(len(t), []).append(i)
        turned = {
            i: j
            for same in by_length.values()
            for i, j in zip(same, sorted(same, key=_name(trajectories)), strict=True)
        }
        return [scores[turned[i]] for i in range(len(scores))]


def _name(trajectories: Sequence[Trajectory]) -> Any:
    return lambda i: str(trajectories[i].token_ids.tolist())


@dataclass(frozen=True, slots=True, kw_only=True)
class Ungated(NearFuture):
    """Soft labels of every candidate's window, whether student and teacher part there or not."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        settings: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(NearFuture)}
        settings["quantile"] = 0.0
        return await NearFuture(**settings)(trajectories, context)


@dataclass(frozen=True, slots=True, kw_only=True)
class LateDistances(FutureDistances):
    """Distances of near futures at the token after the candidate."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        right = FutureDistances(**{f.name: getattr(self, f.name) for f in fields(FutureDistances)})
        found = await right(trajectories, context)
        return [replace(s, ahead=np.roll(s.ahead, 1)) for s in found if isinstance(s, FutureScores)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surprise:
    """Token weights that grow with the behavior's surprise: the estimate has another expectation.

    It does not say so; `Method` would refuse it otherwise.
    """

    consumes: ClassVar[type[Scores]] = TokenScores
    reads_sampled_tokens: ClassVar[bool] = False

    def __call__(self, scored: Sequence[Scored[Any]], context: Any) -> list[Float[np.ndarray, " _T"]]:
        return [np.maximum(-np.asarray(s.trajectory.behavior.logprobs, dtype=np.float64), 0.0) for s in scored]


@dataclass(frozen=True, slots=True, kw_only=True)
class EveryTokenMean:
    """Normalizer that counts all tokens, masked ones and texts without weight included."""

    def __call__(self, weights: Sequence[TokenWeights]) -> float:
        return float(sum(len(w) for w in weights))


@dataclass(frozen=True, slots=True, kw_only=True)
class NotItsOwnLength(SequenceMean):
    """A mean over texts whose tokens are not divided by the length of their own: long texts count more."""

    per_sequence: ClassVar[bool] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoneText(SampledTokens):
    """Credit of a text by its place in its group, in deviations of n - 1: 0/0 of a text that is alone."""

    produces: ClassVar[type[Scores]] = CreditScores

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = [s for s in await SampledTokens()(trajectories, context) if isinstance(s, TokenScores)]
        mean = np.array([np.mean(s.logprobs) for s in scores])
        with np.errstate(all="ignore"):
            place = (mean - mean.mean()) / (np.sum((mean - mean.mean()) ** 2) / (len(mean) - np.float64(1))) ** 0.5
        return [
            CreditScores(logprobs=s.logprobs, credit=np.full(len(s.logprobs), x, dtype=np.float32))
            for s, x in zip(scores, place, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextRewarded(WithReturns):
    """Returns in which the words of an environment have a reward, from log-probabilities that nothing gave them."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        everything = [replace(t, loss_mask=np.ones(len(t), dtype=bool)) for t in trajectories]
        return await WithReturns.__call__(self, everything, context)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextDiscounts(WithReturns):
    """Returns discounted, and divided, by the words of an environment between the student's own."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = await WithReturns.__call__(self, trajectories, context)
        scale, how = self.reward_scale, (self.discount, self.length_normalized, self.own_reward)
        return _returns(trajectories, scores, lambda rewards: returns(rewards * scale, *how))


@dataclass(frozen=True, slots=True, kw_only=True)
class CutRewarded(GroupAdvantage):
    """Rewards also for texts that the token limit cut."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        return await GroupAdvantage.__call__(self, [replace(t, stop=StopReason.END) for t in trajectories], context)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedMean(SampledTokens):
    """The mean log-probability of a text as credit, over as many tokens as the longest of its group is padded to."""

    produces: ClassVar[type[Scores]] = CreditScores

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = [s for s in await SampledTokens()(trajectories, context) if isinstance(s, TokenScores)]
        longest = max(map(len, trajectories))
        return [
            CreditScores(logprobs=s.logprobs, credit=np.full(len(s.logprobs), s.logprobs.sum() / longest))
            for s in scores
        ]
