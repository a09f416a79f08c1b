"""Outcome credit: one advantage of teacher and reward, whose gradient is that of both apart."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from opd.certify.gradients import relative_difference
from opd.errors import ConfigurationError
from opd.loss.packing import SequenceMean
from opd.method.method import Method, check_prompts
from opd.ports import Role, needs_of
from opd.scorers.outcome import OutcomeCredit
from opd.scorers.reward import GroupAdvantage
from opd.scorers.teacher import SampledTokens
from opd.types import Trajectory
from tests.unit.methods.test_hybrids import BOX, WORLD, shipped, trained
from tests.unit.methods.test_method import Grouped


def plain() -> Method:
    return replace(shipped("sampled_reverse_kl"), normalizer=SequenceMean())


def group() -> list[Trajectory]:
    prompts = [p for p in WORLD.prompts if p.id == WORLD.prompts[0].id]
    return asyncio.run(shipped("mopd_orm").rollout(prompts, BOX))


@pytest.mark.parametrize("scaled", [True, False])
def test_a_token_has_its_teachers_log_probability_and_its_texts_advantage(scaled: bool) -> None:
    texts = group()
    found: Any = asyncio.run(OutcomeCredit(scale_by_std=scaled)(texts, BOX))
    taught: Any = asyncio.run(SampledTokens()(texts, BOX))
    graded: Any = asyncio.run(GroupAdvantage(scale_by_std=scaled)(texts, BOX))
    assert len({float(f.credit[0]) for f in found}) > 1
    for scores, teacher, outcome in zip(found, taught, graded, strict=True):
        assert np.array_equal(scores.logprobs, teacher.logprobs)
        assert np.array_equal(scores.credit, outcome.advantages)


def test_a_group_of_equal_outcomes_has_no_credit() -> None:
    texts = [replace(t, reward=1.0) for t in group()]
    found: Any = asyncio.run(OutcomeCredit()(texts, BOX))
    assert not any(f.credit.any() for f in found)


@pytest.mark.parametrize("weight", [0.25, 1.0, 3.0])
def test_the_gradient_is_that_of_distillation_and_of_the_weighted_reward(weight: float) -> None:
    """Of fresh text, where GRPO's ratio is 1 and nothing is clipped; `grpo` has the same divisor."""
    both = trained(shipped("mopd_orm", f"method.objective.weight={weight}"))
    assert relative_difference(both, trained(plain()) + weight * trained(shipped("grpo"))) < 1e-6  # float32 scores
    assert relative_difference(both, trained(plain())) > 1e-3


def test_without_a_weight_it_is_plain_distillation_bit_for_bit() -> None:
    assert torch.equal(trained(shipped("mopd_orm", "method.objective.weight=0")), trained(plain()))


def test_a_group_of_one_has_no_outcome_to_compare_and_a_grader_is_needed() -> None:
    with pytest.raises(ConfigurationError, match=r"OutcomeCredit compares .*group_size >= 2, but got 1; raise"):
        check_prompts(shipped("mopd_orm"), Grouped(1))
    assert {need.role for need in needs_of(OutcomeCredit())} == {Role.READER, Role.GRADER}
