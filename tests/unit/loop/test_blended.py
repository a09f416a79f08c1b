"""Blends within a trust region (TRB): never further from the student than the budget, and the student at none."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, log
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd import ports
from opd.certify.certify import certify
from opd.errors import ConfigurationError
from opd.method.method import Method
from opd.method.promises import StudentTop
from opd.method.schedules import LinearSchedule
from opd.objectives.sampled import LogprobSource, SampledReverseKL
from opd.objectives.support import Outside, SupportDivergence
from opd.objectives.vocabulary import FullReverseKL
from opd.ports import Need, Role, TeacherBlend, needs_of
from opd.rollouts.blended import BlendedRollout
from opd.rollouts.student import StudentRollout
from opd.rollouts.trust_region import HALVINGS, blended, with_one_end
from opd.scorers.teacher import SampledTokens, TeacherHidden
from opd.types import Prompt
from tests.unit.loop.test_loop import Bench, Model

WHOLE = StudentRollout(max_tokens=8)
SAMPLED = {"scorer": SampledTokens(), "objective": SampledReverseKL(signal=LogprobSource.STUDENT)}
PAPER = {
    "scorer": TeacherHidden(),
    "objective": SupportDivergence(of=FullReverseKL(), support=StudentTop(k=3), outside=Outside.PER_MASS),
}
logits = st.lists(st.floats(-30, 30), min_size=5, max_size=5)
budgets = st.one_of(st.just(0.0), st.floats(1e-6, 50), st.just(1e6), st.just(float("inf")))


def exact(x: Sequence[float]) -> list[float]:
    """Log-probabilities by the standard library alone."""
    most = max(x)
    total = most + log(sum(exp(v - most) for v in x))
    return [v - total for v in x]


def precise(*rows: Sequence[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def divergence(mu: Sequence[float], p: Sequence[float]) -> float:
    return sum(exp(m) * (m - v) for m, v in zip(mu, p, strict=True))


@given(logits, logits, budgets)
def test_no_blend_is_further_from_the_student_than_its_budget(p: Any, q: Any, budget: float) -> None:
    row = blended(precise(p), precise(q), torch.tensor([budget]))
    student, teacher, beta = exact(p), exact(q), float(row.exponent[0])
    mu = exact(row.logprobs[0].tolist())  # recomputed here, as a sampler would normalize it
    assert sum(map(exp, row.logprobs[0].tolist())) == pytest.approx(1)
    assert divergence(mu, student) <= budget + 1e-12 and 0 <= beta <= 1
    assert float(row.divergence[0]) == pytest.approx(divergence(mu, student), abs=1e-9)
    path = exact([(1 - beta) * a + beta * b for a, b in zip(student, teacher, strict=True)])
    assert mu == pytest.approx(path, abs=1e-9)
    if beta < 1 and budget:  # the next place of the search would be beyond
        further = min(1.0, beta + 2.0**-HALVINGS)
        beyond = exact([(1 - further) * a + further * b for a, b in zip(student, teacher, strict=True)])
        assert divergence(beyond, student) >= budget - 1e-9


@given(logits, logits, st.floats(0, 5), st.floats(0, 5))
def test_a_larger_budget_is_nearer_to_the_teacher(p: Any, q: Any, a: float, b: float) -> None:
    pair = blended(precise(p, p), precise(q, q), torch.tensor([min(a, b), max(a, b)]))
    less, more = (divergence(exact(mu.tolist()), exact(q)) for mu in pair.logprobs)
    assert more <= less + 1e-9
    assert pair.exponent[0] <= pair.exponent[1]


def test_by_hand() -> None:
    """p = (1/2, 1/2), q = (4/5, 1/5): mu_beta is odds of 4^beta; at beta = 1/2 it is (2/3, 1/3)."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.8, 0.2]]).log()
    half = 2 / 3 * log(4 / 3) + 1 / 3 * log(2 / 3)
    row = blended(p, q, torch.tensor([half + 1e-7]))
    assert float(row.exponent) == pytest.approx(0.5, abs=2**-15)
    assert row.logprobs.exp()[0].tolist() == pytest.approx([2 / 3, 1 / 3], abs=1e-4)
    whole = blended(p, q, torch.tensor([0.8 * log(1.6) + 0.2 * log(0.4) + 1e-7]))
    assert float(whole.exponent) == 1 and whole.logprobs.exp()[0].tolist() == pytest.approx([0.8, 0.2])
    none = blended(p, q, torch.tensor([0.0]))
    assert float(none.exponent) == 0 and none.logprobs.exp()[0].tolist() == pytest.approx([0.5, 0.5])


