"""Pools under fire, in virtual time: stand-in replicas die, hang, lie and lag; nothing is lost, repeated or wrong."""

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError

from actors.engine import VLLMEngine
from benchmarks.virtual_time import simulate
from launch.config.retry_policy import RetryPolicy
from launch.services.dispatch import MANY_CALLS, SMALLEST_SHARE, Dispatcher, share_bounds
from launch.services.replicas import Fault, ReplicaFault, Replicas, within
from opd.errors import ConfigurationError, DataError, OpdError, ServiceHung, ServiceLost
from teacher_service.backends.torch_forward import TorchTeacher
from tests.fault_matrix import Witness

FAULTS = (
    "die before",
    "die between",
    "hang",
    "say to be stuck",
    "lie",
    "say too little",
    "say nothing more",
    "answer twice",
    "answer what nobody asked",
    "say nothing at all",
)


@dataclass
class Actor:
    """Answers `request -> 10 * request`, four at a time; its `plan` says what goes wrong at which call."""

    shop: "Shop"
    number: int
    version: int = -1
    alive: bool = True

    async def ask(self, requests: Sequence[int]) -> AsyncIterator[tuple[Sequence[int], Sequence[Any]]]:
        fault = self.shop.next_fault()
        self.shop.open += 1
        try:
            if fault == "die before":
                self.fall(fault)
            if fault == "raise":
                self.shop.fired[fault] += 1
                raise ServiceLost("no kernel for head_dim=16")
            if self.version != self.shop.version:
                self.shop.stale += 1
            for start in range(0, len(requests), 4):
                await asyncio.sleep(self.shop.delay() if self.number != self.shop.slow else 0.5)
                part = range(start, min(start + 4, len(requests)))
                said = [10 * requests[i] for i in part]
                if fault == "hang":
                    self.shop.fired[fault] += 1
                    await asyncio.Event().wait()
                if fault == "say to be stuck":
                    self.shop.fired[fault] += 1
                    raise ServiceHung("the engine did not finish writing within 5 s")
                if fault == "lie":
                    self.shop.fired[fault] += 1
                    said[-1] += 1
                if fault == "say too little":
                    self.shop.fired[fault] += 1
                    said.pop()
                if fault in ("answer twice", "answer what nobody asked", "say nothing at all"):
                    self.shop.fired[fault] += 1
                    part = {"answer twice": [start, start], "say nothing at all": []}.get(fault, [len(requests)])
                    said = [10 * requests[start]] * len(part)
                if fault == "say nothing more" and start:
                    self.shop.fired[fault] += 1
                    return
                self.shop.answered.update(requests[i] for i in part if i < len(requests))
                yield part, said
                if fault == "die between":
                    self.fall(fault)
        finally:
            self.shop.open -= 1

    def fall(self, fault: str) -> None:
        self.shop.fired[fault] += 1
        self.alive = False
        raise ActorDiedError  # as Ray tells of a process that is gone: without a reason


@dataclass
class Shop:
    """Makes actors, and knows what happened to them."""

    faults: list[str] = field(default_factory=list)  # of the calls, in order; "" = none
    seed: int = 0
    version: int = 0
    slow: int = -1
    made: list[Actor] = field(default_factory=list)
    ended: list[Actor] = field(default_factory=list)
    fired: Counter[str] = field(default_factory=Counter)
    answered: Counter[int] = field(default_factory=Counter)
    open: int = 0
    stale: int = 0
    breaks_at_start: int = 0
    broken: str = ""  # why, if they say so

    def __post_init__(self) -> None:
        self.draw = np.random.default_rng(self.seed)

    def delay(self) -> float:
        return float(self.draw.choice([0.0, 0.0, 0.001]))

    def next_fault(self) -> str:
        return self.faults.pop(0) if self.faults else ""

    def make(self) -> Actor:
        self.made.append(Actor(self, len(self.made)))
        return self.made[-1]

    async def ready(self, actor: Actor) -> None:
        await asyncio.sleep(0)
        if self.breaks_at_start and actor.number:
            self.breaks_at_start -= 1
            raise ServiceLost(self.broken) if self.broken else ActorDiedError

    async def warm_up(self, actor: Actor) -> None:
        while actor.version != self.version:
            version = self.version
            await asyncio.sleep(0)
            actor.version = version

    async def pool(self, count: int = 2, **retry: Any) -> Dispatcher[int, int]:
        settings: Any = {"deadline_s": 0.2, "restarts": 1000, "cooldown_s": 0.001} | retry
        replicas = Replicas(
            service="worker", retry=RetryPolicy(**settings), ready=self.ready, warm_up=self.warm_up,
            end=self.ended.append, make=self.make,
        )  # fmt: skip
        await replicas.start(count)
        for actor in self.made:
            await self.warm_up(actor)
        return Dispatcher(replicas=replicas, ask=lambda actor, r: actor.ask(r), check=check, lost=is_lost)


