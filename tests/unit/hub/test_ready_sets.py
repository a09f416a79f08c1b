"""The ready evaluation sets against data sets that are laid out, and have columns, as the public ones are said to."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.config.run_config import run_config
from launch.plan.plan import make_plan
from opd.errors import DataError
from opd.prompts.choices import gpqa
from tests.hub_stand_in import HubStandIn


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def card(config: str, split: str, path: str) -> bytes:
    return (
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {path}\n---\n".encode()
    )


MATH = {"problem": "has 2 1 ; Mon buys 4 ?", "solution": "so \\boxed{25}", "answer": "25"}
CHOICES = "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\n"
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
    "Idavidrein/gpqa": {
        "README.md": card("gpqa_diamond", "train", "gpqa_diamond.csv"),
        "gpqa_diamond.csv": (CHOICES + "has 2 ?,ok,no,buys,gets\nhas 3 ?,no,ok,buys,gets\n").encode(),
    },
}
SETS = ("math500", "aime24", "aime25", "gsm8k", "gpqa_diamond")


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
    assert {name: len(prompts) for name, prompts in asked.items()} == dict(zip(SETS, (2, 1, 1, 1, 2), strict=True))
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
