"""Protocols of the learner, of one rank and of all together, and of observers of finished steps."""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Concatenate, ParamSpec, Protocol, TypeVar

import numpy as np
from jaxtyping import Float, Float32
from torch import Tensor

from opd.ports.calls import Call, changes_state
from opd.ports.engines import StudentEngine
from opd.ports.weights import PublishReport, WeightShard
from opd.types import Batch, Scores, StepReport, TokenLoss

Own = TypeVar("Own")
Answer = TypeVar("Answer")
P = ParamSpec("P")


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Cut of a step's tokens into micro-batches for `ranks` learners."""

    ranks: int
    tokens_per_microbatch: int


class LossFunction(Protocol):
    """Loss per token that a step minimizes (see `opd.method.method`)."""

    def __call__(self, student: Any, batch: Any) -> TokenLoss:
        """The unreduced loss of `batch`'s trained tokens given the student's logits at them."""
        ...


class Reading(Protocol):
    """A number per token of student and teacher at its state, as the current student has it (see `opd.loss.readings`).

    A frozen value: token weights declare the readings that they need, and find the numbers under them
    (`Scored.readings`).
    """

    consumes: ClassVar[type[Scores]]  # type of the scores that it reads, as an objective has them

    def __call__(self, student: Any, batch: Any) -> Float[Tensor, " L"]:
        """The numbers at `batch`'s tokens given the student's logits at them; no gradient is kept."""
        ...


class Rank(Protocol):
    """The verbs of one rank of the learner: all ranks get the same call, some verbs with batches of their own.

    A verb is typed here and implemented in `learner.training`; `Learner` says how its arguments get to all ranks. After
    an exception out of `step` only `save` may be called.
    """

    @changes_state
    def step(self, batches: Sequence[Batch[Scores]], objective: LossFunction) -> StepReport:
        """One update from this rank's micro-batches; all ranks bring the same number and get the same report.

        Raises:
            DataError: the loss or the gradient was not finite too often in a row (before that, the report is
                `skipped`); the weights are still those of before.
            OpdError: memory does not suffice even for half a micro-batch.
        """
        ...

    def evaluate(self, batches: Sequence[Batch[Scores]], objective: LossFunction) -> Mapping[str, float]:
        """The objective's `loss` and metrics at the current weights, without a gradient, computed as in `step`."""
        ...

    def score(self, batches: Sequence[Batch[Scores]]) -> list[Float32[np.ndarray, " L"]]:
        """The student's own log-probabilities of `target_ids`, per micro-batch and in its order; nothing changes."""
        ...

    def read(self, batches: Sequence[Batch[Scores]], readings: Sequence[Reading]) -> list[Float32[np.ndarray, "R L"]]:
        """All `readings` at the current weights, per micro-batch and in its order; nothing changes.

        One pass without a gradient, with logits and teachers as in `step`. All ranks bring the same number of
        micro-batches.
        """
        ...

    @changes_state
    def snapshot(self, name: str, *, optimizer: bool = False, keep_older: bool = False) -> None:
        """Keep a copy of the trained float32 weights in host memory as `name`, in place of an older one of that name.

        With `optimizer` also Adam's moments and the place in the schedule. With `keep_older` nothing is done where
        there is one of that name. Checkpoints have the snapshots, too.

        Raises:
            ConfigurationError: the name is not 1 to 64 letters, digits and `._-`.
        """
        ...

    @changes_state
    def restore(self, name: str) -> None:
        """Take back the weights of a snapshot, bit for bit.

        If it has the optimizer, the updates since are as if they had not been; otherwise moments and schedule stay.

        Raises:
            ConfigurationError: there is no such snapshot.
        """
        ...

    @changes_state
    def extrapolate(self, name: str, factor: float, *, only: str = "") -> None:
        """Set the float32 weights to `now + factor * (now - snapshot)`; optimizer and schedule stay.

        A factor of 0 changes no bit, and -1 gives the snapshot bit by bit. With adapters, it is their two matrices that
        are extrapolated, not their product. `only` is a regular expression: parameters in whose name it is not found
        stay as they are.

        Raises:
            ConfigurationError: there is no such snapshot, `factor` is not finite, or `only` is found in no name.
        """
        ...

    def offload(self) -> None:
        """Move model and optimizer to host memory until `reload`; every other verb but `written` is refused until then.

        On a CPU they are moved to a file.

        Raises:
            ConfigurationError: DeepSpeed cannot move this optimizer (bfloat16 with `zero_stage=1`).
        """
        ...

    def reload(self) -> None:
        """Move back what `offload` moved; does nothing if nothing is offloaded."""
        ...

    def share(self, version: int) -> WeightShard:
        """This rank's chunks of the student as `version`, and a sentinel to check it by. All ranks must call.

        The last two shares can be read at any time; older ones may not be there any more.
        """
        ...

    def save(self, directory: Path, step: int) -> None:
        """Copy weights, optimizer, snapshots, schedule and random state, and begin to write them into `directory`.

        Returns when training may go on. Every rank writes a file of its own; `written` waits for it.
        Raises `OpdError` where an update broke off in the middle.
        """
        ...

    def written(self) -> tuple[str, str]:
        """Name and xxh3_128 of the file that `save` began, once it is on the disk.

        Raises:
            OpdError: it could not be written; one sentence.
        """
        ...

    def load(self, directory: Path) -> int:
        """Restore what all ranks' `save` wrote, however many they were and whatever they shared; returns its `step`.

        Raises:
            DataError: the checkpoint is foreign, cut off or incomplete.
            ConfigurationError: it is of another model.
        """
        ...

    def export(self, directory: Path) -> None:
        """Write a folder that transformers and vLLM load: safetensors, configuration, tokenizer."""
        ...


