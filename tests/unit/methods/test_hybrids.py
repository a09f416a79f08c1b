"""Reward and distillation as terms of one loss: divided each by its own count, and their ends are the methods alone."""

import asyncio
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.config.run_config import run_config
from opd.certify.engines import RequestLog, engines
from opd.certify.gradients import microbatch_gradient, relative_difference
from opd.certify.worlds import World, make_world
from opd.errors import ConfigurationError
from opd.loss.packing import TokenMean, WeighedTerm, pack_terms
from opd.method.method import Method, packed, scored, weighed
from opd.method.schedules import SwitchSchedule, value
from opd.method.terms import MAIN
from opd.objectives.estimators import SampledDivergence, SquaredReverseKL
from opd.objectives.sampled import LogprobSource, SampledReverseKL
from opd.objectives.vocabulary import JensenShannon
from opd.ports import Layout, Role, needs_of
from opd.scorers.ensemble import ContextIds
from opd.scorers.extrapolated import Extrapolated
from opd.scorers.teacher import SampledTokens
from opd.types import Scored
from tests.unit.methods.test_readings import read

ONE = Layout(ranks=1, tokens_per_microbatch=9**9)
WORLD = make_world(3, 8)
BOX = replace(engines(WORLD, RequestLog()), steps=150)


@cache
def shipped(name: str, *more: str) -> Method:
    return run_config([f"method={name}", "max_tokens=8", "prompts.group_size=2", *more]).method


@cache
def _step(name: str) -> list[Scored[Any]]:
    return step(shipped(name))


def step(method: Method) -> list[Scored[Any]]:
    """A step of two groups, as a run collects and scores it."""

    async def collected() -> list[Scored[Any]]:
        items: list[Scored[Any]] = []
        for name in dict.fromkeys(p.id for p in WORLD.prompts):
            group = [p for p in WORLD.prompts if p.id == name]
            items += await scored(method, await method.rollout(group, BOX), BOX)
        return items

    return asyncio.run(collected())


def trained(method: Method, at: int = 0, layout: Layout = ONE) -> torch.Tensor:
    """Gradient of a step as a learner computes it."""
    items, now = step(method), BOX.at(at)
    batches = packed(method, items, weighed(method, items, now, read(method, items, WORLD, layout).by_term), layout, "")
    return microbatch_gradient(batches, method.loss_at(now), WORLD)


def test_kdrl_without_its_teacher_is_grpo_bit_for_bit_and_asks_no_teacher() -> None:
    alone, plain = shipped("kdrl", "method.terms.teacher.coefficient=0"), shipped("grpo_token_mean")
    assert torch.equal(trained(alone), trained(plain)) and not alone.is_sum and not alone.requires
    assert not any(need.role is Role.READER for t in alone.every_term.values() for need in needs_of(t.scorer))
    assert not torch.equal(trained(shipped("kdrl")), trained(plain))


def test_a_term_of_kdrl_alone_is_the_published_method_of_that_term() -> None:
    kdrl = shipped("kdrl")
    assert torch.equal(trained(kdrl.one_term("teacher")), trained(shipped("squared_reverse_kl")))
    assert torch.equal(trained(kdrl.one_term(MAIN)), trained(shipped("grpo_token_mean")))


def test_k2_is_the_policy_gradient_of_the_log_ratio_token_by_token() -> None:
    """The paper's identity: not only in expectation, also for the text at hand, fresh or stale."""
    sampled = replace(shipped("squared_reverse_kl"), objective=SampledReverseKL(signal=LogprobSource.STUDENT))
    torch.testing.assert_close(trained(shipped("squared_reverse_kl")), trained(sampled), rtol=0, atol=1e-12)


def test_the_factor_of_annealed_kdrl_falls_by_five_hundred_thousandths_a_step() -> None:
    factor = shipped("kdrl_annealed").terms["teacher"].coefficient
    values = [value(factor, BOX.at(at)) for at in range(100)]
    np.testing.assert_allclose(values, np.maximum(0.005 - 0.00005 * np.arange(100), 0.001), rtol=1e-12)
    first = replace(shipped("kdrl_annealed"), name="kdrl")
    constant = shipped("kdrl", "method.terms.teacher.coefficient=0.005")
    assert torch.equal(trained(first), trained(constant)) and not torch.equal(trained(first, 40), trained(constant))


@settings(max_examples=12)
@given(
    kept=st.integers(1, 2**48 - 1).map(lambda bits: [bool(bits >> i & 1) for i in range(48)]),
    layout=st.builds(Layout, ranks=st.integers(1, 4), tokens_per_microbatch=st.sampled_from([12, 40, 9**9])),
)
def test_what_the_reward_leaves_out_changes_nothing_of_the_teachers_part(kept: list[bool], layout: Layout) -> None:
    """Its divisor is its own: however few tokens have an advantage, and however the step is cut."""
    kdrl = shipped("kdrl")
    items = _step("kdrl")
    some = [np.full(len(item.trajectory), float(k)) for item, k in zip(items, kept, strict=True)]
    every = [np.ones(len(item.trajectory)) for item in items]

    def gradient(weights: Any, at: Layout, factor: float = 1.0) -> torch.Tensor:
        terms = {
            MAIN: WeighedTerm(weights=weights, normalizer=TokenMean()),
            "teacher": WeighedTerm(weights=every, normalizer=TokenMean(), coefficient=factor),
        }
        return microbatch_gradient(pack_terms(items, terms, at), kdrl.loss, WORLD)

    part = gradient(some, layout) - gradient(some, layout, 0.0)
    assert relative_difference(part, gradient(every, ONE) - gradient(every, ONE, 0.0)) < 1e-9


