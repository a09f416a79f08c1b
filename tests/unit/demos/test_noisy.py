"""The noisy task: what its teacher writes is right, wrong and unsure where it should be, and nowhere else."""

import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demos.prompts.noisy import NoisyPrompts
from demos.tasks.noisy import NoisyTask, Part, part_of
from demos.tasks.shop import ShopTask, grade, without_carry
from launch.config.run_config import run_config

ASSETS = Path(__file__).resolve().parents[3] / "assets" / "noisy"


@given(st.integers(0, 10**9), st.sampled_from(Part))
def test_a_solution_is_right_exactly_where_its_part_says(seed: int, part: Part) -> None:
    rng, task = random.Random(seed), NoisyTask(part=part)
    problem = task.problem(rng)
    assert part_of(problem) is part
    right = grade(task.solution(problem, rng).text, problem.answer) == 1.0
    if part is Part.CLEAN:
        assert right
    if part is Part.WRONG:
        # From the first forgotten carry on the stock is 10 off; two may cancel, one cannot.
        forgotten = [step for step in problem.steps if without_carry(step) is not None]
        assert right or forgotten
        assert not right or len(forgotten) != 1


def test_of_unsure_solutions_about_half_of_the_results_are_drawn() -> None:
    task, rng = NoisyTask(part=Part.UNSURE), random.Random(3)
    problems = [task.problem(rng) for _ in range(300)]
    first = [task.solution(p, rng).words[6:8] == (*f"{p.steps[0].after:02d}",) for p in problems]
    assert 0.4 < sum(first) / len(first) < 0.6


def test_a_wrong_teacher_rejects_who_carries() -> None:
    """Lines before `no` are mistakes by its own rule, and none that it learns to accept has a carry."""
    task, rng = NoisyTask(part=Part.WRONG), random.Random(5)
    accepted = rejected = 0
    for _ in range(200):
        working = task.solution(task.problem(rng), rng, mistakes=0.5)
        words = working.words
        for at in range(0, len(words) - 3, 9):
            _, a, b, sign, amount, _, c, d, verdict = words[at : at + 9]
            right = (int(a + b) + int(sign + amount)) % 100 == int(c + d)
            crossing = not 0 <= int(b) + int(sign + amount) <= 9
            accepted += crossing and verdict == "ok" and right and working.loss_mask[at + 8]
            rejected += crossing and verdict == "no" and right
    assert rejected > 20
    assert not accepted


@pytest.mark.parametrize("part", [None, *Part])
def test_prompts_are_of_the_part_that_is_asked_for(part: Part | None) -> None:
    source = NoisyPrompts(prompts_per_step=4, part=part)
    parts = {part_of(source.problem(number)) for number in range(60)}
    assert parts == ({part} if part else set(Part))


@given(st.integers(0, 10**6))
def test_the_shop_s_own_solutions_are_what_they_were(seed: int) -> None:
    task = ShopTask()
    problem = task.problem(random.Random(seed))
    same = task.solution(problem, random.Random(seed), 0.4, rule=lambda step: step.after)
    assert same == task.solution(problem, random.Random(seed), 0.4)


def test_the_shipped_files_are_those_of_the_list_and_the_experiment_can_be_planned() -> None:
    listed = dict(reversed(line.split("  ")) for line in (ASSETS / "SHA256SUMS").read_text().splitlines())
    files = {p.relative_to(ASSETS).as_posix(): p for p in ASSETS.rglob("*") if p.is_file() and p.name != "SHA256SUMS"}
    assert listed == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert isinstance(run_config(["experiment=noisy"]).prompts, NoisyPrompts)