def check(requests: Sequence[int], answers: Sequence[int]) -> None:
    if any(a != 10 * r for r, a in zip(requests, answers, strict=True)):
        raise DataError("an answer is wrong")


def is_lost(error: BaseException) -> bool:
    return isinstance(error, ServiceLost | ActorDiedError)


async def ask_groups(pool: Dispatcher[int, int], groups: Sequence[Sequence[int]]) -> list[list[int]]:
    return await asyncio.wait_for(asyncio.gather(*[pool(group) for group in groups]), 30)


@settings(max_examples=60, deadline=None)
@given(
    faults=st.lists(st.sampled_from(["", "", *FAULTS]), max_size=12), sizes=st.lists(st.integers(0, 30), max_size=8),
    count=st.integers(1, 4), seed=st.integers(0, 9),
)  # fmt: skip
def test_every_caller_gets_its_own_answers_whatever_goes_wrong(
    faults: list[str], sizes: list[int], count: int, seed: int
) -> None:
    async def run() -> None:
        shop = Shop(faults=list(faults), seed=seed)
        pool = await shop.pool(count, attempts=len(faults) + 1, deadline_s=0.05)
        pool.replicas.answered()  # what fails alike before anybody was of use ends the run (below)
        groups = [[1000 * i + j for j in range(size)] for i, size in enumerate(sizes)]
        assert await ask_groups(pool, groups) == [[10 * r for r in group] for group in groups]
        await asyncio.sleep(0.01)  # a caller has his answers before the call is put away
        reported, fired = sum(pool.replicas.faults.values()), sum(shop.fired.values())
        assert bool(fired) == bool(reported) and reported <= fired, "two calls may find the same replica dead"
        assert all(not replica.load for replica in pool.replicas.serving)
        await pool.replicas.close()
        assert not shop.open, "a call was left open"
        assert len(shop.ended) >= reported
        assert not {id(r.actor) for r in pool.replicas.serving} & {id(actor) for actor in shop.ended}

    simulate(run(), 1e6)


@pytest.mark.faults("everything at once")
def test_two_hundred_kills_lose_and_repeat_nothing(witness: Witness) -> None:
    """Steps of 64 requests while something dies, hangs or lies at every second call, until 200 faults have fired."""

    async def run() -> Shop:
        draw = np.random.default_rng(0)
        shop = Shop()
        pool = await shop.pool(4, attempts=20, restarts=10_000, deadline_s=0.05)
        pool.replicas.answered()
        step = 0
        while sum(shop.fired.values()) < 200:
            shop.faults = [str(draw.choice(["", *FAULTS])) for _ in range(8)]
            shop.version = step
            for replica in list(pool.replicas.serving):
                await shop.warm_up(replica.actor)
            groups = [[step * 1000 + 8 * g + i for i in range(8)] for g in range(8)]
            assert await ask_groups(pool, groups) == [[10 * r for r in group] for group in groups]
            step += 1
        await pool.replicas.close()
        assert not shop.open
        return shop

    shop = simulate(run(), 1e6)
    assert sum(shop.fired.values()) >= 200 and set(shop.fired) == set(FAULTS)
    assert shop.stale == 0, "a replica served with weights that were not the newest"
    witness("everything at once", sum(shop.fired.values()))


def test_a_replacement_serves_only_with_the_newest_weights() -> None:
    async def run() -> None:
        shop = Shop(faults=["die before"], version=3)
        pool = await shop.pool(1)
        shop.version = 4  # published while nobody could take it
        assert await ask_groups(pool, [[1, 2]]) == [[10, 20]]
        assert [actor.version for actor in shop.made] == [3, 4]
        assert shop.stale == 0 and shop.fired["die before"] == 1

    simulate(run(), 1e6)


