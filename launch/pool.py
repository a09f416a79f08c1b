"""One pool for engines of any kind, with the protocol of its members.

Calls that arrive in the same turn of the event loop travel together: a step asks for tens of groups at once, and
a Ray call costs about a millisecond, so the pool turns them into one call per replica.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from launch.cluster import fetch
from opd.errors import OpdError
from opd.ports import Completion, GenerateRequest, ScoreRequest, StudentEngine, Weights
from opd.types import TokenScores

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Call = Callable[[list[Any]], Awaitable[list[Any]]]

SMALLEST_SHARE = 16  # requests worth a call of their own


async def within(deadline_s: float, who: str, work: Awaitable[Answer]) -> Answer:
    """`work`, or a sentence after `deadline_s` seconds."""
    try:
        async with asyncio.timeout(deadline_s):
            return await work
    except TimeoutError as error:
        raise OpdError(
            f"{who} did not answer within {deadline_s:.0f} s; look at its log, or raise its deadline_s"
        ) from error


@dataclass(slots=True)
class Dispatcher(Generic[Request, Answer]):
    """Coalesces concurrent calls and splits them over replicas, in order, least loaded first."""

    replicas: Sequence[Call]
    deadline_s: float
    who: str
    _waiting: list[tuple[list[Request], asyncio.Future[list[Answer]]]] = field(default_factory=list)
    _load: list[int] = field(default_factory=list)
    _running: set[asyncio.Task[None]] = field(default_factory=set)

    async def __call__(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers in the order of `requests`."""
        if not requests:
            return []
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Answer]] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._flush)
        self._waiting.append((list(requests), future))
        return await future

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        task = asyncio.get_running_loop().create_task(self._serve(waiting))
        self._running.add(task)  # the loop keeps only a weak reference
        task.add_done_callback(self._running.discard)

    async def _serve(self, waiting: list[tuple[list[Request], asyncio.Future[list[Answer]]]]) -> None:
        merged = [request for requests, _ in waiting for request in requests]
        try:
            answers = await self._split(merged)
        except Exception as error:  # noqa: BLE001 (every caller gets it)
            for _, future in waiting:
                if not future.done():
                    future.set_exception(error)
            return
        start = 0
        for requests, future in waiting:
            if not future.done():  # a caller may have been cancelled
                future.set_result(answers[start : start + len(requests)])
            start += len(requests)

    async def _split(self, requests: list[Request]) -> list[Answer]:
        self._load = self._load or [0] * len(self.replicas)
        shares = min(len(self.replicas), max(1, len(requests) // SMALLEST_SHARE))
        bounds = [len(requests) * i // shares for i in range(shares + 1)]
        chosen = sorted(range(len(self.replicas)), key=lambda i: (self._load[i], i))[:shares]

        async def one(replica: int, part: list[Request]) -> list[Answer]:
            self._load[replica] += len(part)
            try:
                return await within(self.deadline_s, f"{self.who} {replica}", self.replicas[replica](part))
            finally:
                self._load[replica] -= len(part)

        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(one(replica, requests[bounds[i] : bounds[i + 1]])) for i, replica in enumerate(chosen)
            ]
        return [answer for task in running for answer in task.result()]


class StudentPool:
    """Several rollout engines that look like one (`opd.ports.StudentEngine`)."""

    def __init__(self, actors: Sequence[Any], deadline_s: float) -> None:
        self.actors = actors
        self._deadline_s = deadline_s
        self._generate: Dispatcher[GenerateRequest, Completion] = Dispatcher(
            replicas=[actor.generate.remote for actor in actors], deadline_s=deadline_s, who="rollout actor"
        )

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """One completion per request, in order."""
        return await self._generate(requests)

    async def receive(self, weights: Weights) -> float:
        """Make `weights` live in every engine; the largest sentinel gap."""
        calls = [
            within(self._deadline_s, f"rollout actor {i} (weights)", actor.receive.remote(weights))
            for i, actor in enumerate(self.actors)
        ]
        return max(await asyncio.gather(*calls))


@dataclass(frozen=True, slots=True, kw_only=True)
class Follower:
    """The actors of a teacher that follows the student, and at which versions (every so many) it does."""

    actors: Sequence[Any]
    every: int
    deadline_s: float

    async def follow(self, weights: Weights) -> None:
        """Hand `weights` to every replica."""
        calls = [
            within(self.deadline_s, f"teacher actor {i} (weights)", actor.follow.remote(weights, fetch))
            for i, actor in enumerate(self.actors)
        ]
        await asyncio.gather(*calls)

    async def save(self, path: Path) -> str:
        """Write the weights, which all replicas share, to `path`; returns their digest."""
        return await within(self.deadline_s, "teacher actor 0 (saving)", self.actors[0].save.remote(str(path)))

    async def restore(self, path: Path) -> None:
        """Take back what `save` wrote."""
        calls = [
            within(self.deadline_s, f"teacher actor {i} (loading)", actor.restore.remote(str(path)))
            for i, actor in enumerate(self.actors)
        ]
        await asyncio.gather(*calls)


class TeacherPool:
    """Several scoring actors that look like one (`opd.ports.LogprobTeacher`)."""

    def __init__(self, actors: Sequence[Any], deadline_s: float) -> None:
        self.actors = actors
        self._score: Dispatcher[ScoreRequest, TokenScores] = Dispatcher(
            replicas=[actor.score.remote for actor in actors], deadline_s=deadline_s, who="teacher actor"
        )

    async def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores]:
        """Testimony per request, in order."""
        return await self._score(requests)


class FollowedStudent:
    """A student whose new weights some teachers take in, too (`TeacherConfig.mixup`).

    `seen` is the version up to which they have done so: a resumed run publishes that one again.
    """

    def __init__(self, student: StudentEngine, followers: Mapping[str, Follower]) -> None:
        self._student, self.followers = student, followers
        self.seen = 0

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """As the student itself."""
        return await self._student.generate(requests)

    async def receive(self, weights: Weights) -> float:
        """Every follower first, so that no text of the new student is read by a teacher that lags behind."""
        new = weights.version > self.seen
        due = [follower for follower in self.followers.values() if new and not weights.version % follower.every]
        await asyncio.gather(*[follower.follow(weights) for follower in due])
        self.seen = max(self.seen, weights.version)
        return await self._student.receive(weights)
