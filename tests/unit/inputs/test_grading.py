"""What is right is graded right and what is wrong wrong: a written table, forms made of it, and hostile answers."""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.config.run_config import run_config
from launch.inputs.answers import expressions
from launch.inputs.answers.check import doubtful, trouble
from launch.inputs.answers.finding import reference
from launch.inputs.answers.kinds import Unreadable
from launch.inputs.graders import MathGrader, verify_math
from launch.plan.checks.answers import NO_ANSWERS, unreadable
from launch.plan.plan import make_plan
from opd.errors import OpdError
from opd.ports import References
from tests.fuzz import grading

ROOT = Path(__file__).resolve().parents[3]


def test_every_pair_of_the_table_is_graded_as_it_must_be() -> None:
    pairs = grading.table()
    assert sum(pair.right for pair in pairs) >= 200 and sum(not pair.right for pair in pairs) >= 120
    assert [pair for pair in pairs if grading.graded(pair) != pair.right] == []


def test_answers_made_from_references_are_graded_as_they_must_be() -> None:
    pairs = list(grading.made(600, seed=11))
    assert [pair for pair in pairs if grading.graded(pair) != pair.right] == []


SIGNS = ["\\frac", "\\boxed{", "\\text{", *"0123456789abxyABC()[]{}\\$%^_+-=<>,.;:/|&~ \n"]


@given(st.lists(st.sampled_from(SIGNS), max_size=40).map("".join))
@settings(max_examples=400, deadline=None)
def test_no_text_breaks_the_reader(text: str) -> None:
    """Whatever a model writes has a verdict, quickly; nothing that cannot be read equals anything."""
    began = time.perf_counter()
    assert isinstance(doubtful(text), str | None)
    for gold in (text, "12", r"\text{Tuesday}", "B", r"\{1, 2\}"):
        if "^" not in text and "\\frac" not in text:
            assert verify_math(text, gold) in (0.0, 1.0)
    assert time.perf_counter() - began < 5
    if isinstance(reference(text), Unreadable):
        assert verify_math(r"\boxed{12}", text) == 0.0


