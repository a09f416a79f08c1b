"""Prompts reach both readers through the chat templates of real families, as the settings say or not at all."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import TemplateError

from hf.template_keywords import keywords
from hf.tokenizer import HuggingFaceTokenizer
from launch.config.run_config import run_config
from launch.plan.plan import Plan, make_plan
from opd.errors import ConfigurationError, DataError, OpdError
from opd.ports import Sources
from opd.prompts.conversations import ChatTemplate
from opd.prompts.dataset import DatasetPrompts
from opd.prompts.mixed import MixedPrompts
from opd.types.prompt_rows import Columns, Row
from tests.unit.inputs.chat.families import FAMILIES, checkpoint

ASKED = "What is 1+1?"
TAKE_SYSTEM = sorted(FAMILIES.keys() - {"gemma2"})
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1).filter(
    lambda t: t == t.strip() and t.strip()
)


def words_of(family: str, part: str = "student", template: str = "") -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(checkpoint(family, template), part)


def first(family: str, prompt: Any = ASKED, others: Mapping[str, HuggingFaceTokenizer] = {}, **fields: Any) -> Any:
    def rows(path: str, columns: Columns) -> Sequence[Row]:
        return [Row(prompt=prompt, answer="2", where="f.jsonl line 1")]

    sources = Sources(tokenizer=words_of(family), rows=rows, teachers=others)
    (made,) = DatasetPrompts(path="f.jsonl", prompts_per_step=1, max_tokens=4096, **fields)(0, sources)
    return made


def mine(family: str, **fields: Any) -> str:
    return words_of(family).visible(first(family, **fields).student_ids)


def its(family: str, **fields: Any) -> str:
    return words_of(family).visible(first(family, **fields).teacher_ids)


def test_qwen3_thinks_or_not_for_each_reader() -> None:
    opened = r"<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"
    shut = opened + r"<think>\n\n</think>\n\n"
    off, on = {"enable_thinking": False}, {"enable_thinking": True}
    assert mine("qwen3", chat=True) == opened
    assert mine("qwen3", chat=True, template_kwargs=off) == its("qwen3", chat=True, template_kwargs=off) == shut
    assert its("qwen3", chat=True, template_kwargs=off, teacher_template_kwargs=on) == opened
    assert mine("qwen3", chat=True, teacher_template_kwargs=off) == opened
    assert its("qwen3", chat=True, teacher_template_kwargs=off) == shut


def test_a_system_prompt_is_written_as_each_family_does() -> None:
    written = {family: mine(family, chat=True, system="Be brief.") for family in TAKE_SYSTEM}
    assert written["qwen3"].startswith(r"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert r"Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|>" in written["llama3"]
    assert written["mistral"] == r"<s>[INST] Be brief.\n\nWhat is 1+1?[/INST]"
    dated = mine("llama3", chat=True, template_kwargs={"date_string": "1 Jan 2000"})
    assert r"Today Date: 1 Jan 2000\n" in dated and dated.count("<|begin_of_text|>") == 1


@given(st.sampled_from(TAKE_SYSTEM), words, words, st.none() | words | st.just(""))
def test_a_prompt_is_what_the_template_writes_of_the_whole_conversation(
    family: str, system: str, asked: str, other: str | None
) -> None:
    """Whether messages come from the settings or stand in the record; the teacher's are its own."""
    made = first(family, prompt=asked, chat=True, system=system, teacher_system=other)
    user = {"role": "user", "content": asked}

    def whole(said: str) -> list[int]:
        head = ({"role": "system", "content": said},) if said else ()
        return first(family, prompt=(*head, user)).student_ids.tolist()

    assert made.student_ids.tolist() == whole(system)
    assert made.teacher_ids.tolist() == whole(system if other is None else other)
    assert made.source.text == ({"role": "system", "content": system}, user)


@given(st.sampled_from(sorted(FAMILIES)), words)
def test_settings_that_say_nothing_change_nothing(family: str, text: str) -> None:
    plain = first(family, prompt=text)
    assert plain.student_ids.tolist() == words_of(family).encode(text).tolist() == plain.teacher_ids.tolist()
    chat = first(family, prompt=({"role": "user", "content": text},))
    assert first(family, prompt=text, chat=True).student_ids.tolist() == chat.student_ids.tolist()


