"""The plain update: one optimizer step on the step's batch."""

from collections.abc import Sequence
from dataclasses import dataclass

from opd.ports import Context, Learner, LossFunction
from opd.types import Batch, Scores, StepReport


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerStep:
    """Forward, backward, clip, step: what every first-generation method does."""

    async def __call__(
        self, learner: Learner, batches: Sequence[Sequence[Batch[Scores]]], objective: LossFunction, context: Context
    ) -> StepReport:
        return await learner.step(batches, objective)
