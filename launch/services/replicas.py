"""Replicas of one service: after a death, a hang or an invalid answer one is replaced by another, warmed up first."""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeVar

from launch.config.retry_policy import RetryPolicy
from launch.services.failure_causes import ProcessFailed, brief, find_own, vanished
from launch.services.turns import Turn, resident
from opd import deadlines
from opd.errors import DataError, OpdError, ServiceHung

Answer = TypeVar("Answer")
DescribeStacks = Callable[
    ..., Awaitable[str]
]  # where these actors are stuck or (error=...) how they died: the end of a sentence
_NUMBERS = re.compile(r"\d+")
GO_ON = (
    "the same command with run_name=... resume=latest goes on from the newest checkpoint, if the run has one; without "
    "one start it again"
)
logger = logging.getLogger(__name__)


class Fault(Enum):
    """Kind of a replica's failure; the value completes a sentence."""

    DIED = "died"
    HUNG = "hung"
    INVALID_ANSWER = "gave an invalid answer"


class ReplicaFault(OpdError):
    """A failure of a replica, not of the request, which may be given to another one.

    `repeats`: the replica itself gave the reason, so another one that gives the same has failed for the same reason.
    """

    def __init__(self, fault: Fault, reason: str, repeats: bool = False) -> None:
        super().__init__(reason)
        self.fault, self.repeats = fault, repeats

    @classmethod
    def of(cls, fault: Fault, error: BaseException) -> "ReplicaFault":
        """The failure of a replica with `error`."""
        faulty = cls(fault, brief(error), repeats=not vanished(error))
        faulty.__cause__ = error
        return faulty


async def within(deadline_s: float, service: str, work: Awaitable[Answer]) -> Answer:
    """The answer of `service`. Raises `ReplicaFault` (`HUNG`) after `deadline_s` seconds."""
    late = f"{service} did not answer within {deadline_s:.0f} s; look at its log, or raise its deadline_s"
    return await deadlines.within(deadline_s, work, ReplicaFault(Fault.HUNG, late))


def fault_of(error: BaseException) -> Fault:
    """Kind of failure of a replica that is lost with this error."""
    return Fault.HUNG if isinstance(error, ServiceHung) else Fault.DIED


async def no_stack_dump(*_: Any, error: BaseException | None = None) -> str:  # noqa: ARG001
    """No stack dump (see `stack_dumps.StackDumps.stack_dump`)."""
    return ""


@dataclass(slots=True, eq=False)
class Replica:
    """A replica that serves. `load` counts its open requests; while it is not `open` it gets no new ones."""

    number: int
    actor: Any
    load: int = 0
    open: bool = True