def test_a_teacher_reads_its_own_template_where_it_is_asked_for() -> None:
    other = words_of("qwen3", "teacher", template="gemma2")
    made = first("qwen3", others={"default": other}, chat=True, suffix="!", teacher_chat_template=ChatTemplate.OWN)
    assert other.visible(made.teacher_ids) == r"<start_of_turn>user\nWhat is 1+1?!<end_of_turn>\n<start_of_turn>model\n"
    assert made.student_ids.tolist() == first("qwen3", chat=True, suffix="!").teacher_ids.tolist()
    routed = MixedPrompts(
        sources={"a": DatasetPrompts(path="a", prompts_per_step=1, chat=True, teacher_chat_template=ChatTemplate.OWN)},
        teachers={"math": "strange"},
    )
    rows = [Row(prompt=ASKED, answer="2")]
    known = Sources(tokenizer=words_of("qwen3"), rows=lambda *_: rows, teachers={"strange": other})
    assert "start_of_turn" in other.visible(routed(0, known)[0].teacher_ids)


def test_what_has_nothing_to_act_on_is_refused_with_its_row() -> None:
    for fields in ({"system": "x"}, {"template_kwargs": {"enable_thinking": False}}, {"teacher_system": "x"}):
        with pytest.raises(DataError, match=r"^f.jsonl line 1 is plain text.*set prompts.chat=true"):
            first("qwen3", **fields)
    with pytest.raises(DataError, match=r"^f.jsonl line 1 begins with a system message, and prompts.system would"):
        first("qwen3", prompt=({"role": "system", "content": "y"}, {"role": "user", "content": "z"}), system="x")


KEYWORDS = {"qwen3": {"enable_thinking"}, "llama3": {"date_string"}, "gemma2": set(), "mistral": {"system_message"}}


def test_the_keywords_of_a_template_are_found() -> None:
    assert {family: words_of(family).template_keywords() for family in FAMILIES} == KEYWORDS


@pytest.mark.parametrize(
    ("template", "reads"),
    [
        ("{{ a }}{% set a = 1 %}", {"a"}),
        ("{% set a = 1 %}{{ a }}{{ raise_exception(b) }}", {"b"}),
        ("{% if c %}{% set a = 1 %}{% endif %}{{ a }}", {"a", "c"}),
        ("{% if 0 %}{% set a = 1 %}{% elif 1 %}{% set a = 2 %}{% else %}{% set a = 3 %}{% endif %}{{ a }}", set()),
        ("{% for x in messages %}{{ loop.index }}{{ x }}{% set a = 1 %}{% endfor %}{{ a }}{{ x }}", {"a", "x"}),
        ("{% macro f(x, y=z) %}{{ x }}{{ y }}{{ w }}{% endmacro %}{{ f(1) }}", {"z", "w"}),
        (
            "{% generation %}{{ g | default(h) }}{% endgeneration %}{% set b %}{{ i }}{% endset %}{{ b }}",
            {"g", "h", "i"},
        ),
        ("{% set ns = namespace(a=k) %}{% set ns.a = 2 %}{{ ns.a }}{{ [q for_ in []] if 0 }}", None),
        ("{% with x = y %}{{ x }}{% endwith %}{{ range(3) }}", {"y"}),
    ],
)
def test_a_keyword_is_what_is_read_and_need_not_have_been_set(template: str, reads: set[str] | None) -> None:
    if reads is None:
        with pytest.raises(TemplateError):
            keywords(template)
    else:
        assert keywords(template) == reads