def test_what_was_answered_before_a_death_is_not_asked_again() -> None:
    async def run() -> None:
        shop = Shop(faults=["die between"])
        pool = await shop.pool(1)
        assert await ask_groups(pool, [list(range(12))]) == [[10 * r for r in range(12)]]
        assert set(shop.answered.values()) == {1}

    simulate(run(), 1e6)


def test_a_replica_that_says_itself_that_it_is_stuck_hangs() -> None:
    """Its own deadline may end before its caller's: the engine is looked at and replaced, and the run goes on."""

    async def run() -> None:
        shop, looked = Shop(faults=["say to be stuck"]), list[Any]()
        pool = await shop.pool(1)

        async def stack_dump(*actors: Any, error: BaseException | None = None) -> str:
            looked.extend(actors)
            assert error is None, "it has not died"
            return ""

        pool.replicas.stack_dump = stack_dump
        assert await ask_groups(pool, [[1, 2]]) == [[10, 20]]
        assert pool.replicas.faults == {Fault.DIED: 0, Fault.HUNG: 1, Fault.INVALID_ANSWER: 0}
        assert looked == shop.ended == shop.made[:1]

    simulate(run(), 1e6)


def test_an_engine_whose_own_deadline_ends_says_that_it_is_stuck() -> None:
    made: Any = object.__new__(VLLMEngine)
    made._config = SimpleNamespace(deadline_s=0.01)
    with pytest.raises(ServiceHung, match="student engine did not finish writing within"):
        asyncio.run(made._soon(asyncio.sleep(60), "writing"))


def test_a_teacher_whose_own_deadline_ends_says_that_it_is_stuck() -> None:
    made: Any = object.__new__(TorchTeacher)
    made._config = SimpleNamespace(deadline_s=0.01)
    given_up = threading.Event()
    made._scores = lambda _: given_up.wait(60)

    async def asked() -> None:
        try:
            await made.score([])
        finally:
            given_up.set()

    with pytest.raises(ServiceHung, match="teacher did not finish scoring 0 completions within"):
        asyncio.run(asked())


def test_the_breaker_pauses_and_closes_again() -> None:
    async def run() -> list[float]:
        shop = Shop(faults=["die before"] * 6)
        shop.delay = lambda: 0.0
        pool = await shop.pool(1, max_consecutive_failures=3, attempts=10, cooldown_s=1.0, deadline_s=3.0)
        took = []
        for _ in range(2):
            began = asyncio.get_running_loop().time()
            await ask_groups(pool, [[1]])
            took.append(asyncio.get_running_loop().time() - began)
        assert pool.replicas.faults[Fault.DIED] == 6
        return took

    first, second = simulate(run(), 1e6)
    assert first == pytest.approx(1 + 2 + 3 + 3, abs=0.01)  # after faults 3, 4, 5 and 6; a pause ends at the deadline
    assert second == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize(("fault", "kind"), [("lie", DataError), ("die before", OpdError)])
def test_a_service_that_always_fails_ends_in_one_sentence(fault: str, kind: type[Exception]) -> None:
    async def run() -> None:
        pool = await used(Shop(faults=["", *[fault] * 99]), attempts=3)
        with pytest.raises(kind, match=r"worker: 1 requests were given to 3 replicas .* all failed; the last one"):
            await ask_groups(pool, [[1]])
        scarce = await used(Shop(faults=["", *[fault] * 99]), attempts=30, restarts=2)
        with pytest.raises(kind, match=r"worker: no replica is left after 2 restarts"):
            await ask_groups(scarce, [[1]])

    async def used(shop: Shop, **retry: int) -> "Dispatcher[int, int]":
        pool = await shop.pool(2, **retry)
        assert await ask_groups(pool, [[7]]) == [[70]]
        return pool

    simulate(run(), 1e6)


@pytest.mark.parametrize(("fault", "replicas"), [("raise", 1), ("raise", 2), ("lie", 1), ("lie", 2)])
def test_a_cause_that_repeats_before_any_answer_ends_the_run_at_once(fault: str, replicas: int) -> None:
    """Eight restarts would each take minutes to say the same."""

    async def run() -> Shop:
        shop = Shop(faults=[fault] * 99)
        pool = await shop.pool(replicas, restarts=8, attempts=30)
        reason = "ServiceLost: no kernel for head_dim=16" if fault == "raise" else "an answer is wrong"
        with pytest.raises(OpdError, match=f"worker: two failed alike before any was of use.*: {reason}"):
            await ask_groups(pool, [[1]])
        return shop

    shop = simulate(run(), 1e6)
    assert shop.fired[fault] == 2 and len(shop.made) <= replicas + 1


