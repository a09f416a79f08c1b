"""Conversations reach the template whole, or are refused; what begins a text comes once."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf.tokenizer import HuggingFaceTokenizer
from hf.tokenizer_check import load_tokenizer, tokenizer_identity
from launch.config.run_config import run_config
from launch.plan.plan import make_plan
from opd.errors import DataError
from opd.types.prompt_rows import PromptText
from tests.fuzz.prompt_files import made, tried

SHOP = Path("assets/shop/student")
PLAIN = "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}<assistant>"
WITH_CALLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}<{{ m.role }}{{ ':' + m.name if m.name }}>{% if m.content %}{{ m.content }}{% endif %}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
)
KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role in ('system', 'user') %}{{ m.content }}{% elif m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1] | trim }}{% endif %}{% endfor %}"
)
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem role') }}{% endif %}{{ messages[0].content }}"
)
WRITES_NONE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
)
ASKED = {"role": "user", "content": "has 3"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
TOOL = {"type": "function", "function": {"name": "add"}}


def tokenizer(folder: Path, template: str) -> HuggingFaceTokenizer:
    shutil.copytree(SHOP, folder / "student")
    (folder / "student" / "chat_template.jinja").write_text(template)
    return HuggingFaceTokenizer(str(folder / "student"))


def text(words: HuggingFaceTokenizer, *messages: dict[str, Any], tools: Sequence[dict[str, Any]] = ()) -> str:
    said = PromptText(text=messages, tools=tuple(tools), where="f line 1")
    words.encode_all([said])
    return words._chat(said)


def refused(words: HuggingFaceTokenizer, *messages: dict[str, Any], tools: Sequence[dict[str, Any]] = ()) -> str:
    with pytest.raises(DataError) as caught:
        text(words, *messages, tools=tools)
    assert str(caught.value).startswith("f line 1") and "\n" not in str(caught.value)
    return str(caught.value)


def test_names_tools_and_calls_reach_the_template(tmp_path: Path) -> None:
    words = tokenizer(tmp_path, WITH_CALLS)
    named = ASKED | {"name": "Ada"}
    said = text(words, named, CALLS, {"role": "tool", "content": "1", "tool_call_id": "7"}, tools=[TOOL])
    assert said.startswith(json.dumps(TOOL) + "<user:Ada>has 3<assistant>[{") and said.endswith("}]<tool>1")


@pytest.mark.parametrize("template", [PLAIN, WRITES_NONE])
def test_no_content_beside_tool_calls_is_never_the_word_none(template: str, tmp_path: Path) -> None:
    words = tokenizer(tmp_path, template)
    if template is WRITES_NONE:
        assert (
            text(words, ASKED, CALLS, ASKED)
            == '<user>has 3<assistant>[{"function": {"name": "add", "arguments": {"a": 1}}}]<user>has 3'
        )
    else:
        assert "leaves out the tool calls of message 2" in refused(words, ASKED, CALLS, ASKED)


def test_what_a_template_leaves_out_or_refuses_is_one_sentence(tmp_path: Path) -> None:
    words = tokenizer(tmp_path, KNOWN_ROLES)
    assert "leaves out what message 2 (role 'developer') says" in refused(
        words, ASKED, {"role": "developer", "content": "x"}
    )
    thought = {"role": "assistant", "content": "<think>long</think> 1 "}
    assert text(words, ASKED, thought, ASKED) == "has 31has 3"  # thoughts are cut off by design
    assert "names none; clear prompts.tools_column" in refused(words, ASKED, tools=[TOOL])
    strict = tokenizer(tmp_path / "strict", STRICT)
    assert "refuses the conversation (no)" in refused(strict, {"role": "system", "content": "x"})
    broken = tokenizer(tmp_path / "broken", "{{ messages[0].content + 5 }}")
    assert "refuses the conversation" in refused(broken, ASKED)
    assert "no chat template" in refused(HuggingFaceTokenizer(str(SHOP)), ASKED)


FORMS = {  # how templates write the arguments of a call
    "{{ c.arguments | tojson }}": "object",
    "{{ c | tojson }}": "object",
    "{{ '{' }}{% if c.arguments is string %}{{ c.arguments }}{% else %}{% for k, v in c.arguments | items %}{{ k }}="
    "{{ v }}{% endfor %}{% endif %}{{ '}' }}": "object",
    "{{ c.arguments }}": "text",
    "{{ '' + c.arguments }}": "text",
    "{% for k, v in c.arguments | items %}<{{ k }}>{{ v }}{% endfor %}": "object",
    "{{ c.arguments if c.arguments is string else c.arguments | tojson }}": "either",
}
ARGUMENTS = st.dictionaries(
    st.text(max_size=3), st.integers() | st.text(max_size=4) | st.none(), min_size=1, max_size=3
)


@pytest.fixture(scope="module")
def by_form(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HuggingFaceTokenizer]:
    whole = "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for call in m.tool_calls or [] %}{% set c = "
    end = "{% endfor %}{% endfor %}"
    return {
        form: tokenizer(tmp_path_factory.mktemp("form"), whole + "call.function %}{{ c.name }}" + form + end)
        for form in FORMS
    }


@given(ARGUMENTS, st.sampled_from(list(FORMS)))
@settings(max_examples=60, deadline=None)
def test_arguments_of_calls_are_written_as_the_template_means_them(
    by_form: dict[str, HuggingFaceTokenizer], arguments: dict[str, Any], form: str
) -> None:
    """Whatever form a row has them in: neither quoted twice, nor in braces twice, nor as Python writes them."""
    for given_as, value in (("object", arguments), ("text", json.dumps(arguments, ensure_ascii=False))):
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": value}}]}
        if FORMS[form] in (given_as, "either"):
            assert "<user>has 3<assistant>add" in text(by_form[form], ASKED, call, ASKED)
        else:
            said = refused(by_form[form], ASKED, call, ASKED)
            assert "store them as" in said or "refuses the conversation" in said


@pytest.mark.parametrize(
    ("head", "ends", "left_out"),
    [
        ("<{{ m.role }}>", "", "<assistant>"),
        ("<{{ m.role }}>", "{% if add_generation_prompt %}<assistant>{% endif %}", ""),
        ("<{{ m.role }}>", "<assistant>", ""), ("{{ 'Q:' if m.role == 'user' else ' ' }}", "", ""),
        ("{{ raise_exception('x') if m.role != 'user' }}", "", ""),
    ],
)  # fmt: skip
def test_a_template_whose_prompts_end_too_early_is_found(head: str, ends: str, left_out: str, tmp_path: Path) -> None:
    whole = "{% for m in messages %}" + head + "{{ m.content }}{% endfor %}" + ends
    assert tokenizer(tmp_path, whole).opening() == left_out
    if left_out:
        rows = tmp_path / "rows.jsonl"
        rows.write_text(json.dumps({"prompt": [ASKED], "answer": "3"}))
        asked = ["experiment=shop", "prompts=dataset", f"prompts.path={rows}", f"student.path={tmp_path}/student"]
        config = run_config(asked)
        with pytest.raises(DataError, match=r"writes '<assistant>' before an answer, but not where a prompt ends"):
            make_plan(config)


def test_the_first_token_comes_once(tmp_path: Path) -> None:
    words = tokenizer(tmp_path, PLAIN)
    bos = words.encode("")[0]
    chat, plain, brought = words.encode_all(
        [PromptText(text=(ASKED,)), PromptText(text="has 3"), PromptText(text="<bos> has 3")]
    )
    for ids in (chat, plain, brought, words.encode("<bos> has 3")):
        assert ids[0] == bos and (ids == bos).sum() == 1
    assert plain.tolist() == brought.tolist() == words.encode("has 3").tolist()
    assert words.visible(plain).startswith("<bos>") and "<bos>" not in words.decode(plain)


def test_a_tokenizer_that_ends_every_prompt_is_refused(tmp_path: Path) -> None:
    words = tokenizer(tmp_path, PLAIN)
    file = tmp_path / "student" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<eos>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [words.eos_id], "tokens": ["<eos>"]}},
    }
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="end-of-text token behind every prompt"):
        HuggingFaceTokenizer(str(tmp_path / "student")).encode_all([PromptText(text="has 3")])


def test_a_batch_is_what_each_prompt_is_alone(tmp_path: Path) -> None:
    words = tokenizer(tmp_path, PLAIN)
    prompts = [
        PromptText(text="has 3"),
        PromptText(text=(ASKED,)),
        PromptText(text="Mon buys 1 ?"),
        PromptText(text=(ASKED, ASKED)),
    ]
    together = [ids.tolist() for ids in words.encode_all(prompts)]
    assert together == [words.encode_all([said])[0].tolist() for said in prompts]
    assert together[0] == words.encode("has 3").tolist() and words.encode_all([]) == []


def test_equal_tokenizers_are_read_once_wherever_they_are(tmp_path: Path) -> None:
    copy = shutil.copytree(SHOP, tmp_path / "copy")
    assert load_tokenizer(str(copy)) is load_tokenizer(str(SHOP))
    assert tokenizer_identity(str(copy)).tokens is tokenizer_identity(str(SHOP)).tokens
    (copy / "chat_template.jinja").write_text(PLAIN)
    assert tokenizer_identity(str(copy)).template and not tokenizer_identity(str(SHOP)).template


def test_mutated_files_are_understood_or_refused() -> None:
    """A part of `python -m tests.fuzz.prompt_files`."""
    assert list(made(20, 3)) == list(made(20, 3))
    verdicts = {case.name: said for case, said in tried(150, 7)}
    assert set(verdicts.values()) == {"understood", "refused"}, verdicts