def broadcast(
    verb: Callable[Concatenate[Any, P], Answer],
) -> "Callable[Concatenate[Learner, P], Coroutine[Any, Any, Answer]]":
    """The verb as a method of all ranks: each gets the same arguments, and the answer of rank 0 is returned."""

    async def ask(self: "Learner", *arguments: P.args, **options: P.kwargs) -> Answer:
        return (await self.call(Call.broadcast(verb, *arguments, **options)))[0]

    ask.__doc__ = verb.__doc__
    return ask


def scatter(
    verb: Callable[Concatenate[Any, Own, P], Answer],
) -> "Callable[Concatenate[Learner, Sequence[Own], P], Coroutine[Any, Any, Answer]]":
    """The same with a first argument per rank, as in `batches[rank][micro-batch]`."""

    async def ask(self: "Learner", own: Sequence[Own], *arguments: P.args, **options: P.kwargs) -> Answer:
        return (await self.call(Call.scatter(verb, own, *arguments, **options)))[0]

    ask.__doc__ = verb.__doc__
    return ask


def scatter_gather(
    verb: Callable[Concatenate[Any, Own, P], Answer],
) -> "Callable[Concatenate[Learner, Sequence[Own], P], Coroutine[Any, Any, list[Answer]]]":
    """The same with the answers of all ranks, in their order."""

    async def ask(self: "Learner", own: Sequence[Own], *arguments: P.args, **options: P.kwargs) -> list[Answer]:
        return await self.call(Call.scatter(verb, own, *arguments, **options))

    ask.__doc__ = verb.__doc__
    return ask


class Learner(Protocol):
    """The trained model on any number of ranks: `call`, and the verbs of a rank by name.

    Example, in an `Update`: `await learner.snapshot("before")`, then a `step`, then
    `await learner.extrapolate("before", 0.5)`.
    """

    layout: Layout

    async def call(self, call: Call[Answer]) -> list[Answer]:
        """The answers of all ranks, in their order."""
        ...

    async def publish(self, student: StudentEngine, version: int) -> PublishReport:
        """Make the learner's weights live in the engines as `version`; raises if they disagree afterwards."""
        ...

    step = scatter(Rank.step)
    evaluate = scatter(Rank.evaluate)
    score = scatter_gather(Rank.score)
    read = scatter_gather(Rank.read)
    snapshot = broadcast(Rank.snapshot)
    restore = broadcast(Rank.restore)
    extrapolate = broadcast(Rank.extrapolate)
    offload = broadcast(Rank.offload)
    reload = broadcast(Rank.reload)
    save = broadcast(Rank.save)


class Observer(Protocol):
    """Callback after every finished step: trackers, the evaluator, the live view."""

    async def __call__(self, record: Any) -> None:
        """`record` is an `opd.loop.train.StepRecord`. Awaited before the next step is taken."""
        ...
