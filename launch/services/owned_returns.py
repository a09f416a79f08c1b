"""Owned returns: the arrays of a teacher's answers belong to the driver and outlive the teacher.

An object that an actor puts into Ray's object store is lost with that actor; one that it returns belongs to the
caller. So a teacher's actor returns its hidden states one after the other behind its answers, and the driver takes in
their names and never their bytes.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from opd.ports import ScoreAnswer, ScoreRequest
from opd.types import RemoteRows, Scores


@dataclass(frozen=True, slots=True)
class DeferredArray:
    """Placeholder of a handle: the `number`-th array that follows the answers."""

    number: int


def keep(array: np.ndarray) -> np.ndarray:
    """Store of a teacher in an actor: arrays stay in the answers until these are returned."""
    return array


def with_owned_returns(cls: type) -> type:
    """The teacher `cls` with a method `score_owned`: its answers first, then their arrays."""

    class OwnedReturns(cls):
        async def score_owned(self, requests: Sequence[ScoreRequest]) -> AsyncIterator[Any]:
            arrays: dict[int, np.ndarray] = {}  # by identity: answers of a micro-batch share one

            def name(array: np.ndarray) -> DeferredArray:
                arrays.setdefault(id(array), array)
                return DeferredArray(list(arrays).index(id(array)))

            yield [_with_handles(answer, name) for answer in await self.score(requests)]
            while arrays:  # let go of one by one, so that they are not all here and in the object store
                yield arrays.pop(next(iter(arrays)))

    OwnedReturns.__name__ = OwnedReturns.__qualname__ = cls.__name__  # Ray shows it
    return OwnedReturns


async def owned_answers(
    method: Any, requests: Sequence[ScoreRequest]
) -> AsyncGenerator[tuple[Sequence[int], list[Any]]]:
    """All answers of an actor's `score_owned`, in one part; their handles are references that this process owns.

    Raises what Ray raises if the actor dies before the last array is handed over.
    """
    parts = method.remote(requests)
    # Before that an array may be missing, which its reference would show only when it is read; and waiting for
    # references one by one would make Ray fetch what they name.
    await parts.completed()
    answers, *arrays = [reference async for reference in parts]
    yield range(len(requests)), [_with_handles(answer, lambda held: arrays[held.number]) for answer in await answers]


def _with_handles(answer: ScoreAnswer, name: Callable[[Any], Any]) -> ScoreAnswer:
    return tuple(_renamed(scores, name) for scores in answer)


def _renamed(scores: Scores, name: Callable[[Any], Any]) -> Scores:
    """The same scores, with other handles in every field that names rows of arrays."""
    held = {f.name: rows for f in fields(scores) if isinstance(rows := getattr(scores, f.name), RemoteRows)}
    return replace(scores, **{field: _other_handles(rows, name) for field, rows in held.items()}) if held else scores


def _other_handles(rows: RemoteRows, name: Callable[[Any], Any]) -> RemoteRows:
    return replace(rows, pieces=tuple((name(handle), numbers) for handle, numbers in rows.pieces))
