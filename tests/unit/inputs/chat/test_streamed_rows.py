"""Rows that stay in their files are the same rows, in the same steps, from any step on; memory holds their places."""

import json
import os
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as trials
from hypothesis import strategies as st

from launch.config.run_config import run_config
from launch.inputs.prompt_files import read_rows, reading
from launch.plan.plan import make_plan
from opd.errors import ConfigurationError, DataError
from opd.ports import Sources
from opd.prompts.dataset import DatasetPrompts
from opd.types.prompt_rows import Columns
from tests.unit.loop.test_prompts import Letters

PLAIN, STREAM = Columns(prompt="prompt", answer="answer"), Columns(prompt="prompt", answer="answer", stream=True)
texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1).filter(str.strip)
lines = st.lists(
    st.tuples(texts, st.integers(-9, 9), st.sampled_from(["\n", "\r\n", "\n \n", "\r"])), min_size=1, max_size=9
)


def stored(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    reading.cache_clear()
    return str(path)


def written(rows: Sequence[tuple[str, int, str]], bom: bool) -> bytes:
    body = "".join(json.dumps({"prompt": p, "answer": a}, ensure_ascii=False) + end for p, a, end in rows)
    return b"\xef\xbb\xbf" * bom + body.encode()


def steps_of(path: str, first: int, last: int, **fields: Any) -> list[list[tuple[str, list[int], str]]]:
    """What steps have for a run that has just started, or resumed."""
    reading.cache_clear()
    source = DatasetPrompts(path=path, answer_column="answer", max_tokens=10**6, **fields)
    sources = Sources(tokenizer=Letters(), rows=read_rows)
    return [[(p.id, p.student_ids.tolist(), p.answer) for p in source(step, sources)] for step in range(first, last)]


@trials(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(lines, min_size=1, max_size=3), st.booleans())
def test_streamed_rows_are_the_rows(tmp_path: Path, files: list[list[Any]], bom: bool) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    for i, rows in enumerate(files):
        stored(tmp_path / f"{i}.jsonl", written(rows, bom))
    whole, streamed = read_rows(str(tmp_path), PLAIN), read_rows(str(tmp_path), STREAM)
    assert len(streamed) == len(whole) and tuple(streamed) == whole
    assert [row.where for row in streamed] == [row.where for row in whole]
    assert streamed[1:] == whole[1:] and streamed[-1] == whole[-1]


@trials(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(lines, st.integers(1, 4), st.integers(0, 5), st.integers(0, 3), st.booleans())
def test_a_run_that_goes_on_reads_what_an_uninterrupted_one_does(
    tmp_path: Path, rows: list[Any], count: int, stopped: int, seed: int, shuffle: bool
) -> None:
    path = stored(tmp_path / "rows.jsonl", written(rows, bom=False))
    fields = {"prompts_per_step": count, "seed": seed, "shuffle": shuffle}
    whole = steps_of(path, 0, stopped + 3, stream=True, **fields)
    assert whole == steps_of(path, 0, stopped, stream=True, **fields) + steps_of(
        path, stopped, stopped + 3, stream=True, **fields
    )
    assert whole == steps_of(path, 0, stopped + 3, **fields), "and as one that holds the file in memory"


def test_memory_holds_the_places_of_rows_and_not_the_rows(tmp_path: Path) -> None:
    count, size = 4_000, 4_000
    row = json.dumps({"prompt": "x" * size, "answer": 1}) + "\n"
    path = stored(tmp_path / "large.jsonl", (row * count).encode())
    tracemalloc.start()
    try:
        rows = read_rows(path, STREAM)
        assert len(rows) == count and sum(len(str(r.prompt)) for r in rows) == count * size
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < count * size / 10, f"{peak} bytes for a file of {count * size}"


def test_filters_hold_and_every_row_is_checked_when_the_index_is_made(tmp_path: Path) -> None:
    path = stored(tmp_path / "rows.jsonl", b'{"prompt": "a", "answer": 1}\n{"prompt": "bb", "answer": 2}\n')
    found = reading(path, Columns(prompt="prompt", filter="len(prompt) > 1", stream=True))
    assert [row.prompt for row in found.rows] == ["bb"]
    assert (found.left_out, found.first_left_out) == (1, f"{path} line 1")
    late = stored(tmp_path / "late.jsonl", b'{"prompt": "a"}\n' * 50 + b'{"prompt": ""}\n')
    with pytest.raises(DataError, match=r"late\.jsonl line 51 has an empty prompt"):
        read_rows(late, Columns(prompt="prompt", stream=True))


def test_a_file_that_changes_under_a_run_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path / "rows.jsonl", b'{"prompt": "a"}\n')
    rows = read_rows(path, Columns(prompt="prompt", stream=True))
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match=r"rows\.jsonl was changed while the run reads it"):
        rows[0]
    Path(path).unlink()
    with pytest.raises(DataError, match="is gone"):
        rows[0]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv", "rows.json", "rows.parquet"])
def test_other_files_are_refused_before_they_are_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"prompts\.stream=true reads JSON lines"):
        read_rows(stored(tmp_path / name, b"x"), STREAM)
    with pytest.raises(ConfigurationError, match=r"clear prompts\.teacher_column"):
        DatasetPrompts(path="x", prompts_per_step=1, stream=True, teacher_column="who")


def test_a_plan_says_that_rows_stay_in_their_files(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"prompt": f"has {i} ; Mon buys 1 ?"}) + "\n" for i in range(1, 8))
    path = stored(tmp_path / "rows.jsonl", rows.encode())
    found = make_plan(
        run_config(
            ["experiment=shop", "prompts=dataset", f"prompts.path={path}", "prompts.task=shop", "prompts.stream=true"]
        )
    )
    assert any("prompts: 7 rows stay in their files; the first 7 stand for all" in note for note in found.remarks)
    assert found.prompts["first prompt"].startswith("<bos> has 1")
