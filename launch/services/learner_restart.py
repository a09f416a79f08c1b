"""Restarts of the learner: when a rank is lost all start anew, and repeat the calls that no checkpoint has.

The driver keeps everything else: text that was written or is being written, engines, teachers, the account.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from launch.artifacts.checkpoint_store import verified_state
from launch.services.failure_causes import brief
from launch.services.learner_group import RanksLost
from launch.services.ray_session.cluster import is_lost
from launch.services.replay_log import ReplayLog
from launch.services.replicas import GO_ON
from launch.services.turns import Turn, resident
from opd.errors import OpdError
from opd.ports import Call, Layout, Learner, PublishedWeights, PublishReport, Rank, StudentEngine, broadcast

Answer = TypeVar("Answer")
_log = logging.getLogger(__name__)


class RankGroup(Learner, Protocol):
    """Ranks that live and die together (`learner_group.LearnerGroup`); every call may raise `RanksLost`."""

    async def setup(self) -> None:
        """Find each other and load the student."""
        ...

    async def share(self, version: int) -> PublishedWeights:
        """Lay out the weights as they are now."""
        ...

    async def settled(self) -> None:
        """Wait until all have finished their last call, also one whose caller was cancelled."""
        ...

    async def sleep(self) -> None:
        """Give up the memory of the model."""
        ...

    async def wake(self) -> None:
        """Take it back."""
        ...

    def end(self) -> None:
        """Kill all of them."""
        ...


async def _fine(_: Any) -> None:
    """No check of new ranks."""


async def verified(directory: Path) -> None:
    """Raise if the checkpoint with the learner's files in `directory` is not whole: every byte of it is read."""
    await asyncio.to_thread(verified_state, directory.parent)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFactory:
    """Factory of learner ranks.

    `make` starts them, `ready` raises if they stand where they cannot work, `renew` gets the place of the weights
    that are live already, for engines that start later, and `check` raises if a checkpoint is not whole. In a `turn`
    ranks start and are asked.
    """

    make: Callable[[], RankGroup]
    ready: Callable[[Any], Awaitable[None]] = _fine
    renew: Callable[[PublishedWeights], None] = lambda weights: None  # noqa: ARG005
    check: Callable[[Path], Awaitable[None]] = verified
    turn: Turn = resident