@given(st.integers(-999, 999), st.integers(2, 99), st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_numbers_equal_all_their_spellings_and_nothing_beside_them(up: int, down: int, by: int) -> None:
    gold = rf"\frac{{{up}}}{{{down}}}"
    for same in (f"{up}/{down}", rf"\dfrac{{{up * by}}}{{{down * by}}}", rf"x = \frac{{{up}}}{{{down}}}"):
        assert verify_math(rf"\boxed{{{same}}}", gold) == 1.0
    for other in (rf"\frac{{{up + 1}}}{{{down}}}", f"{up}", rf"({up}, {down})", rf"\frac{{{up}}}{{{down}}}, 7"):
        assert verify_math(rf"\boxed{{{other}}}", gold) == float(other == str(up) and up == 0)


@given(st.lists(st.integers(-30, 30), min_size=2, max_size=4, unique=True), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_order_counts_in_tuples_and_not_in_lists(items: list[int], shuffling: random.Random) -> None:
    other = list(items)
    shuffling.shuffle(other)
    as_list, moved = (", ".join(map(str, numbers)) for numbers in (items, other))
    assert verify_math(rf"\boxed{{{moved}}}", as_list) == 1.0
    assert verify_math(rf"\boxed{{({moved})}}", f"({as_list})") == float(items == other)
    assert verify_math(rf"\boxed{{{items[0]}}}", as_list) == 0.0
    assert verify_math(rf"\boxed{{\{{{moved}\}}}}", as_list) == 1.0


@given(st.integers(1, 12), st.integers(0, 59), st.integers(1, 12), st.integers(0, 59), st.sampled_from(["a", "p"]))
@settings(max_examples=60, deadline=None)
def test_a_time_of_day_equals_itself_and_no_other(hour: int, minute: int, other: int, more: int, half: str) -> None:
    """Though times are written as ratios are, and 12:00 and 1:00 would both be ratios to nothing."""
    gold = rf"{hour}:{minute:02} \text{{ {half}.m.}}"
    for same in (f"{hour}:{minute:02}", f"{hour}:{minute:02} {half.upper()}M", rf"\text{{{hour}:{minute:02} {half}m}}"):
        assert verify_math(rf"\boxed{{{same}}}", gold) == 1.0
    assert verify_math(rf"\boxed{{{hour % 12 + 12 * (half == 'p')}:{minute:02}}}", gold) == 1.0
    assert verify_math(rf"\boxed{{{hour}:{minute:02} {'p' if half == 'a' else 'a'}m}}", gold) == 0.0
    assert verify_math(rf"\boxed{{{other}:{more:02} {half}m}}", gold) == float((hour, minute) == (other, more))
    if minute < 10:
        assert verify_math(rf"\boxed{{{other}:{more:02}}}", f"{hour}:{minute:02}") == float(
            (hour, minute) == (other, more)
        )


@given(st.lists(st.integers(0, 5), min_size=2, max_size=3).filter(any), st.lists(st.integers(0, 5), max_size=3))
@settings(max_examples=80, deadline=None)
def test_ratios_are_equal_if_one_is_a_multiple_of_the_other(gold: list[int], given_: list[int]) -> None:
    if len(given_) < 2:
        given_ = [7 * term for term in gold]
    multiple = len(gold) == len(given_) and any(
        [term * down for term in given_] == [term * up for term in gold] for up in range(1, 41) for down in range(1, 6)
    )
    assert verify_math(rf"\boxed{{{':'.join(map(str, given_))}}}", ":".join(map(str, gold))) == float(multiple)


REAL = (
    (r"\sqrt{\frac{X}{Y}}", r"\frac{\sqrt{X}}{\sqrt{Y}}", True),
    (r"2\pi\sqrt{\frac{X}{Y Z}}", r"\frac{2\pi\sqrt{X}}{\sqrt{Y}\sqrt{Z}}", True),
    (r"\ln\frac{X}{Y}", r"\ln X - \ln Y", True),
    (r"\ln\frac{X}{Y}", r"\ln Y - \ln X", False),
    (r"\sqrt{X^3} Y", r"X\sqrt{X} Y", True),
    (r"\sqrt[3]{-X} + Y", r"Y - \sqrt[3]{X}", True),
    (r"\frac{\sqrt{X Y}}{X}", r"\sqrt{\frac{Y}{X}}", True),
    (r"\sqrt{(X - Y)^2}", r"X - Y", False),
    (r"|X| Y", r"X Y", False),
    (r"\sqrt{X^2}", r"X", False),
    (r"\sqrt{X Y}", r"-\sqrt{X}\sqrt{Y}", False),
)


@given(st.permutations("abghkmr"), st.sampled_from(REAL))
@settings(max_examples=24, deadline=None)
def test_the_names_of_variables_change_no_verdict(names: list[str], pair: tuple[str, str, bool]) -> None:
    """Formulas are equal where both are real, whichever of them would be negative at the points of comparison."""
    gold, other = (text.replace("X", names[0]).replace("Y", names[1]).replace("Z", names[2]) for text in pair[:2])
    assert verify_math(rf"\boxed{{{other}}}", gold) == verify_math(rf"\boxed{{{gold}}}", other) == float(pair[2])


@given(st.integers(2, 6), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_formulas_that_mean_integers_are_compared_there(k: int, shift: int) -> None:
    gold = rf"\left\lceil \frac{{n}}{{{k}}} \right\rceil"
    for given_, right in (
        (rf"\lfloor \frac{{n+{shift}}}{{{k}}} \rfloor", shift == k - 1),
        (rf"\frac{{n}}{{{k}}}", False),
    ):
        assert verify_math(rf"\boxed{{{given_}}}", gold) == float(right)
    assert verify_math(rf"\boxed{{(-1)^{{n+{shift}}}}}", "(-1)^n") == float(shift % 2 == 0)
    assert verify_math(r"\boxed{\cos(n\pi)}", "(-1)^{-n}") == 1.0


DASHES = st.characters(categories=["Pd"]).filter(
    lambda c: "HYPHEN" in unicodedata.name(c) or "DASH" in unicodedata.name(c)
)
FRACTIONS = [c for c in map(chr, range(0x2150, 0x215F)) if unicodedata.decomposition(c).startswith("<fraction>")]


@given(st.characters(categories=["Nd"]), DASHES, st.characters(categories=["Cf", "Zs"]), st.sampled_from(FRACTIONS))
@settings(max_examples=150, deadline=None)
def test_a_number_is_itself_in_all_characters_that_unicode_has_for_it(
    digit: str, dash: str, nothing: str, part: str
) -> None:
    value = unicodedata.digit(digit)
    assert verify_math(rf"\boxed{{1{digit}{nothing}}}", f"1{value}") == 1.0
    assert verify_math(f"The answer is {dash}7", "-7") == verify_math(r"\boxed{-7}", f"{dash}7") == 1.0
    assert verify_math(rf"\boxed{{{dash}1{digit}}}", f"1{value}") == 0.0
    assert verify_math(rf"\boxed{{{part}}}", f"{unicodedata.numeric(part):.15f}") == 1.0
    spaced = f"1{nothing}0{value}0" if unicodedata.category(nothing) == "Zs" else "1"
    assert verify_math(rf"\boxed{{{1000 + 10 * value}}}", spaced) == float(spaced != "1")


@given(st.sampled_from("ABCDEFGHIJ"), st.sampled_from("ABCDEFGHIJ"))
@settings(max_examples=30, deadline=None)
def test_a_choice_is_found_behind_a_boxed_formula_and_before_its_text(gold: str, said: str) -> None:
    forms = (
        rf"Thus \boxed{{\langle H\rangle \ll \Delta E}}.⏎⏎**Answer: {said}**", rf"\boxed{{x = 3}}⏎Answer: ({said})",
        f"{said.lower()}. 4 m/s", rf"\boxed{{{said.lower()}) 4}}", f"The answer is {said}. Note that D is common.",
        rf"\boxed{{\text{{{said}}}}}⏎⏎Answer: (K)",
    )  # fmt: skip
    for form in forms:
        assert verify_math(form.replace("⏎", "\n"), gold) == float(said == gold)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("", "empty"), ("   ", "empty"), ("$$", "empty"), (r"\boxed{", "not closed"), (r"\frac{1}{2", "not balanced"),
        ("?!", "neither"), (r"x^{2}+", "no formula"),
        ("Let x be the number of apples; the rest follows by induction on n", "8 words"),
        ('["34"]', "text of a list"), ("['2', '3']", "text of a list"), ('{"answer": 2}', "or an object"),
        ("(1, )", "empty item"), (r"\begin{pmatrix} 1 & \\ 2 & 3 \end{pmatrix}", "empty cells"),
    ],
)  # fmt: skip
def test_references_that_say_nothing_are_found_without_the_library(answer: str, why: str) -> None:
    assert why in (doubtful(answer) or "readable") != "readable"


def test_what_looks_readable_is_read_by_the_library_too() -> None:
    """The cheap look before a run must not promise what the child cannot keep."""
    answers = {
        pair.reference for pair in (*grading.table(), *grading.made(400, seed=3)) if "^{9^" not in pair.reference
    }
    assert [a for a in sorted(answers) if trouble(a)] == []
    assert [a for a in sorted(answers) if doubtful(a)] == []


def test_reading_many_references_takes_no_time() -> None:
    answers = [("x", pair.reference) for pair in grading.made(3000, seed=7)]
    began = time.process_time()
    found = unreadable(References(place="prompts", task="math", answers=answers, allowed=0.0), {"math": MathGrader()})
    assert found == [] and time.process_time() - began < 5


ROWS = [{"prompt": "has 3 7 ; ?", "answer": r"\frac{1}{2}"}] * 19


def planned(tmp_path: Path, rows: list[dict[str, str]], *more: str) -> dict[str, str]:
    path = tmp_path / f"{len(rows)}rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        "experiment=shop", "prompts=dataset", f"prompts.path={path}", "prompts.answer_column=answer",
        "evaluation=dataset", f"evaluation.prompts.path={path}", *more,
    ]  # fmt: skip
    return dict(make_plan(run_config(overrides)).answers)