def test_causes_that_differ_or_that_are_not_known_are_bad_luck() -> None:
    async def run() -> None:
        pool = await Shop(faults=["raise", "lie", "die before", "die before", "hang"]).pool(2, attempts=10)
        assert await ask_groups(pool, [[1]]) == [[10]]
        assert sum(pool.replicas.faults.values()) == 5

    simulate(run(), 1e6)


def test_replacements_that_fail_alike_at_their_start_are_not_repeated() -> None:
    async def run() -> Shop:
        shop = Shop(faults=["die before"], breaks_at_start=99, broken="head_dim=16 is unsupported (pid 7)")
        pool = await shop.pool(1, restarts=8)
        with pytest.raises(OpdError, match=r"worker: two failed alike.*head_dim=16 is unsupported"):
            await ask_groups(pool, [[7]])
        return shop

    assert len(simulate(run(), 1e6).made) == 3


def test_a_replacement_that_is_under_way_is_waited_for_when_no_other_may_be_started() -> None:
    """Two replicas and one restart: the second dies while the first one's replacement starts."""

    async def run() -> None:
        shop = Shop(faults=["die before"] * 2)
        pool = await shop.pool(2, restarts=1)
        pool.replicas.ready = slow_start
        assert await ask_groups(pool, [[i] for i in range(2 * SMALLEST_SHARE)])
        assert len(shop.ended) == 2 and len(pool.replicas.serving) == 1

    async def slow_start(actor: Actor) -> None:
        await asyncio.sleep(0.1)

    simulate(run(), 1e6)


def test_replacements_that_do_not_start_are_tried_within_the_budget() -> None:
    async def run() -> None:
        shop = Shop(faults=["die before"], breaks_at_start=3)
        pool = await shop.pool(1, restarts=4)
        assert await ask_groups(pool, [[7]]) == [[70]]
        assert len(shop.ended) == 4

    simulate(run(), 1e6)


def test_a_wrong_request_is_nobody_s_fault() -> None:
    async def run() -> None:
        shop = Shop()
        pool = await shop.pool(2)

        async def refuse(actor: Any, requests: Any) -> AsyncIterator[Any]:
            raise DataError("prompt 'p' is too long")
            yield

        pool.ask = refuse
        with pytest.raises(DataError, match="too long"):
            await ask_groups(pool, [[1]])
        assert len(pool.replicas.serving) == 2 and not shop.ended

    simulate(run(), 1e6)


@pytest.mark.faults("answers come late or twice")
def test_a_slow_replica_is_hedged_and_the_second_answer_is_not_counted_twice(witness: Witness) -> None:
    async def run() -> None:
        shop = Shop()
        pool = await shop.pool(2, hedge_quantile=0.95, deadline_s=5)
        for i in range(25):
            await ask_groups(pool, [[i]])
        assert pool.hedged <= 10
        before, shop.slow = pool.hedged, 0
        assert await asyncio.wait_for(pool([1, 2, 3]), 0.4) == [10, 20, 30]
        await asyncio.sleep(0.01)
        assert pool.hedged == before + 1 and not sum(pool.replicas.faults.values())
        witness("answers come late or twice", pool.hedged)
        assert not shop.open, "the slow one is still being asked"

    simulate(run(), 1e6)


def test_a_slow_replica_is_hedged_as_soon_as_another_is_idle() -> None:
    """When its patience ends, the other one is busy with the other half of the step."""

    async def run() -> None:
        shop = Shop()
        pool = await shop.pool(2, hedge_quantile=0.95, deadline_s=5)
        for i in range(25):
            await ask_groups(pool, [[i]])
        before, shop.slow = pool.hedged, 0
        shop.delay = lambda: 0.01
        many = list(range(2 * SMALLEST_SHARE))
        assert await asyncio.wait_for(pool(many), 0.4) == [10 * r for r in many]
        await asyncio.sleep(0.01)
        assert pool.hedged == before + 1 and not shop.open

    simulate(run(), 1e6)


