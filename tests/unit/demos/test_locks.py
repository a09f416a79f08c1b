"""The locks task: locks, both copies of a prompt, answers and why they fail, and the shipped checkpoints."""

import hashlib
import random
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from demos.prompts.locks import LocksPrompts
from demos.tasks.locks import (
    KEYS,
    LOCKS,
    MAX_COMPLETION_WORDS,
    MOST_TRIES,
    SEALED,
    TABLE,
    VALUES,
    VOCABULARY,
    Failure,
    Lock,
    LocksProblem,
    LocksTask,
    grade,
    judge,
    lock,
    lock_count,
    locks_of,
)
from hf.tokenizer import HuggingFaceTokenizer
from launch.config.run_config import run_config
from launch.plan.plan import make_plan
from opd.ports import Sources

ASSETS = Path(__file__).parents[3] / "assets" / "locks"
ROLES = ("teacher", "student", "reader")

seeds = st.integers(min_value=0, max_value=2**32)
shares = st.floats(min_value=0.0, max_value=0.9)


def drawn(seed: int) -> tuple[LocksProblem, random.Random]:
    rng = random.Random(seed)
    return LocksTask().problem(rng), rng


def prompts(*, held_out: bool = False, seed: int = 0) -> LocksPrompts:
    return LocksPrompts(prompts_per_step=64, held_out=held_out, seed=seed)


def sources() -> Sources:
    return Sources(tokenizer=HuggingFaceTokenizer(str(ASSETS / "student")), rows=lambda *_: ())


def test_every_number_is_a_lock_of_its_own_and_each_has_one_code() -> None:
    locks = {lock(n, held_out=held) for held in (False, True) for n in range(lock_count(held_out=held))}
    assert len(locks) == LOCKS == len(KEYS) ** 3 * len(VALUES)
    assert all(sorted(TABLE[key]) == list(range(len(VALUES))) for key in KEYS)
    held_out = [lock(n, held_out=True) for n in range(lock_count(held_out=True))]
    for place, key in product(range(3), KEYS):  # what is held out is no corner of the task
        assert 0.02 < sum(one.keys[place] == key for one in held_out) / len(held_out) < 0.07


@given(seeds)
@settings(max_examples=30)
def test_the_keys_lead_the_code_and_no_other_value_to_the_opening(seed: int) -> None:
    problem, _ = drawn(seed)
    for one in problem.locks:
        assert [value for value in VALUES if one.led(value)[-1] == one.opening] == [one.code]


@given(seeds, shares)
def test_a_perfect_solver_is_graded_right_whatever_it_tries_first(seed: int, wrong: float) -> None:
    problem, rng = drawn(seed)
    assert grade(problem.answer, problem.answer) == 1 and judge(problem.answer, problem.answer).wrong == 0
    tries = LocksTask().solution(problem, rng, wrong=wrong)
    checker = LocksTask(notice=1.0).pupil_solution(problem, rng)
    for working in (tries, checker):
        verdict = judge(working.text, problem.answer)
        assert verdict.failure is None and verdict.noticed == verdict.wrong == working.words.count("no")
        assert locks_of(working.text) == problem.locks  # so any right answer serves as the reference
        assert len(working.words) < MAX_COMPLETION_WORDS
    assert judge(checker.text, problem.answer).repeated == 0


@given(seeds, shares, shares, shares)
def test_mistakes_are_kept_from_the_loss_and_all_else_is_learned(
    seed: int, wrong: float, slip: float, missed: float
) -> None:
    """Whatever is learned is what a perfect solver who reads the code would write there."""
    problem, rng = drawn(seed)
    working = LocksTask().solution(problem, rng, wrong=wrong, slip=slip, missed=missed)
    words, mask = list(working.words), list(working.loss_mask)
    assert {*words} <= {*VOCABULARY}
    for one, mark, following in zip(problem.locks, ("first", "second"), ("second", None), strict=True):
        start, end = words.index(mark), words.index(following) if following else len(words)
        assert mask[start]
        for at in range(start + 1, end, 9):
            value, first, *_ = words[at], *words[at + 1 : at + 9]
            assert first == one.keys[0] and mask[at] == (value == one.code)
            for place, key in enumerate(one.keys):  # from what is written before, right or not
                before, after = words[at + 2 * place], words[at + 2 * place + 2]
                assert mask[at + 2 * place + 2] == (VALUES[TABLE[key][VALUES.index(before)]] == after)
            assert words[at + 7] == one.opening
            assert mask[at + 8] == ((words[at + 8] == "ok") == (words[at + 6] == one.opening))