def test_unreadable_references_are_counted_in_the_plan_and_refused_above_a_share(tmp_path: Path) -> None:
    spoilt = [*ROWS, {"prompt": "has 3 7 ; ?", "answer": r"\frac{1}{"}]
    with pytest.raises(
        OpdError, match=r"1 of 20 .*line 20: .*braces.*\.max_unreadable_answers \(now 0\.01\)"
    ) as caught:
        planned(tmp_path, spoilt)
    assert "\n" not in str(caught.value)
    share = ("prompts.max_unreadable_answers=0.05", "evaluation.prompts.max_unreadable_answers=0.05")
    said = planned(tmp_path, spoilt, *share)
    assert re.search(r"1 of 20 reference answers cannot be read, e\.g\. \S+\.jsonl line 20: ", said["prompts"])
    assert planned(tmp_path, ROWS)["evaluation.prompts"] == "19 reference answers, all readable"


def test_without_answers_nothing_is_promised_and_rewards_are_refused(tmp_path: Path) -> None:
    none = ("prompts.answer_column=''",)
    assert planned(tmp_path, ROWS, *none) == {"evaluation.prompts": NO_ANSWERS}
    with pytest.raises(OpdError, match=r"grpo learns from graded answers.*prompts\.answer_column"):
        planned(tmp_path, ROWS, *none, "method=grpo", "prompts.group_size=4")


