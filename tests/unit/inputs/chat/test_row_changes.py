"""Filters and maps: what stays is what the expression says, every record is counted, and no code is run unasked."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as trials
from hypothesis import strategies as st

from launch.config.run_config import run_config
from launch.inputs.prompt_files import read_rows, reading
from launch.inputs.row_changes import code_digest
from launch.plan.plan import make_plan
from opd.errors import ConfigurationError, DataError, OpdError
from opd.prompts.row_filter import parsed
from opd.types.prompt_rows import Columns

MODULE = """
def shorten(record):
    return {**record, "prompt": record["prompt"][:3], "extra": 1}

def long_enough(record):
    return len(record["prompt"]) > 2

def number(record): return 1
def fails(record): return record["nope"]
def other(record): return {"prompt": 5}
constant = 3
"""


@pytest.fixture(scope="module", autouse=True)
def functions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_rows.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


def stored(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading.cache_clear()
    return str(path)


def columns(**fields: str) -> Columns:
    return Columns(**({"prompt": "prompt"} | fields))


records = st.fixed_dictionaries(
    {
        "prompt": st.text("ab c", min_size=1).filter(str.strip),
        "level": st.integers(-3, 3),
        "from": st.sampled_from(["web", "book"]),
        "meta": st.fixed_dictionaries({"ok": st.booleans(), "n": st.none() | st.integers(0, 2)}),
    }
)
EXPRESSIONS = {
    "len(prompt) < 3": lambda r: len(r["prompt"]) < 3,
    "level >= -1 and not meta.ok": lambda r: r["level"] >= -1 and not r["meta"]["ok"],
    "column('from') == 'web' or 'a' in prompt": lambda r: r["from"] == "web" or "a" in r["prompt"],
    "-1 < level <= 2": lambda r: -1 < r["level"] <= 2,
    "meta.n is None or meta.n in [0, 2]": lambda r: r["meta"]["n"] in (None, 0, 2),
    "meta.n != 1 and startswith(lower(prompt), 'a')": lambda r: r["meta"]["n"] != 1 and r["prompt"].startswith("a"),
}


@trials(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(records, min_size=1, max_size=8), st.sampled_from(sorted(EXPRESSIONS)))
def test_what_stays_is_what_the_expression_says_in_the_order_of_the_file(
    tmp_path: Path, rows: list[dict[str, Any]], expression: str
) -> None:
    path = stored(tmp_path / "rows.jsonl", rows)
    kept = [i for i, row in enumerate(rows) if EXPRESSIONS[expression](row)]
    if not kept:
        with pytest.raises(DataError, match=f"leaves out all {len(rows)} records"):
            read_rows(path, columns(filter=expression))
        return
    found = reading(path, columns(filter=expression))
    whole = read_rows(path, columns())
    assert found.rows == tuple(whole[i] for i in kept)
    assert [row.where for row in found.rows] == [whole[i].where for i in kept]
    assert found.left_out + len(found.rows) == len(rows)
    left = sorted(set(range(len(rows))) - set(kept))
    assert found.first_left_out == (whole[left[0]].where if left else "")


def test_a_map_makes_the_records_that_columns_and_filter_see(tmp_path: Path) -> None:
    path = stored(tmp_path / "rows.jsonl", [{"prompt": "abcdef"}, {"prompt": "ab"}])
    mapped = columns(map="own_rows:shorten", filter="len(prompt) == 3", answer="extra")
    assert [(row.prompt, row.answer) for row in read_rows(path, mapped)] == [("abc", "1")]
    assert [row.prompt for row in read_rows(path, columns(filter="own_rows:long_enough"))] == ["abcdef"]
    (tmp_path / "n.jsonl").write_text('{"prompt": "abcd", "answer": 1.50}\n')
    (row,) = read_rows(str(tmp_path / "n.jsonl"), columns(map="own_rows:shorten", answer="answer"))
    assert row.answer == "1.50", "what a map leaves as it is stays as it was written"


REFUSED = {
    "prompt": r"line 1: prompts.filter=prompt must say true or false",
    "len(prompt) < 'a'": r"line 1: prompts.filter=.* failed \(TypeError",
    "nope == 1": r"line 1 has no column 'nope' \(has \['prompt'\]\); correct the filter",
    "own_rows:number": "line 1: prompts.filter=own_rows:number must say true or false, but said a int",
    "own_rows:fails": r"line 1: prompts.filter=own_rows:fails failed \(KeyError: 'nope'\)",
}


@pytest.mark.parametrize("wanted", REFUSED)
def test_a_filter_that_does_not_fit_is_named_with_its_row(wanted: str, tmp_path: Path) -> None:
    path = stored(tmp_path / "rows.jsonl", [{"prompt": "abc"}])
    with pytest.raises(DataError, match=REFUSED[wanted]) as caught:
        read_rows(path, columns(filter=wanted))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(path)
    for name, says in (("number", "must give a record"), ("other", "must be text or a list"), ("fails", "failed")):
        with pytest.raises(DataError, match=says):
            read_rows(path, columns(map=f"own_rows:{name}"))
    for name in ("own_rows:nope", "no_such_module:f", "own_rows:constant", "plain"):
        with pytest.raises(ConfigurationError, match=r"^prompts\.map="):
            read_rows(path, columns(map=name))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "prompt.__class__()",
        "[x for x in prompt]",
        "(lambda: 1)()",
        "len(*prompt)",
        "f'{prompt}'",
        "prompt[0]",
        "2 ** 99999",
        "'a' * 99999999",
        "open('x')",
        "len(x=1)",
        "x if y else z",
        "(x := 1)",
        "1 +",
        "",
        "not " * 60 + "x",
        "b'x'",
    ],
)
def test_code_is_no_filter(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^prompts\.filter"):
        parsed(text, "prompts.filter")


@given(st.text(max_size=30))
def test_any_text_is_a_filter_or_refused(text: str) -> None:
    with suppress(ConfigurationError):  # any other error is one too many
        parsed(text, "prompts.filter")


def plan(path: str, *more: str) -> Any:
    rows = ["experiment=shop", "prompts=dataset", f"prompts.path={path}", "prompts.task=shop", *more]
    return make_plan(run_config(rows))


def refused(*more: str, kind: type[OpdError] = ConfigurationError) -> str:
    with pytest.raises(kind) as caught:
        plan(*more)
    return str(caught.value)


def test_a_plan_counts_what_is_kept_and_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": f"has {i} ; Mon buys 1 ?", "level": i} for i in range(6)]
    found = plan(stored(tmp_path / "rows.jsonl", rows), "prompts.filter=level < 4")
    assert any("prompts.filter keeps 4 of 6 records and leaves 2 out (first: " in note for note in found.remarks)
    assert found.prompts["prompts"] == "4 rows"


def test_a_function_that_a_file_names_needs_permission(tmp_path: Path) -> None:
    path = stored(tmp_path / "rows.jsonl", [{"prompt": "has 3 ?"}])
    assert plan(path, "prompts.map=own_rows:shorten").prompts["first prompt"].endswith("has")
    conf = tmp_path / "conf" / "experiment"
    conf.mkdir(parents=True)
    (conf / "mine.yaml").write_text("# @package _global_\nprompts:\n  map: own_rows:shorten\n")
    rows = ["prompts=dataset", f"prompts.path={path}", "prompts.task=shop", f"conf={tmp_path / 'conf'}"]
    with pytest.raises(ConfigurationError, match=r"prompts\.map=own_rows:shorten would run code of 'own_rows'"):
        run_config([*rows, "experiment=mine"])
    assert run_config([*rows, "experiment=mine", "allow_targets=[own_rows]"]).prompts.map == "own_rows:shorten"


def test_another_function_is_another_input_of_a_checkpoint() -> None:
    digests = {code_digest(f"own_rows:{name}", "prompts.map") for name in ("shorten", "other")}
    assert len(digests) == 2
