"""Pools that take turns, in virtual time: asked while they are awake alone, and replaced in a turn of their own."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from benchmarks.virtual_time import simulate
from launch.config.retry_policy import RetryPolicy
from launch.services.learner_group import RanksLost
from launch.services.learner_restart import RankFactory, RestartingLearner
from launch.services.pools import StudentPool
from launch.services.replicas import Fault
from launch.services.turns import Turns
from opd.errors import OpdError
from opd.ports import Call, Layout, PublishedWeights, Rank, WeightAck
from tests.unit.services.test_pools import Engine, requests, weights

DEADLINE_S = 5.0


@dataclass
class Sleeper(Engine):
    """An engine that takes a second to fall asleep and to wake, and answers nothing while it sleeps."""

    asleep: bool = False
    alive: bool = True
    naps: int = 0

    def _check(self) -> None:
        if not self.alive:
            raise ActorDiedError
        assert not self.asleep

    async def write(self, asked: Sequence[Any]) -> Any:
        self._check()
        return await super().write(asked)

    async def take(self, sent: PublishedWeights) -> WeightAck:
        self._check()
        self.may_answer.set()
        return await super().take(sent)

    async def sleep(self) -> None:
        await asyncio.sleep(1)
        self._check()
        self.asleep, self.naps = True, self.naps + 1

    async def wake(self) -> None:
        await asyncio.sleep(1)
        if not self.alive:
            raise ActorDiedError
        self.asleep = False

    @property
    def actor(self) -> Any:
        more = {name: SimpleNamespace(remote=getattr(self, name)) for name in ("sleep", "wake")}
        return SimpleNamespace(**vars(super().actor), **more)


@dataclass
class Other:
    """Another role on the same memory."""

    asleep: bool = False
    busy: bool = False

    async def sleep(self) -> None:
        self.asleep = True

    async def wake(self) -> None:
        self.asleep = False


@dataclass
class Scene:
    """A pool of two engines and another role."""

    turns: Turns
    pool: StudentPool
    other: Other = field(default_factory=Other)
    made: list[Sleeper] = field(default_factory=list)

    async def other_works(self, seconds: float) -> None:
        """A call of the other role; no engine is awake or starts meanwhile."""
        async with self.turns.of("other")():
            there = len(self.made)
            assert (
                all(engine.asleep or engine.ended or not engine.alive for engine in self.made) and not self.other.asleep
            )
            await asyncio.sleep(seconds)
            assert len(self.made) == there


def scene(work: Callable[[Scene], Awaitable[None]]) -> None:
    async def play() -> None:
        made = list[Sleeper]()

        def make() -> Any:
            made.append(Sleeper(len(made)))
            return made[-1].actor

        def end(actor: Any) -> None:
            actor.engine.ended = True

        turns = Turns(100.0)
        pool = StudentPool(RetryPolicy(deadline_s=DEADLINE_S, start_deadline_s=DEADLINE_S, restarts=4), make, end)
        there = Scene(turns, pool, made=made)
        pool.replicas.turn = turns.of("rollout actor")
        turns.attach("rollout actor", pool.replicas)
        turns.attach("other", there.other)
        await pool.replicas.start(2)
        await work(there)
        await pool.replicas.close()

    simulate(play(), 1e6)


def test_waiting_for_a_turn_is_no_delay_of_an_answer() -> None:
    async def work(s: Scene) -> None:
        await s.pool.receive(weights(1, "aa"))
        busy = asyncio.ensure_future(s.other_works(10 * DEADLINE_S))
        await asyncio.sleep(3)
        written, _ = await asyncio.gather(s.pool.generate(requests(40)), busy)
        assert {c.digests[1] for c in written} == {"aa"} and s.other.asleep
        assert not s.pool.replicas.history and {engine.naps for engine in s.made} == {1}

    scene(work)


@pytest.mark.parametrize("deaths", [1, 2])
def test_engines_that_died_asleep_are_replaced_in_their_turn_with_the_weights(deaths: int) -> None:
    """No other role is awake while the replacement starts; new weights that come first are those it gets."""

    async def work(s: Scene) -> None:
        await s.pool.receive(weights(1, "aa"))
        await s.other_works(1)
        for engine in s.made[:deaths]:
            engine.alive = False
        await s.other_works(1)
        assert len(s.made) == 2, "nothing is awake that would notice"
        assert (await s.pool.receive(weights(2, "bb"))).digest == "bb"
        written = await s.pool.generate(requests(40))
        assert {c.digests[2] for c in written} == {"bb"} and s.pool.replicas.faults[Fault.DIED] == deaths
        await s.other_works(1)
        assert len(s.made) == 2 + deaths

    scene(work)


def test_an_engine_that_does_not_fall_asleep_is_ended_before_others_wake() -> None:
    async def work(s: Scene) -> None:
        async def hang() -> None:
            await asyncio.Event().wait()

        s.made[0].sleep = hang  # type: ignore[method-assign]
        s.pool.replicas.serving[0].actor.sleep.remote = hang
        await s.other_works(1)
        assert s.made[0].ended and s.pool.replicas.faults[Fault.HUNG] == 1
        assert len(await s.pool.generate(requests(40))) == 40

    scene(work)


@dataclass
class Ranks:
    """Ranks that can be lost while they sleep."""

    layout: Layout = field(default_factory=lambda: Layout(ranks=1, tokens_per_microbatch=1))
    asleep: bool = False
    alive: bool = True
    ended: bool = False

    def _there(self) -> None:
        if not self.alive:
            raise RanksLost(Fault.DIED, "a learner rank died")

    async def setup(self) -> None:
        """At once."""

    async def sleep(self) -> None:
        self._there()
        self.asleep = True

    async def wake(self) -> None:
        self._there()
        self.asleep = False

    async def call(self, call: Call[Any]) -> list[Any]:
        self._there()
        assert not self.asleep, call.name
        return [call.name]

    def end(self) -> None:
        self.ended = True


def test_ranks_that_died_asleep_start_anew_when_they_are_asked() -> None:
    """Those that could not be put to sleep are ended at once: others need their memory."""

    async def play() -> None:
        made, turns = list[Ranks](), Turns(100.0)

        def make() -> Any:
            made.append(Ranks())
            return made[-1]

        learner = RestartingLearner(RankFactory(make=make, turn=turns.of("learner")), 9, 1 << 20)
        turns.attach("learner", learner)
        other = Other()
        turns.attach("other", other)

        async def other_works() -> None:
            async with turns.of("other")():
                assert all(ranks.asleep or ranks.ended for ranks in made)
                await asyncio.sleep(1)

        assert await learner.call(Call.broadcast(Rank.snapshot, "a")) == ["snapshot"]
        await other_works()
        made[0].alive = False
        assert await learner.call(Call.broadcast(Rank.snapshot, "b")) == ["snapshot"]
        assert len(made) == 2 and made[0].ended
        made[1].alive = False
        await other_works()
        assert made[1].ended and len(made) == 2
        assert await learner.call(Call.broadcast(Rank.snapshot, "c")) == ["snapshot"]
        assert len(made) == 3 and len(learner.history) == 2 and other.asleep

    simulate(play(), 1e6)


def test_a_replacement_whose_turn_does_not_come_fails_its_callers() -> None:
    """With the sentence of the turn, and at once."""

    async def work(s: Scene) -> None:
        @asynccontextmanager
        async def turn(*, joins: bool = False) -> AsyncIterator[None]:
            if joins:
                raise OpdError("the rollout actor waits for its turn")
            yield

        s.pool.replicas.turn = turn
        for engine in s.made:
            engine.alive = False
        with pytest.raises(OpdError, match="the rollout actor waits for its turn"):
            await s.pool.generate(requests(3))

    scene(work)
