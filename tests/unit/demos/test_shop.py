"""The shop task: problems, the two ways of writing a solution, grading, and the shipped checkpoints."""

import hashlib
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from demos.tasks.shop import VOCABULARY, ShopProblem, ShopTask, Step, Working, grade, without_carry

ASSETS = Path(__file__).parents[3] / "assets" / "shop"
ROLES = ("teacher", "student")
WORDS_PER_LINE = 9

seeds = st.integers(min_value=0, max_value=2**32)
shares = st.floats(min_value=0.0, max_value=0.9)


def drawn(seed: int, task: ShopTask | None = None) -> tuple[ShopProblem, random.Random]:
    rng = random.Random(seed)
    return (task or ShopTask()).problem(rng), rng


def lines(working: Working) -> list[tuple[list[str], list[bool]]]:
    """The nine words and marks of each written day."""
    days = len(working.words) - 3
    assert days % WORDS_PER_LINE == 0
    return [
        (list(working.words[at : at + WORDS_PER_LINE]), list(working.loss_mask[at : at + WORDS_PER_LINE]))
        for at in range(0, days, WORDS_PER_LINE)
    ]


def seen_from(line: list[str]) -> Step:
    """What a written line claims to compute, with the right result."""
    before, amount = int(line[1] + line[2]), int(line[4])
    after = (before + amount if line[3] == "+" else before - amount) % 100
    return Step(day=line[0], before=before, sign="+" if line[3] == "+" else "-", amount=amount, after=after)


@given(seeds)
def test_the_stock_stays_a_two_digit_number_and_the_steps_are_a_chain(seed: int) -> None:
    problem, _ = drawn(seed)
    assert 4 <= len(problem.steps) <= 6
    for step, following in pairwise(problem.steps):
        assert step.after == following.before
    for step in problem.steps:
        change = step.amount if step.sign == "+" else -step.amount
        assert step.after == step.before + change
        assert 10 <= step.before <= 99 and 10 <= step.after <= 99 and 1 <= step.amount <= 9
    assert problem.answer == " ".join(str(problem.steps[-1].after))


@given(seeds)
def test_the_prompt_tells_the_story_of_the_steps(seed: int) -> None:
    problem, _ = drawn(seed)
    words = problem.prompt.split()
    assert words[:4] == ["has", *str(problem.steps[0].before), ";"] and words[-1] == "?"
    for place, step in enumerate(problem.steps):
        day, verb, amount = words[4 + 3 * place : 7 + 3 * place]
        assert (day, amount) == (step.day, str(step.amount))
        assert (verb in {"buys", "finds", "gets"}) == (step.sign == "+")


@given(seeds)
def test_the_true_solution_is_graded_one_and_is_learned_whole(seed: int) -> None:
    problem, rng = drawn(seed)
    working = ShopTask().solution(problem, rng)
    assert grade(working.text, problem.answer) == 1.0
    assert all(working.loss_mask) and "no" not in working.words


@given(seeds, shares)
def test_injected_mistakes_are_kept_from_the_loss_and_everything_else_is_learned(seed: int, mistakes: float) -> None:
    problem, rng = drawn(seed)
    working = ShopTask().solution(problem, rng, mistakes)
    assert len(working.words) == len(working.loss_mask)
    amounts = {step.day: str(step.amount) for step in problem.steps}
    for line, mask in lines(working):
        right = f"{seen_from(line).after:02d}"
        verdict_fits = (line[8] == "ok") == (line[6] + line[7] == right)
        assert mask == [True] * 6 + [line[6] == right[0], line[7] == right[1], verdict_fits]
        assert line[4] == amounts[line[0]]
    assert all(working.loss_mask[-3:])


def test_mistakes_do_occur_are_rejected_and_repaired() -> None:
    problem, rng = drawn(0)
    workings = [ShopTask().solution(problem, rng, 0.4) for _ in range(200)]
    rejections = sum(working.words.count("no") for working in workings)
    # A day is begun wrong with probability 0.4, and again with 0.4.
    assert 0.5 < rejections / (200 * len(problem.steps)) < 0.62
    unnoticed = 0
    for working in workings:
        days = [line for line, _ in lines(working)]
        wrong = [line for line in days if int(line[6] + line[7]) != seen_from(line).after]
        assert all(line in wrong for line in days if line[8] == "no")
        unnoticed += sum(line[8] == "ok" for line in wrong)
        for line, following in pairwise(days):
            # After `no` the same day is written again from the same stock; after `ok` the next one begins.
            assert (line[:3] == following[:3]) == (line[8] == "no")
    assert 0.07 < unnoticed / (200 * len(problem.steps)) < 0.13


def test_most_injected_mistakes_are_forgotten_carries_where_there_is_one_to_forget() -> None:
    task, rng = ShopTask(), random.Random(0)
    workings = [task.solution(task.problem(rng), rng, 0.4) for _ in range(200)]
    rejected = [line for working in workings for line, _ in lines(working) if line[8] == "no"]
    crossing = [line for line in rejected if without_carry(seen_from(line)) is not None]
    forgotten = [line for line in crossing if int(line[6] + line[7]) == without_carry(seen_from(line))]
    # Six in ten by intent; a small error of plus or minus ten can look the same.
    assert 0.6 < len(forgotten) / len(crossing) < 0.73


@given(seeds)
def test_the_pupil_forgets_carries_and_nothing_else_when_it_never_slips(seed: int) -> None:
    task = ShopTask(forget_carry=0.9, slip=0.0, notice=0.9)
    problem, rng = drawn(seed, task)
    working = task.pupil_solution(problem, rng)
    assert all(working.loss_mask)
    assert [line[0] for line, _ in lines(working) if line[8] == "ok"] == [step.day for step in problem.steps]
    for line, _ in lines(working):
        step, written = seen_from(line), int(line[6] + line[7])
        if written == step.after:
            assert line[8] == "ok"
        else:
            assert written == without_carry(step)


