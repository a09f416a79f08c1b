"""Prompt files as rows: JSONL, parquet, or a directory written by `datasets.save_to_disk`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from opd.errors import ConfigurationError, DataError
from opd.ports import Columns, Row


@cache
def read_rows(path: str, columns: Columns) -> tuple[Row, ...]:
    """All rows of `path`, checked; the first bad one is named by its line (counted from 1).

    Raises:
        ConfigurationError: the path does not exist or is of no known kind.
        DataError: a row is malformed, or there is none.
    """
    source = Path(path)
    if not source.exists():
        raise ConfigurationError(
            f"prompts.path {path!r} does not exist; set it to a .jsonl or .parquet file or a dataset folder"
        )
    rows = tuple(_row(record, f"{path} line {number}", columns) for number, record in _records(source))
    if not rows:
        raise DataError(f"{path} has no rows; a prompt file needs at least one")
    return rows


def _records(source: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if source.is_dir():
        from datasets import Dataset, load_from_disk

        dataset = load_from_disk(str(source))
        if not isinstance(dataset, Dataset):
            raise ConfigurationError(f"{source} holds several splits; point prompts.path at one of them")
        yield from enumerate(dataset, start=1)
    elif source.suffix == ".parquet":
        import pyarrow.parquet

        yield from enumerate(pyarrow.parquet.read_table(source).to_pylist(), start=1)
    elif source.suffix in (".jsonl", ".json"):
        yield from _json_lines(source)
    else:
        raise ConfigurationError(
            f"{source} has the unknown ending {source.suffix!r}; use .jsonl, .parquet or a dataset folder"
        )


def _json_lines(source: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with source.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{source} line {number} is no JSON ({error.msg}); correct or remove it") from error
            if not isinstance(record, dict):
                raise DataError(f"{source} line {number} is no JSON object; each line needs a field per column")
            yield number, record


def _row(record: Mapping[str, Any], where: str, columns: Columns) -> Row:
    for f in fields(columns):
        column = getattr(columns, f.name)
        if column and column not in record:
            raise DataError(
                f"{where} has no column {column!r} (has {sorted(record)}); set prompts.{f.name}_column to one of them"
            )
    teacher = str(record[columns.teacher]) if columns.teacher else ""
    if columns.teacher and not teacher:
        raise DataError(f"{where} names no teacher in {columns.teacher!r}; fill it in or clear prompts.teacher_column")
    return Row(
        prompt=_prompt(record, where, columns.prompt),
        answer=str(record[columns.answer]) if columns.answer else "",
        teacher=teacher,
        teacher_prompt=_prompt(record, where, columns.teacher_prompt) if columns.teacher_prompt else "",
        weight=_weight(record[columns.weight], where, columns.weight) if columns.weight else 1.0,
    )


def _prompt(record: Mapping[str, Any], where: str, column: str) -> str | tuple[Mapping[str, str], ...]:
    prompt = record[column]
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError(f"{where} has an empty {column}; remove the row")
        return prompt
    if (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt)
    ):
        return tuple({"role": str(m["role"]), "content": str(m["content"])} for m in prompt)
    raise DataError(f"{where}: {column!r} must be text or a list of messages with role and content")


def _weight(value: Any, where: str, column: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise DataError(f"{where}: {column!r} must be a finite number >= 0, got {value!r}; correct the row")
    return float(value)