@example(count=2048, loads=[0] * 200)
@given(count=st.integers(1, 5000), loads=st.lists(st.integers(0, 300), max_size=200))
def test_shares_level_the_replicas_and_are_worth_a_call(count: int, loads: list[int]) -> None:
    bounds = share_bounds(count, loads)
    sizes = [last - first for first, last in itertools.pairwise(bounds)]
    assert bounds[0] == 0 and bounds[-1] == count and len(sizes) <= max(1, len(loads))
    if len(sizes) > 1:
        assert min(sizes) >= SMALLEST_SHARE
    assert len(sizes) <= MANY_CALLS or count >= 2 * SMALLEST_SHARE * len(sizes)
    after = [load + size for load, size in zip(sorted(loads), sizes, strict=False)]
    if after:
        assert max(after) - min(after) <= 1, "those who are asked are level"
        few = len(sizes) < min(MANY_CALLS, count // SMALLEST_SHARE)
        for load in sorted(loads)[len(sizes) :] if few else []:
            assert load > max(after) - 2 * SMALLEST_SHARE, "who is not asked has little less to do than the others"


def test_who_has_less_to_do_is_given_more() -> None:
    """A replica that has answered half of what it was asked counts as having the other half to do."""

    async def run() -> list[int]:
        shop, asked = Shop(slow=0), list[int]()
        pool = await shop.pool(2, deadline_s=50)
        inner = pool.ask

        def ask(actor: Actor, requests: list[int]) -> Any:
            asked.append(len(requests))
            return inner(actor, requests)

        pool.ask = ask
        first = asyncio.ensure_future(pool(list(range(64))))
        await asyncio.sleep(2.1)  # one part of four every half second; the other replica is done
        second = asyncio.ensure_future(pool(list(range(100, 164))))
        assert await asyncio.gather(first, second)
        assert all(not replica.load for replica in pool.replicas.serving)
        return asked

    assert simulate(run(), 1e6) == [32, 32, 40, 24]


def test_one_call_per_replica_and_turn() -> None:
    async def run() -> None:
        shop = Shop()
        pool = await shop.pool(2)
        await ask_groups(pool, [[i] for i in range(2 * SMALLEST_SHARE)])
        assert sorted(len(s) for s in [shop.answered]) == [2 * SMALLEST_SHARE]
        assert len(pool._durations) == 2

    simulate(run(), 1e6)


def test_a_deadline_counts_only_while_the_driver_is_awake() -> None:
    """Stopped for longer than the deadline, it hears what was said meanwhile; without an answer the time is up."""

    async def answered(after_s: float, stopped_s: float) -> str:
        loop = asyncio.get_running_loop()
        answer = loop.create_future()
        said = threading.Timer(after_s, loop.call_soon_threadsafe, [answer.set_result, "said"])
        said.start()
        loop.call_soon(said.join, stopped_s)  # nothing else of this process runs, until it is said
        try:
            return await within(0.2, "somebody", answer)
        finally:
            said.cancel()

    assert asyncio.run(answered(0.3, 60)) == "said"
    begun = time.monotonic()
    with pytest.raises(ReplicaFault, match=r"^somebody did not answer within 0 s"):
        asyncio.run(answered(600, 0.5))
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("deadline_s", [0.5, 8.0, 3600.0])
def test_a_deadline_is_kept(deadline_s: float) -> None:
    async def waited() -> float:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        with pytest.raises(ReplicaFault):
            await within(deadline_s, "somebody", loop.create_future())
        return loop.time() - begun

    assert simulate(waited()) == pytest.approx(deadline_s)


def test_care_out_of_range_is_refused() -> None:
    for wrong in ({"attempts": 0}, {"restarts": -1}, {"hedge_quantile": 1.0}, {"max_consecutive_failures": 0}):
        fields: Any = {"deadline_s": 1.0} | wrong
        with pytest.raises(ConfigurationError, match="a retry policy needs"):
            RetryPolicy(**fields)


@pytest.mark.parametrize(
    ("raised", "kind", "sentence"),
    [
        (ConfigurationError("set student.device=AUTO"), ConfigurationError, "^set student.device=AUTO$"),
        (ValueError("head_dim=16"), OpdError, "^worker did not start: ValueError: head_dim=16$"),
    ],
)
def test_what_keeps_the_first_replicas_from_starting_keeps_its_kind(
    raised: Exception, kind: type[Exception], sentence: str
) -> None:
    async def run() -> None:
        shop = Shop()

        async def refuse(actor: Any) -> None:
            raise raised

        shop.ready = refuse
        with pytest.raises(kind, match=sentence):
            await shop.pool(2)

    simulate(run(), 1e6)
