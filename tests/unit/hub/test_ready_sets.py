"""The ready evaluation sets against data sets that are laid out, and have columns, as the public ones are said to."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.config.run_config import run_config
from launch.inputs.answers.instructions import CHECKS, follows, trouble
from launch.plan.plan import make_plan
from opd.errors import DataError
from opd.prompts.choices import gpqa
from opd.prompts.instructions import NOT_CHECKED
from tests.hub_stand_in import HubStandIn


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def card(config: str, split: str, path: str) -> bytes:
    return (
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {path}\n---\n".encode()
    )


MATH = {"problem": "has 2 1 ; Mon buys 4 ?", "solution": "so \\boxed{25}", "answer": "25"}
CHOICES = "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\n"
INSTRUCTED = {
    "key": 1000,
    "prompt": "has 2 ?",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
    "kwargs": [{}, {"relation": "at least", "num_words": 3, "keywords": None}],
}
DATA = {
    "HuggingFaceH4/MATH-500": {"test.jsonl": lines(MATH, MATH | {"problem": "has 3 1 ?", "answer": r"\frac{3}{2}"})},
    "HuggingFaceH4/aime_2024": {
        "README.md": card("default", "train", "data/train-*"),
        "data/train-0.jsonl": lines(MATH),
    },
    "math-ai/aime25": {"test.jsonl": lines({"problem": "has 1 1 ?", "answer": "070", "id": "0"})},
    "openai/gsm8k": {
        "README.md": card("main", "test", "main/test-*"),
        "main/test-0.jsonl": lines({"question": "has 4 1 ?", "answer": "4 * 2 = <<4*2=8>>8\n#### 8"}),
    },
    "google/IFEval": {
        "README.md": card("default", "train", "ifeval_input_data.jsonl"),
        "ifeval_input_data.jsonl": lines(
            INSTRUCTED,
            INSTRUCTED | {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "kn"}]},
        ),
    },
    "Idavidrein/gpqa": {
        "README.md": card("gpqa_diamond", "train", "gpqa_diamond.csv"),
        "gpqa_diamond.csv": (CHOICES + "has 2 ?,ok,no,buys,gets\nhas 3 ?,no,ok,buys,gets\n").encode(),
    },
}
SETS = ("math500", "aime24", "aime25", "gsm8k", "gpqa_diamond", "ifeval")


@pytest.fixture
def data(hub: HubStandIn) -> HubStandIn:
    for name, files in DATA.items():
        hub.add("dataset", name, files)
    return hub


def test_ready_sets_are_planned(data: HubStandIn, tmp_path: Path) -> None:
    """Each with its rows, its references read, pinned to a commit; the first of them stands for the run."""
    plain = [f"evaluation.sets.{name}.prompts.chat=false" for name in SETS]  # the models here have no chat template
    given = ["experiment=shop", "evaluation=none", f"evaluation_sets=[{','.join(SETS)}]", *plain, "dry_run=true"]
    plan = make_plan(run_config([*given, f"output_dir={tmp_path}"]))
    asked = {name: plan.config.evaluation.asked(name, plan.sources) for name in SETS}
    assert {name: len(prompts) for name, prompts in asked.items()} == dict(zip(SETS, (2, 1, 1, 1, 2, 1), strict=True))
    assert set(plan.answers) == {f"evaluation.sets.{name}.prompts" for name in SETS}
    assert all(sentence.endswith("all readable") for sentence in plan.answers.values())
    assert [p.answer for p in asked["aime25"]] == ["070"] and {p.answer for p in asked["gpqa_diamond"]} <= set("ABCD")
    assert {one.setting for one in plan.hub} == {f"evaluation.sets.{name}.prompts.path" for name in SETS}
    again = run_config(plan.config.overrides)
    assert again.evaluation.sets["math500"].prompts.path.startswith("HuggingFaceH4/MATH-500:default:test@")  # type: ignore[attr-defined]


def test_choices_are_drawn_from_the_question() -> None:
    row = {"Question": " Which? ", "Correct Answer": "this\n"} | {
        f"Incorrect Answer {i}": f"not {i}" for i in (1, 2, 3)
    }
    made = gpqa(row)
    assert made == gpqa(dict(reversed(row.items())))
    assert f"({made['answer']}) this\n" in made["prompt"] and made["prompt"].startswith("Which?\n\n(A) ")
    letters = {gpqa(row | {"Question": f"Which of {i}?"})["answer"] for i in range(40)}
    assert letters == set("ABCD")
    with pytest.raises(DataError, match="needs a text in 'Incorrect Answer 2'"):
        gpqa({name: text for name, text in row.items() if name != "Incorrect Answer 2"})


INSTRUCTIONS = [
    ("keywords:existence", {"keywords": ["red", "Blue"]}, "RED and blue", "red"),
    ("keywords:frequency", {"keyword": "a b", "relation": "less than", "frequency": 2}, "a b", "a b a b"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "category", "The Cat!"),
    ("keywords:letter_frequency", {"letter": "N", "let_relation": "at least", "let_frequency": 3}, "none now", "non"),
    ("length_constraints:number_sentences", {"relation": "at least", "num_sentences": 2}, "A b. C d!", "A b, c d."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one *** two", "one two"),
    ("length_constraints:number_words", {"relation": "less than", "num_words": 3}, "two words", "three words here"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First.\n\nThen, more.",
        "Then.\n\nFirst.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] at [place]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "x\nP.P.S. y", "x\nP.S. y"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "Maybe."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a*"),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
     "Section 1\na\nSection 2\nb", "Section 1\na"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<< >>\ntext"),
    ("combination:two_responses", {}, "one ****** two", "one ****** one"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "say it. Done", "Done. Say it."),
    ("startend:end_checker", {"end_phrase": "The end."}, "So. the end.", "The end. So."),
    ("startend:quotation", {}, '"all of it"', 'all "of it"'),
    ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 2}, "A BC", "A bc"),
    ("change_case:english_capital", {}, "LOUD 1!", "Loud"),
    ("change_case:english_lowercase", {}, "quiet 1!", "Quiet"),
    ("punctuation:no_comma", {}, "no", "no, no"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "right", "wrong"), INSTRUCTIONS)
def test_instructions_are_checked(name: str, given: dict[str, Any], right: str, wrong: str) -> None:
    answer = json.dumps([{"id": name, **given}])
    assert trouble(answer) == "" and (follows(right, answer), follows(wrong, answer)) == (1.0, 0.0)
    assert follows(f"<think>{wrong}</think>{right}", answer) == 1.0 and follows("", answer) == 0.0


def test_every_instruction_has_a_case_and_others_are_named() -> None:
    assert {name for name, *_ in INSTRUCTIONS} == set(CHECKS) and not set(NOT_CHECKED) & set(CHECKS)
    assert trouble('[{"id": "language:response_language"}]') == (
        "instruction 'language:response_language' is not checked here"
    )
    assert "other arguments than it needs (KeyError: 'keywords')" in trouble('[{"id": "keywords:existence"}]')
    assert trouble("25") == trouble("{") == trouble("[]") == "it is no JSON list of instructions"
    both = json.dumps([{"id": "punctuation:no_comma"}, {"id": "startend:quotation"}])
    assert (follows('"both"', both), follows('"both, not"', both), follows("one", both)) == (1.0, 0.0, 0.0)
