"""Whatever file of a checkpoint names an end of text, it ends completions; files that disagree are by_file aloud."""

import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from actors.config import StudentConfig
from actors.startup import read_limits
from hf.stop_tokens import read_ends
from hf.tokenizer import HuggingFaceTokenizer
from launch.plan.checks.ends import text_ends
from opd.errors import ConfigurationError, DataError
from teacher_service.config import TeacherConfig

ROWS = 8
WORDS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "hi": 3, "ok": 4, "user": 5, "assistant": 6}
NAMES = {i: word for word, i in WORDS.items()}
CHATML = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)
PromptText = int | list[int] | None


def folder(path: Path, *, tokenizer: int, config: PromptText, generation: PromptText, template: str = "") -> Path:
    """A checkpoint without weights whose three files name these ends."""
    path.mkdir(exist_ok=True)
    words = Tokenizer(WordLevel(vocab=WORDS, unk_token="hi"))  # type: ignore[arg-type]
    words.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=NAMES[tokenizer], additional_special_tokens=[NAMES[i] for i in (0, 1, 2)]
    )
    if template:
        made.chat_template = template
    made.save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": ROWS, "eos_token_id": config}))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return path


def limits(path: Path) -> tuple[int, ...]:
    return read_limits(StudentConfig(path=str(path), max_model_len=16)).ends


def ids(*by_file: PromptText) -> tuple[int, ...]:
    return tuple(
        sorted({i for one in by_file for i in (one if isinstance(one, list) else [] if one is None else [one])})
    )


def test_the_engine_ends_at_what_any_file_names(tmp_path: Path) -> None:
    """An SFT of a base model: its generation_config.json still names the base model's end alone."""
    path = folder(tmp_path / "m", tokenizer=2, config=2, generation=0)
    assert limits(path) == (0, 2)


@pytest.mark.parametrize(
    ("tokenizer", "config", "generation"), list(product([0, 2], [None, 0, 2, [2, 0]], [None, 0, [2], [0, 2]]))
)
def test_every_combination_is_the_union_and_is_said_where_generation_lacks_one(
    tmp_path: Path, tokenizer: int, config: PromptText, generation: PromptText
) -> None:
    path = folder(tmp_path / "m", tokenizer=tokenizer, config=config, generation=generation)
    whole = ids(tokenizer, config, generation)
    assert limits(path) == whole
    found = text_ends(str(path), HuggingFaceTokenizer(str(path)), {})
    assert found.ids == whole
    named = [set(ids(s)) for s in (tokenizer, config, generation) if s is not None]
    missing = any(n != named[0] for n in named) and set(ids(generation)) != set(whole)
    assert bool(found.notes) == missing
    if missing:
        assert "<|im_end|>" in found.notes[0] and "<|endoftext|>" in found.notes[0]


def test_a_template_that_ends_turns_with_another_token_adds_it_and_is_said(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", tokenizer=0, config=0, generation=0, template=CHATML)
    found = text_ends(str(path), HuggingFaceTokenizer(str(path)), {})
    assert found.ids == (0, 2)
    assert "ends a turn with '<|im_end|>' (2)" in found.notes[0]


@pytest.mark.parametrize("template", ["", "{{ messages[0]['content'] }}", "{{ raise_exception('no') }}", "{% broken"])
def test_a_template_that_says_nothing_adds_nothing(tmp_path: Path, template: str) -> None:
    path = folder(tmp_path / "m", tokenizer=0, config=0, generation=0, template=template)
    assert text_ends(str(path), HuggingFaceTokenizer(str(path)), {}).ids == (0,)


def test_a_teacher_with_more_ends_is_said(tmp_path: Path) -> None:
    student = folder(tmp_path / "s", tokenizer=2, config=2, generation=2)
    teacher = folder(tmp_path / "t", tokenizer=2, config=2, generation=[2, 0])
    teachers = {"default": TeacherConfig(path=str(teacher)), "remote": TeacherConfig(path=str(tmp_path / "nowhere"))}
    (note,) = text_ends(str(student), HuggingFaceTokenizer(str(student)), teachers).notes
    assert "teacher 'default' also ends texts with '<|endoftext|>' (0)" in note


SAMPLERS = [
    ({}, ""),
    ({"temperature": 1.0, "top_p": 1, "top_k": -1, "min_p": None, "do_sample": True}, ""),
    ({"temperature": 0.6, "top_k": 20, "top_p": 0.95}, "suggests temperature 0.6, top_p 0.95, top_k 20, which"),
    ({"repetition_penalty": 1.05, "top_k": 0}, "suggests repetition_penalty 1.05, which"),
    ({"temperature": "hot"}, "suggests temperature hot, which"),
]


@pytest.mark.parametrize(("sampler", "says"), SAMPLERS)
def test_a_sampler_that_a_checkpoint_suggests_is_left_aside_aloud(
    tmp_path: Path, sampler: dict[str, Any], says: str
) -> None:
    path = folder(tmp_path / "m", tokenizer=2, config=2, generation=2)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **sampler}))
    notes = text_ends(str(path), HuggingFaceTokenizer(str(path)), {}).notes
    assert len(notes) == bool(says) and all(says in note for note in notes)


@given(wrong=st.one_of(st.integers(max_value=-1), st.integers(min_value=ROWS), st.text(), st.booleans(), st.floats()))
def test_what_is_no_id_of_the_vocabulary_is_refused(tmp_path_factory: pytest.TempPathFactory, wrong: Any) -> None:
    path = tmp_path_factory.mktemp("ends")
    for file, others in (("config.json", {"vocab_size": ROWS}), ("generation_config.json", {})):
        (path / "config.json").write_text(json.dumps({"vocab_size": ROWS, "eos_token_id": 2}))
        (path / file).write_text(json.dumps({**others, "eos_token_id": [2, wrong]}))
        with pytest.raises(DataError, match=r"but the model has the ids 0 to 7; correct its eos_token_id"):
            read_ends(str(path))
    shutil.rmtree(path)


@pytest.mark.parametrize("text", ["", "[1]", "{", '"x"', "null"])
def test_damaged_files_are_a_sentence(tmp_path: Path, text: str) -> None:
    path = folder(tmp_path / "m", tokenizer=0, config=0, generation=0)
    for file in ("tokenizer_config.json", "generation_config.json", "config.json"):
        whole = (path / file).read_text()
        (path / file).write_text(text)
        with pytest.raises(DataError, match=file):
            read_ends(str(path))
        (path / file).write_text(whole)


def test_nothing_that_ends_a_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": ROWS}))
    with pytest.raises(DataError, match="names no end-of-text token"):
        read_ends(str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        read_ends(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("drop", [(), ("added_tokens_decoder",), ("added_tokens_decoder", "added_tokens")])
@pytest.mark.parametrize("shape", [str, lambda token: {"content": token, "special": True}])
def test_the_tokenizers_end_is_found_wherever_its_id_stands(tmp_path: Path, drop: Sequence[str], shape: Any) -> None:
    path = folder(tmp_path / "m", tokenizer=2, config=None, generation=None)
    for name in ("tokenizer_config.json", "tokenizer.json"):
        content: Mapping[str, Any] = json.loads((path / name).read_text())
        kept = {key: value for key, value in content.items() if key not in drop}
        if "eos_token" in kept:
            kept["eos_token"] = shape(kept["eos_token"])
        (path / name).write_text(json.dumps(kept))
    assert read_ends(str(path)).by_file == {"tokenizer_config.json": (2,)}
