"""Turns of roles that share memory: calls of one role at a time, while all others sleep.

A turn belongs to a role, and any number of its calls share it. Who asks while another role has the turn waits in a line
of roles: once another role waits, new calls of the one that works go behind it, so that every role is served after
those that were there before. No call waits for a call of another role while it has the turn, so this cannot lock up.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from opd.deadlines import running_timeout
from opd.errors import OpdError


class Sleeper(Protocol):
    """A role that can give its memory up for a while."""

    async def sleep(self) -> None:
        """Give memory up; only `wake` may be called next."""
        ...

    async def wake(self) -> None:
        """Take memory back, with what was in it."""
        ...


class Turn(Protocol):
    """Turn of a role around each of its calls."""

    def __call__(self, *, joins: bool = False) -> AbstractAsyncContextManager[None]:
        """A context in which the role is awake; with `joins` part of a turn that it has, even if others wait."""
        ...


def resident(*, joins: bool = False) -> AbstractAsyncContextManager[None]:  # noqa: ARG001
    """Turn of a role that shares its memory with no other: no wait."""
    return nullcontext()


@dataclass(slots=True, eq=False)
class _Waiting:
    """Calls of one role that wait for its next turn together."""

    role: str
    calls: "list[asyncio.Future[None]]" = field(default_factory=list)


class Turns:
    """Turns of any number of roles. A role that was never put to sleep is taken to be awake when it starts.

    A call waits as long as others make progress: it fails when for `deadline_s` seconds none began or ended. So does
    every call that a role's failure to sleep or to wake keeps from working.
    """

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._sleepers: dict[str, Sleeper] = {}
        self._asleep: set[str] = set()
        self._awake: str | None = None  # the role that has the turn, or had the last one
        self._inside = 0  # its calls under way
        self._line: deque[_Waiting] = deque()
        self._switching: asyncio.Task[None] | None = None
        self._moves = 0  # calls that began or ended

    def of(self, role: str) -> Turn:
        """Turn of a role, which from `attach` on can be put to sleep and woken."""

        @asynccontextmanager
        async def turn(*, joins: bool = False) -> AsyncIterator[None]:
            await self._enter(role, joins)
            try:
                yield
            finally:
                self._leave()

        return turn

    def attach(self, role: str, sleeper: Sleeper) -> None:
        """Let `sleeper` put `role` to sleep and wake it."""
        assert role not in self._sleepers, f"there is a role {role!r} already"
        self._sleepers[role] = sleeper

    def forget(self, sleeper: Sleeper) -> None:
        """Drop the role of a sleeper, if it has one, whose processes have ended: they hold nothing."""
        role = next((role for role, known in self._sleepers.items() if known is sleeper), None)
        if role is None:
            return
        del self._sleepers[role]
        self._asleep.discard(role)
        if self._awake == role and not self._inside and self._switching is None:
            self._awake = None

    async def _enter(self, role: str, joins: bool) -> None:
        has_turn = self._awake == role and self._switching is None
        if has_turn and (not self._line or (joins and self._inside)):
            self._inside, self._moves = self._inside + 1, self._moves + 1
            return
        call = asyncio.get_running_loop().create_future()
        self._queue(role).calls.append(call)
        self._advance()
        try:
            while not call.done():
                await self._progress(role, call)
            call.result()
        except BaseException:
            if call.done() and not call.cancelled() and call.exception() is None:
                self._leave()  # it was let in, and is cancelled before it could begin
            call.cancel()
            raise

    async def _progress(self, role: str, call: "asyncio.Future[None]") -> None:
        """Wait for a call's turn until the deadline; raise if nothing has moved meanwhile."""
        moves = self._moves
        try:
            async with running_timeout(self._deadline_s):
                await asyncio.wait({call})
        except TimeoutError:
            if self._moves == moves and not call.done():
                raise OpdError(self._late(role)) from None

    def _queue(self, role: str) -> _Waiting:
        for waiting in self._line:
            if waiting.role == role:
                return waiting
        self._line.append(_Waiting(role))
        return self._line[-1]

    def _leave(self) -> None:
        self._inside, self._moves = self._inside - 1, self._moves + 1
        self._advance()

    def _advance(self) -> None:
        """Give the turn to the next role if no call has it."""
        while self._line and all(call.done() for call in self._line[0].calls) and self._switching is None:
            self._line.popleft()  # all of them were cancelled
        if self._inside or self._switching is not None or not self._line:
            return
        if self._line[0].role == self._awake:
            self._admit(self._line.popleft())
        else:
            self._switching = asyncio.get_running_loop().create_task(self._switch(self._line[0]))

    def _admit(self, waiting: _Waiting) -> None:
        """Let all of them in within one iteration of the event loop, so that pools can send them together."""
        for call in waiting.calls:
            if not call.done():
                call.set_result(None)
                self._inside, self._moves = self._inside + 1, self._moves + 1

    async def _switch(self, waiting: _Waiting) -> None:
        """In a task of its own: a caller that is cancelled leaves no role half asleep."""
        try:
            if self._awake is not None and (sleeper := self._sleepers.get(self._awake)) is not None:
                await sleeper.sleep()
                self._asleep.add(self._awake)
            self._awake = None
            if waiting.role in self._asleep:
                await self._sleepers[waiting.role].wake()
                self._asleep.discard(waiting.role)
            self._awake = waiting.role
        except BaseException as error:
            for call in waiting.calls:
                if not call.done():
                    call.set_exception(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self._switching = None
            self._line.remove(waiting)
            self._admit(waiting)  # those that did not fail
            self._advance()

    def _late(self, role: str) -> str:
        why = (
            f"{self._inside} calls of the {self._awake} do not end"
            if self._switching is None
            else "the one before it does not fall asleep, or it does not wake"
        )
        return (
            f"the {role} waits for its turn on memory that it shares, but for {self._deadline_s:.0f} s {why}; look at "
            "their logs, or raise cluster.turn_deadline_s"
        )