@dataclass(slots=True, kw_only=True)
class Replicas:
    """Set of replicas: gives out the least loaded, and replaces those that are reported.

    `make` starts an actor, `ready` waits until it can work, `warm_up` brings it up to date (returns when it is), `end`
    kills it. Without `make` nothing is replaced: a fault is final. `stack_dump` shows where one hangs, before it is
    killed. `turn` is that of all replicas, for what needs their memory; starting one is such work, too.
    """

    service: str
    retry: RetryPolicy
    ready: Callable[[Any], Awaitable[None]]
    warm_up: Callable[[Any], Awaitable[None]]
    end: Callable[[Any], None]
    make: Callable[[], Any] | None = None
    stack_dump: DescribeStacks = no_stack_dump
    turn: Turn = resident
    serving: list[Replica] = field(default_factory=list)
    faults: dict[Fault, int] = field(default_factory=lambda: dict.fromkeys(Fault, 0))
    history: list[str] = field(default_factory=list)  # a sentence per fault
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _starting: set[asyncio.Task[None]] = field(default_factory=set)
    _restarts: int = 0
    _replacements: int = 0  # replacements under way
    _in_a_row: int = 0
    _broken: OpdError | None = None
    _useful: bool = False  # a replica gave a valid answer
    _recurring: bool = False  # two failed alike before
    _reasons: set[str] = field(default_factory=set)  # why replicas failed before that

    async def start(self, count: int) -> None:
        """Start the first replicas, all at once; one that cannot start is an error."""
        async with self.turn():
            await self._start(count)

    async def _start(self, count: int) -> None:
        assert self.make is not None
        actors = [self.make() for _ in range(count)]
        service = f"{self.service} that was to start (does the cluster have the CPUs and GPUs for it?)"
        try:
            await asyncio.gather(*[within(self.retry.start_deadline_s, service, self.ready(actor)) for actor in actors])
        except ReplicaFault as fault:
            raise ReplicaFault(fault.fault, f"{fault}{await self.stack_dump(*actors)}") from fault
        except Exception as error:
            if not isinstance(find_own(error), ProcessFailed | None):
                raise  # a sentence of ours, of its own kind
            seen = await self.stack_dump(*actors, error=error)
            raise OpdError(f"{self.service} did not start: {brief(error)}{seen}") from error
        self.adopt(actors)

    def adopt(self, actors: list[Any]) -> None:
        """Add actors that are ready."""
        self.serving += [Replica(number=i, actor=actor) for i, actor in enumerate(actors, len(self.serving))]

    async def sleep(self) -> None:
        """Let every replica give up its memory; one that does not is replaced."""
        await asyncio.gather(*[self._told(r, "falling asleep", r.actor.sleep) for r in list(self.serving)])

    async def wake(self) -> None:
        """Give every replica its memory back; one that died while it slept is replaced."""
        await asyncio.gather(*[self._told(r, "waking up", r.actor.wake) for r in list(self.serving)])

    async def _told(self, replica: Replica, what: str, verb: Any) -> None:
        try:
            await within(self.retry.deadline_s, f"{self.service} {replica.number} ({what})", verb.remote())
        except Exception as error:  # noqa: BLE001 (whatever it is, this replica holds memory that others need)
            fault = error if isinstance(error, ReplicaFault) else ReplicaFault.of(fault_of(error), error)
            await self.report(replica, fault)

    async def acquire(self, requests: int) -> Replica:
        """The least loaded replica, `requests` added to its load; waits until there is one.

        Raises:
            OpdError: there is none and will be none, or none came up in time.
        """
        if self._in_a_row >= self.retry.max_consecutive_failures:  # the breaker is open: one try after a pause
            rounds = self._in_a_row - self.retry.max_consecutive_failures
            await asyncio.sleep(deadlines.backoff(self.retry.cooldown_s, rounds, self.retry.deadline_s))
        longest_s = self.retry.start_deadline_s + self.retry.deadline_s
        service = f"any {self.service} (none is ready, or none has the weights it should work with)"
        return await within(longest_s, service, self._least_loaded(requests))

    def idle(self) -> Replica | None:
        """A replica without open requests, if there is one."""
        return next((replica for replica in self._open() if not replica.load), None)

    async def _least_loaded(self, requests: int) -> Replica:
        async with self._changed:
            while self._is_final() or not self._open():
                if self._broken is not None and self._is_final():
                    raise self._broken
                await self._changed.wait()
            chosen = min(self._open(), key=lambda replica: (replica.load, replica.number))
            chosen.load += requests
            return chosen

    def _is_final(self) -> bool:
        """Whether no replica is left and none will come, or the next one would fail as those before."""
        recurring = self._recurring and not self._useful
        return self._broken is not None and (recurring or (not self.serving and not self._replacements))

    def _open(self) -> list[Replica]:
        return [replica for replica in self.serving if replica.open]

    async def reopen(self, replica: Replica) -> None:
        """Give requests to `replica` again, which has the weights it should work with."""
        replica.open = True
        async with self._changed:
            self._changed.notify_all()

    @property
    def actors(self) -> list[Any]:
        """Actors of the replicas that serve."""
        return [replica.actor for replica in self.serving]

    def answered(self) -> None:
        """Record a valid answer: the circuit breaker closes."""
        self._in_a_row, self._useful = 0, True

    async def report(self, replica: Replica, fault: ReplicaFault) -> None:
        """End `replica`, which failed, and start another. Reporting twice changes nothing."""
        if replica not in self.serving:
            return
        self.serving.remove(replica)
        self.faults[fault.fault] += 1
        self._in_a_row += 1
        # The caller may be cancelled meanwhile (a hedge has answered); the replica is ended all the same.
        await asyncio.shield(self._in_background(self._retire(replica, fault)))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.get_running_loop().create_task(work)
        self._starting.add(task)  # the loop keeps only a weak reference
        task.add_done_callback(self._starting.discard)
        return task

    async def _retire(self, replica: Replica, fault: ReplicaFault) -> None:
        try:
            fault = await self._with_stack_dump(replica.actor, fault)
        finally:
            self.end(replica.actor)
        self.history.append(f"{self.service} {replica.number} {fault.fault.value} and is replaced: {fault}")
        logger.warning(self.history[-1])
        recurred = self._has_recurred(fault)
        if self.make is None or recurred or self._restarts >= self.retry.restarts:
            await self._give_up(fault, recurred)
            return
        self._restarts, self._replacements = self._restarts + 1, self._replacements + 1
        self._in_background(self._replace(replica.number))

    async def _with_stack_dump(self, actor: Any, error: Exception) -> ReplicaFault:
        """`error` of `actor` with its stack dump if it hangs, with the end of its log if it died."""
        fault = error if isinstance(error, ReplicaFault) else ReplicaFault.of(Fault.DIED, error)
        if fault.fault is Fault.INVALID_ANSWER:
            return fault
        died = fault.fault is Fault.DIED
        seen = await self.stack_dump(actor, error=fault if died else None)
        return ReplicaFault(fault.fault, f"{fault}{seen}", repeats=died and fault.repeats)

    def _has_recurred(self, fault: ReplicaFault) -> bool:
        """Whether one failed for this very reason before, and none gave a valid answer: a third would fail so, too."""
        if self._useful or not fault.repeats:
            return False
        reason = _NUMBERS.sub("", str(fault))  # of the process, the prompt
        known = reason in self._reasons
        self._reasons.add(reason)
        return known

    async def close(self) -> None:
        """Stop starting replicas."""
        for task in list(self._starting):
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)

    async def _replace(self, number: int) -> None:
        """Start another replica in a turn of its role, or as part of the one whose call waits for it."""
        try:
            async with self.turn(joins=True):
                await self._start_another(number)
        except OpdError as error:  # its turn does not come
            self._replacements -= 1
            await self._give_up(ReplicaFault(Fault.HUNG, str(error)))

    async def _start_another(self, number: int) -> None:
        assert self.make is not None
        service = f"{self.service} {number} (its replacement)"
        while True:
            actor = self.make()
            try:
                await within(self.retry.start_deadline_s, service, self.ready(actor))
                await within(self.retry.deadline_s, service, self.warm_up(actor))
            except asyncio.CancelledError:
                self.end(actor)
                raise
            except Exception as error:  # noqa: BLE001 (whatever it is, this replica cannot serve)
                fault = await self._with_stack_dump(actor, error)
                self.end(actor)
                recurred = self._has_recurred(fault)
                if recurred or self._restarts >= self.retry.restarts:
                    self._replacements -= 1
                    await self._give_up(fault, recurred)
                    return
                self._restarts += 1
                continue
            self._replacements -= 1
            self.serving.append(Replica(number=number, actor=actor))  # no await since `warm_up`: it is up to date
            async with self._changed:
                self._changed.notify_all()
            return

    async def _give_up(self, fault: ReplicaFault, recurred: bool = False) -> None:
        """Replace no replica any more; those that serve go on, and if there are none, every call raises."""
        kind = DataError if fault.fault is Fault.INVALID_ANSWER else OpdError
        why = (
            "two failed alike before any was of use, so a third would, too"
            if recurred
            else f"no replica is left after {self._restarts} restarts (allowed: {self.retry.restarts}); the last one "
            f"{fault.fault.value}"
        )
        self._broken, self._recurring = kind(f"{self.service}: {why}: {fault}"), recurred
        async with self._changed:
            self._changed.notify_all()
