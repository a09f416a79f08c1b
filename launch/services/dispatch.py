"""Dispatch of a pool's requests: coalesced, split, streamed back, and given to another replica if one fails.

Calls that arrive in the same turn of the event loop travel together: a step asks for tens of groups at once, and a Ray
call costs about a millisecond. Answers come back in parts, so a caller of the first few need not wait for all.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Generic, TypeVar

import numpy as np

from launch.services.replicas import Fault, Replica, ReplicaFault, Replicas, fault_of, within
from opd.errors import DataError, OpdError

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Part = tuple[Sequence[int], Sequence[Any]]  # positions in the call, and their answers
Ask = Callable[[Any, list[Any]], AsyncGenerator[Part, None]]
Lost = Callable[[BaseException], bool]

SMALLEST_SHARE = 16  # requests worth a call of their own
MANY_CALLS = 32
_HISTORY = 20  # calls before a quantile of their durations means anything


@dataclass(slots=True, eq=False)
class _Caller:
    """A call that waits for the answers to all its requests."""

    future: "asyncio.Future[list[Any]]"
    answers: list[Any]
    missing: int


@dataclass(slots=True, eq=False)
class _Item:
    """A request, the call it belongs to, and the place of its answer there."""

    request: Any
    caller: _Caller
    slot: int
    answered: bool = False

    @property
    def wanted(self) -> bool:
        return not self.answered and not self.caller.future.done()

    def answer(self, value: Any) -> bool:
        """Set the answer; False if there was one (a hedge came second) or its call waits no more."""
        if not self.wanted:
            return False
        self.answered = True
        self.caller.answers[self.slot] = value
        self.caller.missing -= 1
        if not self.caller.missing:
            self.caller.future.set_result(self.caller.answers)
        return True


@dataclass(slots=True, kw_only=True)
class Dispatcher(Generic[Request, Answer]):
    """Dispatcher of requests to replicas.

    `ask(actor, requests)` yields parts of the answers; `check(requests, answers)` raises `DataError` for answers that
    cannot be true; `lost(error)` tells a dead replica from a wrong request.

    `late` counts answers that came after another replica's, `hedged` the calls that two replicas were given.
    """

    replicas: Replicas
    ask: Ask
    check: Callable[[Sequence[Any], Sequence[Any]], None]
    lost: Lost
    late: int = 0
    hedged: int = 0
    _waiting: list[_Item] = field(default_factory=list)
    _running: set[asyncio.Task[None]] = field(default_factory=set)
    _durations: deque[float] = field(default_factory=lambda: deque(maxlen=200))

    async def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers in the order of `requests`."""
        if not requests:
            return []
        loop = asyncio.get_running_loop()
        caller = _Caller(future=loop.create_future(), answers=[None] * len(requests), missing=len(requests))
        if not self._waiting:
            loop.call_soon(self._flush)
        self._waiting += [_Item(request=r, caller=caller, slot=i) for i, r in enumerate(requests)]
        return await caller.future

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        bounds = share_bounds(len(waiting), [r.load for r in self.replicas.serving if r.open])
        for first, last in pairwise(bounds):
            task = asyncio.get_running_loop().create_task(self._serve(waiting[first:last]))
            self._running.add(task)  # the loop keeps only a weak reference
            task.add_done_callback(self._running.discard)

    async def _serve(self, items: list[_Item]) -> None:
        """Get `items` answered; those that a failing replica leaves go to another."""
        last = ReplicaFault(Fault.HUNG, "no replica was asked")
        try:
            for _ in range(self.replicas.retry.attempts):
                left = [item for item in items if item.wanted]
                if not left:
                    return
                replica = await self.replicas.acquire(len(left))
                try:
                    await self._hedged(replica, left)
                    return
                except ReplicaFault as fault:
                    last = fault
            kind = DataError if last.fault is Fault.INVALID_ANSWER else OpdError
            raise kind(
                f"{self.replicas.service}: {sum(i.wanted for i in items)} requests were given to "
                f"{self.replicas.retry.attempts} replicas one after another and all failed; the last one "
                f"{last.fault.value}: {last}"
            )
        except Exception as error:  # noqa: BLE001 (every caller gets it)
            for item in items:
                if not item.caller.future.done():
                    item.caller.future.set_exception(error)

    async def _hedged(self, replica: Replica, items: list[_Item]) -> None:
        """Ask `replica`, and a second one when it takes unusually long; returns when all are answered."""
        first = asyncio.ensure_future(self._ask(replica, items))
        try:
            delay_s, done, second = self._hedge_delay_s(), set[Any](), None
            while not done and second is None:  # a replica that is busy now may be idle later
                done, _ = await asyncio.wait({first}, timeout=delay_s)
                second = None if done else self.replicas.idle()
            if second is None:
                return await first
            self.hedged += 1
            again = [item for item in items if item.wanted]
            second.load += len(again)
            other = asyncio.ensure_future(self._ask(second, again))
            try:
                await _first_good(first, other)
            finally:
                await _end(other)
        finally:
            await _end(first)

    def _hedge_delay_s(self) -> float | None:
        quantile = self.replicas.retry.hedge_quantile
        if not quantile or len(self._durations) < _HISTORY:
            return None
        return float(np.quantile(self._durations, quantile))

    async def _ask(self, replica: Replica, items: list[_Item]) -> None:
        """All answers of one replica, whose load they are; a fault of it is reported, and raised."""
        retry, service = self.replicas.retry, f"{self.replicas.service} {replica.number}"
        left, now = set(range(len(items))), asyncio.get_running_loop().time
        began = now()
        try:
            async with aclosing(self.ask(replica.actor, [item.request for item in items])) as parts:
                while left:
                    positions, answers = await within(retry.deadline_s, service, anext(parts))
                    self._take(items, left, positions, answers)
                    left.difference_update(positions)
                    replica.load -= len(positions)
            self._durations.append(now() - began)
        except StopAsyncIteration as error:
            reason = f"{len(left)} of {len(items)} answers did not come"
            fault = ReplicaFault(Fault.INVALID_ANSWER, reason, repeats=True)
            await self.replicas.report(replica, fault)
            raise fault from error
        except ReplicaFault as fault:
            await self.replicas.report(replica, fault)
            raise
        except Exception as error:
            if not self.lost(error):
                raise
            fault = ReplicaFault.of(fault_of(error), error)
            await self.replicas.report(replica, fault)
            raise fault from error
        finally:
            replica.load -= len(left)

    def _take(self, asked: list[_Item], left: set[int], positions: Sequence[int], answers: Sequence[Any]) -> None:
        try:
            if not positions or len(set(positions)) < len(positions) or not left.issuperset(positions):
                raise DataError(f"a part has answers {list(positions)}, but those to come are {sorted(left)}")
            items = [asked[i] for i in positions]
            if len(items) != len(answers):
                raise DataError(f"{len(answers)} answers came for {len(items)} requests")
            self.check([item.request for item in items], answers)
        except DataError as error:
            raise ReplicaFault(Fault.INVALID_ANSWER, str(error), repeats=True) from error
        self.late += sum(not item.answer(value) for item, value in zip(items, answers, strict=True))
        self.replicas.answered()


