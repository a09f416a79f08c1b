"""Prompt files of every format are the same rows, or one sentence with file and line; nothing is rewritten."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.inputs.prompt_files import read_rows, reading, row_of
from launch.inputs.prompt_paths import content_digest, files_of
from launch.inputs.records import Record
from opd.errors import DataError, OpdError
from opd.types.prompt_rows import Columns, Row

PLAIN = Columns(prompt="prompt", answer="answer")
CHAT = Columns(prompt="prompt")
RECORDS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(1, 5)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def read(path: Path, columns: Columns = PLAIN) -> tuple[Row, ...]:
    reading.cache_clear()
    return read_rows(str(path), columns)


def refusal(path: Path | str, columns: Columns = PLAIN) -> str:
    reading.cache_clear()
    with pytest.raises(OpdError) as caught:
        read_rows(str(path), columns)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # half a surrogate pair cannot be printed
    return str(caught.value)


def stored(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(records: Sequence[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def parquet(records: Sequence[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(records)), sink)
    return sink.getvalue()


def arrow(records: Sequence[dict[str, Any]]) -> bytes:
    data, sink = pa.Table.from_pylist(list(records)), io.BytesIO()
    with pyarrow.ipc.new_stream(sink, data.schema) as writer:
        writer.write_table(data)
    return sink.getvalue()


def arrow_file(records: Sequence[dict[str, Any]]) -> bytes:
    data, sink = pa.Table.from_pylist(list(records)), io.BytesIO()
    with pyarrow.ipc.new_file(sink, data.schema) as writer:
        writer.write_table(data, max_chunksize=2)
    return sink.getvalue()


def zstandard(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def lines(records: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=i % 2 == 0) + "\n" for i, record in enumerate(records)).encode()


FORMATS: dict[str, Callable[[Sequence[dict[str, Any]]], bytes]] = {
    ".jsonl": lines,
    ".ndjson": lambda r: lines(r).replace(b"\n", b"\r\n"),
    ".JSONL": lambda r: b"\xef\xbb\xbf" + lines(r).replace(b"\n", b"\n\n \n"),
    ".json": lambda r: json.dumps(list(r)).encode(),
    ".pretty.json": lambda r: b"\xef\xbb\xbf" + json.dumps(list(r), indent=2, ensure_ascii=False).encode() + b"\n",
    ".csv": table,
    ".tsv": lambda r: b"\xef\xbb\xbf" + table(r, "\t"),
    ".parquet": parquet,
    ".arrow": arrow,
    ".feather.arrow": arrow_file,
    ".jsonl.gz": lambda r: gzip.compress(lines(r)),
    ".csv.bz2": lambda r: bz2.compress(table(r)),
    ".json.xz": lambda r: lzma.compress(json.dumps(list(r)).encode()),
    ".jsonl.zst": lambda r: zstandard(lines(r)),
    ".parquet.gz": lambda r: gzip.compress(parquet(r)),
}
texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1).filter(str.strip)
rows_of_text = st.lists(st.fixed_dictionaries({"prompt": texts, "answer": texts}), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=rows_of_text)
def test_every_format_has_the_same_rows(records: list[dict[str, str]], tmp_path: Path) -> None:
    expected = [(r["prompt"], r["answer"]) for r in records]
    for ending, write in FORMATS.items():
        rows = read(stored(tmp_path / f"rows{ending}", write(records)))
        assert [(row.prompt, row.answer) for row in rows] == expected, ending


def test_content_under_the_name_of_another_format_is_the_same_rows_or_named(tmp_path: Path) -> None:
    expected = [(r["prompt"], r["answer"]) for r in RECORDS]
    for real, write in FORMATS.items():
        content, ending = write(RECORDS), Path(f"rows{real}").suffix.lower()
        marked = ending not in (".jsonl", ".ndjson", ".json", ".csv", ".tsv") and real != ".arrow"
        for name in (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow"):
            path = stored(tmp_path / f"rows{name}", content)
            if marked and name != ending:
                assert f"begins as a {ending} file does; call it rows" in refusal(path), (real, name)
            elif ending == ".json" and name in (".jsonl", ".ndjson"):
                assert "call an array rows.json" in refusal(path), (real, name)
            elif {name, ending} <= {".jsonl", ".ndjson", ".json"}:
                assert [(row.prompt, row.answer) for row in read(path)] == expected, (real, name)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PK\x03\x04\x14\0\x06\0", "is a zip archive, as Excel files are"),
        (b"\n<!DOCTYPE html>\n<html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "holds no rows"),
    ],
    ids=["zip", "page", "pointer"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_what_was_downloaded_in_place_of_rows_is_named(content: bytes, says: str, stream: bool, tmp_path: Path) -> None:
    assert says in refusal(stored(tmp_path / "p.jsonl", content), replace(PLAIN, stream=stream))


def test_a_list_that_is_no_conversation_is_shown_by_its_first_wrong_entry(tmp_path: Path) -> None:
    for value, got in {
        '["a", "b"]': "a list whose entry 1 is text",
        '[{"role": "user", "content": "x"}, {"text": "y"}]': "a list whose entry 2 is an object with ['text']",
        "[]": "an empty list",
    }.items():
        assert refusal(stored(tmp_path / "p.jsonl", f'{{"prompt": {value}}}'), CHAT).endswith(f"got {got}")


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [1.5, 2]}}}
TALK = [
    {"role": "system", "content": "Add."},
    {"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}], "name": "Ada"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "7"},
]


def test_messages_are_whole_in_every_format_that_has_objects(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    plain = [TALK[0], {"role": "user", "content": "1+1?"}, *TALK[2:]]
    columns = Columns(prompt="prompt", tools="tools", answer="extra.answer")
    records = [{"prompt": plain, "tools": [tool], "extra": {"answer": 2}}]
    Dataset.from_list(records).save_to_disk(str(tmp_path / "saved"))
    paths = [stored(tmp_path / f"rows{e}", FORMATS[e](records)) for e in (".jsonl", ".json", ".parquet", ".arrow")]
    read_alike = [read(path, columns) for path in (*paths, tmp_path / "saved")]
    assert all(rows == read_alike[0] for rows in read_alike)
    assert read_alike[0][0].prompt == tuple(plain) and read_alike[0][0].tools == (tool,)
    assert read_alike[0][0].answer == "2"
    parts = read(stored(tmp_path / "parts.jsonl", lines([{"prompt": TALK}])), CHAT)
    assert parts[0].prompt == (plain[0], plain[1] | {"name": "Ada"}, *plain[2:])


SPLITS = ("train", "dev", "test", "train-00000-of-00001", "a_test_2", "validation.part")


@given(names=st.sets(st.sampled_from([*SPLITS, "maths", "rows", "latest"]), min_size=1, max_size=4))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_folder_is_read_whole_unless_its_files_are_of_several_splits(names: set[str], tmp_path: Path) -> None:
    """`train` and `test` of a data set that was downloaded would be trained on alike."""
    folder = tmp_path / str(abs(hash(frozenset(names))))
    folder.mkdir(exist_ok=True)
    for name in names:
        stored(folder / f"{name}.jsonl", lines(RECORDS[:1]))
    stored(folder / "dataset_infos.json", "{}")
    kinds = {
        next((kind for kind in ("train", "dev", "test", "validation") if kind in n), "") for n in names - {"latest"}
    }
    if len({kind.replace("validation", "dev") for kind in kinds} - {""}) < 2:
        assert len(read(folder)) == len(names)
    else:
        said = refusal(folder)
        assert "several splits" in said
        assert len(read(Path(said.rpartition("='")[2].rstrip("'")))) == len(names), "the pattern reads all"


def test_what_stands_for_a_file_that_was_not_fetched_is_said_to(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for ending in FORMATS:
        assert "git lfs pull" in refusal(stored(tmp_path / f"rows{ending}", pointer))


ROLES = {"user": ("User", "human", " USER", "prompter"), "assistant": ("Assistant", "gpt", "AI"), "system": ("SYSTEM",)}


@pytest.mark.parametrize(("role", "written"), [(role, w) for role, ways in ROLES.items() for w in ways])
def test_a_role_in_another_spelling_is_refused_wherever_it_stands(role: str, written: str, tmp_path: Path) -> None:
    turns = [{"role": written, "content": "1"}, {"role": "user", "content": "2"}]
    said = refusal(stored(tmp_path / "rows.jsonl", lines([{"prompt": turns}])), CHAT)
    assert f"message 1 has the role {written!r}, which chat templates call {role!r}" in said


def test_columns_that_hold_a_part_of_the_prompt_and_are_not_read_are_known(tmp_path: Path) -> None:
    records = [{"prompt": "Translate.", "input": text, "images": [], "note": "x"} for text in ("", "Hallo")]
    path = stored(tmp_path / "rows.jsonl", lines(records))
    reading.cache_clear()
    assert reading(str(path), CHAT).unread == ("input",)
    assert reading(str(path), Columns(prompt="prompt", answer="input")).unread == ()


def test_folders_patterns_and_saved_splits(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    stored(tmp_path / "many" / "b.csv", table(RECORDS[2:]))
    stored(tmp_path / "many" / "a.jsonl", lines(RECORDS[:2]))
    stored(tmp_path / "many" / "README.md", "not a row")
    stored(tmp_path / "many" / ".hidden.jsonl", "{")
    expected = [r["prompt"] for r in RECORDS]
    assert [row.prompt for row in read(tmp_path / "many")] == expected
    assert [row.prompt for row in read(tmp_path / "*" / "*.*[lv]")] == expected
    assert "README.md' has the unknown ending '.md'" in refusal(tmp_path / "many" / "*")
    split = DatasetDict({"train": Dataset.from_list(RECORDS), "test": Dataset.from_list(RECORDS[:1])})
    split.save_to_disk(str(tmp_path / "splits"), num_shards={"train": 2, "test": 1})
    assert "splits ['test', 'train']; name one, such as" in refusal(tmp_path / "splits")
    assert [row.prompt for row in read(tmp_path / "splits" / "train")] == expected
    (tmp_path / "splits" / "train" / "data-00001-of-00002.arrow").unlink()
    assert "'data-00001-of-00002.arrow' is missing" in refusal(tmp_path / "splits" / "train")
    stored(tmp_path / "splits" / "test" / "state.json", "[" * 9999)
    assert "no whole saved data set" in refusal(tmp_path / "splits" / "test")
    (tmp_path / "empty").mkdir()
    assert "has no prompt files" in refusal(tmp_path / "empty")
    assert "a data set on the Hugging Face hub (ORG/NAME:CONFIG:SPLIT)" in refusal("openai/gsm8k")
    assert "does not exist" in refusal(tmp_path / "*.nothing") and "looked at" in refusal("x" * 5000)
    assert len(files_of(str(tmp_path / "many"), "k")) == 2
    assert content_digest(str(tmp_path / "many"), "k") == content_digest(str(tmp_path / "many" / "[ab].*"), "k")


def test_a_name_with_a_dot_comes_before_a_path_into_an_object(tmp_path: Path) -> None:
    record = {"prompt": "a", "r.m": "own", "r": {"m": "inner", "n": {"t": 3}, "x.y": "dotted"}}
    path = stored(tmp_path / "rows.jsonl", lines([record]))
    for column, answer in {"r.m": "own", "r.n.t": "3", "r.x.y": "dotted"}.items():
        assert read(path, Columns(prompt="prompt", answer=column))[0].answer == answer
    assert "no column 'r.q' (has ['prompt', 'r', 'r.m'])" in refusal(path, Columns(prompt="prompt", answer="r.q"))
    assert "must be text or a number, got an object" in refusal(path, Columns(prompt="prompt", answer="r"))


@pytest.mark.parametrize(
    ("number", "answer"), [("1.0", "1.0"), ("1.50", "1.50"), ("9" * 400, "9" * 400), ("-0", "-0"), ("1E5", "1E5")]
)
def test_numbers_as_answers_are_as_they_are_written(number: str, answer: str, tmp_path: Path) -> None:
    assert read(stored(tmp_path / "a.jsonl", f'{{"prompt": "x", "answer": {number}}}'))[0].answer == answer


def test_numbers_of_typed_formats_are_written_short(tmp_path: Path) -> None:
    values = {"prompt": ["a", "b"], "int": [2**60 + 1, 3], "float": [0.1, 1.0]}
    short = pa.table(values | {"short": pa.array([0.1, 2.5], type=pa.float32())})
    pq.write_table(short, tmp_path / "a.parquet")
    for column, answers in {"int": [str(2**60 + 1), "3"], "float": ["0.1", "1.0"], "short": ["0.1", "2.5"]}.items():
        rows = read(tmp_path / "a.parquet", Columns(prompt="prompt", answer=column))
        assert [row.answer for row in rows] == answers


def chat(*messages: dict[str, Any]) -> str:
    return json.dumps({"prompt": list(messages)})


ASKED = {"role": "user", "content": "x"}
REFUSED = {
    "null answer": ('{"prompt": "a", "answer": null}', r"line 2: 'answer' must be text or a number, got null"),
    "list answer": ('{"prompt": "a", "answer": ["2"]}', "got a list"),
    "object answer": ('{"prompt": "a", "answer": {"a": 1}}', "got an object"),
    "boolean answer": ('{"prompt": "a", "answer": true}', "got a boolean"),
    "huge float": ('{"prompt": "a", "answer": 1e400}', "beyond what a float can hold"),
    "huge integer": ('{"prompt": "a", "answer": ' + "1" * 5000 + "}", "a number of 5000 digits"),
    "null prompt": ('{"prompt": null, "answer": "1"}', "got null"),
    "number as prompt": ('{"prompt": 5, "answer": "1"}', "got a number"),
    "surrogate in prompt": (
        '{"prompt": "a\\ud83d", "answer": "1"}',
        r"half of a surrogate pair (\ud83d at character 2)",
    ),
    "surrogate in answer": ('{"prompt": "a", "answer": "\\udead"}', "half of a surrogate pair"),
    "NaN": ('{"prompt": "a", "answer": NaN}', "NaN is no JSON number"),
    "duplicate key": ('{"prompt": "a", "answer": "1", "answer": "2"}', "the key 'answer' is there twice"),
    "deep nesting": ('{"prompt": "a", "answer": "1", "x": ' + "[" * 9999 + "]" * 9999 + "}", "nests too deeply"),
    "two values": ('{"prompt": "a", "answer": "1"} {}', "no JSON (Extra data)"),
    "control character": ('{"prompt": "a\tb", "answer": "1"}', "no JSON (Invalid control character"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_line_that_says_nothing_clear_is_refused(case: str, tmp_path: Path) -> None:
    line, says = REFUSED[case]
    path = stored(tmp_path / "p.jsonl", '{"prompt": "fine", "answer": "1"}\n' + line + "\n")
    assert says in refusal(path) and "p.jsonl line 2" in refusal(path)
    pretty = stored(tmp_path / "p.json", '[\n{"prompt": "fine", "answer": "1"},\n' + line + "\n]")
    assert "p.json line 3" in refusal(pretty)


TALKS = {
    "null content": ((ASKED, {"role": "assistant", "content": None}, ASKED), "message 2 needs role and content"),
    "image part": (({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]},), "'image_url'"),
    "part with more": (({"role": "user", "content": [{"type": "text", "text": "a", "mark": 1}]},), "is 'text'"),
    "no parts": (({"role": "user", "content": []},), "got an empty list"),
    "number as content": (({"role": "user", "content": 5},), "got a number"),
    "role that is no text": (({"role": 7, "content": "a"},), "needs a role that is text"),
    "ShareGPT": (({"from": "human", "value": "a"},), "ShareGPT"),
    "assistant last": ((ASKED, {"role": "assistant", "content": "1"}), "prompts.drop_last_answer=true"),
    "gpt last": ((ASKED, {"role": "gpt", "content": "1"}), "ends with a turn of 'gpt'"),
    "Assistant last": ((ASKED, {"role": "Assistant", "content": "1"}), "prompts.drop_last_answer=true"),
    "model last": ((ASKED, {"role": "model", "content": "1"}), "prompts.drop_last_answer=true"),
    "calls last": ((ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}), "drop_last_answer"),
    "no text at all": (({"role": "user", "content": " "},), "without any text"),
    "surrogate": (({"role": "user", "content": "\ud83d"},), "half of a surrogate pair"),
}


@pytest.mark.parametrize("case", TALKS)
def test_a_conversation_that_cannot_be_rendered_whole_is_refused(case: str, tmp_path: Path) -> None:
    messages, says = TALKS[case]
    path = stored(tmp_path / "p.jsonl", chat(ASKED) + "\n" + chat(*messages))
    assert says in refusal(path, CHAT) and "line 2" in refusal(path, CHAT)


@given(st.lists(st.text(max_size=5), min_size=1, max_size=3), st.sampled_from([json.dumps, repr]), st.booleans())
def test_a_conversation_that_was_stored_as_text_is_refused(said: list[str], spell: Any, turned: bool) -> None:
    """As CSV files and `to_csv` have them: asked as it stands, it would be a prompt about brackets."""
    talk = [{"content": one, "role": "user"} if turned else {"role": "user", "content": one} for one in said]
    with pytest.raises(DataError, match=r"^f line 1: 'prompt' is the text of a list of messages.*prompts\.map"):
        row_of(Record("f line 1", {"prompt": f" {spell(talk)}\n"}), Columns(prompt="prompt"))
    asks = "What does [{'role': 'user'}] mean?"
    assert row_of(Record("f line 1", {"prompt": asks}), Columns(prompt="prompt")).prompt == asks


def test_a_last_answer_is_cut_where_that_was_asked_for(tmp_path: Path) -> None:
    reply = {"role": "assistant", "content": "1"}
    path = stored(tmp_path / "p.jsonl", chat(ASKED, reply, ASKED, reply) + "\n" + chat(ASKED))
    cut = Columns(prompt="prompt", drop_last_answer=True)
    assert [row.prompt for row in read(path, cut)] == [(ASKED, reply, ASKED), (ASKED,)]
    assert "no turn before" in refusal(stored(tmp_path / "q.jsonl", chat(ASKED, reply, reply)), cut)


DAMAGED = {
    "latin1.jsonl": ('{"prompt": "caf\u00e9", "answer": "1"}'.encode("latin-1"), "line 1 is not UTF-8 (byte 0xe9"),
    "commas.tsv": (b"prompt,answer\n1+1=,2\n", "separated by ','"),
    "excel.csv": (b"sep=,\nprompt,answer\n1+1=,2\n", "'sep=', which Excel writes"),
    "utf16.jsonl": (LINES.decode().encode("utf-16"), "UTF-16"),
    "utf16le.json": (LINES.decode().encode("utf-16-le"), "UTF-16"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-9], "cannot be read"),
    "flipped.jsonl.gz": (gzip.compress(LINES)[:20] + b"\xff\xff" + gzip.compress(LINES)[22:], "cannot be read"),
    "plain.jsonl.gz": (LINES, "cannot be read"),
    "cut.jsonl.bz2": (bz2.compress(LINES)[:-9], "cannot be read"),
    "cut.jsonl.xz": (lzma.compress(LINES)[:-9], "cannot be read"),
    "cut.jsonl.zst": (zstandard(LINES)[:-9], "cannot be read"),
    "cut.parquet": (parquet(RECORDS)[:-20], "cannot be read"),
    "text.parquet": (LINES, "cannot be read"),
    "cut.arrow": (arrow(RECORDS)[:100], "cannot be read"),
    "ragged.csv": (b"prompt,answer\n1,2\n3,4,5\n", "line 3 has 3 cells"),
    "open.csv": (b'prompt,answer\n"1,2\n', "line 2 is no row of a table"),
    "twice.csv": (b"prompt,answer,prompt\n1,2,3\n", "names the column 'prompt' twice"),
    "semicolon.csv": (b"prompt;answer\n1;2\n", "line 1 names one column, 'prompt;answer', so its cells seem"),
    "open.json": (b'[{"prompt": "a", "answer": "1"}', "expected ',' or ']'"),
    "more.json": (b'[{"prompt": "a", "answer": "1"}] []', "more after the end"),
    "comma.json": (b'[{"prompt": "a", "answer": "1"},]', "no JSON"),
    "nothing.json": (b"[ ]", "no rows"),
    "object.json": (b'{"data": [{"prompt": "a"}]}', "no column 'prompt' (has ['data'])"),
    "blank.jsonl": (b"\n \n", "no rows"),
    "zip.zip": (b"PK", "unknown ending '.zip'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_or_of_another_kind_is_one_sentence_with_the_file(name: str, tmp_path: Path) -> None:
    content, says = DAMAGED[name]
    assert says in (said := refusal(stored(tmp_path / name, content))) and name in said


def test_weights_and_teachers_are_what_they_should_be(tmp_path: Path) -> None:
    columns = Columns(prompt="p", weight="w", teacher="t")
    assert read(stored(tmp_path / "a.csv", "p,w,t\nx,0.5,b\n"), columns)[0].weight == 0.5
    for cell in ("nan", "inf", "-1", "1_0", "", "much"):
        assert "must be a finite number >= 0" in refusal(stored(tmp_path / "a.csv", f"p,w,t\nx,{cell},b\n"), columns)
    for value in ('"2"', "null", "true", "1e400", "[1]"):
        row = f'{{"p": "x", "w": {value}, "t": "b"}}'
        assert "must be a finite number >= 0" in refusal(stored(tmp_path / "a.jsonl", row), columns)
    for value in ("null", "5", "[]"):
        row = f'{{"p": "x", "w": 1, "t": {value}}}'
        assert "must be the name of a teacher" in refusal(stored(tmp_path / "a.jsonl", row), columns)


def test_errors_name_the_key_that_is_wrong(tmp_path: Path) -> None:
    path = stored(tmp_path / "a.jsonl", '{"prompt": "x"}')
    held_out = Columns(prompt="prompt", answer="answer", place="evaluation.prompts")
    assert "set evaluation.prompts.answer_column to one of them" in refusal(path, held_out)
    assert "evaluation.prompts.path" in refusal(tmp_path / "nothing.jsonl", held_out)
