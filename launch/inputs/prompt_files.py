"""Prompt files as rows: every row is understood or refused with its file and line, and never rewritten."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from launch.inputs.json_records import Number
from launch.inputs.messages import kind, messages, number, text, tools
from launch.inputs.prompt_paths import files_of
from launch.inputs.records import Record, records
from launch.inputs.row_changes import Change, Test, change_of, test_of
from launch.inputs.streamed_rows import StreamedRows, check_streamed
from opd.errors import DataError
from opd.types.prompt_rows import Columns, Row

_SHOWN = 12  # column names that an error lists
_ABSENT = object()
OF_PROMPTS = ("system", "input", "context", "tools", "image", "images", "video", "videos", "audio", "audios")
"""Columns that data sets keep a part of their prompts in."""
_CONVERSATION = re.compile(r"\[\s*\{\s*['\"](?:role|content|from|value)['\"]\s*:.*\]", re.DOTALL)
"""Messages as JSON or as Python writes them, in a text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Rows of a prompt file, and how many records a filter left out, with the place of the first.

    `unread` are columns that are part of a prompt elsewhere, hold something, and are read by no setting.
    """

    rows: Sequence[Row]
    left_out: int
    first_left_out: str
    unread: tuple[str, ...] = ()


def read_rows(path: str, columns: Columns) -> Sequence[Row]:
    """All rows of `path` (see `launch.inputs.prompt_paths.files_of`), checked; the first invalid one is named.

    Raises:
        ConfigurationError: the path does not exist or is of no known kind.
        DataError: a file or a row is malformed, or there is none.
    """
    return reading(path, columns).rows


@cache
def reading(path: str, columns: Columns) -> Reading:
    """The same, with what a filter left out."""
    change, stays = change_of(columns), test_of(columns, _found)
    files = files_of(path, f"{columns.place}.path")
    found = _streamed(files, columns, change, stays) if columns.stream else _whole(files, columns, change, stays)
    if not found.rows and found.left_out:
        raise DataError(
            f"{columns.place}.filter={columns.filter} leaves out all {found.left_out} records of {path}; correct or "
            "clear it"
        )
    if not found.rows:
        raise DataError(f"{path} has no rows; a prompt file needs at least one")
    return found


def _whole(files: Sequence[Path], columns: Columns, change: Change, stays: Test) -> Reading:
    rows: list[Row] = []
    left_out, first = 0, ""
    unread: dict[str, None] = {}
    for file in files:
        for record in map(change, records(file)):
            if stays(record):
                unread |= dict.fromkeys(_unread(record, columns))
                rows.append(row_of(record, columns))
            else:
                left_out, first = left_out + 1, first or record.where
    return Reading(rows=tuple(rows), left_out=left_out, first_left_out=first, unread=tuple(unread))


def _unread(record: Record, columns: Columns) -> list[str]:
    read = (columns.prompt, columns.answer, columns.teacher, columns.teacher_prompt, columns.weight, columns.tools)
    known = {column.partition(".")[0] for column in read if column}
    return [name for name in OF_PROMPTS if record.values.get(name) and name not in known]


def _streamed(files: Sequence[Path], columns: Columns, change: Change, stays: Test) -> Reading:
    check_streamed(files, f"{columns.place}.stream")
    rows = StreamedRows(
        files, keep=lambda record: stays(change(record)), make=lambda record: row_of(change(record), columns)
    )
    return Reading(rows=rows, left_out=rows.left_out, first_left_out=rows.first_left_out)


def _found(record: Record, column: str) -> Any:
    """Value of a column that a filter names."""
    value = _find(record.values, column)
    if value is _ABSENT:
        raise DataError(f"{record.where} has no column {column!r}{_has(record)}; correct the filter")
    return value


def _has(record: Record) -> str:
    names = sorted(map(str, record.values))
    return f" (has {names[:_SHOWN]}{' and more' if len(names) > _SHOWN else ''})"


def row_of(record: Record, columns: Columns) -> Row:
    """A record as a row, checked."""
    plain = Row(prompt=_prompt(record, columns, "prompt", columns.prompt), answer="", where=record.where)
    more: dict[str, Any] = {}
    if columns.answer:
        more["answer"] = _answer(*_cell(record, columns, "answer", columns.answer))
    if columns.teacher:
        more["teacher"] = _teacher(*_cell(record, columns, "teacher", columns.teacher), columns)
    if columns.teacher_prompt:
        more["teacher_prompt"] = _prompt(record, columns, "teacher_prompt", columns.teacher_prompt)
    if columns.weight:
        more["weight"] = _weight(*_cell(record, columns, "weight", columns.weight), record.untyped)
    if columns.tools:
        value, where = _cell(record, columns, "tools", columns.tools)
        more["tools"] = tools(value, where, sparse=record.sparse)
    return replace(plain, **more) if more else plain


def _cell(record: Record, columns: Columns, part: str, column: str) -> tuple[Any, str]:
    """Value of a column, and its name in error messages."""
    value = _find(record.values, column)
    if value is _ABSENT:
        raise DataError(
            f"{record.where} has no column {column!r}{_has(record)}; set {columns.place}.{part}_column to one of them, "
            "or correct the row if others have it"
        )
    return value, f"{record.where}: {column!r}"


def _find(values: Mapping[str, Any], column: str) -> Any:
    """A column by its name, or by a path of names with dots between them; a name that has dots itself comes first."""
    if column in values:
        return values[column]
    cut = column.rfind(".")
    while cut > 0:
        inner = values.get(column[:cut])
        if isinstance(inner, Mapping) and (found := _find(inner, column[cut + 1 :])) is not _ABSENT:
            return found
        cut = column.rfind(".", 0, cut)
    return _ABSENT


def _prompt(record: Record, columns: Columns, part: str, column: str) -> str | tuple[Mapping[str, Any], ...]:
    value, where = _cell(record, columns, part, column)
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{record.where} has an empty {column}; remove the row")
        if _CONVERSATION.fullmatch(value.strip()):
            raise DataError(
                f"{where} is the text of a list of messages, which would be asked as it is spelled; store the list "
                f"itself (JSON lines, parquet), or make one with {columns.place}.map"
            )
        return text(value, where)
    if not isinstance(value, list):
        raise DataError(f"{where} must be text or a list of messages with role and content, got {kind(value)}")
    key = f"{columns.place}.drop_last_answer"
    return messages(value, where, sparse=record.sparse, drop_last_answer=columns.drop_last_answer, key=key)


def _answer(value: Any, where: str) -> str:
    match value:
        case str():
            return text(value, where)
        case bool():
            pass  # an int for Python, but neither a text nor a number for people
        case Number():
            number(value, where)
            return value.text
        case int() | float():
            return repr(number(value, where))
    raise DataError(
        f"{where} must be text or a number, got {kind(value)}; correct or remove the row (a value inside an object is "
        "named with a dot, such as reward_model.ground_truth)"
    )


def _teacher(value: Any, where: str, columns: Columns) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where} must be the name of a teacher, got {kind(value)}; correct the row")
    if not value.strip():
        line = where.partition(": ")[0]
        raise DataError(
            f"{line} names no teacher in {columns.teacher!r}; fill it in or clear {columns.place}.teacher_column"
        )
    return text(value, where)


def _weight(value: Any, where: str, untyped: bool) -> float:
    wrong = f"{where} must be a finite number >= 0, got "
    if untyped and isinstance(value, str) and value.isascii() and "_" not in value:
        value = Number(value)
    if isinstance(value, bool) or not isinstance(value, Number | int | float):
        raise DataError(f"{wrong}{kind(value)}; correct the row")
    try:
        weight = float(value.text if isinstance(value, Number) else value)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{wrong}{getattr(value, 'text', value)!r:.80}; correct the row") from error
    if not 0 <= weight < float("inf"):
        raise DataError(f"{wrong}{getattr(value, 'text', value)}; correct the row")
    return weight
