"""The peak task: problems, the two ways of writing a solution, grading, and the shipped checkpoints."""

import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from demos.tasks.peak import Entry, PeakTask, grade, hasty_choice
from demos.tasks.shop import VOCABULARY, Working

ASSETS = Path(__file__).parents[3] / "assets" / "peak"
seeds = st.integers(min_value=0, max_value=2**32)


def lines(working: Working) -> list[list[str]]:
    words = list(working.words[:-2])
    assert len(words) % 8 == 0
    return [words[at : at + 8] for at in range(0, len(words), 8)]


@given(seeds)
@settings(max_examples=50)
def test_the_plain_solution_is_right_and_the_answer_is_the_largest(seed: int) -> None:
    rng = random.Random(seed)
    problem = PeakTask().problem(rng)
    amounts = {e.day: e.amount for e in problem.entries}
    assert len(set(amounts.values())) == len(amounts) and problem.answer == max(amounts, key=lambda d: amounts[d])
    working = PeakTask().solution(problem, rng)
    assert grade(working.text, problem.answer) == 1 and all(working.loss_mask)
    assert grade(working.text.replace("#", ""), problem.answer) == 0
    assert all(grade(working.text, e.day) == 0 for e in problem.entries if e.day != problem.answer)


@given(seeds, st.floats(0.05, 0.9))
@settings(max_examples=50)
def test_a_mistake_is_rejected_or_kept_from_the_loss(seed: int, mistakes: float) -> None:
    """A line is right if its record is the larger of the last kept record and the day's amount."""
    rng = random.Random(seed)
    problem = PeakTask().problem(rng)
    working = PeakTask().solution(problem, rng, mistakes)
    record = problem.entries[0].amount
    for i, line in enumerate(lines(working)):
        amount, written = int(line[1] + line[2]), int(line[5] + line[6])
        mask = working.loss_mask[8 * i : 8 * i + 8]
        right = written == max(record, amount)
        assert all(mask[:4]) and all(m == right for m in mask[4:7])
        assert mask[7] == (right == (line[7] == "ok"))
        record = written if line[7] == "ok" else record


@given(seeds)
@settings(max_examples=50)
def test_pupils_and_prompts_use_the_words_of_the_shop(seed: int) -> None:
    rng = random.Random(seed)
    problem = PeakTask().problem(rng)
    pupil = PeakTask().pupil_solution(problem, rng)
    assert {*problem.prompt.split(), *pupil.words} <= set(VOCABULARY)
    assert len(pupil.words) < PeakTask().max_completion_words


def test_a_hasty_pupil_looks_at_the_last_digit() -> None:
    monday, tuesday = Entry(day="Mon", amount=37), Entry(day="Tue", amount=29)
    assert hasty_choice((monday, tuesday)) == tuesday
    always = PeakTask(hasty=1.0, slip=0.0, notice=0.0)
    rng = random.Random(0)
    problems = [always.problem(rng) for _ in range(300)]
    solved = [grade(always.pupil_solution(p, rng).text, p.answer) for p in problems]
    assert 0.1 < sum(solved) / 300 < 0.7
    with pytest.raises(ValueError, match="2 <= min_days"):
        PeakTask(min_days=1)


def test_the_shipped_files_are_those_of_the_list() -> None:
    listed = dict(reversed(line.split("  ")) for line in (ASSETS / "SHA256SUMS").read_text().splitlines())
    files = {p.relative_to(ASSETS).as_posix(): p for p in ASSETS.rglob("*") if p.is_file() and p.name != "SHA256SUMS"}
    assert listed == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    shop = ASSETS.parent / "shop" / "student" / "tokenizer.json"
    for role in ("teacher", "student"):
        assert (ASSETS / role / "tokenizer.json").read_bytes() == shop.read_bytes()