@pytest.mark.parametrize("name", ["kdrl", "kdrl_annealed"])
def test_the_sum_is_its_terms_at_their_factors(name: str) -> None:
    method = shipped(name)
    for at in (0, 40, 149):
        parts = [value(t.coefficient, BOX.at(at)) * trained(method.one_term(n)) for n, t in method.every_term.items()]
        assert relative_difference(trained(method, at), torch.stack(parts).sum(0)) < 1e-9


def test_distillation_then_reward_is_one_and_then_the_other() -> None:
    """Two fifths of 150 steps are 60, as published."""
    both, distilled, rewarded = shipped("opd_then_rl"), shipped("sampled_reverse_kl"), shipped("grpo_token_mean")
    for at, alone in ((0, distilled), (59, distilled), (60, rewarded), (149, rewarded)):
        assert relative_difference(trained(both, at), trained(alone)) < 1e-12


@given(first=st.floats(-9, 9), last=st.floats(-9, 9), at=st.floats(0, 1), steps=st.integers(1, 400))
def test_a_switch_has_its_two_values_and_switches_once(first: float, last: float, at: float, steps: int) -> None:
    schedule = SwitchSchedule(first=first, last=last, at=at)
    values = [value(schedule, replace(BOX, step=step, steps=steps)) for step in range(steps)]
    before = sum(step < at * steps - 1e-9 for step in range(steps))
    assert values == [first] * before + [last] * (steps - before) and abs(before - at * steps) < 1 + 1e-9


# Anchors and extrapolation: a second teacher.

ANCHORED = make_world(4, 8, names=("default", "start"))


def trained_with(method: Method, world: World = ANCHORED) -> torch.Tensor:
    """Gradient of a step of a world in which every prompt names the default teacher."""
    box = engines(world, RequestLog())

    async def collected() -> list[Scored[Any]]:
        items: list[Scored[Any]] = []
        for name in dict.fromkeys(p.id for p in world.prompts):
            group = [replace(p, teacher="default") for p in world.prompts if p.id == name]
            items += await scored(method, await method.rollout(group, box), box)
        return items

    items = asyncio.run(collected())
    return microbatch_gradient(packed(method, items, weighed(method, items, box), ONE, ""), method.loss, world)


def test_an_anchor_of_factor_nothing_is_plain_distillation_bit_for_bit() -> None:
    loose = shipped("reference_kl", "method.terms.reference.coefficient=0")
    plain = trained_with(shipped("sampled_reverse_kl"))
    assert torch.equal(trained_with(loose), plain) and needs_of(loose.scorer) == needs_of(SampledTokens())
    assert relative_difference(trained_with(shipped("reference_kl")), plain) > 1e-3


def test_an_anchor_pulls_back_a_student_that_left_its_start_and_no_other() -> None:
    reference = shipped("reference_kl").one_term("reference")
    at_start = replace(ANCHORED, teachers={**ANCHORED.teachers, "start": ANCHORED.student})
    assert float(trained_with(reference, at_start).abs().max()) < 1e-6
    assert float(trained_with(reference).abs().max()) > 1e-3


def test_extrapolation_by_one_is_plain_distillation_bit_for_bit() -> None:
    whole = shipped("reward_extrapolation", "method.scorer.shares={default:1.0,start:0.0}")
    assert torch.equal(trained_with(whole), trained_with(shipped("sampled_reverse_kl")))


@pytest.mark.parametrize("factor", [0.5, 1.25, 2.0])
def test_extrapolation_is_the_scaled_reward_beside_a_kl_to_the_start(factor: float) -> None:
    """G-OPD's equation: KL(p||start) - factor E[log q - log start], as terms of the same text."""
    beyond = shipped("reward_extrapolation", f"method.scorer.shares={{default:{factor},start:{1 - factor}}}")
    to_teacher = trained_with(shipped("sampled_reverse_kl"))
    to_start = trained_with(shipped("reference_kl").one_term("reference"))
    assert relative_difference(trained_with(beyond), factor * to_teacher + (1 - factor) * to_start) < 1e-5


def test_a_product_of_teachers_is_refused_where_probabilities_are_needed() -> None:
    scorer: Any = Extrapolated(shares={"default": 1.5, "start": -0.5})
    part: Any = SampledDivergence(of=JensenShannon())
    with pytest.raises(ConfigurationError, match=r"Extrapolated gives a product .* SampledDivergence needs"):
        replace(shipped("sampled_reverse_kl"), scorer=scorer, objective=part)
    assert replace(shipped("sampled_reverse_kl"), scorer=scorer, objective=SquaredReverseKL())
    for shares in ({"default": 1.0, "start": -1.0}, {"default": -1.0}):
        with pytest.raises(ConfigurationError, match="needs one above 0"):
            Extrapolated(shares=shares)
    with pytest.raises(ConfigurationError, match=r"scorer\.contexts names \['other'\]"):
        Extrapolated(shares={"default": 1.0}, contexts={"other": ContextIds.STUDENT})
