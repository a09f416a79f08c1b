"""Reasoning prefixes: as if later tokens were masked, at a prefix's cost; a whole share is plain distillation."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import ConfigurationError
from opd.method.method import Method
from opd.method.schedules import LinearSchedule
from opd.objectives.sampled import LogprobSource, SampledReverseKL
from opd.objectives.vocabulary import FullReverseKL
from opd.ports import Context
from opd.rollouts.prefixes import PrefixRollout
from opd.rollouts.student import StudentRollout
from opd.scorers.reward import task_rewards
from opd.scorers.teacher import SampledTokens, TeacherHidden
from opd.token_weights.length import SkipTruncated
from opd.types import Scored, Scores, StopReason
from tests.unit.loop.test_loop import Bench

WHOLE = StudentRollout(max_tokens=8)
SAMPLED = {"scorer": SampledTokens(), "objective": SampledReverseKL(signal=LogprobSource.STUDENT)}
EXACT = {"scorer": TeacherHidden(), "objective": FullReverseKL()}


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstTokens:
    """Token weight: 1 for the first `count` tokens of a completion, else 0."""

    consumes: ClassVar[type[Scores]] = Scores
    reads_sampled_tokens: ClassVar[bool] = False

    count: int

    def __call__(self, scored: Sequence[Scored[Any]], context: Context) -> list[np.ndarray]:
        return [(np.arange(len(s.trajectory)) < self.count).astype(np.float64) for s in scored]


def trained(make: Any, rollout: Any, steps: int = 3, **parts: Any) -> tuple[torch.Tensor, Bench]:
    bench = Bench(make)
    asyncio.run(bench.run(Method(name="m", rollout=rollout, **parts), steps))
    return bench.learner.table, bench


@pytest.mark.parametrize("parts", [SAMPLED, EXACT], ids=["sampled", "exact"])
def test_a_prefix_trains_what_whole_completions_train_whose_later_tokens_are_masked(make: Any, parts: Any) -> None:
    prefix, bench = trained(make, PrefixRollout(student=WHOLE, share=0.375), **parts)
    masked, _ = trained(make, WHOLE, weights={"first": FirstTokens(count=3)}, **parts)
    other, _ = trained(make, WHOLE, weights={"first": FirstTokens(count=4)}, **parts)
    torch.testing.assert_close(prefix, masked, rtol=0, atol=1e-12)
    assert (prefix - other).abs().max() > 1e-3
    assert {len(item.trajectory) for record in bench.records for item in record.scored} == {3}


@pytest.mark.parametrize("parts", [SAMPLED, EXACT], ids=["sampled", "exact"])
def test_a_whole_share_is_plain_distillation_bit_for_bit(make: Any, parts: Any) -> None:
    share = LinearSchedule(first=1.0, last=1.0)
    assert torch.equal(
        trained(make, PrefixRollout(student=WHOLE, share=share), **parts)[0], trained(make, WHOLE, **parts)[0]
    )


def test_the_length_follows_the_step_for_which_a_prefix_is_generated(make: Any) -> None:
    rollout = PrefixRollout(student=WHOLE, share=LinearSchedule(first=0.0, last=1.0))
    _, bench = trained(make, rollout, steps=4, **SAMPLED)
    assert [{len(item.trajectory) for item in record.scored} for record in bench.records] == [{1}, {2}, {4}, {6}]


def test_the_end_of_a_prefix_is_no_cut_and_gets_no_reward(make: Any) -> None:
    bench = Bench(make)
    group = bench.prompts(0, None)[:10]  # type: ignore[arg-type]
    cut = asyncio.run(PrefixRollout(student=WHOLE, share=0.5)(group, bench.engines))
    whole = asyncio.run(PrefixRollout(student=WHOLE, share=1.0)(group, bench.engines))
    assert {t.stop for t in cut} == {StopReason.PREFIX, StopReason.END}
    assert {t.stop for t in whole} == {StopReason.LENGTH, StopReason.END}
    weights = SkipTruncated()([Scored(trajectory=t, scores=Scores()) for t in cut], bench.engines)
    assert all(weight.all() for weight in weights)
    rewards = asyncio.run(task_rewards(cut, bench.engines))
    assert all(reward == 0 for t, reward in zip(cut, rewards, strict=True) if t.stop is StopReason.PREFIX)


@given(st.integers(1, 4096), st.floats(0, 1), st.floats(0, 1), st.integers(1, 300))
def test_lengths_grow_with_a_growing_share_and_stay_within_the_limit(most: int, a: float, b: float, steps: int) -> None:
    share = LinearSchedule(first=min(a, b), last=max(a, b))
    rollout = PrefixRollout(student=replace(WHOLE, max_tokens=most), share=share)
    context = replace(Bench(None).engines, steps=steps)
    lengths = [rollout.tokens(context.at(step)) for step in range(steps)]
    assert lengths == sorted(lengths) and lengths[0] >= 1 and lengths[-1] <= most


def test_a_share_beyond_the_whole_is_refused_with_its_step(make: Any) -> None:
    rollout = PrefixRollout(student=WHOLE, share=LinearSchedule(first=0.5, last=2.0))
    context = replace(Bench(make).engines, step=3, steps=4)
    with pytest.raises(ConfigurationError, match=r"but its schedule gives 1\.625 at step 3; correct"):
        rollout.tokens(context)
    with pytest.raises(ConfigurationError, match="share"):
        PrefixRollout(student=WHOLE, share=1.5)