ONE, TWO = Lock(keys=("C", "A", "Q"), code="2"), Lock(keys=("B", "X", "B"), code="5")
WRONG = next(value for value in VALUES if value != ONE.code)


def attempt(one: Lock, value: str, verdict: str, slip: str = "") -> str:
    words = one.attempt(value)
    if slip:
        words[4] = next(v for v in VALUES if v != words[4])
    return " ".join([*words, verdict])


SECOND = f"second {attempt(TWO, TWO.code, 'ok')}"
RIGHT = f"first {attempt(ONE, ONE.code, 'ok')}"


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (f"{RIGHT} {SECOND}", None),
        (f"first {attempt(ONE, WRONG, 'no')} {attempt(ONE, ONE.code, 'ok')} {SECOND}", None),
        (
            f"first {attempt(ONE, WRONG, 'no')} {attempt(ONE, WRONG, 'no')} {attempt(ONE, ONE.code, 'ok')} {SECOND}",
            None,
        ),
        (f"first {attempt(ONE, WRONG, 'ok')} {SECOND}", Failure.BLUFF),
        (f"first {attempt(ONE, ONE.code, 'no')} {SECOND}", Failure.REJECTED),
        (f"first {attempt(ONE, WRONG, 'no', slip='yes')} {RIGHT[6:]} {SECOND}", Failure.CALCULATION),
        (f"first {' '.join([attempt(ONE, WRONG, 'no')] * MOST_TRIES)} {RIGHT[6:]} {SECOND}", Failure.TRIES),
        (f"{SECOND} {RIGHT}", Failure.FORMAT),
        (f"{RIGHT} {SECOND} ok", Failure.FORMAT),
        (f"{RIGHT} {SECOND}".replace(" C ", " 3 ", 1), Failure.FORMAT),
        (f"{RIGHT} {SECOND}".replace(" ok", " ?", 1), Failure.FORMAT),
        (RIGHT, Failure.EARLY),
        (f"{RIGHT} second {attempt(TWO, TWO.code, '')}".strip(), Failure.EARLY),
        ("", Failure.EARLY),
    ],
)
def test_every_failure_has_its_name(answer: str, failure: Failure | None) -> None:
    reference = LocksProblem(locks=(ONE, TWO)).answer
    assert judge(answer, reference).failure is failure and grade(answer, reference) == float(failure is None)


def test_a_text_that_was_cut_is_told_from_one_that_ends_early() -> None:
    reference = LocksProblem(locks=(ONE, TWO)).answer
    for words in range(len(reference.split()) + 1):
        text = " ".join(reference.split()[:words])
        assert judge(text, reference, ended=False).failure is Failure.CUT
    bluff = f"first {attempt(ONE, WRONG, 'ok')} second"
    assert judge(bluff, reference, ended=False).failure is Failure.BLUFF


def test_what_is_counted_up_to_a_failure() -> None:
    tries = [attempt(ONE, WRONG, "no"), attempt(ONE, WRONG, "no"), attempt(ONE, ONE.code, "ok")]
    bluff = attempt(TWO, next(v for v in VALUES if v != TWO.code), "ok")
    verdict = judge(f"first {' '.join(tries)} second {bluff}", LocksProblem(locks=(ONE, TWO)).answer)
    assert (verdict.wrong, verdict.noticed, verdict.repeated, verdict.tried, verdict.at_once) == (3, 2, 1, 2, 0)


