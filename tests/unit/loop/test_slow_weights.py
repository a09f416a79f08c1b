"""Slow weights: where they go, when, and that the whole of the way is the optimizer alone, bit for bit."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import ConfigurationError
from opd.updates.optimizer import OptimizerStep
from opd.updates.slow_weights import SLOW, SlowWeights
from tests.unit.loop.test_extrapolated import REPORT, NothingAt, Quadratic, quadratic, run, trained


def paper(learner: Quadratic, period: int, fraction: float, steps: int) -> np.ndarray:
    """Fast weights of Algorithm 1 after `steps` gradient steps, written with two sets of weights."""
    slow, fast = learner.weights.copy(), learner.weights.copy()
    for number in range(1, steps + 1):
        fast = fast - learner.lr * 2 * learner.curvature * (fast - learner.optimum)
        if number % period == 0:
            slow = slow + fraction * (fast - slow)
            fast = slow.copy()
    return fast


@given(
    st.floats(1e-3, 0.9), st.tuples(st.floats(0.1, 1), st.floats(0.1, 1)), st.integers(1, 6), st.floats(1e-3, 1),
    st.integers(0, 14),
)  # fmt: skip
def test_weights_are_those_of_the_papers_algorithm(
    lr: float, curvature: tuple[float, float], period: int, fraction: float, steps: int
) -> None:
    learner = quadratic(lr, curvature)
    expected = paper(learner, period, fraction, steps)
    reports = run(SlowWeights(period=period, fraction=fraction), learner, steps)
    np.testing.assert_allclose(learner.weights, expected, rtol=1e-9, atol=1e-12)
    assert reports == [REPORT] * steps and learner.calls.count("step") == steps
    assert learner.calls.count("extrapolate") == (steps // period if fraction < 1 else 0)


def test_periods_end_after_so_many_updates_and_the_slow_weights_are_then_the_students() -> None:
    update = SlowWeights(period=3, fraction=0.5)
    assert [step + 1 for step in range(10) if update.ends_period(step)] == [3, 6, 9]
    learner = quadratic()
    run(update, learner, 6)
    assert (learner.kept[SLOW] == learner.weights).all()
    run(update, learner, 2)  # of the next period
    assert (learner.kept[SLOW] != learner.weights).all()


def test_an_optimizer_that_swings_to_and_fro_is_damped() -> None:
    """At a rate at which plain descent diverges, half a step back after each brings it in."""
    plain, slow = quadratic(1.05), quadratic(1.05)
    start = plain.loss
    run(OptimizerStep(), plain, 20)
    run(SlowWeights(period=1, fraction=0.5), slow, 20)
    assert plain.loss > start and slow.loss < 1e-3 * start


def test_the_whole_way_is_the_optimizer_alone_bit_for_bit(make: Any) -> None:
    plain, whole, half = (
        trained(make, update)
        for update in (OptimizerStep(), SlowWeights(period=1, fraction=1.0), SlowWeights(period=2, fraction=0.5))
    )
    assert torch.equal(whole.learner.table, plain.learner.table) and SLOW not in vars(whole.learner)
    assert not torch.equal(half.learner.table, plain.learner.table)
    unfinished = trained(make, SlowWeights(period=6, fraction=0.5))  # five steps
    assert torch.equal(unfinished.learner.table, plain.learner.table)


def test_a_period_whose_last_step_has_no_trained_token_goes_on_until_the_next_one_ends(make: Any) -> None:
    nothing = {"none": NothingAt(step=1)}
    missed, longer, shorter = (
        trained(make, SlowWeights(period=period, fraction=0.5), steps=4, weights=nothing) for period in (2, 4, 1)
    )
    assert torch.equal(missed.learner.table, longer.learner.table)
    assert not torch.equal(missed.learner.table, shorter.learner.table)


@pytest.mark.parametrize("wrong", [{"fraction": 0.0}, {"fraction": 1.1}, {"fraction": float("nan")}, {"period": 0}])
def test_what_would_learn_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=rf"SlowWeights\.{next(iter(wrong))} needs"):
        SlowWeights(**wrong)
