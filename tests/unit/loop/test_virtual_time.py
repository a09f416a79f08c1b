"""Virtual time and the simulated cluster: clocks jump, nothing is lost, and everything repeats bit for bit."""

import asyncio
import time
from collections import deque
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.schedule import ARMS, Arm, best_cluster, floors, run
from benchmarks.simulated import Cluster, SimulatedStudent, Workload
from benchmarks.stand_ins import Busy, Crew, Faults, Worker
from benchmarks.virtual_time import Stalled, simulate
from opd.errors import ServiceLost
from opd.observability.utilization import STAFFED

SMALL = Workload(sequences=32, grain=2048, median=6000.0, sigma=0.8, prompt=2048)
CLUSTER = Cluster(rollout=3, teacher=2, learner=2, slots=4)
AHEAD = Arm(name="ahead", ahead=4)


def test_a_month_passes_at_once_and_in_order() -> None:
    woken: list[tuple[float, str]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        woken.append((asyncio.get_running_loop().time(), name))

    async def main() -> float:
        await asyncio.gather(sleeper("month", 2_592_000.0), sleeper("second", 1.0), sleeper("day", 86_400.0))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5.0):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    began = time.perf_counter()
    assert simulate(main()) == pytest.approx(2_592_005.0)
    assert time.perf_counter() - began < 60
    assert woken == [
        (pytest.approx(1.0), "second"),
        (pytest.approx(86_400), "day"),
        (pytest.approx(2_592_000), "month"),
    ]


def test_time_stands_still_while_there_is_work() -> None:
    async def main() -> float:
        for _ in range(1000):
            await asyncio.sleep(0)
        return asyncio.get_running_loop().time()

    assert simulate(main()) == 0.0


def test_a_deadlock_is_found() -> None:
    async def waits() -> None:
        await asyncio.Event().wait()

    async def waits_beside_a_clock() -> None:
        def tick() -> None:
            asyncio.get_running_loop().call_later(1.0, tick)

        tick()
        await asyncio.Event().wait()

    with pytest.raises(Stalled, match="no timer is set"):
        simulate(waits())
    with pytest.raises(Stalled, match="within 100 virtual seconds"):
        simulate(waits_beside_a_clock(), horizon_s=100.0)


def served(jobs: list[float], actors: int, width: int, faults: Faults, part: int = 1) -> tuple[float, Crew]:
    """Every job is asked for by itself, and asked again when its worker dies; the last ends at the time returned."""

    async def main() -> tuple[float, Crew]:
        crew = Crew(width, faults, seed=5)
        workers = deque(crew.make() for _ in range(actors))

        async def done(seconds: float) -> None:
            while True:
                worker = min(workers, key=lambda w: len(w._calls))
                try:
                    async for _ in worker.work([seconds], part):
                        pass
                    return
                except ServiceLost:
                    if worker in workers:
                        workers.remove(worker)
                        workers.append(crew.make())

        await asyncio.gather(*[done(seconds) for seconds in jobs])
        took = asyncio.get_running_loop().time()
        crew.close()
        return took, crew

    return simulate(main(), horizon_s=1e6)


JOBS = st.lists(st.floats(0.5, 20.0), min_size=1, max_size=30)


@given(JOBS, st.integers(1, 3))
def test_a_worker_never_idles_while_work_waits(jobs: list[float], width: int) -> None:
    """Greedy queues end within `work/places + longest`, and not before `work/places` nor the longest."""
    took, crew = served(jobs, 1, width, Faults())
    assert max(sum(jobs) / width, max(jobs)) <= took + 1e-6
    assert took <= sum(jobs) / width + max(jobs) + 1e-6
    assert crew.busy.useful == pytest.approx(sum(jobs) / width) and crew.busy.lost == crew.busy.down == 0


@given(JOBS, st.integers(1, 3))
def test_failures_lose_time_and_no_work(jobs: list[float], actors: int) -> None:
    faults = Faults(rate=1.0, every_s=60.0, notice_s=1.0, restart_s=7.0)
    took, crew = served(jobs, actors, 2, faults)
    healthy, _ = served(jobs, actors, 2, Faults())
    assert crew.busy.useful == pytest.approx(sum(jobs) / 2)
    if not crew.failures:
        assert took == pytest.approx(healthy) and not crew.busy.lost
    assert crew.busy.lost >= 0


def test_a_failure_really_happens_and_costs_what_it_must() -> None:
    took, crew = served([50.0], 1, 1, Faults(rate=1.0, every_s=40.0, notice_s=3.0))
    assert crew.failures >= 1
    assert took == pytest.approx(50.0 + crew.busy.lost + 3.0 * crew.failures)


