"""A run ends at the first step that has spent its amount, and evaluations are spread over what it may spend."""

import asyncio
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.artifacts.spending import Unit, spending
from launch.checkpoint.step_end import BudgetSpent, until_spent
from launch.config.budget import StopAfter
from launch.config.run_config import run_config
from launch.monitors.accounting import Costs, Totals, step_flops, step_tokens
from launch.monitors.progress import Progress
from launch.services.signals import StopRequest
from opd.errors import ConfigurationError, DataError
from opd.types import NO_VERSION, BlendedScores
from tests.unit.checkpoint.test_endings import Saves, boundary
from tests.unit.checkpoint.test_endings import record as ended
from tests.unit.monitors.test_metrics import record, said, scored

COSTS = st.lists(st.floats(0.5, 50), min_size=3, max_size=60)


def line(step: int, flops: float = 0.0) -> dict[str, float]:
    return {"step": float(step), "tokens/completion": 0.0, "flops/total": flops, "cpu/total_s": 0.0}


@given(COSTS, st.floats(1, 500), st.integers(1, 12))
def test_the_run_ends_at_the_first_step_that_has_spent_the_amount(
    costs: list[float], amount: float, parts: int
) -> None:
    progress = Progress(StopAfter(flops=amount), len(costs), parts=parts)
    evaluated: list[int] = []
    for step, spent in enumerate(accumulate(costs), 1):
        if progress.see(line(step, spent)):
            evaluated.append(step)
        assert progress.spent == (spent >= amount)
        if progress.spent:
            assert spent - costs[step - 1] < amount
            assert step not in evaluated, "the end of the run is measured anyway"
            return
    assert sum(costs) < amount


@given(COSTS, st.integers(1, 12), st.data())
def test_every_part_of_the_budget_is_followed_by_one_evaluation(
    costs: list[float], parts: int, data: st.DataObject
) -> None:
    """Also if the run was interrupted and gone on with."""
    spent = list(accumulate(costs))
    amount, cut = spent[-1], data.draw(st.integers(0, len(costs) - 1))
    progress, due = Progress(StopAfter(flops=amount), 1000, parts=parts), set[int]()
    for step, now in enumerate(spent, 1):
        if progress.see(line(step, now)):
            due.add(step)
        if step == cut:
            progress = Progress(StopAfter(flops=amount), 1000, parts=parts, before=line(step, now))
    crossed = {
        step
        for step, (before, now) in enumerate(pairwise([0.0, *spent]), 1)
        if parts * before // amount < parts * now // amount
    }
    assert due == crossed - {len(costs)}


@pytest.mark.parametrize(("steps", "parts"), [(100, 10), (60, 6), (29, 29), (7, 3), (3, 10)])
def test_parts_of_steps_are_steps_evenly_apart(steps: int, parts: int) -> None:
    progress = Progress(StopAfter(), steps, parts=parts)
    due = [step for step in range(1, steps + 1) if progress.see(line(step))]
    assert due == sorted({-(-steps * i // parts) for i in range(1, parts)} - {steps})
    assert not progress.spent


def test_without_parts_an_evaluation_is_due_every_so_many_steps() -> None:
    every = Progress(StopAfter(), 10, every=4)
    assert [step for step in range(1, 11) if every.see(line(step))] == [4, 8]
    never = Progress(StopAfter(), 10)
    assert not any(never.see(line(step)) for step in range(1, 11))


def costs(*, teacher_writes: bool) -> Costs:
    return Costs(student_params=10, teacher_params=100, teacher_writes=teacher_writes, teacher_reads=False)


@pytest.mark.parametrize(
    ("version", "teacher_writes", "generated"), [(0, False, 10), (NO_VERSION, True, 10), (NO_VERSION, False, 0)]
)
def test_tokens_of_a_data_set_were_not_generated(version: int, teacher_writes: bool, generated: int) -> None:
    """What a student or a teacher of this run generated counts, and so does all that is learned, prompts too."""
    step = record(scored(10, version, said(10)), step=1)
    tokens = step_tokens(step, costs(teacher_writes=teacher_writes))
    assert tokens.generated == generated and tokens.learned == 14
    metrics = Totals().plus(tokens, costs(teacher_writes=teacher_writes)).as_metrics()
    assert spending(metrics, Unit.TOKENS) == generated + 14


def test_the_teacher_s_part_of_a_blend_counts() -> None:
    """By what was blended: after the budget is spent the student writes alone."""
    alone, blend = (
        record(replace(text, trajectory=replace(text.trajectory, behavior=behavior)), step=1)
        for text in [scored(10, 0, said(10))]
        for behavior in (text.trajectory.behavior, BlendedScores(logprobs=said(10).logprobs))
    )
    both = [step_tokens(step, costs(teacher_writes=False)) for step in (alone, blend)]
    assert [tokens.blended for tokens in both] == [0, both[0].student] and both[0].student == 14
    less, more = (step_flops(tokens, costs(teacher_writes=False)) for tokens in both)
    assert more - less == 2 * 100 * 14


def test_a_run_of_before_goes_on_counting_its_tokens() -> None:
    old = {"tokens/prompt": 4, "tokens/completion": 10, "tokens/scored": 0, "tokens/trained": 10, "flops/total": 1.0}
    totals = Totals.from_metrics(old)
    assert spending(totals.as_metrics(), Unit.TOKENS) == spending(old, Unit.TOKENS) == 24


def test_the_amounts_are_settings_of_a_run() -> None:
    run = run_config(["experiment=shop", "stop_after.flops=1e12", "evaluation.parts=5"])
    assert run.stop_after.amounts == {Unit.FLOPS: 1e12} and run.evaluation.parts == 5
    with pytest.raises(ConfigurationError, match=r"stop_after\.cpu_s needs"):
        run_config(["experiment=shop", "stop_after.cpu_s=-1"])


# ---- the end of the loop


def test_the_step_that_spends_the_amount_is_saved_and_ends_the_run() -> None:
    saves, spent = Saves(), []
    end = boundary(saves, StopRequest(1.0), spent=lambda: bool(spent))
    asyncio.run(end(ended(1)))
    spent.append(1)
    with pytest.raises(BudgetSpent):
        asyncio.run(end(ended(2)))
    assert saves.steps == [2]


def test_a_step_that_reached_no_engine_does_not_end_a_run_in_good_order() -> None:
    end = boundary(Saves(), StopRequest(1.0), spent=lambda: True)
    asyncio.run(end(ended(2, live=False)))


async def _grouped(*errors: Exception) -> None:
    async def fail(error: Exception) -> None:
        raise error

    async with asyncio.TaskGroup() as tasks:
        for error in errors:
            tasks.create_task(fail(error))


def test_a_spent_budget_is_no_error_and_hides_none() -> None:
    with until_spent():
        asyncio.run(_grouped(BudgetSpent()))
    with until_spent():
        raise BudgetSpent
    with pytest.raises(ExceptionGroup) as caught, until_spent():
        asyncio.run(_grouped(BudgetSpent(), DataError("row 3")))
    assert [type(error) for error in caught.value.exceptions] == [DataError]
    with pytest.raises(DataError), until_spent():
        raise DataError("row 3")
