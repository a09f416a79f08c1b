"""Extrapolated updates: when they search, what they accept, and that what they refuse leaves no trace."""

import asyncio
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import ConfigurationError
from opd.method.method import Method
from opd.objectives.vocabulary import FullReverseKL
from opd.ports import Context
from opd.rollouts.student import StudentRollout
from opd.scorers.teacher import TeacherHidden
from opd.types import StepReport
from opd.updates.extrapolated import FROM, ExtrapolatedStep, Origin
from opd.updates.optimizer import OptimizerStep
from tests.unit.loop.test_loop import Bench, TableLearner

REPORT = StepReport(loss=0.0, grad_norm=0.0, lr=0.0, tokens=1, trained_tokens=1, metrics={"own": 3.0})


@dataclass
class Quadratic:
    """A learner of the weights that minimize `sum(curvature * (w - optimum)^2)`, by gradient descent."""

    optimum: np.ndarray
    curvature: np.ndarray
    lr: float
    weights: np.ndarray = field(default_factory=lambda: np.zeros(2))
    kept: dict[str, np.ndarray] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    probed: list[float] = field(default_factory=list)

    @property
    def loss(self) -> float:
        return float((self.curvature * (self.weights - self.optimum) ** 2).sum())

    async def step(self, batches: Any, objective: Any) -> StepReport:
        self.calls.append("step")
        self.weights = self.weights - self.lr * 2 * self.curvature * (self.weights - self.optimum)
        return REPORT

    async def evaluate(self, batches: Any, objective: Any) -> dict[str, float]:
        self.calls.append("evaluate")
        self.probed.append(self.loss)
        return {"loss": self.loss, "flat": 1.0, "broken": float("nan")}

    async def snapshot(self, name: str, *, keep_older: bool = False) -> None:
        if not (keep_older and name in self.kept):
            self.kept[name] = self.weights.copy()

    async def restore(self, name: str) -> None:
        self.calls.append("restore")
        self.weights = self.kept[name].copy()

    async def extrapolate(self, name: str, factor: float, *, only: str = "") -> None:
        self.calls.append("extrapolate")
        self.weights = self.weights + factor * (self.weights - self.kept[name])


def quadratic(lr: float = 0.01, curvature: tuple[float, float] = (1.0, 1.0)) -> Quadratic:
    return Quadratic(optimum=np.array([1.0, -2.0]), curvature=np.array(curvature), lr=lr)


def run(update: Any, learner: Any, steps: int) -> list[StepReport]:
    context = replace(Bench(None).engines, steps=steps)

    async def every() -> list[StepReport]:
        return [await update(learner, [], None, context.at(step)) for step in range(steps)]

    return asyncio.run(every())


def test_searches_follow_the_updates_whose_number_is_a_power_of_two() -> None:
    update = ExtrapolatedStep()
    assert [step + 1 for step in range(300) if update.searches(step)] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    reports = run(update, quadratic(), 9)
    assert [n for n, r in enumerate(reports, 1) if "probes_accepted" in r.metrics] == [1, 2, 4, 8]
    assert all(r.metrics["own"] == 3.0 for r in reports)


@pytest.mark.parametrize("lr", [0.01, 0.1, 0.4])
def test_the_way_to_the_optimum_takes_fewer_steps(lr: float) -> None:
    plain, jumping = quadratic(lr), quadratic(lr)
    losses = []
    for learner, update in ((plain, OptimizerStep()), (jumping, ExtrapolatedStep())):
        run(update, learner, 8)
        losses.append(learner.loss)
    assert losses[1] <= losses[0] and (lr > 0.1 or losses[1] < losses[0] / 2)


@given(
    st.floats(1e-4, 1.2), st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)), st.integers(1, 6), st.floats(0, 9),
    st.sampled_from(Origin),
)  # fmt: skip
def test_a_search_never_ends_worse_than_the_step_and_its_accepted_probes_fall(
    lr: float, curvature: tuple[float, float], trials: int, stride: float, origin: Origin
) -> None:
    learner = quadratic(lr, curvature)
    update = ExtrapolatedStep(trials=trials, stride=stride, origin=origin)
    for step in range(5):
        learner.probed.clear()
        context = replace(Bench(None).engines, step=step)
        report = asyncio.run(update(learner, [], None, context))  # type: ignore[arg-type]
        if not update.searches(step):
            assert not learner.probed
            continue
        accepted, rejected = (int(report.metrics[f"probes_{end}"]) for end in ("accepted", "rejected"))
        first, *tried = learner.probed
        assert len(tried) == accepted + rejected <= trials and rejected <= 1 and (rejected or accepted == trials)
        falling = [first, *tried[:accepted]]
        assert all(a > b for a, b in pairwise(falling))
        assert learner.loss == falling[-1] == report.metrics["probe_after"] and first == report.metrics["probe_before"]


@pytest.mark.parametrize("metric", ["flat", "broken"])
@pytest.mark.parametrize("origin", Origin)
def test_what_is_refused_leaves_the_weights_of_the_plain_step_bit_for_bit(metric: str, origin: Origin) -> None:
    plain, searching = quadratic(), quadratic()
    run(OptimizerStep(), plain, 6)
    reports = run(ExtrapolatedStep(metric=metric, origin=origin), searching, 6)
    assert (plain.weights == searching.weights).all() and searching.calls.count("extrapolate") == 3
    assert {r.metrics.get("probes_accepted", 0.0) for r in reports} == {0.0}
    assert {r.metrics.get("probes_rejected") for r in reports} == {1.0, None}


