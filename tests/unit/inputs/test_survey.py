"""A plan goes through all prompts: what would end a run later is refused, what should be known is said."""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.config.run_config import run_config
from launch.plan.plan import Plan, make_plan
from opd.errors import ConfigurationError, DataError, OpdError
from opd.prompts.order import draw

LONG = "has 3 7 ; " + "Mon buys 1 " * 40 + "?"
SHORT = "has 3 7 ; Mon buys 1 ?"


def stored(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def shorts(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"prompt": f"has {i % 10} {i // 10} ; Mon buys 1 ?", "answer": "1"} for i in range(first, first + count)]


def plan(train: str, *more: str, test: str = "") -> Plan:
    mine = ["experiment=shop", "prompts=dataset", f"prompts.path={train}", "prompts.task=shop", *more]
    held_out = ["evaluation=dataset", f"evaluation.prompts.path={test}"] if test else []
    return make_plan(run_config([*mine, *held_out]))


def refused(train: str, *more: str, kind: type[OpdError] = ConfigurationError, test: str = "") -> str:
    with pytest.raises(kind) as caught:
        plan(train, *more, test=test)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_row_that_would_not_fit_is_found_wherever_it_stands(tmp_path: Path) -> None:
    late = stored(tmp_path / "late.jsonl", [*shorts(60), {"prompt": LONG, "answer": "1"}, *shorts(5)])
    few = ["prompts.shuffle=false", "prompts.prompts_per_step=4", "steps=2"]
    assert "late.jsonl line 61 has" in refused(late, *few) and "student.max_model_len" in refused(late, *few)
    roomy = [*few, "student.max_model_len=256", "learner.tokens_per_microbatch=150"]
    assert "late.jsonl line 61" in refused(late, *roomy) and "tokens_per_microbatch" in refused(late, *roomy)
    said = refused(late, *few, "prompts.max_tokens=100", kind=DataError)
    assert "late.jsonl line 61 has" in said and "prompts.max_tokens is 100" in said
    kept = plan(late, *few, "prompts.max_tokens=100", "prompts.skip_long=true")
    assert any("1 of 66 rows are too long and left out" in remark for remark in kept.remarks)
    privileged = stored(tmp_path / "hint.jsonl", [*shorts(9), {"prompt": SHORT, "answer": "1"}])
    rows = [json.loads(line) | {"hint": "a"} for line in Path(privileged).read_text().splitlines()]
    rows[-1]["hint"] = LONG
    hints = ["prompts.teacher_prompt_column=hint", "teacher.max_batch_tokens=150"]
    assert "hint.jsonl line 10 has" in refused(stored(tmp_path / "hint.jsonl", rows), *hints)
    assert plan(late, *few, "prompts.limit=60").longest < 128  # what can never come is no matter


def test_what_a_scorer_asks_about_a_text_must_fit_its_teacher_too(tmp_path: Path) -> None:
    rows = stored(tmp_path / "rows.jsonl", shorts(9))
    room = plan(rows).longest + 20
    probed = ["method=cal_opd", 'method.scorer.probes={mine: "{prompt} ' + "2 " * 60 + '"}']
    assert plan(rows, *probed, f"teacher.max_batch_tokens={room + 60}")
    assert f"teacher.max_batch_tokens is {room}; raise it" in refused(rows, *probed, f"teacher.max_batch_tokens={room}")
    judge = ["method=judged", "prompts.group_size=4", "+teachers.judge.path=${teacher.path}"]
    judge += ["+teachers.judge.dtype=FLOAT32", "method.terms.verdict.scorer.yes=1", "method.terms.verdict.scorer.no=0"]
    asked = [*judge, 'method.terms.verdict.scorer.after="' + "2 " * 60 + '"']
    assert plan(rows, *asked, f"+teachers.judge.max_batch_tokens={room + 60}")
    said = refused(rows, *asked, f"+teachers.judge.max_batch_tokens={room}")
    assert "teachers.judge.max_batch_tokens is" in said and "what method judged asks its teacher about" in said


def test_a_step_whose_rows_are_all_left_out_is_found(tmp_path: Path) -> None:
    rows = [*shorts(4), {"prompt": LONG, "answer": "1"}, {"prompt": LONG + " ?", "answer": "1"}, *shorts(2)]
    path = stored(tmp_path / "rows.jsonl", rows)
    few = ["prompts.shuffle=false", "prompts.prompts_per_step=2", "prompts.max_tokens=100", "prompts.skip_long=true"]
    assert "every prompt of step 2 is longer" in refused(path, *few, "steps=3", kind=DataError)
    assert plan(path, *few, "steps=2").longest < 128


def test_a_missing_answer_is_found_where_it_is_to_be_learnt(tmp_path: Path) -> None:
    path = stored(tmp_path / "rows.jsonl", [*shorts(3), {"prompt": SHORT, "answer": ""}])
    of_answers = [
        "method=sft",
        "method.rollout._target_=opd.rollouts.mixed.AnswerRollout",
        "prompts.answer_column=answer",
    ]
    of_answers += ["prompts.max_unreadable_answers=1"]
    assert "rows.jsonl line 4 has no answer" in refused(path, *of_answers, kind=DataError)


