"""Actors in virtual time, behind the real pools: they take a given time, fail, and are replaced.

What a pool sees is what Ray shows it: methods with `.remote`, generators of references, an error when an actor is gone.
"""

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

from launch.config.retry_policy import RetryPolicy
from opd.errors import ServiceLost, ServiceVanished

# As a run has it, but with as many tries and replacements as it takes (a run has 4 and 8).
RETRIES = RetryPolicy(deadline_s=1e6, start_deadline_s=1e6, attempts=50, restarts=1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Failure model: an actor fails `rate` times in `every_s` seconds on average; that is noticed after `notice_s`, and
    its replacement works `restart_s` later.

    The learner, whose ranks stop together, fails in a step with probability `learner`; its ranks start anew beside the
    driver. `resume`: that ends the run instead (`cluster.restarts=0`), which goes on from its last checkpoint with
    nothing of what was in flight.
    """

    rate: float = 0.0
    every_s: float = 1.0
    notice_s: float = 5.0
    restart_s: float = 30.0
    learner: float = 0.0
    resume: bool = False


@dataclass(slots=True)
class Busy:
    """Actor-seconds of a role: of work that was delivered, of work that was lost, and of waiting for replacements."""

    useful: float = 0.0
    lost: float = 0.0
    down: float = 0.0


@dataclass(slots=True, eq=False)
class _Job:
    call: "_Call"
    at: int
    seconds: float
    timer: asyncio.TimerHandle | None = None
    began: float = 0.0


@dataclass(slots=True, eq=False)
class _Call:
    """Jobs of one request; finished ones are delivered in parts of at least `part` (or when all are)."""

    part: int
    left: int
    out: "asyncio.Queue[list[int] | ServiceLost]" = field(default_factory=asyncio.Queue)
    done: list[_Job] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Worker:
    """Actor that does `width` jobs at once, first come, first served, until it is killed."""

    width: int
    busy: Busy
    ready_s: float = 0.0
    alive: bool = True
    lived: list[tuple[float, int]] = field(default_factory=list)  # since when which version of the weights is live
    _calls: dict[_Call, None] = field(default_factory=dict)
    _waiting: deque[_Job] = field(default_factory=deque)
    _running: dict[_Job, None] = field(default_factory=dict)

    async def work(self, seconds: Sequence[float], part: int) -> AsyncIterator[list[int]]:
        """Run jobs of these lengths; yields positions of finished ones."""
        if not self.alive:
            raise ServiceVanished("the actor is gone")
        call = _Call(part=part, left=len(seconds))
        self._calls[call] = None
        self._waiting.extend(_Job(call=call, at=i, seconds=s) for i, s in enumerate(seconds))
        self._start()
        left = len(seconds)
        try:
            while left:
                delivered = await call.out.get()
                if isinstance(delivered, ServiceLost):
                    raise delivered
                left -= len(delivered)
                yield delivered
        finally:
            del self._calls[call]
            if left and self.alive:
                self._drop(call)

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting and len(self._running) < self.width:
            job = self._waiting.popleft()
            job.began = loop.time()
            job.timer = loop.call_later(job.seconds, self._finish, job)
            self._running[job] = None

    def _finish(self, job: _Job) -> None:
        del self._running[job]
        call = job.call
        call.done.append(job)
        call.left -= 1
        if len(call.done) >= call.part or not call.left:
            self.busy.useful += sum(done.seconds for done in call.done) / self.width
            call.out.put_nowait([done.at for done in call.done])
            call.done.clear()
        self._start()

    def _drop(self, call: _Call) -> None:
        """Drop the rest of `call`, which was abandoned."""
        self._waiting = deque(job for job in self._waiting if job.call is not call)
        self._lose([job for job in self._running if job.call is call], [call])
        self._start()

    def _lose(self, running: Sequence[_Job], calls: Sequence[_Call]) -> None:
        now = asyncio.get_running_loop().time()
        for job in running:
            assert job.timer is not None
            job.timer.cancel()
            self.busy.lost += (now - job.began) / self.width
            del self._running[job]
        for call in calls:
            self.busy.lost += sum(job.seconds for job in call.done) / self.width
            call.done.clear()

    def kill(self, notice_s: float = math.inf) -> None:
        """Kill the actor: undelivered work is lost; waiting calls are notified `notice_s` later, if ever."""
        if not self.alive:
            return
        self.alive = False
        self._waiting.clear()
        self._lose(list(self._running), list(self._calls))
        if notice_s < math.inf:
            asyncio.get_running_loop().call_later(notice_s, self._tell)

    def _tell(self) -> None:
        for call in self._calls:
            call.out.put_nowait(ServiceVanished("the actor died"))


class Crew:
    """The workers of one role, which fail as `faults` describes; the same every time for one `seed`."""

    def __init__(self, width: int, faults: Faults, seed: int) -> None:
        self.busy, self.failures = Busy(), 0
        self._width, self._faults, self._draw = width, faults, Random(seed)
        self._workers: dict[Worker, asyncio.TimerHandle | None] = {}
        self._died: deque[float] = deque()  # when those failed that have no replacement yet

    def make(self) -> Worker:
        """A new worker: ready at once, unless it takes the place of one that died."""
        now, late = asyncio.get_running_loop().time(), len(self._died) > 0
        worker = Worker(self._width, self.busy, ready_s=self._faults.restart_s if late else 0.0)
        self._workers[worker] = None
        if late:
            self.busy.down += now - self._died.popleft() + worker.ready_s
        if self._faults.rate:
            wait = worker.ready_s + self._draw.expovariate(self._faults.rate / self._faults.every_s)
            self._workers[worker] = asyncio.get_running_loop().call_later(wait, self._die, worker)
        return worker

    def _die(self, worker: Worker) -> None:
        self.failures += 1
        self._died.append(asyncio.get_running_loop().time())
        del self._workers[worker]
        worker.kill(self._faults.notice_s)

    def close(self) -> None:
        """End the run: all are killed, and their work under way is lost."""
        for worker, timer in self._workers.items():
            if timer is not None:
                timer.cancel()
            worker.kill()
        self._workers.clear()
        self._died.clear()


async def _now(value: Any) -> Any:
    return value


class _HandOver:
    """Answers without arrays, as `launch.services.owned_returns` takes them over."""

    def __init__(self, answers: Awaitable[Any]) -> None:
        self._answers, self._taken = answers, False

    async def completed(self) -> None:
        self._said = await self._answers

    def __aiter__(self) -> "_HandOver":
        return self

    async def __anext__(self) -> Awaitable[Any]:
        if self._taken:
            raise StopAsyncIteration
        self._taken = True
        return _now(self._said)


Answer = Callable[[Worker, Sequence[Any], Sequence[int]], Sequence[Any]]


def actor(
    worker: Worker,
    seconds: Callable[[Sequence[Any]], Sequence[float]],
    answer: Answer,
    part: Callable[[int], int],
    receive: Callable[[Any], Awaitable[Any]],
) -> Any:
    """`worker` with the interface of Ray's engines and teachers: `seconds` times requests, `answer` makes results."""

    async def in_parts(requests: Sequence[Any]) -> AsyncIterator[Any]:
        async for done in worker.work(seconds(requests), part(len(requests))):
            yield _now((done, answer(worker, requests, done)))

    async def score(requests: Sequence[Any]) -> Sequence[Any]:
        async for _ in worker.work(seconds(requests), 1):
            pass
        return answer(worker, requests, range(len(requests)))

    async def ready() -> None:
        await asyncio.sleep(worker.ready_s)

    def score_owned(requests: Sequence[Any]) -> _HandOver:
        return _HandOver(score(requests))

    methods = {
        "generate_in_parts": in_parts,
        "score_owned": score_owned,
        "receive": receive,
        "ready": ready,
    }
    return SimpleNamespace(worker=worker, **{name: SimpleNamespace(remote=method) for name, method in methods.items()})


def end(seen: Any) -> None:
    """Kill an actor that the pool gives up."""
    seen.worker.kill()