def test_a_reference_that_cannot_be_graded_is_told_from_a_completion() -> None:
    """Both cost their own reward only; the reference costs its deadline once."""
    tower = r"\int_0^{9^{9^{9}}} \frac{9^{9^{9}}!}{x^{9^{9}}} dx"
    grader = MathGrader(deadline_s=3.0)
    try:
        completions = [rf"\boxed{{{tower}}}", r"\boxed{\sqrt{4}}", r"\boxed{3}", r"\boxed{4}"]
        assert asyncio.run(grader.grade(completions, ["2", "2", tower, tower])) == [0.0, 1.0, 0.0, 0.0]
        assert [fault.startswith("a completion") for fault in grader.faults] == [True, False]
    finally:
        grader.close()


def test_the_library_says_nothing_on_the_screen() -> None:
    """In a process of its own, whose screen nobody captures first."""
    program = (
        "import asyncio\nfrom launch.inputs.graders import MathGrader\n"
        "if __name__ == '__main__':\n    grader = MathGrader()\n"
        "    asyncio.run(grader.grade([r'\\boxed{\\sum_{i=1}^{n} i}', r'\\boxed{x!}'], [r'\\frac{n(n+1)}{2}', 'y!']))\n"
        "    grader.close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout + done.stderr == ""


def test_sixfold_decimals_round_and_shorter_ones_do_not() -> None:
    assert expressions.equal(r"\frac{1}{3}", "0.333333") and not expressions.equal(r"\frac{1}{3}", "0.33333")
    assert not expressions.equal("0.000001", "0.000002") and not expressions.equal("3.141592", "3.141593")


def test_the_command_prints_figures_and_fails_on_a_wrong_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert grading.main(["count=20"]) == 0
    assert (
        len(
            re.findall(
                r"(?m)^(?:table|made): (?:right|wrong) pairs graded as such: (\d+) of \1$", capsys.readouterr().out
            )
        )
        == 4
    )
    monkeypatch.setattr(grading, "graded", lambda pair: True)
    assert grading.main(["count=20"]) == 1