def test_ids_that_a_model_excludes() -> None:
    p, q = torch.tensor([[0.0, 0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0, 1.0]])
    for budget in (0.1, 3.0):
        row = blended(p, q, torch.tensor([budget]))
        assert row.logprobs.isfinite().all() and row.divergence <= budget
        assert float(row.logprobs.exp()[0, 2]) == 0, "the student cannot write it"
    anything = blended(p, q, torch.tensor([1e6])).logprobs.exp()[0]
    assert anything.tolist() == pytest.approx([0.0, 1 / (1 + exp(1)), exp(1) / (1 + exp(1))])


@given(logits, st.sets(st.integers(0, 4), min_size=1), st.data())
def test_ends_become_one(x: Any, ends: set[int], data: Any) -> None:
    end = data.draw(st.sampled_from(sorted(ends)))
    before = torch.tensor([x]).double().softmax(-1)[0]
    after = with_one_end(torch.tensor([x]).double(), sorted(ends), end).softmax(-1)[0]
    assert float(after[end]) == pytest.approx(float(before[sorted(ends)].sum()))
    assert all(float(after[i]) == 0 for i in ends - {end})
    assert all(float(after[i]) == pytest.approx(float(before[i])) for i in {*range(5)} - ends)


@dataclass
class Blending(Model):
    """A table that also writes blends with its teacher's."""

    teacher: Any = None

    async def generate(self, requests: Sequence[ports.GenerateRequest]) -> list[ports.Completion]:
        blend = requests[0].blend
        if blend is None:
            return await super().generate(requests)
        budget = torch.full((len(self.table),), blend.budget)
        mixed = blended(torch.from_numpy(self.table), torch.from_numpy(self.teacher), budget).logprobs.numpy()
        return await Model(mixed, self.version, self.wait).generate(requests)


class BlendingBench(Bench):
    """The bench, whose student's engine holds the teacher."""

    def __post_init__(self) -> None:
        super().__post_init__()
        teacher = self.learner.teacher.log_softmax(-1).numpy()
        self.student = Blending(self.student.table, wait=self.wait, teacher=teacher)
        self.engines = replace(self.engines, student=self.student)


def trained(make: Any, rollout: Any, steps: int = 4, start: int = 0, **parts: Any) -> BlendingBench:
    bench = BlendingBench(make)
    asyncio.run(bench.run(Method(name="m", rollout=rollout, **parts), steps, start=start))
    return bench


def rows(bench: Bench) -> list[list[tuple[list[int], list[float]]]]:
    """Tokens and log-probabilities of every step."""
    return [
        [(s.trajectory.token_ids.tolist(), s.trajectory.behavior.logprobs.tolist()) for s in record.scored]
        for record in bench.records
    ]


@pytest.mark.parametrize("parts", [SAMPLED, PAPER], ids=["sampled", "as published"])
def test_a_budget_of_0_is_plain_distillation_bit_for_bit(make: Any, parts: Any) -> None:
    plain = trained(make, WHOLE, **parts)
    for none in (0.0, LinearSchedule(first=0.0, last=0.0)):
        at_none = trained(make, BlendedRollout(student=WHOLE, budget=none), **parts)
        assert torch.equal(at_none.learner.table, plain.learner.table) and rows(at_none) == rows(plain)
    other = trained(make, BlendedRollout(student=WHOLE, budget=0.5), **parts)
    assert rows(other) != rows(plain) and not torch.equal(other.learner.table, plain.learner.table)


