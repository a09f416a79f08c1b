"""Advantages from a teacher (TOP-D): rewards of later tokens, and what is relative to a group."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from opd.certify.engines import RequestLog, engines
from opd.certify.worlds import make_world
from opd.method.method import Method
from opd.method.shapes import ProximalTeacher
from opd.objectives.sampled import ClippedPolicyGradient, SampledReverseKL
from opd.rollouts.student import StudentRollout
from opd.scorers.advantage import TeacherAdvantage, relative, with_later
from opd.scorers.teacher import SampledTokens
from tests.unit.loop.test_loop import Bench

WORLD = make_world(0)
ROLLOUT = StudentRollout(max_tokens=8)
ALONE = TeacherAdvantage(shape=ProximalTeacher(alpha=1.0), later=False, normalized=False)
REWARDS = arrays(np.float64, st.integers(1, 12), elements=st.floats(-9, 9))


def group(size: int = 5) -> tuple[Any, Any]:
    prompts = [p for p in WORLD.prompts if p.id == WORLD.prompts[0].id][:size]
    context = engines(WORLD, RequestLog())
    return asyncio.run(ROLLOUT(prompts, context)), context


def test_returns_and_what_is_relative_by_hand() -> None:
    every = np.ones(3, dtype=bool)
    np.testing.assert_allclose(with_later(np.asarray([1.0, 2.0, 4.0]), every), [4.0, 6.0, 4.0])
    np.testing.assert_allclose(
        with_later(np.asarray([1.0, 0.0, 4.0]), np.asarray([True, False, True])), [5.0, 4.0, 4.0]
    )
    made = relative([np.asarray([1.0, 3.0]), np.asarray([5.0, 99.0])], [every[:2], np.asarray([True, False])], 1e-12)
    np.testing.assert_allclose(np.concatenate(made)[:3], [-1.0, 0.0, 1.0], atol=1e-9)


@given(REWARDS)
def test_a_return_is_its_reward_and_the_mean_of_what_follows(rewards: np.ndarray) -> None:
    naive = [r + (rewards[t + 1 :].mean() if t + 1 < len(rewards) else 0) for t, r in enumerate(rewards)]
    np.testing.assert_allclose(with_later(rewards, np.ones(len(rewards), dtype=bool)), naive, atol=1e-9)


@given(REWARDS)
def test_what_is_relative_has_mean_zero_and_equal_rewards_have_none(rewards: np.ndarray) -> None:
    (made,) = relative([rewards], [np.ones(len(rewards), dtype=bool)], 1e-6)
    assert abs(made.mean()) < 1e-6 and made.std() <= 1 + 1e-6
    (none,) = relative([np.zeros_like(rewards)], [np.ones(len(rewards), dtype=bool)], 1e-6)
    assert not none.any()


def test_context_has_no_advantage_and_counts_nowhere() -> None:
    texts, context = group()
    kept: Any = asyncio.run(TeacherAdvantage()(texts, context))
    mask = np.arange(len(texts[1])) != 0
    masked = [texts[0], replace(texts[1], loss_mask=mask), *texts[2:]]
    other: Any = asyncio.run(TeacherAdvantage()(masked, context))
    assert other[1].advantages[0] == 0 and other[1].rewards[0] == 0
    assert not np.allclose(other[0].advantages, kept[0].advantages)  # the group's mean has one token less
    np.testing.assert_array_equal(other[0].rewards, kept[0].rewards)


@pytest.mark.parametrize("alpha", [0.1, 0.2])
def test_a_reward_is_bounded_below_however_much_the_teacher_dislikes_a_token(alpha: float) -> None:
    texts, context = group()
    scorer = TeacherAdvantage(shape=ProximalTeacher(alpha=alpha), later=False, normalized=False)
    found: Any = asyncio.run(scorer(texts, context))
    for text, scores in zip(texts, found, strict=True):
        assert (scores.advantages >= np.log(1 - alpha) - 1e-6).all()
        (taught,) = asyncio.run(SampledTokens()([text], context))
        ratio = np.exp(np.asarray(taught.logprobs, dtype=np.float64) - text.behavior.logprobs)  # type: ignore[attr-defined]
        np.testing.assert_allclose(scores.rewards, np.log(alpha * ratio + 1 - alpha), atol=1e-6)


def test_the_reward_alone_trains_as_plain_distillation_bit_for_bit_and_the_rest_does_not(make: Any) -> None:
    tables = []
    for scorer, objective in (
        (ALONE, ClippedPolicyGradient()),
        (SampledTokens(), SampledReverseKL()),
        (replace(ALONE, later=True), ClippedPolicyGradient()),
        (replace(ALONE, normalized=True), ClippedPolicyGradient()),
    ):
        bench = Bench(make)
        asyncio.run(bench.run(Method(name="m", rollout=ROLLOUT, scorer=scorer, objective=objective), 3))
        tables.append(bench.learner.table)
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2]) and not torch.equal(tables[0], tables[3])
