"""The learner as the loop sees it, and observers of finished steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from opd.ports.engines import StudentEngine
from opd.ports.weights import PublishReport
from opd.types import Batch, Scores, StepReport, TokenLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a step's tokens are cut into micro-batches for `ranks` learners."""

    ranks: int
    tokens_per_microbatch: int


class LossFunction(Protocol):
    """What is minimized per token (see `opd.method.method`)."""

    def __call__(self, student: Any, batch: Any) -> TokenLoss:
        """The unreduced loss of `batch`'s trained tokens given the student's logits at them."""
        ...


class Learner(Protocol):
    """The trained model, however many ranks it lives on."""

    layout: Layout

    async def step(self, batches: Sequence[Sequence[Batch[Scores]]], objective: LossFunction) -> StepReport:
        """Forward, backward and one optimizer step over `batches[rank][micro-batch]`."""
        ...

    async def evaluate(
        self, batches: Sequence[Sequence[Batch[Scores]]], objective: LossFunction
    ) -> Mapping[str, float]:
        """The objective's loss (`loss`) and metrics without a gradient."""
        ...

    async def publish(self, student: StudentEngine, version: int) -> PublishReport:
        """Make the learner's weights live in the engines as `version`; raises if they disagree afterwards."""
        ...

    async def save(self, directory: Path, step: int) -> None:
        """Write a checkpoint that `load` restores exactly."""
        ...


class Observer(Protocol):
    """Somebody who is told of every finished step: trackers, the evaluator, the live view."""

    async def __call__(self, record: Any) -> None:
        """`record` is an `opd.loop.train.StepRecord`. Awaited before the next step is taken."""
        ...
