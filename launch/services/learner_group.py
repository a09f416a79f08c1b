"""N DeepSpeed ranks as one learner (`opd.ports.Learner`)."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.services.causes import brief, vanished
from launch.services.cluster import end, has_died, place_of
from launch.services.replicas import DescribeStacks, Fault, ReplicaFault, no_stack_dump, within
from learner.config import LearnerConfig
from opd.errors import OpdError
from opd.ports import Layout, LossFunction, PublishedWeights, PublishReport, StudentEngine
from opd.types import Batch, Scores, StepReport
from weight_sync.receiver import assemble

_NEWS_S = 5.0  # what the news of a rank's death may take, once its partners are disturbed


class RanksLost(ReplicaFault):
    """A rank died or hangs: the others cannot go on without it, so none of them is of use any more."""


class LearnerGroup:
    """Calls every rank at once, because ranks meet in collectives; the answer of rank 0 stands for all.

    Whatever is asked raises `RanksLost` if a rank dies or hangs; `launch.services.learner_restart` makes others. How
    soon answers are due does not bound how long ranks take to start: they have `start_deadline_s` at least.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        config: LearnerConfig,
        look: DescribeStacks = no_stack_dump,
        start_deadline_s: float = 300.0,
    ) -> None:
        self.actors, self._look = actors, look
        self.layout = Layout(ranks=len(actors), tokens_per_microbatch=config.tokens_per_microbatch)
        self._deadline_s = config.deadline_s
        self._start_s = max(config.deadline_s, start_deadline_s)
        self._asked: set[asyncio.Task[Any]] = set()  # calls that may not be answered yet

    async def setup(self) -> None:
        """Let the ranks find each other and load the model."""
        ((host, port),) = await self._all([self.actors[0].address.remote()], self._start_s)
        world = len(self.actors)
        await self._all([a.setup.remote(rank, world, host, port) for rank, a in enumerate(self.actors)], self._start_s)

    async def step(self, batches: Sequence[Sequence[Batch[Scores]]], objective: LossFunction) -> StepReport:
        """One optimizer step; see `opd.ports.Learner`."""
        return (await self._all([a.step.remote(b, objective) for a, b in self._pairs(batches)]))[0]

    async def evaluate(
        self, batches: Sequence[Sequence[Batch[Scores]]], objective: LossFunction
    ) -> Mapping[str, float]:
        """Means of the objective's loss and metrics, without a gradient."""
        return (await self._all([a.evaluate.remote(b, objective) for a, b in self._pairs(batches)]))[0]

    async def publish(self, student: StudentEngine, version: int) -> PublishReport:
        """Have every rank lay out its chunks, hand all to the engines, and have the sentinel compared there."""
        weights = await self.share(version)
        try:
            receipt = await student.receive(weights)
        except OpdError:
            await self._all([a.stats.remote() for a in self.actors])  # nobody can read what a dead rank has laid out
            raise
        return PublishReport(version=version, gap=receipt.gap, nbytes=weights.manifest.nbytes, digest=weights.digest)

    async def share(self, version: int) -> PublishedWeights:
        """Have every rank lay out its chunks of the weights as they are now."""
        return assemble(await self._all([a.share.remote(version) for a in self.actors]))

    async def save(self, directory: Path, step: int) -> None:
        """Copy the state of now and begin to write it into the existing `directory`; `written` waits for it."""
        await self._all([a.save.remote(str(directory), step) for a in self.actors])

    async def written(self) -> dict[str, str]:
        """Names and digests of the files that `save` began, once they are on the disk."""
        return dict(await self._all([a.written.remote() for a in self.actors]))

    async def load(self, directory: Path) -> int:
        """Take over what `save` wrote, whoever wrote it; returns its step."""
        return (await self._all([a.load.remote(str(directory)) for a in self.actors]))[0]

    async def export(self, directory: Path) -> None:
        """The student as a Hugging Face folder."""
        await self._all([a.export.remote(str(directory)) for a in self.actors])

    async def places(self) -> list[str]:
        """Where each rank runs (`weight_sync.shared_memory.place`)."""
        return await self._all([place_of(a) for a in self.actors])

    async def settled(self) -> None:
        """Wait until every rank has answered what it was asked last, also where nobody waits for it any more."""
        if self._asked:
            await asyncio.wait(self._asked)

    def end(self) -> None:
        """Kill every rank."""
        for actor in self.actors:
            end(actor)

    def _pairs(self, batches: Sequence[Sequence[Batch[Scores]]]) -> Any:
        return zip(self.actors, batches, strict=True)

    async def _all(self, calls: Sequence[Any], deadline_s: float = 0.0) -> list[Any]:
        """All answers, due within `deadline_s` seconds (0: those of every call).

        Raises:
            RanksLost: a rank died, or does not answer.
        """
        due_s = deadline_s or self._deadline_s
        tasks = [asyncio.ensure_future(within(due_s, "a learner rank", call)) for call in calls]
        for task in tasks:  # a rank goes on with what it was asked, also when whoever asked is cancelled
            self._asked.add(task)
            task.add_done_callback(self._asked.discard)
        try:
            return await asyncio.gather(*[asyncio.shield(task) for task in tasks])
        except OpdError as error:
            if isinstance(error, ReplicaFault):
                _give_up(tasks)
                raise RanksLost(error.fault, f"{error}{await self._look(*self.actors)}") from error
            raise
        except Exception as error:
            # Its partners may be told first, as a connection that breaks off.
            await asyncio.wait(tasks, timeout=_NEWS_S)
            outcomes = [task.exception() for task in tasks if task.done() and not task.cancelled()]
            lost = next((e for e in outcomes if e is not None and has_died(e)), None)
            if lost is None:
                raise
            _give_up(tasks)
            why = type(lost).__name__ if vanished(lost) else brief(lost)
            seen = await self._look(*self.actors, error=lost)
            raise RanksLost(Fault.DIED, f"a learner rank died ({why}){seen}") from error


def _give_up(tasks: Sequence["asyncio.Task[Any]"]) -> None:
    for task in tasks:
        task.cancel()