def test_parts_come_when_they_are_full_and_what_was_not_delivered_is_lost_with_the_worker() -> None:
    seen: list[tuple[float, list[int]]] = []

    async def main() -> Busy:
        now = asyncio.get_running_loop().time
        worker = Worker(2, Busy())
        asyncio.get_running_loop().call_later(6.5, worker.kill, 1.0)

        async def listen() -> None:
            async for part in worker.work([1.0, 2.0, 3.0, 2.5, 9.0], 3):
                seen.append((now(), part))  # noqa: PERF401

        with pytest.raises(ServiceLost):
            await listen()
        assert now() == 7.5
        return worker.busy

    busy = simulate(main())
    assert seen == [(4.0, [0, 1, 2])], "0 and 1 ended at 1 and 2 s, 2 and 3 began then"
    assert busy.useful == 6.0 / 2
    assert busy.lost == pytest.approx((2.5 + 2.5) / 2), "3 had ended at 4.5 s, 4 had begun at 4 s"


@pytest.mark.parametrize(("rate", "resume"), [(0.0, False), (0.2, False), (0.2, True)])
@pytest.mark.parametrize("arm", [ARMS[0], AHEAD], ids=lambda arm: arm.name)
def test_a_run_repeats_bit_for_bit(arm: Arm, rate: float, resume: bool) -> None:
    faults = Faults(rate=rate, every_s=100.0, restart_s=10.0, learner=rate / 2, resume=resume)
    one, two = (run(CLUSTER, SMALL, arm, 3, faults, checkpoint_every=2) for _ in range(2))
    assert one.digest == two.digest and one.marks == two.marks
    assert (one.failures > 0) == (rate > 0) and (one.resumed > 0) == resume
    assert run(CLUSTER, replace(SMALL, seed=1), arm, 3, faults, checkpoint_every=2).digest != one.digest
    assert one.staleness <= arm.ahead


def test_a_learner_that_dies_costs_the_text_in_flight_unless_it_comes_back_alone() -> None:
    """The run that is resumed trains every step once (`go` checks the ledger), and later than the one that is not."""
    healthy, (resumed, alone) = run(CLUSTER, SMALL, AHEAD, 12), (
        run(CLUSTER, SMALL, AHEAD, 12, Faults(learner=0.1, resume=resume), checkpoint_every=1)
        for resume in (True, False)
    )  # fmt: skip
    assert resumed.resumed == resumed.failures > 0 and alone.failures > 0 == alone.resumed
    assert len(healthy.marks) == len(resumed.marks) == len(alone.marks)
    assert resumed.all_s > max(alone.all_s, healthy.all_s)
    assert resumed.busy[0].useful + resumed.busy[0].lost > healthy.busy[0].useful == pytest.approx(alone.busy[0].useful)


def test_overlap_hides_the_other_roles_and_lock_step_does_not() -> None:
    """The arms do the same work; no schedule beats its floor, and running ahead comes close to it."""
    lock, ahead = run(CLUSTER, SMALL, ARMS[0], 12), run(CLUSTER, SMALL, AHEAD, 12)
    steps = len(lock.marks)
    least, work = floors(CLUSTER, SMALL, steps)
    assert lock.all_s > steps * least.lock_step
    assert ahead.all_s > steps * max(work, least.teacher, least.learner + least.push)
    assert ahead.eta > 0.9 > 0.6 > lock.eta
    assert lock.step_s / ahead.step_s > 2
    counts = dict(zip(STAFFED, (3, 2, 2), strict=True))
    for made in (lock, ahead):
        assert made.usage.whole().bubble(counts) <= made.bubble + 0.05, "spans see a lower bound"


def test_the_best_split_gives_every_role_its_share() -> None:
    best = best_cluster(24, SMALL, 4)
    assert best.devices == 24
    least, work = floors(best, SMALL, 4)
    parts = [work, least.teacher, least.learner]
    assert max(parts) / min(parts) < 1.6, "no role has twice the devices it needs"


def test_lengths_have_the_mean_that_is_said() -> None:
    load = Workload(sequences=4000, grain=64)
    assert load.lengths(0).response.mean() == pytest.approx(load.mean, rel=0.06)
    assert load.lengths(0).response.max() <= load.most
    assert (load.lengths(0).response == load.lengths(0).response).all()
    assert (load.lengths(0).response != load.lengths(1).response).any()


def test_a_token_knows_the_version_it_was_written_by() -> None:
    """Weights go live every 3.5 tokens: a response of 12 tokens is by several versions, oldest first."""

    async def main() -> np.ndarray:
        student, lived = SimulatedStudent(CLUSTER, SMALL, Faults()), list[tuple[float, int]]()
        for version in range(40):
            asyncio.get_running_loop().call_later(
                3.5 * student.token_s * version, lived.append, (3.5 * student.token_s * version, version)
            )
        await asyncio.sleep(student.token_s + student.seconds(12))
        return student._completion(12, asyncio.get_running_loop().time(), lived).versions

    versions = simulate(main())
    assert (np.diff(versions) >= 0).all() and len(set(versions.tolist())) in (4, 5)