def share_bounds(count: int, loads: Sequence[int]) -> list[int]:
    """Bounds of the shares of `count` requests by which replicas with so many open ones become level.

    The least loaded, which is called first, gets the most.

    A share has at least `SMALLEST_SHARE` requests, and twice as many if there are more than `MANY_CALLS` shares: what
    calls cost the driver is then bounded per request.
    """
    lowest = sorted(loads) or [0]
    most = max(1, min(len(lowest), count // SMALLEST_SHARE, max(MANY_CALLS, count // (2 * SMALLEST_SHARE))))
    below = list(accumulate(lowest[:most]))
    # A share fewer raises the level that the others are filled to: take the most shares whose smallest is large enough.
    shares = next(
        k for k in range(most, 0, -1) if k == 1 or count + below[k - 1] >= k * (lowest[k - 1] + SMALLEST_SHARE)
    )
    level = count + below[shares - 1]
    return [0, *(level * k // shares - below[k - 1] for k in range(1, shares + 1))]


async def _first_good(first: "asyncio.Future[None]", other: "asyncio.Future[None]") -> None:
    """Return when one of the two has all answers; raise only if both fail."""
    done, pending = await asyncio.wait({first, other}, return_when=asyncio.FIRST_COMPLETED)
    if all(task.exception() for task in done) and pending:
        await asyncio.wait(pending)
        done |= pending
    failures = [task.exception() for task in done]
    if all(failures):
        raise next(error for error in failures if error is not None)


async def _end(task: "asyncio.Future[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
