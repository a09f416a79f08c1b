"""Turns of roles that share memory: never two awake, none forgotten, whatever is cancelled or fails."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.virtual_time import simulate
from launch.services.turns import Turn, Turns, resident
from opd.errors import OpdError

DEADLINE_S = 100.0


@dataclass
class Memory:
    """Memory for one role: a role that has not begun, or sleeps, holds none."""

    holders: set[str] = field(default_factory=set)
    fullest: int = 0

    def take(self, role: str) -> None:
        self.holders.add(role)
        self.fullest = max(self.fullest, len(self.holders))


@dataclass
class Role:
    """A sleeper that takes a second to fall asleep and to wake, and sees that no call is under way."""

    name: str
    memory: Memory
    fails: bool = False
    busy: int = 0
    order: list[str] = field(default_factory=list)

    async def sleep(self) -> None:
        assert not self.busy and self.name in self.memory.holders
        await asyncio.sleep(1)
        self.memory.holders.remove(self.name)

    async def wake(self) -> None:
        assert not self.busy and self.name not in self.memory.holders
        await asyncio.sleep(1)
        if self.fails:
            raise OpdError("it does not wake")
        self.memory.take(self.name)

    async def work(self, turn: Turn, seconds: float, nested: int = 0) -> None:
        """A call; what it needs of its own role, `nested` times, is asked for within it."""
        async with turn(joins=nested < 0):
            if self.name not in self.memory.holders:  # it begins
                self.memory.take(self.name)
            self.order.append(self.name)
            self.busy += 1
            try:
                assert self.memory.holders == {self.name}
                await asyncio.sleep(seconds)
                if nested > 0:
                    await self.work(turn, seconds, -1)
                assert self.memory.holders == {self.name}
            finally:
                self.busy -= 1


def scene(work: Callable[[Turns, dict[str, Role], dict[str, Turn]], Awaitable[None]]) -> Memory:
    """Roles a, b and c in one memory, in virtual time; returns the memory."""
    memory = Memory()

    async def all_of_it() -> None:
        turns, order = Turns(DEADLINE_S), list[str]()
        roles = {name: Role(name=name, memory=memory, order=order) for name in "abc"}
        for name, role in roles.items():
            turns.attach(name, role)
        await work(turns, roles, {name: turns.of(name) for name in roles})

    simulate(all_of_it(), horizon_s=100_000)
    assert memory.fullest <= 1
    return memory


@dataclass(frozen=True)
class Planned:
    """A call of a role: when it is made, how long it works, whether it needs its own role again, when it is cancelled
    (0: never).
    """

    role: str
    at: float
    seconds: float
    nested: int
    cancelled: float


TENTHS = st.integers(0, 60).map(lambda n: n / 10)
CALLS = st.lists(
    st.builds(
        Planned,
        role=st.sampled_from("abc"),
        at=TENTHS,
        seconds=TENTHS,
        nested=st.integers(0, 1),
        cancelled=st.one_of(st.just(0.0), TENTHS),
    ),
    max_size=14,
)


@given(CALLS)
def test_one_role_is_awake_and_every_call_has_its_turn(calls: list[Planned]) -> None:
    """Whatever is cancelled, in whatever order calls come; a deadlock would stall virtual time."""

    async def work(_: Turns, roles: dict[str, Role], turns: dict[str, Turn]) -> None:
        async def one(call: Planned) -> bool:
            await asyncio.sleep(call.at)
            task = asyncio.ensure_future(roles[call.role].work(turns[call.role], call.seconds, call.nested))
            if call.cancelled:
                await asyncio.wait({task}, timeout=call.cancelled)
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            return task.cancelled() or task.result() is None

        assert all(await asyncio.gather(*[one(call) for call in calls]))
        assert not any(role.busy for role in roles.values())
        for name, role in roles.items():  # and it goes on
            await role.work(turns[name], 1)

    scene(work)


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=9), st.integers(2, 6))
def test_a_role_that_waits_is_served_before_the_others_come_twice(first: list[str], rounds: int) -> None:
    """Callers that come again and again: between two turns of a role that asks all the time, each has one at most."""

    async def work(_: Turns, roles: dict[str, Role], turns: dict[str, Turn]) -> None:
        async def caller(name: str) -> None:
            for _ in range(rounds):
                await roles[name].work(turns[name], 1)

        await asyncio.gather(*[caller(name) for name in first])
        order, asking = roles["a"].order, set(first)
        turned = [name for i, name in enumerate(order) if not i or order[i - 1] != name]
        steady = turned[: len(asking) * (rounds - 1)]
        for i, name in enumerate(steady):
            later = steady[i + 1 :]
            if name in later:
                between = later[: later.index(name)]
                assert len(between) == len(set(between)), turned

    scene(work)


def test_a_call_waits_only_as_long_as_others_make_progress() -> None:
    async def work(_: Turns, roles: dict[str, Role], turns: dict[str, Turn]) -> None:
        async def many() -> None:
            for _ in range(5):
                await roles["a"].work(turns["a"], 60)

        async def endless() -> None:
            async with turns["a"]():
                await asyncio.sleep(1e6)

        busy = asyncio.ensure_future(many())
        await asyncio.sleep(1)
        await roles["b"].work(turns["b"], 1)  # 60 s
        await busy
        hung = asyncio.ensure_future(endless())
        await asyncio.sleep(1)
        began = asyncio.get_running_loop().time()
        with pytest.raises(OpdError, match=r"the b waits for its turn .* for 100 s 1 calls of the a do not end"):
            await roles["b"].work(turns["b"], 1)
        assert asyncio.get_running_loop().time() - began <= DEADLINE_S
        hung.cancel()
        await asyncio.gather(hung, return_exceptions=True)
        await roles["b"].work(turns["b"], 1)

    scene(work)


def test_a_role_that_cannot_wake_fails_its_calls_and_no_others() -> None:
    async def work(_: Turns, roles: dict[str, Role], turns: dict[str, Turn]) -> None:
        for name in "ab":
            await roles[name].work(turns[name], 1)
        roles["a"].fails = True
        a, again, b = await asyncio.gather(
            *[roles[name].work(turns[name], 1) for name in "aab"], return_exceptions=True
        )
        assert isinstance(a, OpdError) and isinstance(again, OpdError) and b is None
        roles["a"].fails = False
        await roles["a"].work(turns["a"], 1)

    scene(work)


def test_calls_that_wait_for_one_turn_begin_together() -> None:
    """Within one iteration of the event loop: a pool sends what comes together in one call."""

    async def work(_: Turns, roles: dict[str, Role], turns: dict[str, Turn]) -> None:
        await roles["b"].work(turns["b"], 1)
        begun = list[int]()

        async def one(number: int) -> None:
            async with turns["a"]():
                if not begun:
                    asyncio.get_running_loop().call_soon(lambda: begun.append(-1))
                begun.append(number)
                await asyncio.sleep(1)

        await asyncio.gather(*[one(number) for number in range(9)])
        assert begun == [*range(9), -1]

    scene(work)


def test_a_role_that_ended_holds_nothing_and_a_resident_one_never_waits() -> None:
    async def work(turns: Turns, roles: dict[str, Role], of: dict[str, Turn]) -> None:
        await roles["a"].work(of["a"], 1)
        roles["a"].memory.holders.clear()
        turns.forget(roles["a"])
        await roles["b"].work(of["b"], 1)
        async with resident(), resident(joins=True):
            pass

    scene(work)
