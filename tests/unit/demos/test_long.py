"""The long task: true texts repeat a list, pupils' forget more and more, and what is due and right is found exactly."""

import hashlib
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from demos.prompts.long import LongPrompts
from demos.recipes.measure_long import Place, share
from demos.tasks.long import (
    BEGIN,
    END,
    MARKS,
    MAX_COMPLETION_WORDS,
    ROOMS,
    ROUNDS,
    STAIRS,
    STAIRS_OF_ROUND,
    VOCABULARY,
    WORDS_PER_ROUND,
    LongProblem,
    LongTask,
    due,
    first_slip,
    grade,
)
from launch.config.run_config import run_config
from launch.plan.plan import make_plan

ASSETS = Path(__file__).parents[3] / "assets" / "long"
ROLES = ("teacher", "student")

seeds = st.integers(0, 2**32)


def drawn(seed: int) -> tuple[LongProblem, random.Random]:
    rng = random.Random(seed)
    return LongTask().problem(rng), rng


@given(seeds)
def test_a_list_is_the_round_in_a_circle_and_tells_every_next_room_once(seed: int) -> None:
    problem, _ = drawn(seed)
    circle = problem.circle
    assert len({*circle}) == len(circle) == WORDS_PER_ROUND - 1 and {*circle} <= {*ROOMS, *STAIRS}
    *listed, closing, asks = problem.prompt.split()
    assert asks == "?" and closing == listed[0] and sorted(listed) == sorted([*circle, BEGIN])
    at = listed.index(BEGIN)
    assert (*listed[at + 1 :], *listed[:at]) == circle
    assert problem.answer.split() == [*circle]
    stairs = [place for place, word in enumerate(circle) if word in STAIRS]
    assert len(stairs) == STAIRS_OF_ROUND and 0 not in stairs and len(circle) - 1 not in stairs
    assert all(later - one > 1 for one, later in pairwise(stairs))


@given(seeds)
def test_the_true_text_is_right_and_every_word_of_it_is_due(seed: int) -> None:
    problem, _ = drawn(seed)
    working = LongTask().solution(problem)
    words = working.words
    assert {*words} <= {*VOCABULARY} and all(working.loss_mask)
    assert len(words) + 1 == MAX_COMPLETION_WORDS  # with the end-of-text token
    assert grade(working.text, problem.answer) == 1.0 and first_slip(words, problem.circle) is None
    assert due(words, problem.circle) == [*words, None]
    # The two places that the next word can be known from agree: the list, and the rounds before.
    assert all(
        words[at] == words[at - WORDS_PER_ROUND] or words[at] in (*MARKS, END)
        for at in range(WORDS_PER_ROUND, len(words))
    )


@given(seeds, st.floats(0.0, 1.0))
def test_a_pupil_leaves_out_ever_after_what_it_once_forgot_and_nothing_but_stairs(seed: int, forget: float) -> None:
    problem, rng = drawn(seed)
    working = LongTask(forget=forget).pupil_solution(problem, rng)
    words = working.words
    rounds = [
        words[words.index(mark) + 1 : words.index(after)] for mark, after in zip(MARKS, (*MARKS[1:], END), strict=True)
    ]
    for before, after in zip([problem.circle, *rounds], rounds, strict=False):
        assert [word for word in before if word in {*after}] == [*after]
        assert {*before} - {*after} <= {*STAIRS}
    whole = sum(went == problem.circle for went in rounds)
    assert grade(working.text, problem.answer) == pytest.approx(whole / ROUNDS)
    assert rounds[:whole] == [problem.circle] * whole  # only the first rounds are whole
    slip = first_slip(words, problem.circle)
    assert (slip is None) == (whole == ROUNDS)
    # A text goes on from where it is: every slip leaves out stairs, and is counted once.
    slips = [(word, asked) for word, asked in zip(words, due(words, problem.circle), strict=False) if word != asked]
    assert len(slips) == sum(STAIRS_OF_ROUND - sum(word in STAIRS for word in went) for went in rounds)
    assert all(asked in STAIRS for _, asked in slips)


def test_a_pupil_forgets_as_often_as_it_is_told_to() -> None:
    rng = random.Random(0)
    texts = [LongTask(forget=0.08).pupil_solution(LongTask().problem(rng), rng) for _ in range(400)]
    first = [sum(word in STAIRS for word in t.words[1 : t.words.index("2")]) for t in texts]
    assert 0.90 < sum(first) / (STAIRS_OF_ROUND * len(texts)) < 0.94


