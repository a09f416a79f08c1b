"""Updates, schedules and parts that go wrong while a run goes on, beside objectives that are right."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import ClassVar

import numpy as np

from opd.method.schedules import LinearSchedule
from opd.ports import Context, Learner, LossFunction
from opd.rollouts.blended import BlendedRollout
from opd.rollouts.mixed import AnswerRollout, Mixed
from opd.rollouts.seeds import heads
from opd.scorers.teacher import SampledTokens
from opd.types import Batch, Prompt, Scores, StepReport, StopReason, TokenScores, Trajectory
from opd.updates.extrapolated import ExtrapolatedStep
from opd.updates.optimizer import OptimizerStep

Batches = Sequence[Sequence[Batch[Scores]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SteppedTwice(OptimizerStep):
    """Two steps on the same batch, the second off-policy."""

    async def __call__(
        self, learner: Learner, batches: Batches, objective: LossFunction, context: Context
    ) -> StepReport:
        await learner.step(batches, objective)
        return await learner.step(batches, objective)


@dataclass(frozen=True, slots=True, kw_only=True)
class EveryOther(OptimizerStep):
    """Every second update taken back, by a count of its own that no checkpoint has."""

    calls: ClassVar[Iterator[int]] = count()

    async def __call__(
        self, learner: Learner, batches: Batches, objective: LossFunction, context: Context
    ) -> StepReport:
        await learner.snapshot("before")
        report = await learner.step(batches, objective)
        if next(self.calls) % 2:
            await learner.restore("before")
        return report


@dataclass(frozen=True, slots=True, kw_only=True)
class FromTheStart(ExtrapolatedStep):
    """Every way measured from the weights of the start, not from where the last search ended."""

    async def _note_origin(self, learner: Learner, *, jumped: bool) -> None:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Backwards(LinearSchedule):
    """A schedule that begins at its end."""

    def __call__(self, context: Context) -> float:
        return LinearSchedule(first=self.last, last=self.first, steps=self.steps)(context)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unblended(BlendedRollout):
    """Trust-region blending without a blend: the student writes alone."""

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        return await self.student(group, context)


@dataclass(frozen=True, slots=True, kw_only=True)
class FromTheSecondStep(SampledTokens):
    """Scores of the token before, from the second step of a run on."""

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        scores = await SampledTokens()(trajectories, context)
        if not context.step:
            return scores
        return [replace(s, logprobs=np.roll(s.logprobs, 1)) for s in scores if isinstance(s, TokenScores)]


@dataclass(frozen=True, slots=True, kw_only=True)
class EndsEarly(LinearSchedule):
    """A schedule that is at its end after half of its steps."""

    def __call__(self, context: Context) -> float:
        whole = self.steps or context.steps
        return LinearSchedule(first=self.first, last=self.last, steps=max(1, whole // 2))(context)


@dataclass(frozen=True, slots=True, kw_only=True)
class OneCoin(Mixed):
    """One coin for the whole run: all prompts have the same source."""

    def student_generates(self, prompt_id: str, step: int = 0) -> bool:
        return heads(self.seed, "run", self.fraction)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndlessAnswers(AnswerRollout):
    """Answers of a data set without the token that ends them."""

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        return [_endless(t) for t in await AnswerRollout.__call__(self, group, context)]


def _endless(text: Trajectory) -> Trajectory:
    kept = np.arange(len(text) - (text.stop is StopReason.END))
    return replace(
        text,
        token_ids=text.token_ids[kept],
        behavior=text.behavior.take(kept),
        loss_mask=text.loss_mask[kept],
        versions=text.versions[kept],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TakenBack:
    """An update of its own that ends where it began: every step is restored."""

    async def __call__(
        self, learner: Learner, batches: Batches, objective: LossFunction, context: Context
    ) -> StepReport:
        await learner.snapshot("before")
        report = await learner.step(batches, objective)
        await learner.restore("before")
        return report


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlyTenSteps(OptimizerStep):
    """Steps after the tenth taken back, as by a number of steps that was left from a test."""

    async def __call__(
        self, learner: Learner, batches: Batches, objective: LossFunction, context: Context
    ) -> StepReport:
        if context.step < 10:
            return await learner.step(batches, objective)
        return await TakenBack()(learner, batches, objective, context)
