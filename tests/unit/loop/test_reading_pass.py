"""The loop reads before it weighs, only where a weight asks; a selection of everything is plain distillation."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from opd import ports
from opd.loss.chunked import read
from opd.loss.readings import StudentEntropy, token_readings
from opd.method.terms import Term
from opd.objectives.vocabulary import FullForwardKL, FullReverseKL
from opd.scorers.teacher import TeacherHidden
from opd.token_weights.confidence import PlausibleTrajectories, SureTeacherUnsureStudent
from opd.token_weights.selection import ByReading, Teachability, TopFraction
from opd.types import Batch
from tests.unit.loop.test_loop import Bench, Pause, TableLearner, V, method

CONFIDENT = {"plausible": PlausibleTrajectories(), "sure": SureTeacherUnsureStudent()}
SELECTED = {"top": TopFraction(by=Teachability(k=2), fraction=0.3)}


@dataclass
class ReadingLearner(TableLearner):
    """A learner that counts its reading passes, and how many updates there were before each."""

    passes: tuple[int, ...] = ()

    async def read(self, batches: Sequence[Sequence[Batch[Any]]], readings: Sequence[ports.Reading]) -> list[Any]:
        self.passes += (self.steps,)
        await self.wait("learner")
        return [[self._read(batch.to("cpu", lambda h: h), readings) for batch in rank] for rank in batches]

    def _read(self, batch: Batch[Any], readings: Sequence[ports.Reading]) -> np.ndarray:
        hidden = torch.eye(V).double()[batch.input_ids[batch.predict_at]]
        rows = lambda start, stop: read(batch.rows(start, stop), self.teacher.T)  # noqa: E731
        return token_readings(hidden, self.table.T, rows, readings, chunk=50).numpy()


def trained(make: Any, weights: Any, steps: int = 4, *, seed: int = 0, **parts: Any) -> tuple[Bench, ReadingLearner]:
    bench = Bench(make, lr=8.0, wait=Pause(seed))
    learner = ReadingLearner(**{name: getattr(bench.learner, name) for name in ("table", "teacher", "lr", "wait")})
    bench.learner = learner
    asyncio.run(bench.run(method(TeacherHidden(), FullReverseKL(), weights=weights, **parts), steps))
    return bench, learner


def test_the_current_student_is_read_once_before_every_update_and_the_cost_is_told(make: Any) -> None:
    bench, learner = trained(make, SELECTED)
    assert learner.passes == (0, 1, 2, 3)
    for record in bench.records:
        lengths = [len(s.trajectory) + len(s.trajectory.prompt.student_ids) - 1 for s in record.scored]
        assert record.read_tokens == sum(lengths)
        sampled = sum(map(len, (s.trajectory for s in record.scored)))
        assert sum(np.count_nonzero(w) for w in record.weights) == int(np.ceil(0.3 * sampled - 1e-9))


def test_nothing_is_read_where_no_weight_asks(make: Any) -> None:
    bench, learner = trained(make, {})
    assert learner.passes == () and all(record.read_tokens == 0 for record in bench.records)


@pytest.mark.parametrize("weights", [CONFIDENT, SELECTED], ids=["confident", "selected"])
def test_limits_train_bit_for_bit_as_without_weights(make: Any, weights: Any) -> None:
    limits = {name: limit.weight for name, part in weights.items() for limit in part.limits}
    plain, limit, other = (trained(make, w)[1].table for w in ({}, limits, weights))
    assert torch.equal(plain, limit) and not torch.equal(plain, other)


@pytest.mark.parametrize("weights", [CONFIDENT, SELECTED], ids=["confident", "selected"])
def test_a_student_that_learns_from_some_tokens_comes_nearer_to_its_teacher(make: Any, weights: Any) -> None:
    bench, _ = trained(make, weights, 0)
    before = bench.divergence()
    bench, _ = trained(make, weights, 40)
    assert bench.divergence() < before / 2  # what the student does not consider is hardly ever selected


def test_a_further_term_is_weighed_by_what_was_read_for_it(make: Any) -> None:
    top = TopFraction(by=ByReading(reading=StudentEntropy()), fraction=0.5)
    further = Term(scorer=TeacherHidden(), objective=FullForwardKL(), weights={"top": top}, coefficient=0.5)
    bench, learner = trained(make, {}, terms={"further": further})
    whole, _ = trained(make, {}, terms={"further": replace(further, weights={"top": replace(top, fraction=1.0)})})
    assert learner.passes == (0, 1, 2, 3)
    assert not torch.equal(learner.table, whole.learner.table)
    without, _ = trained(make, {}, terms={"further": replace(further, weights={})})
    assert torch.equal(whole.learner.table, without.learner.table)
    assert all(record.read_tokens for record in bench.records)