def test_the_pupil_errs_as_often_as_it_is_told_to() -> None:
    task = ShopTask(notice=0.0)
    rng = random.Random(0)
    pupils = [(p := task.problem(rng), task.pupil_solution(p, rng)) for _ in range(500)]
    crossing = [
        line for _, working in pupils for line, _ in lines(working) if without_carry(seen_from(line)) is not None
    ]
    forgotten = [line for line in crossing if int(line[6] + line[7]) == without_carry(seen_from(line))]
    assert 0.45 < len(forgotten) / len(crossing) < 0.55
    solved = sum(grade(working.text, problem.answer) for problem, working in pupils) / len(pupils)
    assert 0.2 < solved < 0.5


@pytest.mark.parametrize(
    ("before", "sign", "amount", "after", "forgotten"),
    [
        (37, "-", 8, 29, 39),
        (37, "+", 8, 45, 35),
        (33, "+", 4, 37, None),
        (20, "-", 1, 19, 29),
        (12, "-", 2, 10, None),
    ],
)
def test_a_forgotten_carry_by_hand(before: int, sign: str, amount: int, after: int, forgotten: int | None) -> None:
    step = Step(day="Mon", before=before, sign="+" if sign == "+" else "-", amount=amount, after=after)
    assert without_carry(step) == forgotten


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("Mon 3 7 - 8 = 2 9 ok # 2 9", 1.0),
        ("# 2 9", 1.0),
        ("Mon 3 7 - 8 = 2 9 ok # 3 9", 0.0),
        ("Mon 3 7 - 8 = 2 9 ok # 9 2", 0.0),
        ("Mon 3 7 - 8 = 2 9 ok 2 9", 0.0),
        ("Mon 3 7 - 8 = 2 9 ok # 29", 0.0),
        ("Mon 3 7 - 8 = 2 9 ok # 2", 0.0),
        ("Mon 3 7 - 8 = 2 9 ok # 2 9 ok", 0.0),
        ("# 2 9 # 3 9", 0.0),
        ("2 9", 0.0),
        ("", 0.0),
    ],
)
def test_grade_wants_the_mark_and_both_digits_at_the_end(completion: str, expected: float) -> None:
    assert grade(completion, "2 9") == expected


@given(seeds, shares)
def test_every_written_word_is_in_the_vocabulary_and_fits_the_limit(seed: int, mistakes: float) -> None:
    problem, rng = drawn(seed)
    task = ShopTask()
    plain = task.solution(problem, rng)
    assert len(plain.words) < task.max_completion_words == 76
    written = {*problem.prompt.split(), *task.solution(problem, rng, mistakes).words}
    assert written <= set(VOCABULARY) - {"<pad>", "<bos>", "<eos>", "<unk>"}


def test_the_same_seed_draws_the_same_problem_and_writes_the_same_text() -> None:
    texts = set()
    for _ in range(2):
        problem, rng = drawn(5)
        texts.add((problem.prompt, ShopTask().solution(problem, rng, 0.4).text))
    assert len(texts) == 1
    assert drawn(6)[0] != drawn(5)[0]


@pytest.mark.parametrize("knobs", [{"min_days": 5, "max_days": 4}, {"max_days": 8}, {"max_change": 10}])
def test_impossible_settings_are_refused(knobs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="ShopTask"):
        ShopTask(**knobs)


def test_the_shipped_tokenizer_knows_every_word_as_one_token_and_writes_it_back() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "teacher")
    assert [tokenizer.convert_tokens_to_ids(word) for word in VOCABULARY] == list(range(len(VOCABULARY)))
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    problem, rng = drawn(0)
    for text in (problem.prompt, ShopTask().solution(problem, rng, 0.4).text, " ".join(VOCABULARY[3:-1])):
        ids = tokenizer.encode(text)
        assert ids == [1, *(VOCABULARY.index(word) for word in text.split())]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_teacher_and_student_share_one_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        found = {hashlib.sha256((ASSETS / role / name).read_bytes()).hexdigest() for role in ROLES}
        assert len(found) == 1


@pytest.mark.parametrize("role", ROLES)
def test_the_shipped_files_are_those_the_recipe_wrote(role: str) -> None:
    recorded = [line.split() for line in (ASSETS / "SHA256SUMS").read_text(encoding="utf-8").splitlines()]
    of_role = {path: digest for digest, path in recorded if path.startswith(role)}
    assert f"{role}/model.safetensors" in of_role
    for path, digest in of_role.items():
        assert hashlib.sha256((ASSETS / path).read_bytes()).hexdigest() == digest


@torch.no_grad()
def test_the_shipped_teacher_knows_the_carry_and_the_student_often_forgets_it() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "teacher")
    text = "has 3 7 ; Mon gives 8 Tue buys 4 Wed gives 5 Thu sells 1 ? Mon 3 7 - 8 ="
    chance_of_two = {}
    for role in ROLES:
        model = AutoModelForCausalLM.from_pretrained(ASSETS / role, dtype=torch.float32)
        assert model.get_input_embeddings().num_embeddings >= len(VOCABULARY)
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        chance_of_two[role] = logits.softmax(-1)[tokenizer.convert_tokens_to_ids("2")].item()
    assert chance_of_two["teacher"] > 0.9
    assert 0.1 < chance_of_two["student"] < 0.9