def test_a_teacher_that_nobody_asks_for_is_refused(tmp_path: Path) -> None:
    more = ["teachers.code.path=assets/shop/teacher"]
    path = stored(tmp_path / "rows.jsonl", [row | {"who": "default"} for row in shorts(3)])
    assert "no prompt asks for teacher 'code'" in refused(path, *more)
    assert "no prompt asks for teacher 'code'" in refused(path, *more, "prompts.teacher_column=who")
    asked = stored(tmp_path / "asked.jsonl", [row | {"who": "code"} for row in shorts(3)])
    assert plan(asked, *more, "prompts.teacher_column=who").config.teachers.keys() == {"default", "code"}


def test_what_should_be_known_is_said(tmp_path: Path) -> None:
    strange = {"prompt": "\u0416\u0416\u0416 \u0416\u0416\u0416 \u0416\u0416 \u0416", "answer": "1"}
    rows = [*shorts(4), shorts(1)[0], strange, {"prompt": "has <eos> 3 ?", "answer": "1"}]
    found = plan(stored(tmp_path / "rows.jsonl", rows), "prompts.answer_column=answer")
    said = "\n".join(found.remarks)
    assert "1 of 7 prompts are mostly unknown tokens (first:" in said and "rows.jsonl line 6" in said
    assert "1 of 7 prompts repeat an earlier one (first:" in said and "rows.jsonl line 5" in said
    assert "contain the text of a special token (first:" in said and "rows.jsonl line 7" in said
    assert "evaluation measures the embedded task" in said
    assert found.prompts["prompts"] == "7 rows" and found.prompts["its answer"] == "1"
    assert found.prompts["first prompt"].startswith("<bos>") and found.prompts["for the teacher"] == "the same"
    assert all("\n" not in remark for remark in found.remarks)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["seed=1000000"], "at least 500 of the 500 prompts"),
        (["prompts.seed=1000000"], "at least 500 of the 500 prompts"),
        (["evaluation.prompts.seed=0"], "of the 500 prompts"),
        (["prompts.seed=1000000", "prompts.problems=20"], "WARNING: 20 of the 500 prompts"),
    ],
)
def test_held_out_problems_that_are_trained_on_are_said(overrides: list[str], says: str) -> None:
    first = make_plan(run_config(["experiment=shop", *overrides])).remarks[0]
    assert first.startswith("WARNING: ") and says in first


def test_held_out_rows_that_are_trained_on_are_said_whatever_the_files_are_called(tmp_path: Path) -> None:
    train = stored(tmp_path / "train.jsonl", shorts(10))
    same = plan(train, test=train).remarks[0]
    assert "WARNING: 10 of the 10 prompts" in same
    some = plan(train, test=stored(tmp_path / "test.jsonl", shorts(5, 8))).remarks[0]
    assert "WARNING: 2 of the 5 prompts" in some
    assert not plan(train, test=stored(tmp_path / "test2.jsonl", shorts(5, 20))).remarks
    assert not make_plan(run_config(["experiment=shop"])).remarks, "the demo is beyond reproach"


def test_errors_of_held_out_rows_name_their_own_key(tmp_path: Path) -> None:
    train = stored(tmp_path / "train.jsonl", shorts(3))
    test = stored(tmp_path / "test.jsonl", [{"prompt": SHORT}])
    said = refused(train, "prompts.answer_column=answer", test=test, kind=DataError)
    assert "test.jsonl line 1 has no column 'answer'" in said and "set evaluation.prompts.answer_column" in said


def test_an_order_is_drawn_once_an_epoch() -> None:
    size = 300_000
    draw(5, size, 0, 64, shuffle=True)
    began = time.process_time()
    for step in range(1, 200):
        draw(5, size, step * 64, 64, shuffle=True)
    assert time.process_time() - began < 5  # drawn anew at each step it takes about 40 s


def test_templates_that_differ_matter_only_where_a_teacher_writes_to_messages(tmp_path: Path) -> None:
    for role, mark in (("student", "<bos>"), ("teacher", "<bos> has")):
        shutil.copytree(f"assets/shop/{role}", tmp_path / role)
        (tmp_path / role / "chat_template.jinja").write_text(
            mark + "{% for m in messages %} {{ m.content }}{% endfor %}"
        )
    mine = [f"student.path={tmp_path / 'student'}", f"teacher.path={tmp_path / 'teacher'}"]
    plain = stored(tmp_path / "plain.jsonl", shorts(3))
    chat = stored(tmp_path / "chat.jsonl", [{"prompt": [{"role": "user", "content": SHORT}]}])
    assert any("differ" in r and "plain text" in r for r in plan(plain, *mine).remarks)
    assert any("differ" in r and "student's" in r for r in plan(chat, *mine).remarks)
    assert any("differ" in r for r in plan(plain, *mine, "method=sft").remarks)
    assert "lets the teacher write to messages" in refused(chat, *mine, "method=sft", kind=DataError)
