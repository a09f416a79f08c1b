"""Maps and filters of records, before columns are read from them."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from launch.inputs.messages import kind, plain
from launch.inputs.records import Record
from opd.errors import ConfigurationError, DataError
from opd.prompts.row_filter import parsed, value
from opd.settings.own_modules import IMPORTED_FROM, own_module
from opd.types.prompt_rows import Columns

FUNCTION = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)")
Change = Callable[[Record], Record]
Test = Callable[[Record], bool]
Find = Callable[[Record, str], Any]


def function_of(name: str, place: str) -> Callable[[Mapping[str, Any]], Any]:
    """The function `module:function`. Raises `ConfigurationError` if there is none."""
    found = FUNCTION.fullmatch(name)
    if not found:
        raise ConfigurationError(f"{place}={name!r} names no function; write module:function")
    try:
        part = getattr(own_module(found[1]), found[2])
    except Exception as error:  # a user's module may raise anything
        raise ConfigurationError(
            f"{place}={name} cannot be imported ({type(error).__name__}: {_line(error)}); {IMPORTED_FROM}"
        ) from error
    if not callable(part):
        raise ConfigurationError(f"{place}={name} is no function, but {kind(part)}; name another")
    return part


def code_digest(name: str, place: str) -> str:
    """xxh3-128 (hex) over a function's name and its module's source."""
    function_of(name, place)
    file = own_module(name.partition(":")[0]).__file__
    source = Path(file).read_bytes() if file else b""
    return xxhash.xxh3_128(name.encode() + b";" + source).hexdigest()


def change_of(columns: Columns) -> Change:
    """The map of `columns`, which gives a record for each; what it leaves as it is stays as it was written."""
    if not columns.map:
        return lambda record: record
    place = f"{columns.place}.map"
    function = function_of(columns.map, place)

    def change(record: Record) -> Record:
        given = plain(record.values, record.where, sparse=record.sparse)
        made = _called(function, dict(given), record, f"{place}={columns.map}")
        if not isinstance(made, Mapping) or not all(isinstance(key, str) for key in made):
            raise DataError(
                f"{record.where}: {place}={columns.map} must give a record (a mapping), but gave {kind(made)}; "
                f"records are left out by {columns.place}.filter"
            )
        kept = {k: record.values[k] if k in given and v is given[k] else v for k, v in made.items()}
        return replace(record, values=kept)

    return change


def test_of(columns: Columns, find: Find) -> Test:
    """The filter of `columns`: whether a record stays. `find` gives the value of a column, or names what is missing."""
    if not columns.filter:
        return lambda _: True
    place = f"{columns.place}.filter"
    if FUNCTION.fullmatch(columns.filter):
        function = function_of(columns.filter, place)

        def judge(record: Record) -> Any:
            return function(plain(record.values, record.where, sparse=record.sparse))

    else:
        expression = parsed(columns.filter, place)

        def judge(record: Record) -> Any:
            return value(expression, lambda name: plain(find(record, name), record.where, sparse=record.sparse))

    def test(record: Record) -> bool:
        said = _called(judge, record, record, f"{place}={columns.filter}")
        if not isinstance(said, bool):
            raise DataError(
                f"{record.where}: {place}={columns.filter} must say true or false, but said {kind(said)}; compare it"
            )
        return said

    return test


def _called(function: Callable[[Any], Any], given: Any, record: Record, name: str) -> Any:
    try:
        return function(given)
    except (DataError, ConfigurationError):
        raise
    except Exception as error:  # a user's function may raise anything
        raise DataError(
            f"{record.where}: {name} failed ({type(error).__name__}: {_line(error)}); correct it or the row"
        ) from error


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