def test_a_pupil_overlooks_as_often_as_it_is_told_to_and_never_tries_a_refuted_value() -> None:
    rng = random.Random(0)
    problems = [LocksTask().problem(rng) for _ in range(500)]
    verdicts = [judge(LocksTask(notice=0.6).pupil_solution(p, rng).text, p.answer) for p in problems]
    assert 0.55 < sum(v.noticed for v in verdicts) / sum(v.wrong for v in verdicts) < 0.65
    assert 0.15 < sum(v.at_once for v in verdicts) / sum(v.tried for v in verdicts) < 0.25
    assert {v.failure for v in verdicts} == {None, Failure.BLUFF} and not any(v.repeated for v in verdicts)


@given(st.integers(0, 3), st.integers(0, 200), st.booleans())
@settings(max_examples=8, deadline=None)
def test_the_code_stands_in_the_teachers_copy_only_and_both_have_one_length(seed: int, step: int, held: bool) -> None:
    tokenizer = sources().tokenizer
    for prompt in prompts(held_out=held, seed=seed)(step, sources())[:4]:
        mine, its = prompt.student_ids, prompt.teacher_ids
        slots = [2, 8]  # behind <bos> and a mark
        assert len(mine) == len(its) and np.flatnonzero(mine != its).tolist() == slots
        assert [VOCABULARY[i] for i in mine[slots]] == [SEALED] * 2
        codes = [one.code for one in locks_of(prompt.answer)]
        assert [VOCABULARY[i] for i in its[slots]] == codes
        # What the student reads besides is the locks' keys and openings, and not their codes.
        keys = [word for one in locks_of(prompt.answer) for word in (*one.keys, one.opening)]
        read = tokenizer.decode(mine).split()
        assert [word for word in read if word not in ("first", "second", SEALED, "?", "<bos>")] == keys


def test_no_lock_comes_twice_in_a_run_and_none_is_held_out() -> None:
    source = prompts()
    trained = [one for number in range(64 * 130) for one in source.problem(number).locks]
    assert len(set(trained)) == len(trained)
    asked = [one for number in range(1000) for one in prompts(held_out=True, seed=1_000_000).problem(number).locks]
    assert len(set(asked)) == len(asked) and not set(asked) & set(trained)
    again, other = prompts().problem(7), prompts(seed=1).problem(7)
    assert again == source.problem(7) != other
    taught = {one for seed in range(500) for one in drawn(seed)[0].locks}  # by the recipes
    held_out = {lock(n, held_out=True) for n in range(lock_count(held_out=True))}
    assert not taught & held_out


def test_the_shipped_files_are_those_of_the_list_and_one_tokenizer_knows_every_word() -> None:
    listed = dict(reversed(line.split("  ")) for line in (ASSETS / "SHA256SUMS").read_text().splitlines())
    files = {p.relative_to(ASSETS).as_posix(): p for p in ASSETS.rglob("*") if p.is_file() and p.name != "SHA256SUMS"}
    assert listed == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert sum(path.stat().st_size for path in files.values()) < 3e6
    tokenizers = [(ASSETS / role / "tokenizer.json").read_bytes() for role in ROLES]
    assert len(set(tokenizers)) == 1
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "student")
    assert [tokenizer.convert_tokens_to_ids(word) for word in VOCABULARY] == list(range(len(VOCABULARY)))


def test_the_experiment_can_be_planned_and_its_teacher_reads_another_prompt() -> None:
    config = run_config(["experiment=locks"])
    plan = make_plan(config)
    assert config.max_tokens == MAX_COMPLETION_WORDS
    mine, its = plan.prompts["first prompt"].split(), plan.prompts["for the teacher"].split()
    codes = [one.code for one in locks_of(plan.prompts["its answer"])]
    assert [(a, b) for a, b in zip(mine, its, strict=True) if a != b] == [(SEALED, code) for code in codes]
