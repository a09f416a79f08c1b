"""Pools: replicas of an engine behind one interface, for the student and for each teacher."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from launch.config.retry_policy import RetryPolicy
from launch.services.dispatch import Dispatcher
from launch.services.failure_causes import brief
from launch.services.owned_returns import owned_answers
from launch.services.ray_session.cluster import end, fetch, has_died, is_lost, streamed
from launch.services.replicas import (
    GO_ON,
    DescribeStacks,
    Fault,
    Replica,
    ReplicaFault,
    Replicas,
    fault_of,
    no_stack_dump,
    within,
)
from launch.services.turns import Turn, resident
from opd.errors import ConfigurationError, DataError, OpdError
from opd.ports import (
    Completion,
    GenerateRequest,
    PublishedWeights,
    ScoreAnswer,
    ScoreRequest,
    StudentEngine,
    WeightAck,
    WeightObserver,
)
from opd.rollouts.validation import validate_completions
from opd.scorers.validation import validate_scores


async def _ready(actor: Any) -> None:
    await actor.ready.remote()


async def _nothing_to_do(actor: Any) -> None:
    """No warm-up: a teacher's weights never change."""


class StudentPool:
    """Pool of rollout engines behind one interface (`opd.ports.StudentEngine`).

    From the moment new weights are to be received, an engine is asked for text only after it has acknowledged exactly
    those, by version and digest; requests that come meanwhile wait for the first engine that has. So does a new engine.
    """

    def __init__(
        self,
        retry: RetryPolicy,
        make: Callable[[], Any] | None = None,
        end: Callable[[Any], None] = end,
        stack_dump: DescribeStacks = no_stack_dump,
        rows: int = 0,
    ) -> None:
        """`rows`: the ids that the engines' model has (0: not known, ids are only seen to be positive)."""
        self._weights: PublishedWeights | None = None
        self._gap = 0.0  # the largest sentinel gap of engines that took `_weights`
        self.replicas = Replicas(
            service="rollout actor",
            retry=retry,
            ready=_ready,
            warm_up=self._warm_up,
            end=end,
            make=make,
            stack_dump=stack_dump,
        )
        self._generate: Dispatcher[GenerateRequest, Completion] = Dispatcher(
            replicas=self.replicas,
            ask=lambda actor, requests: streamed(actor.generate_in_parts, requests),
            check=partial(validate_completions, rows=rows),
            lost=is_lost,
        )

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """One completion per request, in order."""
        async with self.replicas.turn():
            return await self._generate(requests)

    async def receive(self, weights: PublishedWeights) -> WeightAck:
        """Make `weights` live in every engine; with the largest sentinel gap.

        An engine that does not take them is replaced; if none takes them, the weights are at fault and that is raised.
        Returns when every engine has answered, and one at least has them.
        """
        async with self.replicas.turn():
            return await self._receive(weights)

    async def _receive(self, weights: PublishedWeights) -> WeightAck:
        self._weights, self._gap = weights, 0.0
        before = list(self.replicas.serving)
        for replica in before:
            replica.open = False
        refusals = await asyncio.gather(*[self._give(replica) for replica in before])
        if refusals and all(refusals):
            raise next(error for error in refusals if error is not None)
        await self.replicas.acquire(0)  # if all are gone: the first replacement, which has them
        return WeightAck(version=weights.version, digest=weights.digest, gap=self._gap)

    def renew(self, weights: PublishedWeights) -> None:
        """Set the new place of the live weights, from which engines that start later fetch them.

        Engines that serve hold the same bytes already and are not disturbed.
        """
        known = self._weights
        if known is not None and (known.version, known.digest) == (weights.version, weights.digest):
            self._weights = weights

    async def _give(self, replica: Replica) -> OpdError | None:
        """Send the weights to `replica`; returns its refusal, if it refuses. One that died or hangs does not."""
        refusal: OpdError | None = None
        try:
            service = f"rollout actor {replica.number} (weights)"
            await within(self.replicas.retry.deadline_s, service, self._warm_up(replica.actor))
            await self.replicas.reopen(replica)
            return None
        except ReplicaFault as error:
            fault = error
        except ConfigurationError:  # its numbers are not the learner's, and a replacement's would not be either
            raise
        except OpdError as error:
            refusal = None if is_lost(error) else error
            fault = ReplicaFault.of(fault_of(error) if is_lost(error) else Fault.INVALID_ANSWER, error)
        except Exception as error:
            if not is_lost(error):
                raise
            if not has_died(error):  # the weights are gone with the learner that held them, not the engine: it waits
                return OpdError(f"a rollout actor cannot read new weights ({brief(error)}); publish them again")
            fault = ReplicaFault.of(fault_of(error), error)
        await self.replicas.report(replica, fault)
        return refusal

    async def _warm_up(self, actor: Any) -> None:
        """Give `actor` the newest weights; again, if newer ones came meanwhile."""
        while (weights := self._weights) is not None:
            ack: WeightAck = await actor.receive.remote(weights)
            got, sent = (ack.version, ack.digest), (weights.version, weights.digest)
            if got != sent:
                raise DataError(
                    f"a rollout actor acknowledges version {got[0]} with digest {got[1]}, but version {sent[0]} with "
                    f"{sent[1]} was published; look at its log"
                )
            if weights is self._weights:
                self._gap = max(self._gap, ack.gap)
                return


