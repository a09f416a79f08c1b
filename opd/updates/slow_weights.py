"""Slow weights: those that a run ends in follow the optimizer's at a fraction of their way, every few steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from opd.ports import Context, Learner, LossFunction
from opd.settings.ranges import In
from opd.settings.validation import settings
from opd.types import Batch, Scores, StepReport

SLOW = "slow_weights"  # snapshot of the learner


@dataclass(frozen=True, slots=True, kw_only=True)
@settings
class SlowWeights:
    """An optimizer step, and after every `period` of them a step back: Lookahead (arXiv 1907.08610, Algorithm 1).

    The weights that are stepped are the fast ones. After steps `period`, 2 `period`, ... the slow weights `s`, at first
    those of the start, become `s + fraction * (fast - s)`, in float32, and the fast ones go on from there. The inner
    optimizer's moments and the learning rate stay as they are, as in the released code's default
    (`pullback_momentum="none"`). A fraction of 1 is `OptimizerStep`, bit for bit.

    Engines get the fast weights like those of any other update, so texts are of the policy that is trained; a run
    whose number of steps is a multiple of `period` ends in the slow ones.

    Nothing is kept here: which steps end a period follows from `context.step`, and the slow weights are a snapshot of
    the learner, which checkpoints have and new ranks get. A step without a trained token is no step and ends none.
    """

    # optimizer steps between two updates of the slow weights
    period: Annotated[int, In(1, 1_000_000)] = 5
    # of the way from the slow weights to the fast ones; 1 is the optimizer alone
    fraction: Annotated[float, In(1e-3, 1, because="with 0 nothing would be learned")] = 0.8

    def ends_period(self, step: int) -> bool:
        """Whether the update after `step` others ends a period."""
        return (step + 1) % self.period == 0

    async def __call__(
        self, learner: Learner, batches: Sequence[Sequence[Batch[Scores]]], objective: LossFunction, context: Context
    ) -> StepReport:
        if self.fraction == 1:
            return await learner.step(batches, objective)
        # At every step, since the first ones may have had nothing to train and made no call.
        await learner.snapshot(SLOW, keep_older=True)
        report = await learner.step(batches, objective)
        if self.ends_period(context.step):
            # `fast + (fraction - 1) * (fast - slow)` is `slow + fraction * (fast - slow)`
            await learner.extrapolate(SLOW, self.fraction - 1)
            await learner.snapshot(SLOW)
        return report