def plan(path: Path, family: str, *more: str, teacher: str = "", prompt: Any = ASKED) -> Plan:
    rows = path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": prompt, "answer": "2"}) + "\n")
    held_out = path / "test.jsonl"
    held_out.write_text(json.dumps({"prompt": prompt + "0" if isinstance(prompt, str) else prompt, "answer": "2"}))
    models = [f"student.path={checkpoint(family)}", f"teacher.path={checkpoint(family, teacher)}"]
    room = ["student.max_model_len=1024", "learner.tokens_per_microbatch=1024", "student.dtype=FLOAT32"]
    files = ["prompts=dataset", f"prompts.path={rows}", "evaluation=dataset", f"evaluation.prompts.path={held_out}"]
    return make_plan(run_config(["experiment=shop", *files, *models, *room, "prompts.answer_column=answer", *more]))


def refused(path: Path, family: str, *more: str, kind: type[OpdError] = ConfigurationError, **fields: Any) -> str:
    with pytest.raises(kind) as caught:
        plan(path, family, *more, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_plan_shows_what_both_will_read(tmp_path: Path) -> None:
    more = ["prompts.chat=true", "prompts.system=Be brief.", "prompts.template_kwargs.enable_thinking=false"]
    found = plan(tmp_path, "qwen3", *more, "prompts.teacher_template_kwargs.enable_thinking=true")
    asked = (
        r"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert found.prompts["first prompt"] == asked + r"<think>\n\n</think>\n\n"
    assert found.prompts["for the teacher"] == asked
    sent = found.config.prompts(0, found.sources)[0]
    assert found.sources.tokenizer.visible(sent.student_ids) == found.prompts["first prompt"]
    assert found.sources.tokenizer.visible(sent.teacher_ids) == found.prompts["for the teacher"]
    held_out = found.config.evaluation.prompts
    assert isinstance(held_out, DatasetPrompts) and held_out.system == "Be brief." and held_out.chat
    assert held_out.template_kwargs == {"enable_thinking": False}


def test_what_a_template_does_not_read_is_refused_by_name(tmp_path: Path) -> None:
    chat = "prompts.chat=true"
    said = refused(tmp_path, "qwen3", chat, "prompts.template_kwargs.enable_thinkin=false")
    assert said.startswith("prompts.template_kwargs.enable_thinkin is no keyword") and "reads enable_thinking)" in said
    said = refused(tmp_path, "llama3", chat, "prompts.teacher_template_kwargs.enable_thinking=false")
    assert said.startswith("prompts.teacher_template_kwargs.enable_thinking") and "reads date_string)" in said
    assert "reads no keyword at all)" in refused(tmp_path, "gemma2", chat, "prompts.template_kwargs.messages=[]")
    assert "is no keyword" in refused(tmp_path, "llama3", chat, "prompts.template_kwargs.bos_token=x")
    said = refused(tmp_path, "gemma2", chat, "prompts.system=x")
    assert said.startswith("prompts.system needs a chat template that takes a system") and "role not supported" in said
    said = refused(tmp_path, "gemma2", chat, "prompts.teacher_system=x")
    assert said.startswith("prompts.teacher_system needs")


def test_a_teacher_with_another_template_is_said_and_may_have_its_own(tmp_path: Path) -> None:
    chat = "prompts.chat=true"
    assert any(
        "differ" in r and "both read messages in the student's" in r
        for r in plan(tmp_path, "qwen3", chat, teacher="gemma2").remarks
    )
    own = [chat, "prompts.teacher_chat_template=OWN"]
    found = plan(tmp_path, "qwen3", *own, teacher="gemma2")
    assert found.prompts["for the teacher"].startswith("<start_of_turn>user")
    assert any("differ" in r and "each reads messages in its own" in r for r in found.remarks)
    assert "prompts.teacher_chat_template=OWN" in refused(
        tmp_path, "qwen3", chat, "method=sft", teacher="gemma2", kind=DataError
    )
    assert plan(tmp_path, "qwen3", *own, "method=sft", teacher="gemma2").prompts["for the teacher"][:5] == "<star"
    said = refused(tmp_path, "qwen3", *own, "prompts.system=x", teacher="gemma2")
    assert said.startswith("prompts.teacher_system needs") and "of teacher" in said
    fine = plan(tmp_path, "qwen3", *own, "prompts.system=x", "prompts.teacher_system=", teacher="gemma2")
    assert "system" in fine.prompts["first prompt"] and "system" not in fine.prompts["for the teacher"]
