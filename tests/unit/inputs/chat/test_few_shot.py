"""Few-shot examples stand as turns before the question, whole and in order, or are refused with file and line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as trials
from hypothesis import strategies as st

from hf.tokenizer import HuggingFaceTokenizer
from launch.inputs.few_shot import read_examples
from opd.errors import ConfigurationError, DataError
from opd.ports import Sources
from opd.prompts.dataset import DatasetPrompts
from opd.types.prompt_rows import Columns, Row
from tests.unit.inputs.chat.families import checkpoint

COLUMNS = Columns(prompt="question", answer="answer")
USER, ANSWER = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "Be brief."}
texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1).filter(str.strip)


def stored(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(prompt: Any, **fields: Any) -> Any:
    rows = [Row(prompt=prompt, answer="2", where="f.jsonl line 1")]
    sources = Sources(tokenizer=HuggingFaceTokenizer(checkpoint("qwen3")), rows=lambda *_: rows, examples=read_examples)
    made = DatasetPrompts(
        path="f.jsonl", prompts_per_step=1, max_tokens=10**6, prompt_column="question", answer_column="answer", **fields
    )
    return made(0, sources)[0]


@trials(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(solved=st.lists(st.tuples(texts, texts), min_size=1, max_size=4), question=texts, system=st.just("") | texts)
def test_examples_of_any_form_are_the_same_turns(
    tmp_path: Path, solved: list[tuple[str, str]], question: str, system: str
) -> None:
    turns = [t for q, a in solved for t in ({"role": "user", "content": q}, {"role": "assistant", "content": a})]
    forms = ([{"question": q, "answer": a} for q, a in solved], turns, [{"messages": turns}])
    head = [{"role": "system", "content": system}] if system else []
    whole = (*head, *turns, {"role": "user", "content": question})
    wanted = asked(whole).student_ids.tolist()
    for form in forms:
        read_examples.cache_clear()
        made = asked(question, chat=True, system=system, few_shot=stored(tmp_path / "few.jsonl", form))
        assert made.source.text == whole
        assert made.student_ids.tolist() == made.teacher_ids.tolist() == wanted


def test_a_records_own_system_message_stays_first_and_each_reader_has_its_examples(tmp_path: Path) -> None:
    few = stored(tmp_path / "a.jsonl", [{"question": "1+1?", "answer": 2}])
    made = asked((SYSTEM, {"role": "user", "content": "2+2?"}), few_shot=few)
    assert made.source.text == (SYSTEM, USER, ANSWER, {"role": "user", "content": "2+2?"})
    bare = asked("2+2?", chat=True)
    for_teacher = asked("2+2?", chat=True, teacher_few_shot=few)
    assert for_teacher.student_ids.tolist() == bare.student_ids.tolist()
    assert for_teacher.teacher_ids.tolist() == asked("2+2?", chat=True, few_shot=few).student_ids.tolist()
    none = asked("2+2?", chat=True, few_shot=few, teacher_few_shot="")
    assert none.teacher_ids.tolist() == bare.student_ids.tolist()
    assert [t["content"] for t in asked("2+2?", chat=True, suffix="!", few_shot=few).source.text] == [
        "1+1?!",
        "2",
        "2+2?!",
    ]


REFUSED = {
    "no answer at the end": ([USER, ANSWER, USER], "line 3: few-shot examples end with an assistant's answer"),
    "two questions": ([USER, USER, ANSWER], "line 2: few-shot .* turn 2 is the user's; correct it$"),
    "a system message": ([{"messages": [SYSTEM, USER, ANSWER]}], "line 1: .* a system prompt is prompts.system"),
    "another column": ([{"q": "1", "answer": "2"}], "line 1 has no column 'question'"),
    "an empty answer": ([{"question": "1", "answer": " "}], "line 1 has an empty answer"),
    "a conversation with an answer": (
        [{"question": [USER], "answer": "2"}],
        "line 1: 'question' of a few-shot example",
    ),
    "nothing": ([], "end with an assistant's answer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_example_is_refused(case: str, tmp_path: Path) -> None:
    rows, says = REFUSED[case]
    with pytest.raises(DataError, match=says) as caught:
        read_examples(stored(tmp_path / "few.jsonl", rows), COLUMNS, "")
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_a_missing_file_and_a_plain_prompt_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"prompts\.few_shot .* does not exist"):
        asked("2+2?", chat=True, few_shot="nothing.jsonl")
    with pytest.raises(DataError, match=r"plain text.*prompts\.few_shot has nothing to act on"):
        asked("2+2?", few_shot=stored(tmp_path / "few.jsonl", [USER, ANSWER]))
