"""Prompts as Python objects: what a library loads from a file gives the rows of that file, or one sentence."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings

import opd
from launch.cli.api.inputs import prompts_file
from launch.inputs.prompt_files import read_rows
from opd.errors import ConfigurationError, DataError, OpdError
from opd.types.prompt_rows import Columns, Row

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(str.strip)
TURN = st.fixed_dictionaries({"role": st.just("user"), "content": TEXT})
PLAIN = st.fixed_dictionaries({"prompt": TEXT, "answer": TEXT, "level": st.integers(-(2**40), 2**40)})
CHAT = st.fixed_dictionaries({"prompt": st.lists(TURN, min_size=1, max_size=3), "answer": TEXT})
ROWS = st.one_of(st.lists(PLAIN, min_size=1, max_size=4), st.lists(CHAT, min_size=1, max_size=4))

Records = Sequence[Mapping[str, Any]]


def lines(rows: Records, folder: Path) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def array(rows: Records, folder: Path) -> Path:
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def parquet(rows: Records, folder: Path) -> Path:
    pq.write_table(pa.Table.from_pylist([*rows]), folder / "rows.parquet")
    return folder / "rows.parquet"


def saved(rows: Records, folder: Path) -> Path:
    datasets.Dataset.from_list([*rows]).save_to_disk(str(folder / "saved"))
    return folder / "saved"


# What writes the file, and what a program that has read it holds.
KINDS: Mapping[str, tuple[Callable[[Records, Path], Path], Callable[[Path], Iterable[Any]]]] = {
    "list of JSON lines": (lines, lambda path: [json.loads(line) for line in path.open()]),
    "tuple": (lines, lambda path: tuple(json.loads(line) for line in path.open())),
    "generator": (lines, lambda path: (json.loads(line) for line in path.open())),
    "values of a mapping": (lines, lambda path: dict(enumerate(map(json.loads, path.open()))).values()),
    "JSON array": (array, lambda path: json.loads(path.read_text())),
    "frame": (parquet, pd.read_parquet),
    "Arrow table": (parquet, pq.read_table),
    "batch": (parquet, lambda path: pq.read_table(path).combine_chunks().to_batches()[0]),
    "data set": (saved, lambda path: datasets.load_from_disk(str(path))),
    "iterable data set": (saved, lambda path: datasets.load_from_disk(str(path)).to_iterable_dataset()),
}


def rows_of(path: str | Path, columns: Mapping[str, str]) -> Sequence[Row]:
    return read_rows(str(path), Columns(prompt=columns["prompt_column"], answer=columns.get("answer_column", "")))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_read_from_a_file_gives_the_rows_of_the_file(kind: str) -> None:
    write, read = KINDS[kind]

    @settings(max_examples=8, deadline=None)
    @given(ROWS)
    def holds(rows: Records) -> None:
        with TemporaryDirectory() as folder:
            file = write(rows, Path(folder))
            path, columns, count = prompts_file(read(file), Path(folder), "prompts")
            assert columns == {"prompt_column": "prompt", "answer_column": "answer"} and count == len(rows)
            assert rows_of(path, columns) == rows_of(file, columns)

    holds()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(TEXT, st.lists(TURN, min_size=1, max_size=2)), min_size=1, max_size=4))
def test_texts_and_conversations_are_rows_without_a_name(records: list[Any]) -> None:
    for given_as in (list, tuple, iter, lambda found: pd.Series(found, dtype=object)):
        with TemporaryDirectory() as folder:
            path, columns, _ = prompts_file(given_as(records), Path(folder), "prompts")
            found = [row.prompt for row in rows_of(path, columns)]
        assert [one if isinstance(one, str) else [*one] for one in found] == records


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.text(max_size=3), st.integers()), inner)
    ),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None)
@given(st.one_of(JSON, st.lists(st.one_of(JSON, PLAIN, TEXT), max_size=3), st.sets(TEXT)))
def test_anything_else_is_rows_as_given_or_one_sentence(given_as: Any) -> None:
    """No exception but ours, no row that was not given."""
    with TemporaryDirectory() as folder:
        try:
            path, columns, count = prompts_file(given_as, Path(folder), "prompts")
        except ConfigurationError as error:
            refused = str(error)
        else:
            refused = ""
        if refused:
            assert refused.startswith("prompts") and "\n" not in refused.strip()
            return
        assert count == len(given_as)
        read = [json.loads(line) for line in path.read_text().split("\n") if line]
        assert read == [{"prompt": r} if isinstance(r, str | list) else r for r in json.loads(json.dumps([*given_as]))]
        try:
            rows = rows_of(path, {"prompt_column": "prompt", **columns})
        except (ConfigurationError, DataError):
            return
        assert len(rows) == count


@pytest.mark.parametrize(
    ("given_as", "sentence"),
    [
        (datasets.DatasetDict({"train": datasets.Dataset.from_list([{"prompt": "a"}])}), r"several splits \(train\)"),
        ({"a", "b"}, r"an order that is the same every time, got an object of class set; give a list"),
        (b"prompts", r"got an object of class bytes; give a list"),
        (7, r"needs a file, a list of prompts or a source of prompts, got 7"),
        (pd.DataFrame([["a", "b"]], columns=["prompt", "prompt"]), r"two columns of one name"),
        (pd.DataFrame({"prompt": ["a", "b"], "answer": [1.0, None]}), r"prompts\[1\] cannot be written as JSON"),
        ([{"prompt": "a", 3: "b"}], r"prompts\[0\] cannot be written as JSON \(the key 3 is no text\)"),
        (["\ud800"], r"prompts\[0\] cannot be written as JSON"),
        (["a", np.array(["b"])], r"prompts\[1\] needs a text, a list of messages"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(given_as: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        prompts_file(given_as, tmp_path, "prompts")


def test_numbers_of_tables_are_numbers(tmp_path: Path) -> None:
    frame = pd.DataFrame({"prompt": ["a"], "answer": ["b"], "weight": np.array([0.5], dtype=np.float32)})
    path, _, _ = prompts_file(frame, tmp_path, "prompts")
    assert json.loads(path.read_text()) == {"prompt": "a", "answer": "b", "weight": 0.5}


def test_a_mapping_is_settings_of_prompts_and_evaluation(tmp_path: Path) -> None:
    made = opd.plan(
        experiment="shop", tracker=["none"], output_dir=tmp_path, prompts={"prompts_per_step": 5},
        evaluation={"every": 7, "prompts": {"prompts_per_step": 9}},
    )  # fmt: skip
    config: Any = made.config
    assert (config.prompts.prompts_per_step, config.evaluation.every) == (5, 7)
    assert config.evaluation.prompts.prompts_per_step == 9
    with pytest.raises(OpdError, match="evry"):
        opd.plan(experiment="shop", tracker="none", output_dir=tmp_path, evaluation={"evry": 7})
