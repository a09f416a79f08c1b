"""A method is a frozen value with slots: rollout -> scorer -> weights -> objective -> update.

Parts are frozen dataclasses whose fields are their whole configuration; engines are call arguments. Each part
declares what testimony it consumes and produces, so a combination that would be meaningless is refused when it
is composed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from opd.divergences import ClippedCredit, Promise
from opd.errors import ConfigurationError, DataError
from opd.packing import Normalizer, TokenMean
from opd.ports import Engines, Kinds, Learner, PromptSource
from opd.types import Batch, Prompt, Scored, Scores, StepReport, TokenLoss, TokenScores, Trajectory
from opd.updates.optimizer import OptimizerStep


class Rollout(Protocol):
    """Who writes, in which context, how far?"""

    @property
    def records(self) -> type[TokenScores]:
        """What the writer tells about its own tokens (`Trajectory.behavior`)."""
        ...

    @property
    def needs_writer(self) -> bool:
        """Whether a teacher must write (`engines.writers`)."""
        ...

    @property
    def on_policy(self) -> bool:
        """Whether every trained token was drawn from the student (of this or a recent version)."""
        ...

    @property
    def truncated(self) -> bool:
        """Whether the writer left out tokens that its distribution holds (top-p below 1, greedy writing)."""
        ...

    async def __call__(self, group: Sequence[Prompt], engines: Engines) -> list[Trajectory]:
        """One trajectory per prompt of the group, in order."""
        ...


class Scorer(Protocol):
    """Who reads what was written, and what do they testify?"""

    @property
    def needs(self) -> type[Scores]:
        """The least that `Trajectory.behavior` must be."""
        ...

    @property
    def produces(self) -> type[Scores]:
        """The testimony returned."""
        ...

    @property
    def asks(self) -> Kinds:
        """The kinds of requests it sends to teachers; a backend that cannot answer them is refused when planned."""
        ...

    @property
    def min_group(self) -> int:
        """The smallest group it can judge (1 unless it compares trajectories of a group)."""
        ...

    async def __call__(self, trajectories: Sequence[Trajectory], engines: Engines) -> Sequence[Scores]:
        """Testimony per trajectory of one group, in order."""
        ...


class TokenWeight(Protocol):
    """Which tokens count, how much? 0 = not trained."""

    @property
    def consumes(self) -> type[Scores]:
        """The testimony it reads."""
        ...

    def __call__(self, scored: Sequence[Scored[Any]]) -> list[Float[np.ndarray, " _T"]]:
        """One weight >= 0 per token, given the *whole* step, so that quantiles do not depend on packing."""
        ...


class Objective(Protocol):
    """What is minimised per token: direction, support and estimator are one choice."""

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
        """Unreduced loss at the batch's trained tokens; `student` is an `opd.logits.StudentLogits`."""
        ...


class Update(Protocol):
    """How does a gradient become new weights?"""

    async def __call__(
        self, learner: Learner, batches: Sequence[Sequence[Batch[Scores]]], objective: Objective
    ) -> StepReport:
        """One step of training on `batches[rank][micro-batch]`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A distillation method, complete. See `conf/method/` for the shipped ones."""

    name: str
    rollout: Rollout
    scorer: Scorer
    objective: Objective
    update: Update = field(default_factory=OptimizerStep)
    weights: Mapping[str, TokenWeight] = field(default_factory=dict)
    normalizer: Normalizer = field(default_factory=TokenMean)

    def __post_init__(self) -> None:
        said = self.scorer.produces
        if not issubclass(self.rollout.records, self.scorer.needs):
            raise ConfigurationError(
                f"scorer {_name(self.scorer)} needs {self.scorer.needs.__name__} from the writer, but rollout "
                f"{_name(self.rollout)} records {self.rollout.records.__name__}; set rollout.record_topk"
            )
        # Declared, not assumed: a rollout that does not say so is not on-policy.
        if getattr(self.objective, "on_policy", False) and not getattr(self.rollout, "on_policy", False):
            raise ConfigurationError(
                f"objective {_name(self.objective)} estimates from tokens that the student drew, but rollout "
                f"{_name(self.rollout)} has text of somebody else's; choose rollout StudentRollout, or an objective "
                "over distributions such as FullReverseKL"
            )
        if _estimates(self.objective) and getattr(self.rollout, "truncated", False):
            raise ConfigurationError(
                f"objective {_name(self.objective)} estimates from the written token and needs every token to have a "
                f"chance of being written, but rollout {_name(self.rollout)} has top_p < 1 or temperature 0; set "
                "rollout.top_p=1 and a temperature above 0, or choose an objective over distributions such as "
                "FullReverseKL"
            )
        readers = {"objective": self.objective} | {f"weight {k!r}": w for k, w in self.weights.items()}
        for role, reader in readers.items():
            if not issubclass(said, reader.consumes) and not (
                role == "objective" and issubclass(getattr(said, "reads_as", Scores), reader.consumes)
            ):
                raise ConfigurationError(
                    f"{role} {_name(reader)} needs {reader.consumes.__name__}, but scorer {_name(self.scorer)} "
                    f"produces {said.__name__}; choose a scorer that produces it or another {role}"
                )


def _estimates(objective: Any) -> bool:
    """Whether the expected gradient needs tokens drawn from all of the student's distribution.

    A clipped credit counts what was written and nothing else; its promise says so.
    """
    return getattr(objective, "on_policy", False) and not isinstance(getattr(objective, "promise", None), ClippedCredit)


def check_prompts(method: Method, prompts: PromptSource) -> None:
    """Refuse a prompt source whose groups the method's scorer cannot judge."""
    if prompts.group_size < method.scorer.min_group:
        raise ConfigurationError(
            f"scorer {_name(method.scorer)} compares the trajectories of a group and needs "
            f"prompts.group_size >= {method.scorer.min_group}, but got {prompts.group_size}; raise prompts.group_size"
        )


def weigh(weights: Mapping[str, TokenWeight], scored: Sequence[Scored[Any]]) -> list[Float[np.ndarray, " _T"]]:
    """The product of all weights and the loss mask, per trajectory."""
    total = [item.trajectory.loss_mask.astype(np.float64) for item in scored]
    for name, part in weights.items():
        factors = part(scored)
        lengths, got = [len(item.trajectory) for item in scored], [len(factor) for factor in factors]
        if got != lengths:
            raise DataError(
                f"weight {name!r} {_name(part)} must give one number per token, {lengths} for the step's "
                f"trajectories, but gave {got}; correct the weight part"
            )
        total = [a * b for a, b in zip(total, factors, strict=True)]
    return total


def _name(part: object) -> str:
    return type(part).__name__
