"""N DeepSpeed ranks as one learner (`opd.ports.Learner`)."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

from launch.services.failure_causes import brief, vanished
from launch.services.ray_session.cluster import end, has_died, place_of, sees
from launch.services.replicas import DescribeStacks, Fault, ReplicaFault, no_stack_dump, within
from launch.services.turns import Turn, resident
from learner.config import LearnerConfig
from learner.learner import LearnerRank
from opd.errors import ConfigurationError, OpdError
from opd.ports import Call, Layout, Learner, PublishedWeights, PublishReport, Rank, StudentEngine
from weight_sync.receiver import assemble

Answer = TypeVar("Answer")
_WITHOUT_MODEL = {Rank.written.__name__, LearnerRank.busy_s.__name__}  # verbs of ranks that may sleep
_NEWS_S = 5.0  # what the news of a rank's death may take, once its partners are disturbed


class RanksLost(ReplicaFault):
    """A rank died or hangs: the others cannot go on without it, so none of them is of use any more."""


class LearnerGroup(Learner):
    """Calls every rank at once, because ranks meet in collectives.

    Whatever is asked raises `RanksLost` if a rank dies or hangs; `launch.services.learner_restart` makes others. How
    soon answers are due does not bound how long ranks take to start: they have `start_deadline_s` at least. `folder` is
    where ranks on other machines write checkpoints and exports (None: all are on this one). In a `turn` they are
    asked for what needs their model.
    """

    def __init__(
        self,
        actors: Sequence[Any],
        config: LearnerConfig,
        stack_dump: DescribeStacks = no_stack_dump,
        start_deadline_s: float = 300.0,
        folder: Path | None = None,
        end: Callable[[Any], None] = end,
        turn: Turn = resident,
    ) -> None:
        self.actors, self._stack_dump, self._folder = actors, stack_dump, folder
        self._end, self._turn = end, turn
        self.layout = Layout(ranks=len(actors), tokens_per_microbatch=config.packed_tokens)
        self._deadline_s = config.deadline_s
        self._start_s = max(config.deadline_s, start_deadline_s)
        self._asked: set[asyncio.Task[Any]] = set()  # calls that may not be answered yet

    async def setup(self) -> None:
        """Let the ranks find each other and load the model."""
        ((host, port),) = await self._all([self.actors[0].address.remote()], self._start_s)
        await self._check_folder()
        world = len(self.actors)
        async with self._turn(joins=True):
            calls = [a.setup.remote(rank, world, host, port) for rank, a in enumerate(self.actors)]
            await self._all(calls, self._start_s)

    async def _check_folder(self) -> None:
        """Refuse a folder that a rank does not see, before it loads anything."""
        if self._folder is None:
            return
        mark = self._folder / f".seen-by-ranks-{token_hex(8)}"
        mark.touch()
        try:
            seen = await self._all([sees(actor, mark) for actor in self.actors], self._start_s)
        finally:
            mark.unlink()
        if not all(seen):
            raise ConfigurationError(
                f"learner rank {seen.index(False)} does not see {self._folder}, where every rank writes its part of "
                "checkpoints and exports; set output_dir to a folder that all nodes of the cluster share"
            )

    async def call(self, call: Call[Answer]) -> list[Answer]:
        """Answers of all ranks, in their order."""
        async with self._turn(joins=True) if call.name not in _WITHOUT_MODEL else resident():
            return await self._call(call)

    async def sleep(self) -> None:
        """Let every rank give up the memory of its model."""
        await self._call(Call.broadcast(Rank.offload))

    async def wake(self) -> None:
        """Give every rank its memory back."""
        await self._call(Call.broadcast(Rank.reload))

    async def _call(self, call: Call[Answer]) -> list[Answer]:
        asked = [getattr(actor, call.name) for actor in self.actors]
        return await self._all([ask.remote(*call.of(rank), **call.options) for rank, ask in enumerate(asked)])

    async def publish(self, student: StudentEngine, version: int) -> PublishReport:
        """Publish the weights: every rank lays out its chunks, the engines load all and compare the sentinel."""
        weights = await self.share(version)
        try:
            ack = await student.receive(weights)
        except OpdError:
            await self.call(Call.broadcast(LearnerRank.busy_s))  # chunks of a dead rank cannot be read
            raise
        return PublishReport(version=version, gap=ack.gap, nbytes=weights.manifest.nbytes, digest=weights.digest)

    async def share(self, version: int) -> PublishedWeights:
        """Current weights, of which every rank lays out its chunks."""
        return assemble(await self.call(Call.broadcast(Rank.share, version)))

    async def places(self) -> list[str]:
        """Host of each rank (`weight_sync.shared_memory.place`)."""
        return await self._all([place_of(a) for a in self.actors])

    async def settled(self) -> None:
        """Wait until every rank has finished its last call, also one whose caller was cancelled."""
        if self._asked:
            await asyncio.wait(self._asked)

    def end(self) -> None:
        """Kill every rank."""
        for actor in self.actors:
            self._end(actor)

    async def _all(self, calls: Sequence[Any], deadline_s: float = 0.0) -> list[Any]:
        """All answers, due within `deadline_s` seconds (0: those of every call).

        Raises:
            RanksLost: a rank died, or does not answer.
        """
        due_s = deadline_s or self._deadline_s
        tasks = [asyncio.ensure_future(within(due_s, "a learner rank", call)) for call in calls]
        for task in tasks:  # a rank goes on with its call, also when the caller is cancelled
            self._asked.add(task)
            task.add_done_callback(self._asked.discard)
        try:
            return await asyncio.gather(*[asyncio.shield(task) for task in tasks])
        except OpdError as error:
            if isinstance(error, ReplicaFault):
                _give_up(tasks)
                raise RanksLost(error.fault, f"{error}{await self._stack_dump(*self.actors)}") from error
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
            seen = await self._stack_dump(*self.actors, error=lost)
            raise RanksLost(Fault.DIED, f"a learner rank died ({why}){seen}") from error


def _give_up(tasks: Sequence["asyncio.Task[Any]"]) -> None:
    for task in tasks:
        task.cancel()
