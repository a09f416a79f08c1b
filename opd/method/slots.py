"""The slots of a method as protocols: what a part must have to stand there (`opd.method.method` composes them)."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from opd.method.promises import Promise
from opd.ports import Context, Learner, LossFunction, Need, ScoreKinds
from opd.settings.validation import may_lack
from opd.types import Batch, Prompt, Scored, Scores, StepReport, TokenLoss, TokenScores, Trajectory


@may_lack("on_policy", "truncated", "needs_engines")  # it is then neither; for the last see `opd.ports.needs_of`
class Rollout(Protocol):
    """Who writes, in which context, how far?"""

    @property
    def records(self) -> type[TokenScores]:
        """What the writer tells about its own tokens (`Trajectory.behavior`)."""
        ...

    @property
    def needs_engines(self) -> frozenset[Need]:
        """The engines that it calls: the student, a writing teacher, an environment."""
        ...

    @property
    def on_policy(self) -> bool:
        """Whether every trained token was drawn from the student (of this or a recent version)."""
        ...

    @property
    def truncated(self) -> bool:
        """Whether the writer left out tokens that its distribution holds (top-p below 1, greedy writing)."""
        ...

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        """One trajectory per prompt of the group, in order."""
        ...


@may_lack("needs_engines")  # see `opd.ports.needs_of`
class Scorer(Protocol):
    """Who reads what was written, and what do they testify?"""

    @property
    def needs_engines(self) -> frozenset[Need]:
        """The engines that it calls: reading teachers, graders."""
        ...

    @property
    def needs(self) -> type[Scores]:
        """The least that `Trajectory.behavior` must be."""
        ...

    @property
    def produces(self) -> type[Scores]:
        """The testimony returned."""
        ...

    @property
    def requires(self) -> ScoreKinds:
        """The kinds of requests it sends to teachers; a backend that cannot answer them is refused when planned."""
        ...

    @property
    def min_group(self) -> int:
        """The smallest group it can judge (1 unless it compares trajectories of a group)."""
        ...

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        """Testimony per trajectory of one group, in order."""
        ...


@may_lack("reads_written")  # it is then taken to read everything
class TokenWeight(Protocol):
    """Which tokens count, how much? 0 = not trained."""

    @property
    def consumes(self) -> type[Scores]:
        """The testimony it reads."""
        ...

    @property
    def reads_written(self) -> bool:
        """Whether a token's weight depends on more than its state: on itself, on later tokens, on how the text ended.

        Such a weight bends what an estimate from written tokens expects, so the two are refused together.
        """
        ...

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[Float[np.ndarray, " _T"]]:
        """One weight >= 0 per token, given the *whole* step, so that quantiles do not depend on packing."""
        ...


@may_lack("on_policy", "promise")  # without a promise it cannot be certified
class Objective(Protocol):
    """What is minimized per token: direction, support and estimator are one choice."""

    @property
    def consumes(self) -> type[Scores]:
        """The testimony it needs in the batch."""
        ...

    @property
    def on_policy(self) -> bool:
        """Whether it is an estimate over tokens the student drew, and wrong on anybody else's text."""
        ...

    @property
    def promise(self) -> Promise:
        """The exact per-state quantity whose gradient its expected gradient is (`opd certify` checks it)."""
        ...

    def __call__(self, student: Any, batch: Batch[Any]) -> TokenLoss:
        """Unreduced loss at the batch's trained tokens; `student` is an `opd.loss.chunked.StudentLogits`."""
        ...


class Update(Protocol):
    """How does a gradient become new weights?"""

    async def __call__(
        self, learner: Learner, batches: Sequence[Sequence[Batch[Scores]]], objective: LossFunction
    ) -> StepReport:
        """One step of training on `batches[rank][micro-batch]`."""
        ...
