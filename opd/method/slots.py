"""Protocols of a method's parts: rollout, scorer, token weight, objective and update (composed in `method.py`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from opd.method.promises import Promise
from opd.ports import Context, Learner, LossFunction, Need, Reading, ScoreKinds
from opd.settings.validation import may_lack
from opd.types import Batch, Prompt, Scored, Scores, StepReport, TokenLoss, TokenScores, Trajectory


@may_lack("on_policy", "truncated", "needs_engines")  # it is then neither; for the last see `opd.ports.needs_of`
class Rollout(Protocol):
    """Part that makes trajectories: which model generates, in which context, and how many tokens.

    One that compares trajectories of a group also has `min_group`, as a scorer has (`check_prompts`).
    """

    @property
    def records(self) -> type[TokenScores]:
        """Type of the behavior log-probabilities that it records (`Trajectory.behavior`)."""
        ...

    @property
    def needs_engines(self) -> frozenset[Need]:
        """Engines that it calls: the student, a generating teacher, an environment."""
        ...

    @property
    def on_policy(self) -> bool:
        """Whether every trained token was sampled from the student (of this or a recent version), or from a
        distribution around it whose log-probabilities `behavior` has, so that estimates weight with p / behavior.
        """
        ...

    @property
    def truncated(self) -> bool:
        """Whether sampling leaves out tokens that the model gives a probability (top-p below 1, greedy decoding)."""
        ...

    async def __call__(self, group: Sequence[Prompt], context: Context) -> list[Trajectory]:
        """One trajectory per prompt of the group, in order."""
        ...


@may_lack("needs_engines")  # see `opd.ports.needs_of`
class Scorer(Protocol):
    """Part that scores trajectories: calls a teacher, several teachers, or a grader."""

    @property
    def needs_engines(self) -> frozenset[Need]:
        """Engines that it calls: scoring teachers, graders."""
        ...

    @property
    def needs(self) -> type[Scores]:
        """Type that `Trajectory.behavior` must have at least."""
        ...

    @property
    def produces(self) -> type[Scores]:
        """Type of the scores that it returns."""
        ...

    @property
    def requires(self) -> ScoreKinds:
        """Score kinds that it requests of teachers; a backend that lacks one is refused when the run is planned."""
        ...

    @property
    def min_group(self) -> int:
        """Size of the smallest group that it can score (1 unless it compares trajectories of a group)."""
        ...

    async def __call__(self, trajectories: Sequence[Trajectory], context: Context) -> Sequence[Scores]:
        """Scores per trajectory of one group, in order."""
        ...


@may_lack("reads_sampled_tokens", "readings")  # it is then taken to read all tokens, and needs no reading
class TokenWeight(Protocol):
    """Part that weighs the loss of tokens: 0 = not trained."""

    @property
    def consumes(self) -> type[Scores]:
        """Type of the scores that it reads."""
        ...

    @property
    def reads_sampled_tokens(self) -> bool:
        """Whether a token's weight depends on more than its state: on itself, on later tokens, on how the text ended.

        Such a weight biases an estimate from sampled tokens, so the two are refused together.
        """
        ...

    @property
    def readings(self) -> Sequence[Reading]:
        """Readings of every token that it needs before the step is weighed (`Scored.readings`): one more pass."""
        ...

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[Float[np.ndarray, " _T"]]:
        """One weight >= 0 per token, given the *whole* step, so that quantiles do not depend on packing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightLimit:
    """Limiting case of a token weight: `weight` gives every sampled token the weight 1, exactly."""

    name: str
    weight: Any


@may_lack("on_policy", "promise")  # without a promise it cannot be certified
class Objective(Protocol):
    """Part that gives the loss per token: direction, support and estimator in one."""

    @property
    def consumes(self) -> type[Scores]:
        """Type of the scores that it needs in the batch."""
        ...

    @property
    def on_policy(self) -> bool:
        """Whether it is an estimate over tokens that the student sampled, and wrong on other text."""
        ...

    @property
    def promise(self) -> Promise:
        """Exact divergence per state whose gradient its expected gradient is (`opd certify` checks it)."""
        ...

    def __call__(self, student: Any, batch: Batch[Any]) -> TokenLoss:
        """Unreduced loss at the trained tokens of the batch; `student` is an `opd.loss.chunked.StudentLogits`."""
        ...


class Update(Protocol):
    """Part that turns a step's batches into new weights."""

    async def __call__(
        self, learner: Learner, batches: Sequence[Sequence[Batch[Scores]]], objective: LossFunction, context: Context
    ) -> StepReport:
        """Take one training step on `batches[rank][micro-batch]`.

        A part keeps nothing between steps: what must outlast one is a function of `context.step`, or a snapshot of the
        learner, which checkpoints have and new ranks get. A step without a trainable token makes no call.
        """
        ...