def test_the_budget_is_spent_by_step_and_then_the_student_writes_alone(make: Any) -> None:
    asked: list[list[TeacherBlend | None]] = []

    class Asked(Blending):
        async def generate(self, requests: Sequence[ports.GenerateRequest]) -> list[ports.Completion]:
            asked.append([r.blend for r in requests])
            return await super().generate(requests)

    rollout: Any = BlendedRollout(student=WHOLE, budget=LinearSchedule(first=0.4, last=0.0, steps=2))
    bench = BlendingBench(make)
    bench.student.__class__ = Asked
    asyncio.run(bench.run(Method(name="m", rollout=rollout, **PAPER), 4))
    blends = [TeacherBlend(teacher="default", budget=b) for b in (0.4, 0.2)]
    assert [{*step} for step in asked] == [{b} for b in (*blends, None, None) for _ in range(2)]
    writer = {s.trajectory.behavior.logprobs.dtype for s in bench.records[0].scored}
    assert writer == {np.dtype(np.float32)}


def test_without_bound_the_teacher_writes(make: Any) -> None:
    bench = BlendingBench(make)
    group: list[Prompt] = bench.prompts(0, None)[:10]  # type: ignore[arg-type]
    texts = asyncio.run(BlendedRollout(student=WHOLE, budget=1e6)(group, bench.engines))
    own = asyncio.run(Model(bench.student.teacher).generate(
        [ports.GenerateRequest(prompt_id=p.id, sample=i, context_ids=p.student_ids, sampling=WHOLE.sampling)
         for i, p in enumerate(group)]
    ))  # fmt: skip
    for text, expected in zip(texts, own, strict=True):
        assert np.array_equal(text.token_ids, expected.token_ids)
        np.testing.assert_allclose(text.behavior.logprobs, expected.behavior.logprobs, atol=1e-6)


def test_a_resumed_run_repeats_the_tokens(make: Any) -> None:
    rollout: Any = BlendedRollout(student=WHOLE, budget=LinearSchedule(first=0.4, last=0.1, steps=4))
    method, whole = Method(name="m", rollout=rollout, **PAPER), trained(make, rollout, **PAPER)
    halves = BlendingBench(make)
    asyncio.run(halves.run(method, 2))
    asyncio.run(halves.run(method, 4, start=2))
    assert rows(halves) == rows(whole) and torch.equal(halves.learner.table, whole.learner.table)
    context = replace(whole.engines, steps=4)
    assert [rollout.budget_at(context.at(step)) for step in range(5)] == pytest.approx([0.4, 0.325, 0.25, 0.175, 0.1])


def test_gradients_of_draws_are_those_of_the_promise() -> None:
    """Since `behavior` is what was sampled from. The method as published has a certificate of its own."""
    rollout: Any = BlendedRollout(student=WHOLE, budget=0.5, teacher="start")
    result = certify(Method(name="m", rollout=rollout, **SAMPLED))
    assert result.passed, str(result)


def test_what_it_needs_and_refuses() -> None:
    assert needs_of(BlendedRollout(student=WHOLE)) == {Need(Role.STUDENT), Need(Role.BLENDED)}
    assert needs_of(BlendedRollout(student=WHOLE, budget=0.0)) == {Need(Role.STUDENT)}
    assert Need(Role.BLENDED, "start") in needs_of(BlendedRollout(student=WHOLE, teacher="start"))
    for wrong in ({"top_p": 0.9}, {"temperature": 0.0}, {"record_topk": 4}):
        with pytest.raises(ConfigurationError, match=r"BlendedRollout needs a student that samples .* but got Student"):
            BlendedRollout(student=replace(WHOLE, **wrong))
    with pytest.raises(ConfigurationError, match=r"budget needs a number from 0"):
        BlendedRollout(student=WHOLE, budget=-0.1)
    falling = BlendedRollout(student=WHOLE, budget=LinearSchedule(first=0.1, last=-0.1))
    with pytest.raises(ConfigurationError, match=r"its schedule gives -0\.05 at step 3; correct"):
        falling.budget_at(replace(Bench(None).engines, step=3, steps=4))
