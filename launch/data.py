"""Prompt files as rows: JSONL, parquet, or a directory written by `datasets.save_to_disk`."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from opd.errors import ConfigurationError, DataError
from opd.ports import Row


@cache
def read_rows(path: str, prompt_column: str, answer_column: str) -> tuple[Row, ...]:
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
    rows = tuple(
        _row(record, f"{path} line {number}", prompt_column, answer_column) for number, record in _records(source)
    )
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


def _row(record: Mapping[str, Any], where: str, prompt_column: str, answer_column: str) -> Row:
    for column in filter(None, (prompt_column, answer_column)):
        if column not in record:
            raise DataError(
                f"{where} has no column {column!r} (has {sorted(record)}); set prompts.prompt_column and "
                "prompts.answer_column"
            )
    prompt = record[prompt_column]
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError(f"{where} has an empty prompt; remove the row")
        checked: str | tuple[Mapping[str, str], ...] = prompt
    elif (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt)
    ):
        checked = tuple({"role": str(m["role"]), "content": str(m["content"])} for m in prompt)
    else:
        raise DataError(f"{where}: {prompt_column!r} must be text or a list of messages with role and content")
    return Row(prompt=checked, answer=str(record[answer_column]) if answer_column else "")
