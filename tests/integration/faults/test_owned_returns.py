"""What a teacher in an actor of Ray has said can be read when that actor is gone."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
import psutil
import pytest

from launch.config.settings import ClusterConfig
from launch.services.owned_returns import DeferredArray, keep, owned_answers, with_owned_returns
from launch.services.ray_session.cluster import connected, fetch, is_lost, store
from opd.ports import ScoreAnswer
from opd.types import HiddenScores, RemoteRows
from tests.fault_matrix import Witness
from tests.one_kind import answered, singles


class Teacher:
    """Says numbers, in arrays that are too large to travel with its answer."""

    def __init__(self, store: Callable[[np.ndarray], Any]) -> None:
        self._store = store

    async def pid(self) -> int:
        return os.getpid()

    async def score(self, requests: Sequence[float]) -> list[ScoreAnswer]:
        held = [self._store(np.full((4000, 100), n, np.float32)) for n in requests]
        rows = [RemoteRows(pieces=((handle, np.arange(2)),)) for handle in held]
        return answered(HiddenScores(logprobs=np.zeros(2, np.float32), hidden=row) for row in rows)


class Learner:
    """Reads what it is given names of."""

    def read(self, answers: Sequence[HiddenScores]) -> list[float]:
        return [float(a.hidden.fetch(fetch)[1, 0]) for a in answers if isinstance(a.hidden, RemoteRows)]


class Dying(Teacher):
    """Its process is gone when its answers and one of two arrays have been handed over."""

    async def score_owned(self, requests: Sequence[float]) -> AsyncIterator[Any]:
        rows = [RemoteRows(pieces=((DeferredArray(i), np.arange(2)),)) for i, _ in enumerate(requests)]
        yield answered(HiddenScores(logprobs=np.zeros(2, np.float32), hidden=row) for row in rows)
        yield np.full((4000, 100), requests[0], np.float32)
        os.kill(os.getpid(), signal.SIGKILL)


async def put(method: Any, requests: Sequence[float]) -> AsyncIterator[Any]:
    """As it was before: handles of objects that belong to the teacher."""
    yield range(len(requests)), await method.remote(requests)


@pytest.mark.ray
@pytest.mark.faults("teacher killed after its answer")
def test_what_was_said_outlives_who_said_it(witness: Witness) -> None:
    async def play(keeping: Any, ask: Any, method: str) -> list[float]:
        import ray

        learner = ray.remote(Learner).options(num_cpus=0.1).remote()
        teacher = ray.remote(with_owned_returns(Teacher)).options(num_cpus=0.1, max_concurrency=8).remote(keeping)
        process = psutil.Process(await teacher.pid.remote())
        ((_, answers),) = [part async for part in ask(getattr(teacher, method), [3.0, 4.0])]
        os.kill(process.pid, signal.SIGKILL)
        try:
            while True:
                await teacher.pid.remote()
        except ray.exceptions.RayActorError:
            witness("teacher killed after its answer")
        await asyncio.sleep(5)  # until the news has reached the learner
        return await learner.read.remote(singles(answers))

    with connected(ClusterConfig()):
        assert asyncio.run(play(keep, owned_answers, "score_owned")) == [3.0, 4.0]
        with pytest.raises(Exception, match="OwnerDied"):  # so the news was there
            asyncio.run(play(store, put, "score"))


@pytest.mark.ray
@pytest.mark.faults("teacher killed handing over")
def test_an_answer_without_its_arrays_is_a_death_and_no_answer(witness: Witness) -> None:
    async def ask() -> list[Any]:
        import ray

        teacher = ray.remote(Dying).options(num_cpus=0.1).remote(keep)
        return [part async for part in owned_answers(teacher.score_owned, [3.0, 4.0])]

    with connected(ClusterConfig()):
        with pytest.raises(Exception, match="died") as raised:
            asyncio.run(ask())
        assert is_lost(raised.value)
    witness("teacher killed handing over")
