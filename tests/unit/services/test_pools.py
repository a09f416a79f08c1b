"""Whom a pool of students asks while weights are on their way."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import OwnerDiedError

from benchmarks.virtual_time import simulate
from launch.config.retry_policy import RetryPolicy
from launch.services.pools import StudentPool
from launch.services.replicas import Fault, ReplicaFault
from opd.errors import DataError, OpdError
from opd.ports import Completion, GenerateRequest, Manifest, PublishedWeights, Sampling, Sentinel, WeightAck
from opd.types import StopReason, TokenScores


def weights(version: int, digest: str) -> PublishedWeights:
    sentinel = Sentinel(ids=np.zeros(2, np.int32), logprobs=np.zeros(1, np.float32), tolerance=1.0)
    manifest = Manifest(names=(), dtypes=(), shapes=(), nbytes=0)
    return PublishedWeights(version=version, manifest=manifest, chunks=(), digest=digest, sentinel=sentinel)


def requests(count: int) -> list[GenerateRequest]:
    ids, sampling = np.ones(1, np.int32), Sampling(max_tokens=1)
    return [GenerateRequest(prompt_id="p", sample=i, context_ids=ids, sampling=sampling) for i in range(count)]


@dataclass
class Engine:
    """An actor that answers at once, and acknowledges weights when it is let, with what it is told to."""

    number: int
    holds: tuple[int, str] = (0, "")
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    answer: Callable[[PublishedWeights], WeightAck] = lambda w: WeightAck(version=w.version, digest=w.digest, gap=0.25)
    asked: int = 0
    ended: bool = False

    async def write(self, asked: Sequence[GenerateRequest]) -> list[Completion]:
        assert not self.ended
        self.asked += len(asked)
        version, digest = self.holds
        one = np.full(1, self.number, np.int32)
        said = TokenScores(logprobs=np.zeros(1, np.float32))
        versions, digests = np.full(1, version, np.int32), {version: digest}
        done = Completion(token_ids=one, behavior=said, versions=versions, stop=StopReason.END, digests=digests)
        return [done] * len(asked)

    async def take(self, sent: PublishedWeights) -> WeightAck:
        await self.may_answer.wait()
        self.may_answer.clear()
        receipt = self.answer(sent)
        self.holds = (receipt.version, receipt.digest)
        return receipt

    async def write_in_parts(self, asked: Sequence[GenerateRequest]) -> AsyncIterator[Any]:
        """As Ray gives it: references, each of which is awaited."""

        async def part(at: int) -> Any:
            return [at], await self.write(asked[at : at + 1])

        for at in range(len(asked)):
            yield part(at)

    async def is_ready(self) -> None:
        """At once."""

    @property
    def actor(self) -> Any:
        """As Ray shows it."""
        methods = {"generate_in_parts": self.write_in_parts, "receive": self.take, "ready": self.is_ready}
        return SimpleNamespace(engine=self, **{name: SimpleNamespace(remote=m) for name, m in methods.items()})


def scene(work: Callable[[StudentPool, list[Engine]], Any], engines: int = 2, restarts: int = 0, **retry: Any) -> None:
    """`made` grows with every engine that is started; an engine that is ended cannot be asked any more."""

    async def play() -> None:
        made: list[Engine] = []

        def make() -> Any:
            made.append(Engine(len(made)))
            return made[-1].actor

        def end(actor: Any) -> None:
            actor.engine.ended = True

        pool = StudentPool(
            RetryPolicy(**({"deadline_s": 5.0, "start_deadline_s": 5.0, "restarts": restarts} | retry)), make, end
        )
        await pool.replicas.start(engines)
        await work(pool, made)
        await pool.replicas.close()

    simulate(play(), 1e6)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_before_the_first_publication_every_engine_is_asked() -> None:
    async def work(pool: StudentPool, engines: list[Engine]) -> None:
        await pool.generate(requests(40))
        assert [e.asked for e in engines] == [20, 20]

    scene(work)


def test_only_engines_that_acknowledged_are_asked_and_requests_wait_for_the_first() -> None:
    async def work(pool: StudentPool, engines: list[Engine]) -> None:
        receiving = asyncio.create_task(pool.receive(weights(1, "aa")))
        await settle()
        writing = asyncio.create_task(pool.generate(requests(40)))
        await settle()
        assert not writing.done() and engines[0].asked == engines[1].asked == 0
        engines[1].may_answer.set()
        written = await writing
        assert {int(c.token_ids[0]) for c in written} == {1} and {c.digests[1] for c in written} == {"aa"}
        assert not receiving.done()
        engines[0].may_answer.set()
        assert await receiving == WeightAck(version=1, digest="aa", gap=0.25)
        assert {int(c.token_ids[0]) for c in await pool.generate(requests(40))} == {0, 1}

    scene(work)


@pytest.mark.parametrize(("version", "digest"), [(1, "bb"), (0, "aa"), (2, "aa")])
def test_an_engine_that_acknowledges_something_else_is_replaced_by_one_that_has_the_weights(
    version: int, digest: str
) -> None:
    async def work(pool: StudentPool, engines: list[Engine]) -> None:
        engines[0].answer = lambda w: WeightAck(version=version, digest=digest, gap=0.0)
        for engine in engines:
            engine.may_answer.set()
        assert (await pool.receive(weights(1, "aa"))).digest == "aa"
        await pool.generate(requests(40))
        assert [e.asked for e in engines] == [0, 40, 0] and engines[0].ended, "the new one has no weights yet"
        engines[2].may_answer.set()
        await settle()
        written = await pool.generate(requests(40))
        assert [e.asked for e in engines] == [0, 60, 20]
        assert {c.digests[1] for c in written} == {"aa"}

    scene(work, restarts=1)


def test_an_engine_that_refuses_is_replaced_and_the_replacement_takes_the_newest() -> None:
    async def work(pool: StudentPool, engines: list[Engine]) -> None:
        def refuse(sent: PublishedWeights) -> WeightAck:
            raise DataError("damaged")

        engines[0].answer = refuse
        for engine in engines:
            engine.may_answer.set()
        await pool.receive(weights(1, "aa"))
        engines[1].may_answer.set()
        await pool.receive(weights(2, "bb"))  # the third is being given version 1
        engines[2].may_answer.set()
        await settle()
        assert engines[2].holds == (1, "aa")
        assert {int(c.token_ids[0]) for c in await pool.generate(requests(40))} == {1}
        engines[2].may_answer.set()
        await settle()
        assert engines[2].holds == (2, "bb")
        assert {int(c.token_ids[0]) for c in await pool.generate(requests(40))} == {1, 2}

    scene(work, restarts=1)


def test_weights_that_every_engine_refuses_are_at_fault() -> None:
    async def work(pool: StudentPool, engines: list[Engine]) -> None:
        def refuse(sent: PublishedWeights) -> WeightAck:
            raise DataError("half-loaded")

        for engine in engines:
            engine.answer = refuse
            engine.may_answer.set()
        with pytest.raises(DataError, match="half-loaded"):
            await pool.receive(weights(1, "aa"))

    scene(work, restarts=5)


def test_a_late_acknowledgement_of_older_weights_opens_nothing() -> None:
    async def work(pool: StudentPool, engines: list[Engine]) -> None:
        first = asyncio.create_task(pool.receive(weights(1, "aa")))
        await settle()
        second = asyncio.create_task(pool.receive(weights(2, "bb")))
        await settle()
        engines[0].may_answer.set()  # wakes both calls of this engine; it holds what the last of them said
        engines[0].answer = lambda w: WeightAck(version=1, digest="aa", gap=0.0)
        await settle()
        writing = asyncio.create_task(pool.generate(requests(1)))
        await settle()
        assert not writing.done()
        for task in (first, second, writing):
            task.cancel()
        await asyncio.gather(first, second, writing, return_exceptions=True)

    scene(work)


def test_waiting_for_an_engine_has_a_deadline() -> None:
    async def work(pool: StudentPool, engines: list[Engine]) -> None:
        receiving = asyncio.create_task(pool.receive(weights(1, "aa")))
        await settle()
        writing = asyncio.create_task(pool.generate(requests(3)))
        for task in (receiving, writing):
            with pytest.raises(
                OpdError, match=r"no replica is left .* hung: rollout actor \d .* did not answer within 5 s"
            ):
                await task

    scene(work)


def test_an_engine_that_cannot_read_what_a_lost_learner_laid_out_waits_for_the_next_weights() -> None:
    """It is not at fault, and another in its place could not read them either."""

    def gone(_: PublishedWeights) -> WeightAck:
        raise OwnerDiedError("0" * 56, None, "")  # type: ignore[arg-type]

    async def work(pool: StudentPool, engines: list[Engine]) -> None:
        for engine in engines:
            engine.may_answer.set()
        engines[0].answer = gone
        await pool.receive(weights(1, "one"))
        await pool.generate(requests(40))
        assert [e.asked for e in engines] == [0, 40] and len(engines) == 2
        engines[1].answer = gone
        for engine in engines:
            engine.may_answer.set()
        with pytest.raises(OpdError, match=r"cannot read new weights \(OwnerDiedError.*publish them again"):
            await pool.receive(weights(2, "two"))
        for engine in engines:
            engine.answer = Engine(0).answer
            engine.may_answer.set()
        await pool.receive(weights(2, "two"))  # from ranks that live
        await pool.generate(requests(40))
        assert [e.holds for e in engines] == [(2, "two")] * 2 and [e.asked for e in engines] == [20, 60]

    scene(work, restarts=5)


def test_an_engine_that_starts_fetches_live_weights_from_where_they_lie_now() -> None:
    async def work(pool: StudentPool, engines: list[Engine]) -> None:
        engines[0].may_answer.set()
        await pool.receive(weights(1, "one"))
        moved, other = weights(1, "one"), weights(1, "another")
        pool.renew(other)
        pool.renew(moved)
        pool.renew(weights(2, "two"))
        taken: list[PublishedWeights] = []
        await pool.replicas.report(pool.replicas.serving[0], ReplicaFault(Fault.DIED, "killed"))
        await settle()
        engines[1].answer = lambda w: taken.append(w) or WeightAck(version=w.version, digest=w.digest, gap=0.0)
        engines[1].may_answer.set()
        await pool.generate(requests(1))
        assert taken == [moved] and taken[0] is moved
        assert engines[0].holds == (1, "one"), "one that serves was disturbed"

    scene(work, engines=1, restarts=1)