def test_without_a_way_no_candidate_is_better_and_all_are_as_good() -> None:
    for accept_equal, accepted in ((False, 0), (True, 5)):
        learner = quadratic(lr=0.0)
        (report,) = run(ExtrapolatedStep(accept_equal=accept_equal), learner, 1)
        assert report.metrics["probes_accepted"] == accepted and (learner.weights == 0).all()


def test_the_origin_of_the_next_way_is_where_the_search_ended_or_where_it_began() -> None:
    plain = quadratic()
    run(OptimizerStep(), plain, 1)
    ends = {}
    for origin in Origin:
        learner = quadratic()
        run(ExtrapolatedStep(origin=origin), learner, 1)
        ends[origin] = (learner.kept[FROM], learner.weights)
    (accepted, jumped), (stepped, same) = ends[Origin.ACCEPTED], ends[Origin.STEPPED]
    assert (jumped == same).all() and (jumped != plain.weights).all()
    assert (accepted == jumped).all() and (stepped == plain.weights).all()


def test_a_candidate_is_so_many_ways_from_the_step() -> None:
    learner = quadratic(lr=1e-4)
    run(ExtrapolatedStep(trials=3, stride=2.0), learner, 1)
    plain = quadratic(lr=1e-4)
    run(OptimizerStep(), plain, 1)
    np.testing.assert_allclose(learner.weights, 7 * plain.weights, rtol=1e-12)


def test_an_unknown_metric_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigurationError, match=r"got 'kl' \(reported: broken, flat, loss\); correct method.update"):
        run(ExtrapolatedStep(metric="kl"), quadratic(), 1)


class Verbs(TableLearner):
    """The table with the verbs that an update may use."""

    async def evaluate(self, batches: Any, objective: Any) -> dict[str, float]:
        before, steps = self.table, self.steps
        loss = (await self.step(batches, objective)).loss
        self.table, self.steps = before, steps
        return {"loss": loss}

    async def snapshot(self, name: str, *, keep_older: bool = False) -> None:
        if not (keep_older and name in vars(self)):
            vars(self)[name] = self.table.clone()

    async def restore(self, name: str) -> None:
        self.table = vars(self)[name].clone()

    async def extrapolate(self, name: str, factor: float, *, only: str = "") -> None:
        if factor:
            self.table = self.table + factor * (self.table - vars(self)[name])


@dataclass(frozen=True)
class NothingAt:
    """Token weight: 0 for all tokens of one step."""

    step: int
    consumes: Any = TeacherHidden.produces
    reads_sampled_tokens: bool = False

    def __call__(self, scored: Any, context: Context) -> list[np.ndarray]:
        return [np.full(len(item.trajectory), float(context.step != self.step)) for item in scored]


def trained(make: Any, update: Any, lr: float = 0.05, steps: int = 5, **parts: Any) -> Bench:
    bench = Bench(make)
    bench.learner = Verbs(table=bench.learner.table, teacher=bench.learner.teacher, lr=lr)
    parts = {"scorer": TeacherHidden(), "objective": FullReverseKL(), **parts}
    asyncio.run(bench.run(Method(name="m", rollout=StudentRollout(max_tokens=8), update=update, **parts), steps))
    return bench


@pytest.mark.parametrize("update", [ExtrapolatedStep(trials=0), ExtrapolatedStep(stride=0.0)], ids=["never", "nowhere"])
def test_no_trial_and_no_stride_are_plain_distillation_bit_for_bit(make: Any, update: Any) -> None:
    plain, other, jumping = (trained(make, u) for u in (OptimizerStep(), update, ExtrapolatedStep()))
    assert torch.equal(other.learner.table, plain.learner.table)
    assert not torch.equal(jumping.learner.table, plain.learner.table)


def test_jumps_bring_the_student_nearer_to_its_teacher_in_as_many_steps(make: Any) -> None:
    plain, jumping = (trained(make, update, lr=0.02, steps=9) for update in (OptimizerStep(), ExtrapolatedStep()))
    assert jumping.divergence() < 0.8 * plain.divergence()
    assert sum(r.report.metrics.get("probes_accepted", 0) for r in jumping.records) >= 3


def test_what_the_probes_read_is_counted(make: Any) -> None:
    """One probe of the step's own weights, and one of every candidate; each reads the step's batch."""
    records = trained(make, ExtrapolatedStep(), lr=0.02, steps=9).records
    probes = [
        1 + report.metrics["probes_accepted"] + report.metrics["probes_rejected"] if (step & (step - 1)) == 0 else 0
        for step, report in ((record.step, record.report) for record in records)
    ]
    assert [record.read_tokens for record in records] == [
        n * record.report.tokens for n, record in zip(probes, records, strict=True)
    ]
    assert sum(probes) > 8
    assert not any(record.read_tokens for record in trained(make, OptimizerStep(), steps=3).records)


def test_a_first_step_without_a_trained_token_leaves_the_start_as_origin(make: Any) -> None:
    start = Bench(make).learner.table
    bench = trained(make, ExtrapolatedStep(), steps=1, weights={"none": NothingAt(step=0)})
    assert FROM not in vars(bench.learner)
    bench = trained(make, ExtrapolatedStep(trials=1, metric="loss"), steps=2, weights={"none": NothingAt(step=0)})
    plain = trained(make, OptimizerStep(), steps=2, weights={"none": NothingAt(step=0)})
    way = plain.learner.table - start
    torch.testing.assert_close(bench.learner.table, start + 3 * way, rtol=1e-9, atol=1e-12)
