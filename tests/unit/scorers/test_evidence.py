"""EDGE-OPD: guided texts, of which only what the teacher's context makes likelier is trained."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd.method.method import Method
from opd.objectives.evidence import EvidenceReverseKL
from opd.objectives.sampled import LogprobSource, SampledReverseKL
from opd.rollouts.guided import GuidedRollout
from opd.rollouts.student import StudentRollout
from opd.scorers.evidence import Evidence
from opd.scorers.teacher import SampledTokens
from opd.types import EvidenceScores, Prompt
from tests.unit.loop.test_loop import Bench, Model, Prompts, log_softmax

WHOLE = StudentRollout(max_tokens=8)
GUIDED = GuidedRollout(student=WHOLE, fraction=1.0)


class ToldPrompts(Prompts):
    """Prompts that end in token 3 for the teacher."""

    def __call__(self, step: int, sources: Any) -> list[Prompt]:
        end = np.asarray([3], dtype=np.int32)
        return [replace(p, teacher_ids=np.append(p.student_ids, end)) for p in super().__call__(step, sources)]


class Told(Bench):
    """The bench, whose teacher reads token 3 at the end of its prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prompts = ToldPrompts(self.make)


def trained(make: Any, bench: Bench, steps: int = 3, **parts: Any) -> torch.Tensor:
    asyncio.run(bench.run(Method(**({"name": "m", "rollout": WHOLE, "scorer": Evidence()} | parts)), steps))
    return bench.learner.table


def test_a_teacher_that_is_shown_nothing_gives_no_evidence_and_trains_nothing(make: Any) -> None:
    bench = Bench(make)
    before = bench.learner.table.clone()
    assert torch.equal(trained(make, bench, objective=EvidenceReverseKL()), before)
    assert not torch.equal(trained(make, Told(make), objective=EvidenceReverseKL()), before)


def test_without_guidance_or_threshold_it_is_plain_distillation_bit_for_bit(make: Any) -> None:
    plain = {"scorer": SampledTokens(), "objective": SampledReverseKL(signal=LogprobSource.STUDENT)}
    every = EvidenceReverseKL(threshold=-1e6, corrected=True)
    unguided = replace(GUIDED, fraction=0.0)
    expected = trained(make, Told(make), **plain)
    assert torch.equal(trained(make, Told(make), rollout=unguided, objective=every), expected)
    uncorrected = replace(every, corrected=False)
    torch.testing.assert_close(trained(make, Told(make), objective=uncorrected), expected, rtol=0, atol=1e-6)


def test_a_guided_text_is_written_from_the_teachers_context_and_learned_from_the_students(make: Any) -> None:
    bench = Told(make)
    trained(make, bench, rollout=GUIDED, objective=EvidenceReverseKL())
    first = bench.records[0]
    begins = log_softmax(torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(3)).double()[0] * 1.5)
    for item in first.scored:
        t = item.trajectory
        assert 3 not in t.prompt.student_ids[1:] and len(t.prompt.student_ids) == 1
        assert float(t.behavior.logprobs[0]) == pytest.approx(float(begins[3, t.token_ids[0]]), abs=1e-6)


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_the_share_of_guided_texts_is_the_fraction_and_a_function_of_the_seed(seed: int, fraction: float) -> None:
    rollout = replace(GUIDED, fraction=fraction, seed=seed)
    coins = [rollout.guided("p", i) for i in range(400)]
    assert coins == [rollout.guided("p", i) for i in range(400)]
    assert abs(np.mean(coins) - fraction) < 0.13


def test_evidence_changes_its_sign_when_the_contexts_change_places(make: Any) -> None:
    bench = Told(make)
    group = bench.prompts(0, None)[:10]  # type: ignore[arg-type]
    texts = asyncio.run(WHOLE(group, bench.engines))
    swapped = [
        replace(t, prompt=replace(t.prompt, student_ids=t.prompt.teacher_ids, teacher_ids=t.prompt.student_ids))
        for t in texts
    ]

    def evidence(of: Any) -> np.ndarray:
        scores: Any = asyncio.run(Evidence()(of, bench.engines))
        assert all(isinstance(s, EvidenceScores) for s in scores)
        return np.concatenate([s.logprobs - s.plain for s in scores])

    assert np.array_equal(evidence(swapped), -evidence(texts)) and evidence(texts).any()


def test_a_token_that_the_student_never_samples_is_learned_by_guidance_alone(make: Any) -> None:
    """Token 2 follows only token 3, which the student writes only if it reads it."""
    never, rare = torch.full((4, 4), 0.0).double(), 14.0
    never[:3, 2], never[3, 2] = -rare, rare
    teacher = never.clone()
    hits = {}
    for fraction in (0.0, 1.0):
        bench = Told(make, lr=30.0)
        bench.learner.table, bench.learner.teacher = never.clone(), teacher
        bench.student.table = log_softmax(never)
        reader = Model(log_softmax(teacher))
        bench.engines = replace(bench.engines, teachers={"default": reader}, student=bench.student)
        trained(make, bench, 20, rollout=replace(GUIDED, fraction=fraction), objective=EvidenceReverseKL())
        hits[fraction] = float(bench.learner.table.softmax(-1)[:3, 2].max())
    assert hits[0.0] < 1e-3 and hits[1.0] > 0.5