ONE = LongProblem(circle=("A", "b", "B", "C", "h", "D"), begins=3)


def text_of(*rounds: str, end: str = END) -> str:
    return (
        " ".join(word for mark, went in zip(MARKS, rounds, strict=False) for word in (mark, *went.split())) + f" {end}"
    )


WHOLE = "A b B C h D"


@pytest.mark.parametrize(
    ("text", "rounds"),
    [
        (text_of(*[WHOLE] * ROUNDS), ROUNDS),
        (text_of("A B C h D", *[WHOLE] * (ROUNDS - 1)), ROUNDS - 1),
        (text_of(*["A B C h D"] * ROUNDS), 0),
        (text_of(WHOLE + " A", *[WHOLE] * (ROUNDS - 1)), ROUNDS - 1),
        (text_of(*[WHOLE] * ROUNDS, end=""), 0),
        (text_of(*[WHOLE] * ROUNDS) + " A", 0),
        (text_of(*[WHOLE] * (ROUNDS - 1)), ROUNDS - 1),
        (text_of(*[WHOLE] * ROUNDS).replace(" 3 ", " 2 "), ROUNDS - 2),  # which of the two second rounds counts?
        (text_of(*[WHOLE] * ROUNDS).replace(" 3 ", " "), ROUNDS - 2),
        ("A " + text_of(*[WHOLE] * ROUNDS), 0),
        ("", 0),
    ],
)
def test_a_grade_is_the_share_of_right_rounds(text: str, rounds: int) -> None:
    assert grade(text, ONE.answer) == rounds / ROUNDS


def test_what_is_due_after_words_that_left_the_truth() -> None:
    assert ONE.prompt == "C h D * A b B C ?"
    assert due(["1", "A", "B", "C", "X", "D", "7", "5"], ONE.circle) == ["1", "A", "b", "C", "h", None, "2", "A", "A"]
    assert due(["A", "D"], ONE.circle) == ["1", "b", "1"]  # no round has begun yet
    assert due(["18", "D", END], ONE.circle)[-2:] == [END, None]
    assert first_slip(["1", "A", "B"], ONE.circle) == 2


def test_shares_are_of_the_places_where_something_is_due() -> None:
    here = Place(depth=1, due="A", written="A", likeliest="A", fidelity=0.5, slipped=False)
    there = Place(depth=2, due="b", written="B", likeliest="B", fidelity=1.0, slipped=False)
    nowhere = Place(depth=3, due=None, written="X", likeliest="A", fidelity=0.0, slipped=True)
    found = share([here, there, nowhere])
    assert (found.places, found.fidelity, found.right, found.slips) == (2, 0.75, 0.5, 0.5)


@given(st.integers(0, 10**6), st.integers(0, 3))
def test_prompts_are_a_pure_function_of_number_and_seed(number: int, seed: int) -> None:
    source = LongPrompts(prompts_per_step=4, seed=seed)
    assert source.problem(number) == source.problem(number) != source.problem(number + 1)
    assert source.problem(number) != LongPrompts(prompts_per_step=4, seed=seed + 1).problem(number)


def test_the_shipped_files_are_those_of_the_list_and_one_tokenizer_knows_every_word() -> None:
    listed = dict(reversed(line.split("  ")) for line in (ASSETS / "SHA256SUMS").read_text().splitlines())
    files = {p.relative_to(ASSETS).as_posix(): p for p in ASSETS.rglob("*") if p.is_file() and p.name != "SHA256SUMS"}
    assert listed == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    assert sum(path.stat().st_size for path in files.values()) < 3e6
    assert len({(ASSETS / role / "tokenizer.json").read_bytes() for role in ROLES}) == 1
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "student")
    assert [tokenizer.convert_tokens_to_ids(word) for word in VOCABULARY] == list(range(len(VOCABULARY)))


def test_the_experiment_can_be_planned() -> None:
    config = run_config(["experiment=long"])
    plan = make_plan(config)
    assert config.max_tokens == MAX_COMPLETION_WORDS and isinstance(config.prompts, LongPrompts)
    circle = plan.prompts["its answer"].split()
    assert {*plan.prompts["first prompt"].split()} >= {*circle}