class RestartingLearner(Learner):
    """N ranks as one learner, at most `restarts` times other ones than before.

    New ranks load the newest checkpoint of this process that is whole, or start from the student's own, repeat the
    calls of the replay log, and are asked what the lost ones did not answer. On a CPU, and elsewhere with
    `learner.deterministic`, they are then bit by bit what the lost ones were. Ranks that are lost twice in a row in the
    same call will be lost a third time (no memory, say): that ends the run, and so does everything for which a log
    or a restart is missing. While no rank is lost a call costs what it costs without this class.
    """

    def __init__(self, factory: RankFactory, restarts: int, replay_log_bytes: int) -> None:
        self._factory, self._max_restarts = factory, restarts
        self._ranks = factory.make()
        self.layout: Layout = self._ranks.layout
        self.history: list[str] = []  # a sentence per restart
        self._replay_log = ReplayLog(most=replay_log_bytes)
        self._published: PublishReport | None = None
        self._lost: RanksLost | None = None  # why the ranks there are cannot be asked
        self._suspects: set[str] = set()  # calls in which ranks were lost, and that were not answered since
        self._starting = asyncio.Lock()
        self._breaking_off = False

    async def setup(self) -> None:
        """Start the first ranks; one that is lost here is not replaced."""
        try:
            await self._ranks.setup()
        except RanksLost as lost:
            raise _end(lost, " while a run starts") from lost

    async def check_placement(self) -> None:
        """Raise if the ranks run where they cannot work; to be called when all other actors have started, too."""
        try:
            await self._factory.ready(self._ranks)
        except RanksLost as lost:
            raise _end(lost, " while a run starts") from lost

    export = broadcast(Rank.export)

    async def call(self, call: Call[Answer]) -> list[Answer]:
        """The answers of all ranks, of new ones if some are lost; what changes their state is logged."""
        async with self._factory.turn():  # also of ranks that must start anew for it
            answers = await self._ask(self._replay_log.label(call), lambda ranks: ranks.call(call))
        if self._max_restarts and call.changes_state:
            self._replay_log.add(call)
        return answers

    async def publish(self, student: StudentEngine, version: int) -> PublishReport:
        """Make the current weights live in the engines."""
        self._published = None  # new ranks need not lay out a version that no engine will ask for
        report = await self._ask(f"publication {version}", lambda ranks: ranks.publish(student, version))
        self._published = report
        return report

    async def sleep(self) -> None:
        """Give up the memory of the model; ranks that are lost are ended, and the next call starts others."""
        await self._while_alive(lambda ranks: ranks.sleep())

    async def wake(self) -> None:
        """Take back what `sleep` gave up."""
        await self._while_alive(lambda ranks: ranks.wake())

    async def _while_alive(self, told: Callable[[RankGroup], Awaitable[None]]) -> None:
        try:
            if self._lost is None:
                return await told(self._ranks)
        except RanksLost as lost:
            self._lost = lost
        self._ranks.end()

    async def save(self, directory: Path, step: int) -> None:
        """Copy the current state and begin to write it into the existing `directory`; `written` waits for it."""
        await self.call(Call.broadcast(Rank.save, directory, step))
        self._replay_log.saving()

    async def written(self) -> dict[str, str]:
        """Names and digests of the files that `save` began, once they are on the disk.

        Raises:
            RanksLost: those who wrote are gone and others will take their place, so `save` may be asked again.
            OpdError: no others will.
        """
        ranks = self._ranks
        try:
            return dict(await ranks.call(Call.broadcast(Rank.written)))
        except RanksLost as lost:
            if ranks is self._ranks:  # not noticed before; the next call starts others
                self._check_restart(lost)
                self._lost = self._lost or lost
            raise

    async def kept(self, directory: Path) -> None:
        """Record that what `save` wrote is a whole checkpoint, in `directory` now."""
        async with self._starting:  # ranks that start read the one before, which may be removed after this
            self._replay_log.kept(directory)

    async def load(self, directory: Path) -> int:
        """Load what `save` of any run wrote; returns its step."""
        steps = await self.call(Call.broadcast(Rank.load, directory))
        self._replay_log.loaded(directory)
        return steps[0]

    async def settle(self) -> None:
        """Wait for the ranks' last calls in a run that breaks off; lost ranks are not replaced any more.

        Raises:
            OpdError: they are lost.
        """
        self._breaking_off = True
        if self._lost is not None:
            raise _end(self._lost, " in a run that breaks off")
        await self._ranks.settled()

    async def _ask(self, what: str, call: Callable[[RankGroup], Awaitable[Answer]]) -> Answer:
        """The answer of the ranks there are; of new ones, if those are gone."""
        while True:
            if self._lost is not None:
                async with self._factory.turn(joins=True):  # before its lock, as every caller has them
                    await self._start_anew(what)
            try:
                return await self._once(what, call)
            except RanksLost as lost:
                self._lost = lost

    async def _once(self, what: str, call: Callable[[RankGroup], Awaitable[Answer]]) -> Answer:
        try:
            answer = await call(self._ranks)
        except RanksLost as lost:
            if what in self._suspects:
                raise _end(lost, f", because ranks were lost in {what} before (does the memory suffice?)") from lost
            self._suspects.add(what)
            raise
        if self._suspects:
            self._suspects.discard(what)
        return answer

    async def _start_anew(self, what: str) -> None:
        """Replace the ranks by others in the same state."""
        async with self._starting:
            while (lost := self._lost) is not None:
                self._check_restart(lost)
                self._ranks.end()
                begin, again = self._replay_log.base, len(self._replay_log.calls)
                self.history.append(
                    f"{lost}, before {what} was answered; all ranks start anew from "
                    f"{begin.parent.name if begin else 'the student they began with'} (calls to repeat: {again})"
                )
                _log.warning(self.history[-1])
                self._ranks = self._factory.make()
                try:
                    await self._bring_up()
                except RanksLost as another:
                    self._lost = another
                else:
                    self._lost = None

    async def _bring_up(self) -> None:
        base = self._replay_log.base
        await self._once("setting up", lambda ranks: ranks.setup())
        await self._once("setting up", self._factory.ready)
        if base is not None:
            await self._factory.check(base)
            await self._once("loading", lambda ranks: ranks.call(Call.broadcast(Rank.load, base)))
        for logged in self._replay_log.calls:
            try:
                await self._once(f"{logged.label} again", lambda ranks, call=logged.call: ranks.call(call))
            except Exception as error:
                if isinstance(error, OpdError) or not is_lost(error):
                    raise
                raise OpdError(
                    f"new learner ranks cannot do {logged.label} again, because a teacher's scores of it are gone, "
                    f"too ({brief(error)}); {GO_ON}"
                ) from error
        await self._lay_out_again()

    async def _lay_out_again(self) -> None:
        """Lay out the live weights again, which lost ranks had in memory: an engine that starts will ask for them."""
        published = self._published
        if published is None:
            return
        weights = await self._once("laying out weights again", lambda ranks: ranks.share(published.version))
        if weights.digest == published.digest:
            self._factory.renew(weights)
        else:  # where arithmetic does not repeat; under the same version engines must hold the same
            _log.warning(
                "the new learner ranks have version %d with digest %s, but %s is live (learner.deterministic=true "
                "repeats); an engine that starts now serves from the next version on",
                published.version,
                weights.digest,
                published.digest,
            )

    def _check_restart(self, lost: RanksLost) -> None:
        if self._breaking_off:
            raise _end(lost, " in a run that breaks off") from lost
        if not self._max_restarts:
            raise _end(lost, " (cluster.restarts=0)") from lost
        if len(self.history) >= self._max_restarts:
            raise _end(lost, f" after {self._max_restarts} restarts (cluster.restarts)") from lost
        if not self._replay_log.whole:
            raise _end(
                lost,
                f", because the calls since the newest checkpoint were more than cluster.replay_log_bytes="
                f"{self._replay_log.most} (set a smaller checkpoint_every, or more bytes)",
            ) from lost


def _end(lost: RanksLost, why: str) -> OpdError:
    return OpdError(f"{lost}, and no other rank can take its place{why}; {GO_ON}")
