"""Learner of an update, with a count of the tokens that it reads without a gradient."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Float32

from opd.ports import Learner, LossFunction, Reading
from opd.types import Batch, Scores

Batches = Sequence[Sequence[Batch[Scores]]]


class ReadTokens:
    """Learner that passes every verb on and adds up the tokens of `evaluate`, `score` and `read` in `read_tokens`.

    An update may probe the student as often as it likes (`opd.updates.extrapolated`), and the meter of operations
    counts those passes whatever it reports.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self.read_tokens = 0

    @property
    def as_learner(self) -> Learner:
        """This object under the type of the port, whose other verbs it has from the learner."""
        return cast(Learner, self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    async def evaluate(self, batches: Batches, objective: LossFunction) -> Mapping[str, float]:
        self._count(batches)
        return await self._learner.evaluate(batches, objective)

    async def score(self, batches: Batches) -> list[list[Float32[np.ndarray, " L"]]]:
        self._count(batches)
        return await self._learner.score(batches)

    async def read(self, batches: Batches, readings: Sequence[Reading]) -> list[list[Float32[np.ndarray, "R L"]]]:
        self._count(batches)
        return await self._learner.read(batches, readings)

    def _count(self, batches: Batches) -> None:
        self.read_tokens += sum(len(b.input_ids) for rank in batches for b in rank if b.weights.any())
