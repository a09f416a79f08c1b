"""Rewards shaped against a teacher that rules a token out; and the arm that has no teacher at all."""

from dataclasses import replace
from math import log
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opd.certify.certificate import Row
from opd.certify.expected_gradient import SOME, check_promise
from opd.certify.gradients import departure, make_case
from opd.certify.worlds import make_world, stale
from opd.errors import ConfigurationError
from opd.method.method import Method
from opd.method.reward_promises import Nothing
from opd.method.shapes import Below, Clip, Floor, ProximalTeacher, SignLog
from opd.objectives.sampled import LogprobSource, SampledReverseKL
from opd.objectives.shaped import FixedAdvantage, ShapedReverseKL
from opd.rollouts.student import StudentRollout
from opd.scorers.teacher import Unscored
from opd.types import Scores, TokenScores
from tests.unit.methods.test_objectives import V, expected_gradient, gradient, outcome, per_sample, world

PLAIN = SampledReverseKL(signal=LogprobSource.STUDENT)
SHAPES = (Clip(limit=2.0), SignLog(), ProximalTeacher(alpha=0.2), Floor(mixture=0.2))
RATIOS = st.lists(st.floats(-60, 60), min_size=1, max_size=20).map(lambda d: torch.tensor(d, dtype=torch.float64))


@pytest.mark.parametrize("shape", [Clip(limit=1e6), ProximalTeacher(alpha=1.0), Floor(mixture=0.0)], ids=str)
def test_a_shape_that_changes_nothing_is_plain_distillation_bit_for_bit(shape: Any) -> None:
    for seed in range(3):
        for dtype in (torch.float64, torch.float32):
            w = world(seed, stale=True, dtype=dtype)
            losses = [outcome(o, w).loss for o in (ShapedReverseKL(shape=shape), PLAIN)]
            assert torch.equal(*losses)
            assert torch.equal(*(gradient(loss.sum(), w) for loss in losses))


@given(RATIOS)
def test_a_shape_keeps_the_sign_and_the_order_of_rewards_and_never_makes_a_blow_larger(ratios: Tensor) -> None:
    for shape in SHAPES:
        rewards = shape.reward(ratios)
        assert bool((rewards * ratios >= -1e-12).all())
        order = ratios.argsort()
        assert bool((rewards[order].diff() >= -1e-12).all())
        assert bool((rewards.abs() <= ratios.abs() + 1e-12).all())
        assert float(shape.reward(torch.zeros(1, dtype=torch.float64))) == pytest.approx(0, abs=1e-12)


@given(RATIOS, st.floats(0.01, 0.99))
def test_a_proximal_teacher_is_the_mixture_and_its_reward_is_bounded_below(ratios: Tensor, alpha: float) -> None:
    rewards = ProximalTeacher(alpha=alpha).reward(ratios)
    torch.testing.assert_close(rewards, (alpha * ratios.exp() + 1 - alpha).log())
    assert bool((rewards >= log(1 - alpha) - 1e-12).all())


@given(RATIOS, st.floats(0.01, 0.5))
def test_a_floor_changes_nothing_above_it_and_below_it_rewards_the_floor_or_nothing(
    ratios: Tensor, mixture: float
) -> None:
    floor = log(mixture / (1 - mixture))
    kept, left_out = (Floor(mixture=mixture, below=below).reward(ratios) for below in Below)
    above = ratios >= floor
    assert torch.equal(kept[above], ratios[above]) and torch.equal(left_out[above], ratios[above])
    assert bool((kept[~above] == floor).all()) and not left_out[~above].any()


def test_a_clip_bounds_every_reward_by_its_limit() -> None:
    assert Clip(limit=2.0).reward(torch.tensor([-9.0, -2.0, 0.5, 9.0])).tolist() == [-2.0, -2.0, 0.5, 2.0]
    assert SignLog().reward(torch.tensor([-1.0, 0.0, 1.0])).tolist() == pytest.approx([-log(2), 0.0, log(2)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token_that_the_teacher_rules_out_cannot_decide_a_step(shape: Any) -> None:
    """The failure: a sampled token whose log-ratio is -40 has a gradient forty times that of others; shaped, a few."""
    w = world(1)
    ruled_out = w.q.clone()
    ruled_out[2] = -40.0
    w = replace(w, q=ruled_out.log_softmax(-1))
    assert per_sample(PLAIN, w) > 5 * per_sample(ShapedReverseKL(shape=shape), w)


@pytest.mark.parametrize("advantage", [-0.5, 0.2])
@pytest.mark.parametrize("late", [False, True], ids=["fresh", "stale"])
def test_a_fixed_advantage_has_an_expected_gradient_of_exactly_nothing(advantage: float, late: bool) -> None:
    for seed in range(3):
        w = world(seed, stale=late)
        part = FixedAdvantage(advantage=advantage)
        assert float(expected_gradient(part, w).abs().max()) < 1e-12
        assert per_sample(part, w) > 1e-2


def test_a_negative_advantage_of_unlikely_tokens_moves_their_mass_to_the_others() -> None:
    """This is a gradient: what the paper says that distillation mostly does, and it needs no teacher."""
    for seed in range(3):
        w = world(seed)
        step = -0.1 * expected_gradient(FixedAdvantage(below=0.1), w)
        p, after = w.z.detach().softmax(-1), (w.z.detach() + step).softmax(-1)
        rare = p < 0.1
        assert float(after[rare].sum()) < float(p[rare].sum()) and rare.any() and not rare.all()


def arm(objective: Any) -> Method:
    writing: Any = StudentRollout(max_tokens=8)
    unscored: Any = Unscored()
    return Method(name="m", rollout=writing, scorer=unscored, objective=objective)


def test_the_certificate_of_the_arm_asks_for_a_gradient_of_nothing_and_notices_one() -> None:
    """So a defect that leaves a gradient behind is refused, though 0 promises nothing to compare with."""
    here = make_world(0, 8)
    for case in (make_case(arm(FixedAdvantage()), here), make_case(arm(FixedAdvantage()), stale(here, 1))):
        assert departure(case) < 1e-6
    rows = [f for f in check_promise(make_case(arm(FixedAdvantage()), here), None) if isinstance(f, Row)]
    assert all(row.passed for row in rows) and SOME not in {row.name for row in rows}

    class Leaky(FixedAdvantage):
        """Counts the unlikely tokens, and claims that nothing is descended."""

        @property
        def promise(self) -> Nothing:
            return Nothing()

    leaky: Any = Leaky(below=0.1)
    assert departure(make_case(arm(leaky), here)) > 1e-3


def test_values_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Clip\.limit needs a number"):
        Clip(limit=0.0)
    with pytest.raises(ConfigurationError, match=r"ProximalTeacher\.alpha needs a number"):
        ProximalTeacher(alpha=0.0)
    with pytest.raises(ConfigurationError, match=r"FixedAdvantage\.below needs a number"):
        FixedAdvantage(below=0.0)
    assert FixedAdvantage.consumes is Scores and ShapedReverseKL.consumes is TokenScores and V > 3
