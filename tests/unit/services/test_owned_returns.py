"""Arrays of a teacher's answers follow them one by one, and come back under the names that the driver has for them."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from launch.services.owned_returns import keep, owned_answers, with_owned_returns
from opd.ports import ScoreAnswer
from opd.types import HiddenScores, RemoteRows, TokenScores
from tests.one_kind import answered, singles


class Teacher:
    """Says three things; two of them have hidden states in one array, one has them in two."""

    def __init__(self) -> None:
        self.shared, self.own = np.zeros((5, 2), np.float32), np.ones((2, 2), np.float32)

    async def score(self, requests: Sequence[Any]) -> list[ScoreAnswer]:
        def said(*pieces: tuple[np.ndarray, list[int]]) -> HiddenScores:
            rows = RemoteRows(pieces=tuple((keep(a), np.asarray(r)) for a, r in pieces), row_nbytes=8)
            return HiddenScores(logprobs=np.zeros(len(rows), np.float32), hidden=rows)

        plain = TokenScores(logprobs=np.zeros(1, np.float32))
        three = [said((self.shared, [0, 1])), plain, said((self.own, [0]), (self.shared, [3, 4]))]
        return answered(three[: len(requests)])


class References:
    """What a streaming call of Ray gives: all parts are made before the first is read, each behind a name."""

    def __init__(self, parts: AsyncIterator[Any]) -> None:
        self._parts, self.traveled = parts, []

    async def completed(self) -> None:
        async for part in self._parts:
            future = asyncio.get_running_loop().create_future()
            future.set_result(part)
            self.traveled.append(future)

    async def __aiter__(self) -> AsyncIterator[Any]:
        for future in self.traveled:
            yield future


def asked(teacher: Any, requests: list[int]) -> tuple[list[TokenScores], list[Any]]:
    """What the driver gets, and what traveled, when references stand for arrays."""

    async def ask() -> tuple[list[TokenScores], list[Any]]:
        stream = References(teacher.score_owned(requests))
        method = SimpleNamespace(remote=lambda _: stream)
        ((positions, answers),) = [part async for part in owned_answers(method, requests)]
        assert list(positions) == list(range(len(requests)))
        return singles(answers), stream.traveled

    return asyncio.run(ask())


def test_arrays_travel_once_behind_the_answers_and_are_named_by_references() -> None:
    teacher = with_owned_returns(Teacher)()
    answers, traveled = asked(teacher, [1, 2, 3])
    assert type(teacher).__name__ == "Teacher"
    first, *arrays = [future.result() for future in traveled]
    assert [a is b for a, b in zip(arrays, (teacher.shared, teacher.own), strict=True)] == [True, True]
    assert not any(isinstance(handle, np.ndarray) for (a,) in (first[0], first[2]) for handle, _ in a.hidden.pieces)
    handles = [[handle for handle, _ in a.hidden.pieces] for a in (answers[0], answers[2])]
    assert handles == [[traveled[1]], [traveled[2], traveled[1]]]
    get = {id(future): future.result() for future in traveled}
    assert answers[2].hidden.fetch(lambda handle: get[id(handle)]).tolist() == [[1, 1], [0, 0], [0, 0]]
    assert isinstance(answers[1], TokenScores) and answers[2].hidden.row_nbytes == 8


def test_answers_without_arrays_travel_alone() -> None:
    answers, traveled = asked(with_owned_returns(Teacher)(), [])
    assert answers == [] and len(traveled) == 1