@dataclass(frozen=True, slots=True, kw_only=True)
class Follower(WeightObserver):
    """The actors of a teacher that follows the student at every `every`-th version."""

    replicas: Replicas
    every: int
    deadline_s: float

    async def receive(self, weights: PublishedWeights) -> None:
        """Hand `weights` to every replica."""
        async with self.replicas.turn():
            calls = [
                within(self.deadline_s, f"teacher actor {r.number} (weights)", r.actor.follow.remote(weights, fetch))
                for r in self.replicas.serving
            ]
            await asyncio.gather(*calls)

    async def save(self, path: Path) -> str:
        """Write the weights, which all replicas share, to `path`; returns their digest."""
        async with self.replicas.turn():
            first = self.replicas.actors[0]
            return await within(self.deadline_s, "a teacher actor (saving)", first.save.remote(str(path)))

    async def restore(self, path: Path) -> None:
        """Take back what `save` wrote."""
        async with self.replicas.turn():
            calls = [
                within(self.deadline_s, f"teacher actor {r.number} (loading)", r.actor.restore.remote(str(path)))
                for r in self.replicas.serving
            ]
            await asyncio.gather(*calls)


class TeacherPool:
    """Pool of scoring actors behind one interface (`opd.ports.LogprobTeacher`).

    Scores are validated here, where it is known which replica gave them.
    """

    def __init__(
        self,
        retry: RetryPolicy,
        make: Callable[[], Any] | None = None,
        end: Callable[[Any], None] = end,
        stack_dump: DescribeStacks = no_stack_dump,
    ) -> None:
        self.replicas = Replicas(
            service="teacher actor",
            retry=retry,
            ready=_ready,
            warm_up=_nothing_to_do,
            end=end,
            make=make,
            stack_dump=stack_dump,
        )
        self._score: Dispatcher[ScoreRequest, ScoreAnswer] = Dispatcher(
            replicas=self.replicas,
            ask=lambda actor, requests: owned_answers(actor.score_owned, requests),
            check=validate_scores,
            lost=is_lost,
        )

    @classmethod
    def of(cls, actors: Sequence[Any], retry: RetryPolicy, turn: Turn = resident) -> "TeacherPool":
        """A pool of actors that are ready and are not replaced; `turn` is that of the pool they belong to."""
        pool = cls(retry)
        pool.replicas.turn = turn
        pool.replicas.adopt(list(actors))
        return pool

    async def score(self, requests: Sequence[ScoreRequest]) -> list[ScoreAnswer]:
        """Scores per request, in order."""
        async with self.replicas.turn():
            return await self._score(requests)


class ObservedStudent:
    """A student whose new weights go to observers, too, and to teachers that follow it (`TeacherConfig.mixup`).

    A follower takes in a version once, because it becomes another model by it; `seen` is the version up to which they
    have done so: a resumed run publishes that one again. Observers, in `observers`, receive every publication.
    """

    def __init__(
        self,
        student: StudentEngine,
        followers: Mapping[str, Follower] = MappingProxyType({}),
        observers: Sequence[WeightObserver] = (),
    ) -> None:
        self.student, self.followers, self.observers = student, followers, list(observers)
        self.seen = self._begun = 0

    async def generate(self, requests: Sequence[GenerateRequest]) -> list[Completion]:
        """Completions of the student, in order."""
        return await self.student.generate(requests)

    async def receive(self, weights: PublishedWeights) -> WeightAck:
        """Send the weights to followers and observers first: no lagging teacher may score the new student's text."""
        new = weights.version > self.seen
        due = [follower for follower in self.followers.values() if new and not weights.version % follower.every]
        if due and weights.version <= self._begun:  # the learner was lost while they did
            raise OpdError(
                f"teachers that follow the student may have taken in version {weights.version} in part and cannot do "
                f"so twice; {GO_ON}"
            )
        self._begun = max(self._begun, weights.version)
        await asyncio.gather(*[observer.receive(weights) for observer in (*due, *self.observers)])
        self.seen = max(self.seen, weights.version)
        return await self.student.receive(weights)
