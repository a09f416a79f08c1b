"""Strict JSON: an ambiguous text is refused, and numbers keep their own spelling."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from opd.errors import DataError


@dataclass(frozen=True, slots=True)
class Number:
    """A JSON number as it is written. Example: `Number("1.50")`."""

    text: str


class _Ambiguous(ValueError):
    """Error about text that a lenient reader accepts although it is ambiguous or no JSON."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Ambiguous(f"the key {twice!r} is there twice")
    return values


def _constant(name: str) -> Any:
    raise _Ambiguous(f"{name} is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=Number, parse_int=Number, parse_constant=_constant)
_SPACE = re.compile(r"[ \t\n\r]*")


def parse(text: str, where: str) -> Any:
    """Value of `text`, its numbers as `Number`. Raises `DataError` with `where` if it is not exactly one."""
    value, end = _value(text, _end_of_space(text, 0), where)
    if _end_of_space(text, end) < len(text):
        raise DataError(f"{where} is no JSON (Extra data); correct or remove it")
    return value


def parse_array(text: str, name: str) -> Iterator[tuple[str, Any]]:
    """Items of the array in `text`, each with the line on which it begins."""
    place = _end_of_space(text, _end_of_space(text, 0) + 1)
    line, seen, more = 1, 0, text[place : place + 1] != "]"
    while more:
        line, seen = line + text.count("\n", seen, place), place
        value, place = _value(text, place, f"{name} line {line}")
        yield f"{name} line {line}", value
        place = _end_of_space(text, place)
        more = text[place : place + 1] == ","
        if not more and text[place : place + 1] != "]":
            line += text.count("\n", seen, place)
            raise DataError(f"{name} line {line} is no JSON (expected ',' or ']' after an item); correct it")
        place = _end_of_space(text, place + 1) if more else place
    if _end_of_space(text, place + 1) < len(text):
        raise DataError(f"{name} is no JSON (there is more after the end of its array); correct it")


def _value(text: str, place: int, where: str) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, place)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is no JSON ({error.msg}); correct or remove it") from error
    except _Ambiguous as error:
        raise DataError(f"{where} is no plain JSON ({error}); correct or remove it") from error
    except RecursionError as error:
        raise DataError(f"{where} nests too deeply to be read; correct or remove it") from error


def _end_of_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found is not None  # it matches the empty text, too
    return found.end()
